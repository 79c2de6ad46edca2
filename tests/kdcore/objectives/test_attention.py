import math
from functools import partial

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.attention import (
    AttentionTransfer,
    GradientAttention,
    attention_loss,
    attention_map,
    gradient_attention_loss,
)
from kdcore.spec.methods.features import Attention
from tests.kdcore.objectives.feature_pairs import SETTING, UP_TO_DEEP, Looker, changed_by_training, seen, under
from tests.kdcore.objectives.lessons import lesson, maps, parameters

MAPPINGS = ["sum", "sum_p", "max_p"]
REDUCTIONS = ["mean_squares", "norms"]


def by_loops(student: torch.Tensor, teacher: torch.Tensor, mapping: str, p: float, reduction: str) -> float:
    """Section 3.1, number by number; equal sizes."""
    distances = []
    for maps_s, maps_t in zip(student.tolist(), teacher.tolist(), strict=True):
        of_s, of_t = attention_by_loops(maps_s, mapping, p), attention_by_loops(maps_t, mapping, p)
        distances.append(sum((s - t) ** 2 for s, t in zip(of_s, of_t, strict=True)))
    if reduction == "norms":
        return sum(math.sqrt(distance) for distance in distances) / len(distances) / 2
    return sum(distances) / len(distances) / len(of_s)


def attention_by_loops(channels: list, mapping: str, p: float) -> list[float]:
    rows, columns = range(len(channels[0])), range(len(channels[0][0]))
    power = 1 if mapping == "sum" else p
    seen = [[abs(channel[row][column]) ** power for channel in channels] for row in rows for column in columns]
    flat = [max(values) if mapping == "max_p" else sum(values) for values in seen]
    length = math.sqrt(sum(value**2 for value in flat))
    return [value / length for value in flat]


# Two channels at three places: |A| = (1, 2, 0) and (2, 2, 0).
BY_HAND = torch.tensor([[1.0, -2.0, 0.0], [-2.0, 2.0, 0.0]]).view(1, 2, 1, 3)


@pytest.mark.parametrize(
    ("mapping", "p", "expected"),
    [("sum", 2, [3 / 5, 4 / 5, 0]), ("sum_p", 1, [3 / 5, 4 / 5, 0]), ("sum_p", 2, [5, 8, 0]), ("max_p", 3, [8, 8, 0])],
)
def test_attention_maps_worked_out_by_hand(mapping, p, expected):
    """Sums are 1 + 2 = 3 and 2 + 2 = 4 (length 5), of squares 1 + 4 = 5 and 4 + 4 = 8; the largest is 2 twice."""
    length = math.hypot(*expected)
    found = attention_map(BY_HAND, mapping=mapping, p=p)
    assert found.shape == (1, 3) and found[0].tolist() == pytest.approx([value / length for value in expected])


@pytest.mark.parametrize(("reduction", "expected"), [("mean_squares", 2 / 2), ("norms", math.sqrt(2) / 2)])
def test_losses_worked_out_by_hand(reduction, expected):
    """The student looks left, Q = (1, 0), the teacher right, (0, 1): squares 1 + 1 over HW = 2; √2 apart, halved."""
    student, teacher = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 5.0]).view(1, 1, 1, 2)
    assert attention_loss(student, teacher, reduction=reduction).item() == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("mapping", "p"), [("sum", 2.0), ("sum_p", 2.0), ("sum_p", 3.0), ("max_p", 1.5), ("max_p", 8)])
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (4, 5, 3, 7)], ids=str)
def test_losses_agree_with_loops(shape, mapping, p, reduction, dtype, tolerance):
    n, c, h, w = shape
    student, teacher = maps(*shape, dtype=dtype), maps(n, c + 2, h, w, seed=1, dtype=dtype)
    value = attention_loss(student, teacher, mapping=mapping, p=p, reduction=reduction)
    expected = by_loops(student, teacher, mapping, p, reduction)
    assert value.dtype == dtype and value.item() == pytest.approx(expected, abs=tolerance)


def test_the_defaults_are_the_published_codes():
    student, teacher = maps(3, 4, 5, 5), maps(3, 4, 5, 5, seed=1)
    assert attention_loss(student, teacher).item() == pytest.approx(
        by_loops(student, teacher, "sum_p", 2, "mean_squares")
    )


def test_the_larger_maps_are_averaged_down_before_attention_is_taken():
    student, teacher = maps(2, 3, 6, 5), maps(2, 4, 4, 7, seed=1)
    pooled = torch.nn.AdaptiveAvgPool2d((4, 5))
    assert attention_loss(student, teacher).item() == pytest.approx(
        by_loops(pooled(student), pooled(teacher), "sum_p", 2, "mean_squares")
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("mapping", "p"), [("sum", 2.0), ("sum_p", 2.0), ("sum_p", 3.0), ("max_p", 2.5)])
def test_gradients_are_right_and_never_reach_the_teacher(mapping, p, reduction):
    student, teacher = maps(2, 2, 2, 3).requires_grad_(), maps(2, 3, 2, 1, seed=1).requires_grad_()

    loss = partial(attention_loss, mapping=mapping, p=p, reduction=reduction)
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher.detach()), student)
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 8.0])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (maps(1, 3, 5, 3, dtype=torch.float32), maps(1, 2, 5, 3, seed=1, dtype=torch.float32)),
        (torch.zeros(2, 3, 4, 4), maps(2, 3, 4, 4, dtype=torch.float32)),
        (maps(2, 3, 4, 4, dtype=torch.float32), torch.zeros(2, 3, 4, 4)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        (maps(2, 3, 4, 4, dtype=torch.float32), maps(2, 3, 4, 4, dtype=torch.float32)),
        (maps(2, 3, 4, 4, dtype=torch.float32) * 1e5, maps(2, 3, 4, 4, seed=1, dtype=torch.float32) * 1e-5),
        (maps(2, 3, 1, 1, dtype=torch.float32), maps(2, 3, 1, 1, seed=1, dtype=torch.float32)),
        (maps(2, 3, 4, 4, dtype=torch.float32).relu(), maps(2, 3, 4, 4, seed=1, dtype=torch.float32).relu()),
    ],
    ids=[
        "batch of one",
        "dead student",
        "dead teacher",
        "both dead",
        "identical",
        "huge and tiny",
        "one place",
        "relu",
    ],
)
def test_value_and_gradient_are_finite(student, teacher, p, mapping, reduction):
    student = student.clone().requires_grad_()
    value = attention_loss(student, teacher, mapping=mapping, p=p, reduction=reduction)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("scale", [1.0, -7.0])
