"""How a teacher's view becomes a record of bytes, and a view again: the same numbers, bit for bit.

Numbers that bfloat16 can hold take two bytes, others four. Shapes: N batch, W numbers of a view, R bytes of a record.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcore.cache.store import Records
from kdcore.lesson import Reduced, View

MOST_BYTES = 16 << 10
"""The largest view, in bytes of float32, that is kept."""

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Which numbers are those of a view, and in how many bytes each is stored."""

    parts: tuple[tuple[str | Reduced | None, tuple[int, ...]], ...]
    """Logits (None), taps and what is made of taps, each with its shape for one image."""
    halves: npt.NDArray[np.bool_]
    """W: the numbers that bfloat16 can hold, whose upper two bytes are stored."""

    @classmethod
    def of(cls, view: View) -> Layout | str:
        """Return the layout of a view, or what forbids to keep such views."""
        named: list[tuple[str | Reduced | None, Tensor]] = [(None, view.logits), *view.taps.items()]
        named += view.reduced.items()
        if any(value.dtype != torch.float32 or len(value) != len(view.logits) for _, value in named):
            return "the teacher gives numbers of another type than float32"
        parts = tuple((name, tuple(value.shape[1:])) for name, value in named)
        width = sum(math.prod(shape) for _, shape in parts)
        if 4 * width > MOST_BYTES:
            return f"a view has {4 * width:,} bytes of activations and logits, the most is {MOST_BYTES:,}"
        halves = [
            np.full(math.prod(shape), _are_bf16(value)) for (_, shape), (_, value) in zip(parts, named, strict=True)
        ]
        return cls(parts, np.concatenate(halves))

    @property
    def width(self) -> int:
        return len(self.halves)

    @property
    def size(self) -> int:
        """Return the bytes of a record."""
        return 4 * self.width - 2 * int(self.halves.sum())

    def described(self) -> list[Any]:
        """Return the layout as JSON, for a key."""
        names = [(name.taps, name.name) if isinstance(name, Reduced) else name for name, _ in self.parts]
        shapes = [shape for _, shape in self.parts]
        return [names, shapes, hashlib.sha256(self.halves.tobytes()).hexdigest()]

    def flat(self, view: View) -> Values:
        """Return the numbers of a view, N × W."""
        values = [
            view.logits if name is None else view.reduced[name] if isinstance(name, Reduced) else view.taps[name]
            for name, _ in self.parts
        ]
        return torch.cat([value.flatten(1) for value in values], dim=1).numpy()

    def view(self, values: Values) -> View:
        """Return the view of numbers, N × W. Its tensors are the same for all that these numbers came from."""
        found: dict[str | Reduced | None, Tensor] = {}
        start = 0
        for name, shape in self.parts:
            end = start + math.prod(shape)
            found[name] = torch.from_numpy(np.ascontiguousarray(values[:, start:end])).view(-1, *shape)
            start = end
        logits = found.pop(None)
        taps = {name: value for name, value in found.items() if isinstance(name, str)}
        return View(logits, taps, reduced={name: value for name, value in found.items() if isinstance(name, Reduced)})

    def encoded(self, values: Values) -> tuple[Records, npt.NDArray[np.bool_]]:
        """Return records, N × R, and which of them hold the exact numbers."""
        bits = values.view(np.uint32)
        halves, wholes = bits[:, self.halves], bits[:, ~self.halves]
        exact = (halves & 0xFFFF == 0).all(1)
        stored = ((halves >> 16).astype(np.uint16), wholes)
        parts = [np.ascontiguousarray(one).view(np.uint8) for one in stored]
        return np.concatenate(parts, axis=1), exact

    def decoded(self, records: Records) -> Values:
        """Return the numbers of records, N × W."""
        end = 2 * int(self.halves.sum())
        bits = np.empty((len(records), self.width), dtype=np.uint32)
        bits[:, self.halves] = np.ascontiguousarray(records[:, :end]).view(np.uint16).astype(np.uint32) << 16
        bits[:, ~self.halves] = np.ascontiguousarray(records[:, end:]).view(np.uint32)
        return bits.view(np.float32)


def _are_bf16(values: Tensor) -> bool:
    return bool((values.contiguous().view(torch.int32) & 0xFFFF == 0).all())


def same_bits(one: Values, other: Values) -> bool:
    """Return True if two arrays of numbers are equal bit for bit."""
    return np.array_equal(one.view(np.uint32), np.ascontiguousarray(other).view(np.uint32))
