"""What makes a step of the gradients: the learning rate, PyTorch's optimizers, and the average of the weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from kdcore.spec import AdamW, Multistep, Optimizer, Schedule


def learning_rate(base: float, schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate at `step` of the stage, counted from 0.

    During the warm-up the rate rises linearly and reaches the base at the warm-up's last step. Milestones apply from
    the start of their epoch; the cosine starts where the warm-up ends.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / math.ceil(warmup)
    if isinstance(schedule, Multistep):
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones or ())
        return base * schedule.gamma**passed
    done = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
    return base * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * done)) / 2)


Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])


def _uncompiled(kind: Kind) -> Kind:
    """PyTorch's optimizer without the wrappers that keep `torch.compile` out of it.

    Their first call imports the compiler, which takes longer than torch itself; nothing is compiled here.
    """
    wrapped = ("add_param_group", "zero_grad", "step", "state_dict", "load_state_dict")
    written = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    plain = type(kind.__name__, (kind,), {**written, "step": torch.no_grad()(written["step"])})
    return cast(Kind, plain)


_AdamW, _Sgd = _uncompiled(torch.optim.AdamW), _uncompiled(torch.optim.SGD)


def optimizer_for(
    spec: Optimizer, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], captured: bool = False
) -> torch.optim.Optimizer:
    """Return an optimizer of parameters, or of groups of them in PyTorch's form.

    Weight decay applies to every parameter, batch norm's too, as in the recipes behind the field's tables. If its steps
    are `captured` in a graph, it is the fused one, which reads the learning rate from a tensor on the device."""
    fused = captured or None
    optimizer: torch.optim.Optimizer
    if isinstance(spec, AdamW):
        decay, betas = spec.weight_decay, spec.betas
        optimizer = _AdamW(parameters, spec.lr, betas, weight_decay=decay, fused=fused, capturable=captured)
    else:
        momentum, decay, nesterov = spec.momentum, spec.weight_decay, spec.nesterov
        optimizer = _Sgd(parameters, spec.lr, momentum, weight_decay=decay, nesterov=nesterov, fused=fused)
    for group in optimizer.param_groups if captured else ():
        device = group["params"][0].device if group["params"] else None
        group["lr"] = torch.tensor(spec.lr, dtype=torch.float32, device=device)
    return optimizer


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group of parameters; where it is a tensor, in place, so that a graph reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class Average:
    """An exponential moving average of a network's weights (Polyak & Juditsky 1992).

    Parameters and running statistics: average ← decay · average + (1 - decay) · value. Counters are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.begin(network)

    def begin(self, network: nn.Module) -> None:
        """Begin with the values that the network has now."""
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        for name, value in network.state_dict().items():
            average = self.state[name]
            if average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)
