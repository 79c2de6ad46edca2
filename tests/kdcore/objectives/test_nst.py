import math

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.nst import NeuronSelectivityTransfer, nst_loss
from kdcore.spec.methods.features import Nst
from tests.kdcore.objectives.feature_pairs import SETTING, UP_TO_DEEP, Looker, changed_by_training
from tests.kdcore.objectives.lessons import lesson, maps, parameters

KERNELS = ["linear", "polynomial", "gaussian"]


def by_loops(student: torch.Tensor, teacher: torch.Tensor, kernel: str) -> float:
    """The formula, pair by pair; equal sizes."""
    return sum(map(mmd2, student, teacher, [kernel] * len(student))) / len(student)


def mmd2(student: torch.Tensor, teacher: torch.Tensor, kernel: str) -> float:
    x, y = directions(student), directions(teacher)
    variance = mean(squared_distance, x, y)
    kernels = {
        "linear": product,
        "polynomial": lambda a, b: product(a, b) ** 2,
        "gaussian": lambda a, b: math.exp(-squared_distance(a, b) / (2 * variance)),
    }
    k = kernels[kernel]
    return mean(k, y, y) + mean(k, x, x) - 2 * mean(k, x, y)


def directions(channels: torch.Tensor) -> list[list[float]]:
    flat = [channel.flatten().tolist() for channel in channels]
    return [[value / math.sqrt(product(row, row)) for value in row] for row in flat]


def product(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def mean(of, first: list, second: list) -> float:
    return sum(of(a, b) for a in first for b in second) / (len(first) * len(second))


HALFWAY = (1 + 1 / math.e) / 2


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("linear", 1 + 1 / 2 - 2 / 2), ("polynomial", 1 + 1 / 2 - 2 / 2), ("gaussian", 1 + HALFWAY - 2 * HALFWAY)],
)
def test_value_worked_out_by_hand(kernel, expected):
    """The student's channels are e1 and e2, the teacher's one channel is e1.

    Products with the teacher are 1 and 0, so a mean of 1/2; the student's own are 1, 0, 0, 1, a mean of 1/2 too; the
    teacher's own is 1. Powers of 0 and 1 are themselves. Squared distances to the teacher are 0 and 2, so σ² = 1 and
    the gaussian has exp(-0) and exp(-1): a mean of (1 + 1/e) / 2 with the teacher, and within the student too.
    """
    student, teacher = 3 * torch.eye(2).view(1, 2, 1, 2), torch.tensor([5.0, 0.0]).view(1, 1, 1, 2)
    assert nst_loss(student, teacher, kernel=kernel).item() == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("shape", "teacher_channels"),
    [((1, 1, 2, 3), 4), ((3, 5, 3, 2), 4), ((2, 7, 2, 2), 9), ((2, 3, 3, 3), 9), ((2, 4, 1, 5), 1)],
    ids=["one channel", "more places", "more channels", "in between", "one channel of the teacher"],
)
def test_loss_agrees_with_loops(shape, teacher_channels, kernel, dtype, tolerance):
    n, _, h, w = shape
    student, teacher = maps(*shape, dtype=dtype), maps(n, teacher_channels, h, w, seed=1, dtype=dtype)
    value = nst_loss(student, teacher, kernel=kernel)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(by_loops(student, teacher, kernel), abs=tolerance)


def test_the_default_is_the_polynomial_kernel():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    assert nst_loss(student, teacher).item() == pytest.approx(by_loops(student, teacher, "polynomial"))


def test_the_larger_maps_are_averaged_down_first():
    student, teacher = maps(2, 3, 6, 5), maps(2, 4, 4, 7, seed=1)
    pooled = torch.nn.AdaptiveAvgPool2d((4, 5))
    assert nst_loss(student, teacher).item() == pytest.approx(by_loops(pooled(student), pooled(teacher), "polynomial"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (2, 4, 1, 2)], ids=["more places", "more channels"])
