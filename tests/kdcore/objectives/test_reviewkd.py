import itertools
import math

import pytest
import torch
from torch import nn

from kdcore.lesson import Lesson
from kdcore.objectives.reviewkd import Fusion, KnowledgeReview, hcl_loss
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters

TAPS = ("early", "late", "embedding")


def objective(*taps: str, mid_channels: int = 512, warmup_epochs: int = 0) -> KnowledgeReview:
    torch.manual_seed(0)
    options = features.ReviewKd(taps=taps or TAPS, mid_channels=mid_channels, warmup_epochs=warmup_epochs)
    return KnowledgeReview(options, SETTING)


def maps(epoch: int = 0) -> Lesson:
    student = {"early": normal(4, 3, 6, 6), "late": normal(4, 4, 3, 3, seed=1), "embedding": normal(4, 4, seed=2)}
    teacher = {"early": normal(4, 5, 6, 6), "late": normal(4, 6, 3, 3, seed=1), "embedding": normal(4, 6, seed=2)}
    return lesson(student, teacher, epoch=epoch)


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
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


def test_hcl_loss_equals_a_value_computed_by_hand():
    """Differences 1, 1, 1, -1 on 2x2: mean square 1. Pooled, they are ½, whose square is ¼. Weights 1 and ½."""
    student = torch.tensor([1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    assert hcl_loss(student, torch.zeros(1, 1, 2, 2)).item() == pytest.approx((1 + 0.25 / 2) / 1.5)


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (3, 2, 5, 7), (2, 2, 9, 3), (1, 1, 4, 4), (2, 1, 1, 6), (4, 5, 1, 1)], ids=str
)
def test_hcl_loss_equals_the_levels_in_plain_loops(shape):
    student, teacher = normal(*shape), normal(*shape, seed=1)
    assert hcl_loss(student, teacher).item() == pytest.approx(naive(student, teacher), abs=1e-9)


def test_fusion_equals_a_value_computed_by_hand():
    """One channel throughout, no batch statistics. The map 3 enters as 2·3 = 6. With attention weights of zero both
    sides count half, σ(0): 6/2 + 4/2 = 5 is carried on; a kernel with 1 at its centre passes it on unchanged, in the
    teacher's size."""
    fusion = Fusion(1, 1, 1, deepest=False).eval()
    for weight, value in ((fusion.enter[0].weight, 2.0), (fusion.attend[0].weight, 0.0), (fusion.attend[0].bias, 0.0)):
        nn.init.constant_(weight, value)
    nn.init.dirac_(fusion.leave[0].weight)
    review, carried = fusion(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 1), 4.0), (4, 3))
    assert review.shape == carried.shape == (1, 1, 4, 3)
    assert carried.flatten().tolist() == pytest.approx([5.0] * 12, rel=1e-4)
    assert review.flatten().tolist() == pytest.approx([5.0] * 12, rel=1e-4)


def test_fusion_has_an_attention_map_for_each_side():
    """Biases of ±100 leave only the student's map in the mixture."""
    fusion = Fusion(2, 2, 3, deepest=False).eval()
    nn.init.constant_(fusion.attend[0].weight, 0.0)
    with torch.no_grad():
        fusion.attend[0].bias.copy_(torch.tensor([100.0, -100.0]))
    student = normal(1, 2, 3, 3, dtype=torch.float32)
    _, carried = fusion(student, normal(1, 2, 1, 1, dtype=torch.float32), (3, 3))
    assert torch.allclose(carried, fusion.enter(student))


@pytest.mark.parametrize(("limit", "mid"), [(512, 4), (3, 3)], ids=["the embedding's width", "the limit"])
def test_knowledge_review_has_blocks_as_large_as_the_papers(limit, mid):
    """1x1 in, 3x3 out, a batch norm after each; attention with bias everywhere but at the deepest."""
    review = built(objective(mid_channels=limit), maps())
    enter = (3 + 4 + 4) * mid + 3 * 2 * mid
    leave = 9 * mid * (5 + 6 + 6) + 2 * (5 + 6 + 6)
    attend = 2 * (2 * mid * 2 + 2)
    assert parameters(review) == enter + leave + attend


def test_knowledge_review_sums_the_losses_of_its_blocks():
    seen = maps()
    review = built(objective(), seen).eval()
    student, teacher = seen.student.taps, seen.teacher.taps
    deep, carried = review.blocks[0](student["embedding"][:, :, None, None], None, (1, 1))
    middle, carried = review.blocks[1](student["late"], carried, (3, 3))
    shallow, _ = review.blocks[2](student["early"], carried, (6, 6))
    expected = hcl_loss(deep, teacher["embedding"][:, :, None, None])
    expected = expected + hcl_loss(middle, teacher["late"]) + hcl_loss(shallow, teacher["early"])
    assert review(seen).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("epoch", "warmup_epochs", "factor"), [(0, 20, 0.05), (4, 20, 0.25), (19, 20, 1), (49, 20, 1), (0, 0, 1)], ids=str
)
def test_knowledge_review_grows_over_the_warmup(epoch, warmup_epochs, factor):
    warming, warm = (built(objective("early", warmup_epochs=epochs), maps()) for epochs in (warmup_epochs, 0))
    assert warming(maps(epoch)).item() == pytest.approx(factor * warm(maps(epoch)).item())
