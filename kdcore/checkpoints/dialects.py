"""The names that other libraries give to the tensors of networks that are listed here."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Rule = tuple[str, str]
"""A regular expression for a part of a path, and what takes its place."""


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file under other names."""

    tensors: Mapping[str, Tensor]
    origins: Mapping[str, str] = field(default_factory=dict)
    """The names in the file, of those that have changed."""

    @classmethod
    def same(cls, tensors: Mapping[str, Tensor]) -> "Renamed":
        return cls(tensors)

    def origin(self, path: str) -> str:
        return self.origins.get(path, path)


def dialects(
    _architecture: str, shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]
) -> Iterator[Renamed]:
    """Yield a file's tensors under their own names, and under those that a library's names may mean here."""
    yield Renamed.same(tensors)
    for rules in (*_shortcuts(shapes), DENSENET_DOTS):
        renamed = _rename(rules, tensors)
        if renamed is not None:
            yield renamed


DENSENET_DOTS: Sequence[Rule] = ((r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),)
"""The names that torchvision's DenseNets had before PyTorch forbade dots in the names of modules."""


def _shortcuts(shapes: Mapping[str, Sequence[int]]) -> Iterator[Sequence[Rule]]:
    """Yield the two names of a residual block's shortcut, in the direction that this network needs."""
    for one, other in (("shortcut", "downsample"), ("downsample", "shortcut")):
        if any(f".{other}." in name for name in shapes):
            yield ((rf"\.{one}\.", f".{other}."),)


def _rename(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> Renamed | None:
    """Return tensors under new names; None if no name changes, or two become one."""
    new: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for path, tensor in tensors.items():
        name = path
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name != path:
            origins[name] = path
        new[name] = tensor
    return Renamed(new, origins) if origins and len(new) == len(tensors) else None
