import itertools
import math

import pytest
import torch
from torch import nn

from base.errors import SpecInvalid
from kdcore.objectives.reviewkd import Fusion, KnowledgeReview, hcl_loss
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, Classroom, lesson, maps, parameters

TAPS = ("early", "late", "embedding")


def objective(*taps: str, mid_channels: int = 512, warmup_epochs: int = 0) -> KnowledgeReview:
    options = features.ReviewKd(taps=taps or TAPS, mid_channels=mid_channels, warmup_epochs=warmup_epochs)
    return KnowledgeReview(options, SETTING)


def naive(student, teacher) -> float:
    n, c, h, w = student.shape
    total, weights, weight = 0.0, 0.0, 1.0
    for rows, columns in [(h, w)] + [(size, size) for size in (4, 2, 1) if size < min(h, w)]:
        squares = 0.0
        for i, j, y, x in itertools.product(range(n), range(c), range(rows), range(columns)):
            window = list(
                itertools.product(
                    range(y * h // rows, math.ceil((y + 1) * h / rows)),
                    range(x * w // columns, math.ceil((x + 1) * w / columns)),
                )
            )
            means = [sum(side[i, j, a, b].item() for a, b in window) / len(window) for side in (student, teacher)]
            squares += (means[0] - means[1]) ** 2
        total, weights, weight = total + weight * squares / (n * c * rows * columns), weights + weight, weight / 2
    return total / weights


def test_hcl_worked_out_by_hand():
    """Differences 1, 1, 1, -1 on 2x2: mean square 1. Pooled, they are ½, whose square is ¼. Weights 1 and ½."""
    student = torch.tensor([1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    assert hcl_loss(student, torch.zeros(1, 1, 2, 2)).item() == pytest.approx((1 + 0.25 / 2) / 1.5)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["double", "single"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (3, 2, 5, 7), (2, 2, 9, 3), (1, 1, 4, 4), (2, 1, 1, 6), (4, 5, 1, 1)], ids=str
)
def test_hcl_is_the_levels_written_out(shape, dtype, close):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    assert hcl_loss(student, teacher).item() == pytest.approx(naive(student, teacher), abs=close)


def test_hcl_of_a_single_place_is_the_mean_squared_difference():
    student, teacher = maps(4, 5, 1, 1), maps(4, 5, 1, 1, seed=1)
    assert hcl_loss(student, teacher).item() == pytest.approx((student - teacher).square().mean().item())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teacher = maps(2, 3, 5, 4)
    student = teacher.clone().requires_grad_()
    value = hcl_loss(student, teacher)
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_gradients_are_right_and_none_reaches_the_teacher():
    student, teacher = maps(2, 2, 5, 3).requires_grad_(), maps(2, 2, 5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: hcl_loss(s, teacher.detach()), student)
    hcl_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_fusion_worked_out_by_hand():
    """One channel throughout, no batch statistics. The map 3 enters as 2·3 = 6. With attention weights of zero both
    sides count half, σ(0): 6/2 + 4/2 = 5 is carried on; a kernel with 1 at its centre lets it out as it is, at the
    teacher's size."""
    fusion = Fusion(1, 1, 1, deepest=False).eval()
    for weight, value in ((fusion.enter[0].weight, 2.0), (fusion.attend[0].weight, 0.0), (fusion.attend[0].bias, 0.0)):
        nn.init.constant_(weight, value)
    nn.init.dirac_(fusion.leave[0].weight)
    review, carried = fusion(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 1), 4.0), (4, 3))
    assert review.shape == carried.shape == (1, 1, 4, 3)
    assert carried.flatten().tolist() == pytest.approx([5.0] * 12, rel=1e-4)
    assert review.flatten().tolist() == pytest.approx([5.0] * 12, rel=1e-4)


def test_attention_gives_each_side_a_map_of_its_own():
    """Biases of ±100 leave the student's map alone in the mixture."""
    fusion = Fusion(2, 2, 3, deepest=False).eval()
    nn.init.constant_(fusion.attend[0].weight, 0.0)
    with torch.no_grad():
        fusion.attend[0].bias.copy_(torch.tensor([100.0, -100.0]))
    student = maps(1, 2, 3, 3, dtype=torch.float32)
    _, carried = fusion(student, maps(1, 2, 1, 1, dtype=torch.float32), (3, 3))
    assert torch.allclose(carried, fusion.enter(student))


@pytest.mark.parametrize(("limit", "mid"), [(512, 4), (3, 3)], ids=["the embedding's width", "the limit"])
def test_the_blocks_are_as_large_as_the_papers(limit, mid):
    """1x1 in, 3x3 out, a batch norm after each; attention with bias everywhere but at the deepest."""
    room, review = Classroom(), objective(mid_channels=limit)
    assert review.needs.student_taps == review.needs.teacher_taps == TAPS
    room.build(review)
    enter = (3 + 4 + 4) * mid + 3 * 2 * mid
    leave = 9 * mid * (5 + 6 + 6) + 2 * (5 + 6 + 6)
    attend = 2 * (2 * mid * 2 + 2)
    assert parameters(review) == enter + leave + attend


def test_training_changes_the_student_and_all_blocks_and_no_teacher():
    room, review = Classroom(), objective()
    room.build(review)
    owned = {f"objective.{name}" for name, _ in review.named_parameters()}
    assert room.changed_by_training(review) == room.students() | owned


def test_the_loss_is_the_sum_over_taps_of_what_each_block_answers():
    room, review = Classroom(), objective()
    room.build(review)
    seen, review = room.lesson(), review.eval()
    student, teacher = seen.student.taps, seen.teacher.taps
    deep, carried = review.blocks[0](student["embedding"][:, :, None, None], None, (1, 1))
    middle, carried = review.blocks[1](student["late"], carried, (3, 3))
    shallow, _ = review.blocks[2](student["early"], carried, (6, 6))
    expected = hcl_loss(deep, teacher["embedding"][:, :, None, None])
    expected = expected + hcl_loss(middle, teacher["late"]) + hcl_loss(shallow, teacher["early"])
    assert review(seen).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("epoch", "warmup_epochs", "factor"), [(1, 20, 0.05), (5, 20, 0.25), (20, 20, 1), (50, 20, 1), (1, 0, 1)], ids=str
)
def test_the_loss_grows_with_the_epochs_until_the_warm_up_is_over(epoch, warmup_epochs, factor):
    taps = {"early": maps(2, 3, 4, 4)}
    seen = lesson(taps, {"early": maps(2, 3, 4, 4, seed=1)}, epoch=epoch)
    warming, warm = objective("early", warmup_epochs=warmup_epochs), objective("early")
    warming.build(seen)
    warm.build(seen)
    warm.load_state_dict(warming.state_dict())
    assert warming(seen).item() == pytest.approx(factor * warm(seen).item())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((maps(1, 1, 1, 1), maps(1, 1)), (maps(1, 1, 1, 1, seed=1), maps(1, 1, seed=1))),
        ((maps(2, 3, 7, 5), maps(2, 4)), (maps(2, 4, 3, 5, seed=1), maps(2, 6, seed=1))),
        ((maps(2, 3, 3, 2), maps(2, 4)), (maps(2, 3, 6, 4, seed=1), maps(2, 4, seed=1))),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)), (torch.zeros(2, 5, 4, 4), torch.zeros(2, 6))),
    ],
    ids=["one of each", "odd and larger", "smaller", "all zero"],
)
def test_value_and_gradient_are_finite(student, teacher):
    student = [side.clone().requires_grad_() for side in student]
    names = ("early", "embedding")
    seen = lesson(dict(zip(names, student, strict=True)), dict(zip(names, teacher, strict=True)))
    review = objective(*names)
    review.build(seen)
    value = review(seen)
    value.backward()
    assert value.shape == () and value.isfinite()
    assert all(side.grad.isfinite().all() for side in student)


def test_a_state_that_is_put_back_gives_the_same_loss():
    room, review, again = Classroom(), objective(), objective()
    room.build(review)
    room.changed_by_training(review)
    room.build(again)
    again.load_state_dict(review.state_dict())
    seen = room.lesson()
    assert torch.equal(again.eval()(seen), review.eval()(seen))


def test_tokens_are_refused_by_the_taps_name():
    with pytest.raises(SpecInvalid, match="tap 'early' gives 5 x 7 for each image"):
        objective("early").build(lesson({"early": maps(2, 5, 7)}, {"early": maps(2, 3, 4, 4)}))
