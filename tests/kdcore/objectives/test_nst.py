import math

import pytest
import torch

from kdcore.objectives.nst import NeuronSelectivityTransfer, nst_loss
from kdcore.spec.methods.features import Nst
from tests.kdcore.objectives.lessons import SETTING, lesson, normal

KERNELS = ["linear", "polynomial", "gaussian"]


def naive(student: torch.Tensor, teacher: torch.Tensor, kernel: str) -> float:
    """The formula, pair by pair; equal sizes."""
    return sum(map(naive_mmd2, student, teacher, [kernel] * len(student))) / len(student)


def naive_mmd2(student: torch.Tensor, teacher: torch.Tensor, kernel: str) -> float:
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
def test_nst_loss_equals_a_value_computed_by_hand(kernel, expected):
    """The student's channels are e1 and e2, the teacher's one channel is e1.

    Products with the teacher are 1 and 0, so a mean of 1/2; the student's own are 1, 0, 0, 1, a mean of 1/2 too; the
    teacher's own is 1. Powers of 0 and 1 are themselves. Squared distances to the teacher are 0 and 2, so σ² = 1 and
    the gaussian has exp(-0) and exp(-1): a mean of (1 + 1/e) / 2 with the teacher, and within the student too.
    """
    student, teacher = 3 * torch.eye(2).view(1, 2, 1, 2), torch.tensor([5.0, 0.0]).view(1, 1, 1, 2)
    assert nst_loss(student, teacher, kernel=kernel).item() == pytest.approx(expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("shape", "teacher_channels"),
    [((1, 1, 2, 3), 4), ((3, 5, 3, 2), 4), ((2, 7, 2, 2), 9), ((2, 3, 3, 3), 9), ((2, 4, 1, 5), 1)],
    ids=["one channel", "more places", "more channels", "in between", "one channel of the teacher"],
)
def test_nst_loss_equals_plain_loops(shape, teacher_channels, kernel):
    n, _, h, w = shape
    student, teacher = normal(*shape), normal(n, teacher_channels, h, w, seed=1)
    assert nst_loss(student, teacher, kernel=kernel).item() == pytest.approx(naive(student, teacher, kernel), abs=1e-9)


def test_nst_loss_defaults_to_the_polynomial_kernel():
    student, teacher = normal(2, 3, 4, 4), normal(2, 5, 4, 4, seed=1)
    assert nst_loss(student, teacher).item() == pytest.approx(naive(student, teacher, "polynomial"))


@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (2, 4, 1, 2)], ids=["more places", "more channels"])
def test_nst_loss_has_the_gradient_of_its_value_in_both_forms_of_the_polynomial(shape):
    student, teacher = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    assert torch.autograd.gradcheck(lambda student: nst_loss(student, teacher), student)


@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (2, 4, 1, 2)], ids=["more places", "more channels"])
def test_nst_loss_of_the_gaussian_kernel_has_a_gradient_with_constant_variance(shape):
    """A numerical gradient would change σ² too; pairwise differences with σ² detached are the reference."""
    student, teacher = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    nst_loss(student, teacher, kernel="gaussian").backward()
    reference = student.detach().clone().requires_grad_()
    x, y = (torch.nn.functional.normalize(side.flatten(2), dim=2) for side in (reference, teacher))

    def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, :, None] - b[:, None]).square().sum(3)

    twice = 2 * distances(x, y).mean((1, 2), keepdim=True).detach()
    own, between = (-distances(x, x) / twice).exp(), (-distances(x, y) / twice).exp()
    (own.mean((1, 2)) - 2 * between.mean((1, 2))).mean().backward()
    assert torch.allclose(student.grad, reference.grad)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4)),
        (1e8 * normal(2, 3, 4, 4).float(), 1e-8 * normal(2, 3, 4, 4, seed=1).float()),
        (normal(2, 9, 1, 1).float(), normal(2, 8, 1, 1, seed=1).float()),
        (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)),
    ],
    ids=["equal channels", "huge and tiny", "one place", "one number"],
)
def test_nst_loss_is_not_below_zero_and_has_a_small_gradient(student, teacher, kernel):
    student = student.clone().requires_grad_()
    value = nst_loss(student, teacher, kernel=kernel)
    value.backward()
    assert value.item() >= -1e-6 and student.grad.abs().max().item() < 100


@pytest.mark.parametrize("kernel", KERNELS)
def test_nst_loss_sends_no_gradient_to_a_channel_of_zeros(kernel):
    student = normal(2, 3, 4, 4, dtype=torch.float32)
    student[:, 1] = 0
    student.requires_grad_()
    nst_loss(student, normal(2, 5, 4, 4, seed=1, dtype=torch.float32), kernel=kernel).backward()
    assert not student.grad[:, 1].any() and student.grad[:, 0].any() and student.grad.abs().max().item() < 100


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 9, 2, 1)], ids=str)
def test_nst_loss_does_not_depend_on_order_and_scale_of_the_channels(shape, kernel):
    teacher = normal(*shape)
    student = (3 * teacher.flip(1)).requires_grad_()
    value = nst_loss(student, teacher, kernel=kernel)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_neuron_selectivity_transfer_sums_over_its_layers():
    student = {"shallow": normal(2, 3, 4, 4), "deep": normal(2, 5, 2, 2, seed=1)}
    teacher = {"shallow": normal(2, 6, 8, 8, seed=2), "deep": normal(2, 7, 2, 2, seed=3)}
    transfer = NeuronSelectivityTransfer(Nst(taps=("shallow", "deep"), kernel="linear"), SETTING)
    single = [nst_loss(student[tap], teacher[tap], kernel="linear").item() for tap in student]
    assert transfer(lesson(student, teacher)).item() == pytest.approx(sum(single))
