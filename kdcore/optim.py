"""The optimizer that a spec names, and the moving average of a network's weights."""

import inspect
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from kdcore.spec import AdamW, Optimizer

Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])


def _uncompiled(kind: Kind) -> Kind:
    """Return PyTorch's optimizer without the wrappers that exclude it from `torch.compile`.

    Their first call imports the compiler, which takes longer than torch itself; nothing is compiled here.
    """
    wrapped = ("add_param_group", "zero_grad", "step", "state_dict", "load_state_dict")
    written = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    plain = type(kind.__name__, (kind,), {**written, "step": torch.no_grad()(written["step"])})
    return cast(Kind, plain)


_AdamW, _Sgd = _uncompiled(torch.optim.AdamW), _uncompiled(torch.optim.SGD)


def optimizer_for(spec: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer. Weight decay applies to every parameter, also batch norm's, as in the published recipes."""
    if isinstance(spec, AdamW):
        return _AdamW(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    return _Sgd(parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov)


class Average:
    """An exponential moving average of a network's weights (Polyak & Juditsky 1992).

    Parameters and running statistics: average ← decay · average + (1 - decay) · value. Counters are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        for name, value in network.state_dict().items():
            average = self.state[name]
            if average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)
