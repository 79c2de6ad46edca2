import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.attention import (
    AttentionTransfer,
    GradientAttention,
    attention_loss,
    attention_map,
    gradient_attention_loss,
)
from kdcore.spec.methods.features import Attention
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal

MAPPINGS = ["sum", "sum_p", "max_p"]
REDUCTIONS = ["mean_squares", "norms"]


def naive(student: torch.Tensor, teacher: torch.Tensor, mapping: str, p: float, reduction: str) -> float:
    """Section 3.1, number by number; equal sizes."""
    distances = []
    for maps_s, maps_t in zip(student.tolist(), teacher.tolist(), strict=True):
        of_s, of_t = naive_map(maps_s, mapping, p), naive_map(maps_t, mapping, p)
        distances.append(sum((s - t) ** 2 for s, t in zip(of_s, of_t, strict=True)))
    if reduction == "norms":
        return sum(math.sqrt(distance) for distance in distances) / len(distances) / 2
    return sum(distances) / len(distances) / len(of_s)


def naive_map(channels: list, mapping: str, p: float) -> list[float]:
    rows, columns = range(len(channels[0])), range(len(channels[0][0]))
    power = 1 if mapping == "sum" else p
    places = [[abs(channel[row][column]) ** power for channel in channels] for row in rows for column in columns]
    flat = [max(values) if mapping == "max_p" else sum(values) for values in places]
    length = math.sqrt(sum(value**2 for value in flat))
    return [value / length for value in flat]


# Two channels at three places: |A| = (1, 2, 0) and (2, 2, 0).
BY_HAND = torch.tensor([[1.0, -2.0, 0.0], [-2.0, 2.0, 0.0]]).view(1, 2, 1, 3)


@pytest.mark.parametrize(
    ("mapping", "p", "expected"),
    [("sum", 2, [3 / 5, 4 / 5, 0]), ("sum_p", 1, [3 / 5, 4 / 5, 0]), ("sum_p", 2, [5, 8, 0]), ("max_p", 3, [8, 8, 0])],
)
def test_attention_map_equals_a_value_computed_by_hand(mapping, p, expected):
    """Sums are 1 + 2 = 3 and 2 + 2 = 4 (length 5), of squares 1 + 4 = 5 and 4 + 4 = 8; the largest is 2 twice."""
    length = math.hypot(*expected)
    value = attention_map(BY_HAND, mapping=mapping, p=p)
    assert value.shape == (1, 3) and value[0].tolist() == pytest.approx([number / length for number in expected])


@pytest.mark.parametrize(("reduction", "expected"), [("mean_squares", 2 / 2), ("norms", math.sqrt(2) / 2)])
def test_attention_loss_equals_a_value_computed_by_hand(reduction, expected):
    """The student is active on the left, Q = (1, 0), the teacher on the right, (0, 1): squares 1 + 1 over HW = 2; √2
    apart, halved."""
    student, teacher = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 5.0]).view(1, 1, 1, 2)
    assert attention_loss(student, teacher, reduction=reduction).item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("mapping", "p"), [("sum", 2.0), ("sum_p", 2.0), ("sum_p", 3.0), ("max_p", 1.5), ("max_p", 8)])
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (4, 5, 3, 7)], ids=str)
def test_attention_loss_equals_the_formula_number_by_number(shape, mapping, p, reduction):
    n, c, h, w = shape
    student, teacher = normal(*shape), normal(n, c + 2, h, w, seed=1)
    value = attention_loss(student, teacher, mapping=mapping, p=p, reduction=reduction)
    assert value.item() == pytest.approx(naive(student, teacher, mapping, p, reduction), abs=1e-9)


