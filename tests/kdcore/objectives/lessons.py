"""Small lessons for the tests of objectives: made of given maps, or by two networks that can be trained in no time."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.objective import Objective, Setting

SETTING = Setting(
    temperature=None, num_classes=3, epochs=10, labels=torch.zeros(8, dtype=torch.int64), rows=torch.arange(8)
)


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lesson(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    epoch: int = 1,
    layers: Mapping[str, nn.Module] | None = None,
) -> Lesson:
    """Of given taps."""
    nothing = torch.empty(0)
    batch = Batch(nothing, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), epoch)
    return Lesson(View(nothing, student), View(nothing, teacher, layers=layers or {}), batch)


class Network(nn.Module):
    """Gives a map `early`, a smaller one `late`, and an `embedding`, each before any ReLU."""

    def __init__(self, early: int, late: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, early, kernel_size=3, padding=1)
        self.second = nn.Conv2d(early, late, kernel_size=3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(late)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        early = self.first(inputs)
        late = self.norm(self.second(early.relu()))
        return {"early": early, "late": late, "embedding": late.mean((2, 3))}


class Classroom:
    """A student and a wider teacher of `Network`, that look at the same images."""

    def __init__(self, images: int = 4) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = Network(3, 4), Network(5, 6).eval()
        self.inputs = torch.randn(images, 2, 6, 6)

    def lesson(self) -> Lesson:
        with torch.no_grad():
            taught = self.teacher(self.inputs)
        return lesson(self.student(self.inputs), taught, layers={"norm": self.teacher.norm})

    def build(self, objective: Objective) -> None:
        """As the engine does: in eval mode and without gradients."""
        self.student.eval()
        with torch.no_grad():
            objective.build(self.lesson())
        self.student.train()

    def changed_by_training(self, objective: Objective, steps: int = 2) -> set[str]:
        """Names of all parameters that some steps of SGD changed; no weight decay, so those that had a gradient."""
        everything = nn.ModuleDict({"student": self.student, "teacher": self.teacher, "objective": objective})
        before = {name: value.detach().clone() for name, value in everything.named_parameters()}
        optimizer = torch.optim.SGD([*self.student.parameters(), *objective.parameters()], lr=1e-3)
        objective.train()
        for _ in range(steps):
            optimizer.zero_grad()
            objective(self.lesson()).backward()
            optimizer.step()
        return {name for name, value in everything.named_parameters() if not torch.equal(value, before[name])}

    def students(self) -> set[str]:
        return {f"student.{name}" for name, _ in self.student.named_parameters()}


def parameters(module: nn.Module) -> int:
    """How many numbers of it are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
