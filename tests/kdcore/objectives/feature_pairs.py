"""What the tests of objectives on activations share: a small student and teacher, and what training them changes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.objective import Objective, Setting
from tests.kdcore.objectives.lessons import maps

LABELS = torch.tensor([0, 1, 2, 0])
SETTING = Setting(temperature=None, num_classes=3, epochs=10, labels=LABELS, rows=torch.arange(4))


class Looker(nn.Module):
    """Two convolutions and a classifier; its taps are `shallow`, `deep` (half the size) and `embedding`."""

    def __init__(self, shallow: int, deep: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.shallow = nn.Conv2d(2, shallow, 3, padding=1)
            self.deep = nn.Conv2d(shallow, deep, 3, stride=2, padding=1)
            self.fc = nn.Linear(deep, 3)

    def forward(self, images: Tensor) -> View:
        shallow = self.shallow(images).tanh()
        deep = self.deep(shallow).tanh()
        embedding = deep.mean((2, 3))
        return View(self.fc(embedding), {"shallow": shallow, "deep": deep, "embedding": embedding})


def seen(student: Looker, teacher: Looker, gradients: bool = False) -> Lesson:
    """Both look at the same four images; with `gradients` also at their losses' gradients there."""
    images = maps(4, 2, 6, 5, seed=9, dtype=next(student.parameters()).dtype)
    batch = Batch(images, LABELS, torch.arange(4))
    if gradients:
        return Lesson(with_input_gradient(student, images, True), with_input_gradient(teacher, images, False), batch)
    with torch.no_grad():
        of_teacher = teacher(images)
    return Lesson(student(images), of_teacher, batch)


def with_input_gradient(network: Looker, images: Tensor, again: bool) -> View:
    """The view with the gradient of the summed cross-entropy; `again` keeps it differentiable."""
    images = images.clone().requires_grad_()
    view = network(images)
    loss = nn.functional.cross_entropy(view.logits, LABELS, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=again)
    return View(view.logits, view.taps, gradient)


def changed_by_training(objective: Objective, student: Looker, teacher: Looker, gradients: bool = False) -> set[str]:
    """Two steps of SGD on the objective alone: names of the student's and the objective's tensors that it changed.

    Fails where a value is not finite, where the loss does not fall, and where the teacher changed or got a gradient.
    """
    objective.build(seen(student, teacher, gradients))
    both = nn.ModuleDict({"student": student, "objective": objective})
    before = {name: value.clone() for name, value in both.state_dict().items()}
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = objective(seen(student, teacher, gradients))
        assert loss.shape == () and loss.isfinite()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    return {name for name, value in both.state_dict().items() if not torch.equal(value, before[name])}


def loss_survives_a_round_trip(objective: Objective, again: Objective, student: Looker, teacher: Looker) -> bool:
    """`again`, built anew with other random weights, takes over the state of `objective` and says the same."""
    first = seen(student, teacher)
    objective.build(first)
    torch.manual_seed(77)
    again.build(first)
    again.load_state_dict(objective.state_dict())
    return torch.equal(objective(first), again(first))


def under(prefix: str, names: Sequence[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


UP_TO_DEEP = under("student", ["shallow.weight", "shallow.bias", "deep.weight", "deep.bias"])
"""What a comparison at `deep` can change of the student: the classifier above it is out of reach."""
