"""A network's names and shapes, without its memory and without the time that initialising takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kdcore.models.networks import build

RANDOM = (torch.Tensor.normal_, torch.Tensor.uniform_)


def skeleton(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """As `models.build`, but its large tensors hold nothing: ask for shapes and counts only."""
    try:
        with _NothingInside():
            return build(name, num_classes, channels)
    except (NotImplementedError, RuntimeError):  # A builder computed with a tensor that has nothing inside.
        return build(name, num_classes, channels)


class _NothingInside(TorchFunctionMode):
    """Layers allocate by `torch.empty`: that goes to the meta device, and drawing random numbers is left out.

    `torch.device("meta")` would do for most networks, but not for those that compute their widths with tensors, and
    random numbers on it import PyTorch's whole compiler, for seconds.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty:
            options["device"] = "meta"
        if function in RANDOM or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else options["tensor"]
        return function(*args, **options)