def test_attention_loss_defaults_to_the_published_code():
    student, teacher = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
    assert attention_loss(student, teacher).item() == pytest.approx(naive(student, teacher, "sum_p", 2, "mean_squares"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("scale", [1.0, -7.0])
def test_attention_loss_of_a_scaled_teacher_is_zero(scale, mapping, reduction):
    teacher = normal(3, 4, 3, 5)
    student = (scale * teacher).requires_grad_()
    value = attention_loss(student, teacher, mapping=mapping, p=3, reduction=reduction)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    if reduction == "mean_squares":  # A norm keeps a gradient of length 1 down to 0; rounding gives its direction.
        assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("p", [1.0, 1.5, 8.0])
@pytest.mark.parametrize("scale", [1.0, 1e5, 0.0])
def test_attention_loss_of_any_power_is_finite_on_maps_with_zeros(scale, p, mapping):
    student = (scale * normal(2, 3, 4, 4, dtype=torch.float32).relu()).requires_grad_()
    value = attention_loss(student, normal(2, 3, 4, 4, seed=1, dtype=torch.float32).relu(), mapping=mapping, p=p)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_attention_transfer_sums_over_its_layers():
    student = {"shallow": normal(2, 3, 4, 4), "deep": normal(2, 5, 2, 2, seed=1)}
    teacher = {"shallow": normal(2, 6, 8, 8, seed=2), "deep": normal(2, 7, 2, 2, seed=3)}
    options = {"mapping": "max_p", "p": 3, "reduction": "norms"}
    transfer = AttentionTransfer(Attention(taps=("shallow", "deep"), **options), SETTING)
    single = [attention_loss(student[tap], teacher[tap], **options).item() for tap in student]
    built(transfer, lesson(student, teacher))
    assert transfer(lesson(student, teacher)).item() == pytest.approx(sum(single))


def test_attention_transfer_needs_only_the_maps_of_a_teacher_once_it_is_built():
    """From the maps alone, the loss has the same bits as from the activations."""
    student, teacher = {"a": normal(2, 3, 4, 4)}, {"a": normal(2, 6, 8, 8, seed=2)}
    transfer = AttentionTransfer(Attention(taps=("a",)), SETTING)
    assert transfer.needs.teacher_taps == ("a",)
    whole = lesson(student, teacher)
    built(transfer, whole)
    (of_map,) = transfer.needs.reduced
    assert transfer.needs.teacher_taps == () and transfer.needs.student_taps == ("a",)
    maps = of_map.from_taps(teacher)
    assert maps.shape == (2, 16)
    reduced = replace(whole, teacher=View(whole.teacher.logits, reduced={of_map: maps}))
    assert torch.equal(transfer(reduced), transfer(whole))


# Gradients at the image


def test_gradient_attention_loss_equals_a_value_computed_by_hand():
    """Squared distances are 3² + 4² = 25 and 1: half of their sum, over a batch of two, is 6.5."""
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    teacher = torch.tensor([[0.0, 4.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    assert gradient_attention_loss(student, teacher).item() == 6.5
    assert gradient_attention_loss(student, student).item() == 0


def test_gradient_attention_has_the_gradient_of_its_value_in_every_weight():
    """Central differences in a small smooth network, where J itself is a gradient."""
    student, teacher = (network(seed) for seed in range(2))
    attention = GradientAttention(Attention(mapping="gradient"), SETTING)

    def value() -> torch.Tensor:
        return attention(Lesson(with_input_gradient(student), with_input_gradient(teacher), NO_BATCH))

    value().backward()
    for weight in student.parameters():
        flat, analytic = weight.data.view(-1), weight.grad.view(-1)
        for place in range(0, len(flat), 7):
            ends = []
            for step in (1e-5, -1e-5):
                flat[place] += step
                ends.append(value().item())
                flat[place] -= step
            assert analytic[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


NO_BATCH = Batch(torch.empty(0), torch.empty(0), torch.empty(0))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()


def with_input_gradient(network: nn.Module) -> View:
    images = normal(4, 2, 6, 5, seed=9).requires_grad_()
    logits = network(images)
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    return View(logits, input_gradient=gradient)
