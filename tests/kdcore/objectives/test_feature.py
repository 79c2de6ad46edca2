import itertools
import math

import pytest
import torch

from kdcore.objectives.feature import FeatureMatching, feature_cosine_loss, feature_kl_loss, feature_l2_loss
from kdcore.spec.methods.features import Feature
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters


def naive_l2(student: list[float], teacher: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


def naive_cosine(student: list[float], teacher: list[float]) -> float:
    product = sum(s * t for s, t in zip(student, teacher, strict=True))
    return 1 - product / math.hypot(*student) / math.hypot(*teacher)


def naive_kl(student: list[float], teacher: list[float]) -> float:
    p_s, p_t = ([math.exp(z) / sum(map(math.exp, side)) for z in side] for side in (student, teacher))
    return sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))


LOSSES = {"l2": feature_l2_loss, "cosine": feature_cosine_loss, "kl": feature_kl_loss}
NAIVE = {"l2": naive_l2, "cosine": naive_cosine, "kl": naive_kl}
each_form = pytest.mark.parametrize("form", LOSSES)


def naive(form: str, student: torch.Tensor, teacher: torch.Tensor) -> float:
    """The mean over samples and places of the loss of the channels there; equal sizes."""
    places = list(itertools.product(*map(range, (student.shape[0], *student.shape[2:]))))
    return sum(
        NAIVE[form](*(side.movedim(1, -1)[place].tolist() for side in (student, teacher))) for place in places
    ) / len(places)


@pytest.mark.parametrize(
    ("form", "student", "teacher", "expected"),
    [
        ("l2", [1.0, 2.0], [4.0, -2.0], (9 + 16) / 2),
        ("cosine", [3.0, 4.0], [5.0, 0.0], 1 - 15 / 25),
        ("kl", [0.0, 0.0], [math.log(3), 0.0], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    ],
    ids=list(LOSSES),
)
def test_feature_losses_equal_values_computed_by_hand(form, student, teacher, expected):
    """Squares 9 and 16; a product of 15 of lengths 5 and 5; p = (3/4, 1/4) against (1/2, 1/2)."""
    assert LOSSES[form](torch.tensor([student]), torch.tensor([teacher])).item() == pytest.approx(expected)


@each_form
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (1, 3, 2, 2), (3, 4, 3, 5), (2, 1, 1, 4)], ids=str)
def test_feature_losses_equal_plain_loops(shape, form):
    student, teacher = normal(*shape), normal(*shape, seed=1)
    assert LOSSES[form](student, teacher).item() == pytest.approx(naive(form, student, teacher), rel=1e-9, abs=1e-9)


def test_feature_cosine_loss_sends_no_gradient_to_a_vector_of_zeros():
    student = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    value = feature_cosine_loss(student, torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    value.backward()
    assert value.item() == pytest.approx((1 + 0) / 2)
    assert not student.grad[0].any() and student.grad.abs().max().item() < 1e-6


def test_feature_cosine_loss_ignores_length_and_feature_kl_loss_a_shift():
    student, teacher = normal(3, 4), normal(3, 4, seed=1)
    cosine, kl = feature_cosine_loss(student, teacher).item(), feature_kl_loss(student, teacher).item()
    assert feature_cosine_loss(7 * student, teacher).item() == pytest.approx(cosine)
    assert feature_kl_loss(student + 7, teacher).item() == pytest.approx(kl)


@each_form
@pytest.mark.parametrize(
    ("student", "teacher", "projector", "weights"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), "auto", 3 * 5 + 5),
        ((2, 3, 7, 5), (2, 5, 4, 8), "auto", 3 * 5 + 5),
        ((2, 4, 4, 4), (2, 4, 2, 2), "auto", 0),
        ((2, 4, 4, 4), (2, 4, 4, 4), "always", 4 * 4 + 4),
        ((2, 6), (2, 8), "auto", 6 * 8 + 8),
        ((2, 6), (2, 6), "auto", 0),
        ((1, 6), (1, 6), "always", 6 * 6 + 6),
        ((2, 6, 3, 3), (2, 8), "auto", 6 * 8 + 8),
    ],
    ids=["maps", "odd maps", "equal widths", "always", "embeddings", "equal", "always 2d", "map to embedding"],
)
def test_feature_matching_has_a_projector_only_where_needed(student, teacher, projector, weights, form):
    student, teacher = normal(*student).requires_grad_(), normal(*teacher, seed=1)
    seen = lesson({"deep": student}, {"deep": teacher})
    matching = built(FeatureMatching(Feature(tap="deep", form=form, projector=projector), SETTING), seen)
    assert parameters(matching) == weights
    value = matching(seen)
    value.backward()
    assert student.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in matching.parameters())
    if weights == 0:
        assert value.item() == pytest.approx(LOSSES[form](student, teacher).item())
