"""Small lessons made of given tensors, for the tests of objectives."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.objective import Objective, Setting

NOTHING = torch.empty(0)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 1])
"""Ten training images of three classes."""


def setting(temperature: float | None = None, labels: Tensor = LABELS, rows: Tensor | None = None) -> Setting:
    """The setting of a training on `rows`; by default all rows except the last."""
    rows = torch.arange(len(labels) - 1) if rows is None else rows
    return Setting(temperature, num_classes=3, epochs=10, labels=labels, rows=rows)


SETTING = setting()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed numbers, always the same for one seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n: int, classes: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(2))


def lesson(
    student: Tensor | Mapping[str, Tensor],
    teacher: Tensor | Mapping[str, Tensor],
    *,
    labels: Tensor = NOTHING,
    index: Tensor = NOTHING,
    epoch: int = 0,
    layers: Mapping[str, nn.Module] | None = None,
) -> Lesson:
    """A lesson of given logits or given taps."""
    views = (View(side) if isinstance(side, Tensor) else View(NOTHING, side) for side in (student, teacher))
    of_student, of_teacher = views
    return Lesson(
        of_student,
        View(of_teacher.logits, of_teacher.taps, layers=layers or {}),
        Batch(NOTHING, labels, index, epoch),
    )


def built(objective: Objective, first: Lesson) -> Objective:
    """The objective, built as the engine does it: in eval mode and without gradients."""
    with torch.no_grad():
        objective.eval().build(first)
    return objective.train()


def parameters(module: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class NoHostReads(TorchDispatchMode):
    """Fails if a tensor's value decides what runs next: on a GPU the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        assert not func.overloadpacket.__name__.startswith(waits), func
        return func(*args, **(kwargs or {}))
