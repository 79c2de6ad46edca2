import itertools
import math

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.feature import FeatureMatching, feature_cosine_loss, feature_kl_loss, feature_l2_loss
from kdcore.spec.methods.features import Feature
from tests.kdcore.objectives.feature_pairs import (
    SETTING,
    UP_TO_DEEP,
    Looker,
    changed_by_training,
    loss_survives_a_round_trip,
    under,
)
from tests.kdcore.objectives.lessons import lesson, maps, parameters

LOSSES = {"l2": feature_l2_loss, "cosine": feature_cosine_loss, "kl": feature_kl_loss}
each_form = pytest.mark.parametrize("form", LOSSES)


def l2_by_loops(student: list[float], teacher: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


def cosine_by_loops(student: list[float], teacher: list[float]) -> float:
    product = sum(s * t for s, t in zip(student, teacher, strict=True))
    return 1 - product / math.hypot(*student) / math.hypot(*teacher)


def kl_by_loops(student: list[float], teacher: list[float]) -> float:
    p_s, p_t = ([math.exp(z) / sum(map(math.exp, side)) for z in side] for side in (student, teacher))
    return sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))


BY_LOOPS = {"l2": l2_by_loops, "cosine": cosine_by_loops, "kl": kl_by_loops}


def by_loops(form: str, student: torch.Tensor, teacher: torch.Tensor) -> float:
    """The mean over samples and places of what the channels there are worth; equal sizes."""
    places = list(itertools.product(*map(range, (student.shape[0], *student.shape[2:]))))
    return sum(
        BY_LOOPS[form](*(side.movedim(1, -1)[place].tolist() for side in (student, teacher))) for place in places
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
def test_losses_worked_out_by_hand(form, student, teacher, expected):
    """Squares 9 and 16; a product of 15 of lengths 5 and 5; p = (3/4, 1/4) against (1/2, 1/2)."""
    assert LOSSES[form](torch.tensor([student]), torch.tensor([teacher])).item() == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@each_form
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (1, 3, 2, 2), (3, 4, 3, 5), (2, 1, 1, 4)], ids=str)
def test_losses_agree_with_loops(shape, form, dtype, tolerance):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    value = LOSSES[form](student, teacher)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(by_loops(form, student, teacher), rel=tolerance, abs=tolerance)


@each_form
def test_the_larger_map_is_averaged_down_first(form):
    student, teacher = maps(2, 3, 6, 5), maps(2, 3, 4, 7, seed=1)
    pooled = torch.nn.AdaptiveAvgPool2d((4, 5))
    expected = by_loops(form, pooled(student), pooled(teacher))
    assert LOSSES[form](student, teacher).item() == pytest.approx(expected)


@each_form
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 3)], ids=["embedding", "map"])
def test_the_gradient_is_right_and_never_reaches_the_teacher(shape, form):
    student, teacher = maps(*shape).requires_grad_(), maps(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda student: LOSSES[form](student, teacher.detach()), student)
    LOSSES[form](student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def float32(*shape: int, seed: int = 0) -> torch.Tensor:
    return maps(*shape, seed=seed, dtype=torch.float32)


@each_form
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (float32(1, 3), float32(1, 3, seed=1)),
        (torch.zeros(2, 3, 4, 4), float32(2, 3, 4, 4)),
        (float32(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (float32(2, 3) * 1e4, float32(2, 3, seed=1) * 1e4),
        (torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)),
    ],
    ids=["batch of one", "dead student", "dead teacher", "both dead", "huge", "one number"],
)
def test_value_and_gradient_are_finite(student, teacher, form):
    student = student.clone().requires_grad_()
    value = LOSSES[form](student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_a_vector_of_zeros_has_no_direction_and_gets_no_gradient():
    student = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    value = feature_cosine_loss(student, torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    value.backward()
    assert value.item() == pytest.approx((1 + 0) / 2)
    assert not student.grad[0].any() and student.grad.abs().max().item() < 1e-6


@each_form
def test_a_student_that_is_its_teacher_has_nothing_to_learn(form):
    teacher = maps(3, 4, 3, 2)
    student = teacher.clone().requires_grad_()
    value = LOSSES[form](student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max().item() < 1e-12


def test_the_cosine_is_blind_to_length_and_softmax_to_a_shift():
    student, teacher = maps(3, 4), maps(3, 4, seed=1)
    assert feature_cosine_loss(7 * student, teacher).item() == pytest.approx(
        feature_cosine_loss(student, teacher).item()
    )
    assert feature_kl_loss(student + 7, teacher).item() == pytest.approx(feature_kl_loss(student, teacher).item())


def objective(form: str = "l2", projector: str = "auto", tap: str = "deep") -> FeatureMatching:
    return FeatureMatching(Feature(tap=tap, form=form, projector=projector), SETTING)


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
    ids=[
        "maps",
        "odd maps",
        "equal widths",
        "always",
        "embeddings",
        "equal embeddings",
        "always 2d",
        "map to embedding",
    ],
)
def test_a_projector_comes_where_it_is_needed_and_learns(student, teacher, projector, weights, form):
    matching = objective(form, projector)
    student, teacher = maps(*student).requires_grad_(), maps(*teacher, seed=1)
    seen = lesson({"deep": student}, {"deep": teacher})
    matching.build(seen)
    assert parameters(matching) == weights
    value = matching(seen)
    value.backward()
    assert value.shape == () and value.isfinite()
    assert student.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in matching.parameters())


@each_form
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3, 3)], ids=["embedding", "map"])
def test_without_a_projector_the_objective_is_the_loss(shape, form):
    student, teacher = maps(*shape), maps(*shape, seed=1)
    seen = lesson({"deep": student}, {"deep": teacher})
    matching = objective(form)
    matching.build(seen)
    assert matching(seen).item() == pytest.approx(LOSSES[form](student, teacher).item())


@each_form
@pytest.mark.parametrize("tap", ["deep", "embedding"])
def test_training_changes_the_student_up_to_the_tap_and_the_projector_alone(tap, form):
    matching = objective(form, tap=tap)
    changed = changed_by_training(matching, Looker(3, 4, seed=0), Looker(5, 6, seed=1))
    assert changed == UP_TO_DEEP | under("objective", ["projector.weight", "projector.bias"])


@pytest.mark.parametrize("deep", [4, 6], ids=["projected", "not projected"])
def test_its_state_resumes_it(deep):
    assert loss_survives_a_round_trip(objective(), objective(), Looker(3, deep, seed=0), Looker(5, 6, seed=1))


def test_it_asks_for_one_layer_on_each_side():
    matching = objective(tap={"student": "fc@in", "teacher": "classifier@in"})
    assert (matching.needs.student_taps, matching.needs.teacher_taps) == (("fc@in",), ("classifier@in",))


def test_what_is_neither_map_nor_embedding_is_refused():
    sequence = {"deep": maps(2, 4, 5)}
    with pytest.raises(SpecInvalid, match="tap 'deep' gives 4 x 5 for each image"):
        objective().build(lesson(sequence, sequence))