def test_a_student_that_scales_its_teacher_has_nothing_to_learn(scale, mapping, reduction):
    teacher = maps(3, 4, 3, 5)
    student = (scale * teacher).requires_grad_()
    value = attention_loss(student, teacher, mapping=mapping, p=3, reduction=reduction)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    if reduction == "mean_squares":  # A norm keeps its slope of 1 down to 0: rounding alone turns the gradient.
        assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def objective(**options) -> AttentionTransfer:
    return AttentionTransfer(Attention(taps=("shallow", "deep"), **options), SETTING)


def test_the_objective_sums_over_its_layers_and_asks_for_them():
    student = {"shallow": maps(2, 3, 4, 4), "deep": maps(2, 5, 2, 2, seed=1)}
    teacher = {"shallow": maps(2, 6, 8, 8, seed=2), "deep": maps(2, 7, 2, 2, seed=3)}
    transfer = objective(mapping="max_p", p=3, reduction="norms")
    single = [
        attention_loss(student[tap], teacher[tap], mapping="max_p", p=3, reduction="norms").item() for tap in student
    ]
    assert transfer(lesson(student, teacher)).item() == pytest.approx(sum(single))
    assert transfer.needs.student_taps == transfer.needs.teacher_taps == ("shallow", "deep")
    assert not transfer.needs.input_gradient


def test_training_changes_the_student_alone():
    transfer = objective()
    assert changed_by_training(transfer, Looker(3, 4, seed=0), Looker(5, 6, seed=1)) == UP_TO_DEEP
    assert parameters(transfer) == 0 and not transfer.state_dict()


def test_what_is_no_map_is_refused():
    embedding = {"shallow": maps(2, 4), "deep": maps(2, 4)}
    with pytest.raises(SpecInvalid, match="tap 'shallow' gives 4 for each image, where a map"):
        objective().build(lesson(embedding, embedding))


# Gradients at the image


def test_gradient_attention_worked_out_by_hand():
    """Squared distances are 3² + 4² = 25 and 1: half of their sum, over a batch of two, is 6.5."""
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    teacher = torch.tensor([[0.0, 4.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    assert gradient_attention_loss(student, teacher).item() == 6.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 4, 3)], ids=str)
def test_gradient_attention_agrees_with_loops(shape, dtype, tolerance):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    squares = [
        sum((s - t) ** 2 for s, t in zip(of_s.flatten().tolist(), of_t.flatten().tolist(), strict=True))
        for of_s, of_t in zip(student, teacher, strict=True)
    ]
    value = gradient_attention_loss(student, teacher)
    assert value.dtype == dtype and value.item() == pytest.approx(sum(squares) / 2 / shape[0], rel=tolerance)


def test_gradient_attention_reaches_the_student_and_never_the_teacher():
    student, teacher = maps(2, 2, 3, 3).requires_grad_(), maps(2, 2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda student: gradient_attention_loss(student, teacher.detach()), student)
    gradient_attention_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert gradient_attention_loss(student, student).item() == 0


def test_the_double_gradient_is_the_numerical_one():
    """Central differences of the loss in every weight of a small smooth network, where J itself is a gradient."""
    student, teacher = Looker(2, 3, seed=0).double(), Looker(2, 3, seed=1).double()
    attention = GradientAttention(Attention(mapping="gradient"), SETTING)
    attention(seen(student, teacher, gradients=True)).backward()
    checked = 0
    for weight in student.parameters():
        flat = weight.data.view(-1)
        analytic = torch.zeros_like(flat) if weight.grad is None else weight.grad.view(-1)
        for place in range(0, len(flat), 7):
            ends = []
            for step in (1e-5, -1e-5):
                flat[place] += step
                ends.append(attention(seen(student, teacher, gradients=True)).item())
                flat[place] -= step
            assert analytic[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)
            checked += 1
    assert checked > 10


def test_gradient_attention_trains_the_whole_student_alone_and_needs_no_taps():
    attention = GradientAttention(Attention(mapping="gradient"), SETTING)
    assert attention.needs.input_gradient and attention.needs.student_taps == attention.needs.teacher_taps == ()
    changed = changed_by_training(attention, Looker(3, 4, seed=0), Looker(5, 6, seed=1), gradients=True)
    assert changed == UP_TO_DEEP | under("student", ["fc.weight", "fc.bias"])
