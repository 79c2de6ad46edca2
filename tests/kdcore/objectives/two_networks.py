"""A student and a teacher of a few dozen parameters, and what every objective has to leave alone or move."""

import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.vocabulary import Pair
from tests.kdcore.objectives.lessons import maps

EMBEDDING = Pair(student="fc@in", teacher="head@in")
MAP = Pair(student="body", teacher="trunk")
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 1])
"""Ten training images of three classes; row 9 is held out."""
SETTING = Setting(temperature=None, num_classes=3, epochs=10, labels=LABELS, rows=torch.arange(9))


class Network(nn.Module):
    """One convolution and one classifier; its taps are named as `pair` names one side of them."""

    def __init__(self, width: int, side: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.side = side
        self.body = nn.Conv2d(2, width, 3, padding=1)
        self.fc = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> View:
        body = self.body(images).relu()
        embedding = body.mean((2, 3))
        taps = {getattr(MAP, self.side): body, getattr(EMBEDDING, self.side): embedding}
        return View(self.fc(embedding), taps)


class Trial:
    """Student, teacher and an objective, built; a batch is a few rows of ten images."""

    def __init__(self, objective: Objective) -> None:
        self.student = Network(4, "student", seed=1)
        self.teacher = Network(7, "teacher", seed=2).requires_grad_(False)
        self.images = maps(10, 2, 5, 3, dtype=torch.float32)
        self.objective = objective
        torch.manual_seed(3)
        with torch.no_grad():
            objective.eval().build(self.lesson([0, 3, 5, 6, 7]))
        objective.train()

    def lesson(self, rows: list[int]) -> Lesson:
        index = torch.tensor(rows)
        images = self.images[index]
        return Lesson(self.student(images), self.teacher(images), Batch(images, LABELS[index], index))

    def train(self, *batches: list[int]) -> None:
        """One step of SGD a batch."""
        own = [*self.student.parameters(), *self.objective.parameters()]
        optimizer = torch.optim.SGD(own, lr=0.5, momentum=0.9)
        for rows in batches:
            optimizer.zero_grad()
            self.objective(self.lesson(rows)).backward()
            optimizer.step()

    def moved(self, *batches: list[int]) -> set[str]:
        """The parameters that training changes, `teacher.fc.weight` and so on; none is left without a finite number."""
        parts = {"student": self.student, "teacher": self.teacher, "objective": self.objective}
        before = copy.deepcopy({name: dict(part.named_parameters()) for name, part in parts.items()})
        self.train(*batches)
        after = {(name, key): value for name, part in parts.items() for key, value in part.named_parameters()}
        assert all(value.isfinite().all() for value in after.values())
        return {f"{name}.{key}" for (name, key), value in after.items() if not value.equal(before[name][key])}


BODY = {"student.body.weight", "student.body.bias"}
"""What an objective on maps or embeddings moves of the student; its classifier lies behind them."""


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value decides what runs next: on a GPU the host would wait for the device there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        assert not func.overloadpacket.__name__.startswith(waits), func
        return func(*args, **(kwargs or {}))