def test_the_gradient_is_right_and_never_reaches_the_teacher(shape, kernel):
    """The gaussian's σ² is a constant to the gradient, but moves in a numerical one: there loops stand in for it."""
    student, teacher = maps(*shape).requires_grad_(), maps(*shape, seed=1).requires_grad_()
    if kernel != "gaussian":
        assert torch.autograd.gradcheck(lambda student: nst_loss(student, teacher.detach(), kernel=kernel), student)
    value = nst_loss(student, teacher, kernel=kernel)
    value.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    if kernel == "gaussian":
        assert torch.allclose(student.grad, gaussian_gradient(student.detach(), teacher.detach()))


def gaussian_gradient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Autograd through pairwise differences, with σ² held."""
    student.requires_grad_()
    x, y = (torch.nn.functional.normalize(side.flatten(2), dim=2) for side in (student, teacher))

    def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, :, None] - b[:, None]).square().sum(3)

    twice = 2 * distances(x, y).mean((1, 2), keepdim=True).detach()
    own, between = (-distances(x, x) / twice).exp(), (-distances(x, y) / twice).exp()
    (gradient,) = torch.autograd.grad((own.mean((1, 2)) - 2 * between.mean((1, 2))).mean(), student)
    return gradient


def float32(*shape: int, seed: int = 0) -> torch.Tensor:
    return maps(*shape, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (float32(1, 3, 5, 3), float32(1, 2, 5, 3, seed=1)),
        (torch.zeros(2, 3, 4, 4), float32(2, 3, 4, 4)),
        (float32(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4)),
        (float32(2, 3, 4, 4) * 1e8, float32(2, 3, 4, 4, seed=1) * 1e-8),
        (float32(2, 9, 1, 1), float32(2, 8, 1, 1, seed=1)),
        (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)),
    ],
    ids=["batch of one", "dead student", "dead teacher", "both dead", "all alike", "huge and tiny", "a place", "one"],
)
def test_value_and_gradient_are_finite_and_small(student, teacher, kernel):
    """A gradient of 1e12, as F.normalize's where a channel is zero, would end the training as surely as NaN."""
    student = student.clone().requires_grad_()
    value = nst_loss(student, teacher, kernel=kernel)
    value.backward()
    assert value.isfinite() and value.item() >= -1e-6
    assert student.grad.abs().max().item() < 100


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_dead_channel_gets_no_gradient_and_spoils_no_other(kernel):
    student = float32(2, 3, 4, 4)
    student[:, 1] = 0
    student.requires_grad_()
    nst_loss(student, float32(2, 5, 4, 4, seed=1), kernel=kernel).backward()
    assert not student.grad[:, 1].any() and student.grad[:, 0].any() and student.grad.abs().max().item() < 100


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 9, 2, 1)], ids=str)
def test_the_order_and_the_scale_of_channels_do_not_matter(shape, kernel):
    teacher = maps(*shape)
    student = (3 * teacher.flip(1)).requires_grad_()
    value = nst_loss(student, teacher, kernel=kernel)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def objective(**options) -> NeuronSelectivityTransfer:
    return NeuronSelectivityTransfer(Nst(taps=("shallow", "deep"), **options), SETTING)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_objective_sums_over_its_layers_and_asks_for_them(kernel):
    student = {"shallow": maps(2, 3, 4, 4), "deep": maps(2, 5, 2, 2, seed=1)}
    teacher = {"shallow": maps(2, 6, 8, 8, seed=2), "deep": maps(2, 7, 2, 2, seed=3)}
    transfer = objective(kernel=kernel)
    single = [nst_loss(student[tap], teacher[tap], kernel=kernel).item() for tap in student]
    assert transfer(lesson(student, teacher)).item() == pytest.approx(sum(single))
    assert transfer.needs.student_taps == transfer.needs.teacher_taps == ("shallow", "deep")


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_changes_the_student_alone(kernel):
    transfer = objective(kernel=kernel)
    assert changed_by_training(transfer, Looker(3, 4, seed=0), Looker(5, 6, seed=1)) == UP_TO_DEEP
    assert parameters(transfer) == 0 and not transfer.state_dict()


def test_what_is_no_map_is_refused():
    embedding = {"shallow": maps(2, 4), "deep": maps(2, 4)}
    with pytest.raises(SpecInvalid, match="tap 'shallow' gives 4 for each image, where a map"):
        objective().build(lesson(embedding, embedding))
