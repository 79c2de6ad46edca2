import math

import pytest
import torch

from kdcore.objectives.sp import SimilarityPreserving, sp_loss
from kdcore.spec.methods.relations import Sp
from tests.kdcore.objectives.lessons import SETTING, lesson, normal


def test_sp_loss_equals_a_value_computed_by_hand():
    """The student's two images are orthogonal (G = I); the teacher's are equal (every entry is 1/√2)."""
    student, teacher = torch.eye(2).reshape(2, 2, 1, 1), torch.ones(2, 2, 1, 1)
    root = math.sqrt(1 / 2)
    assert sp_loss(student, teacher).item() == pytest.approx((2 * (1 - root) ** 2 + 2 * root**2) / 4)


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
    def similarities(maps: torch.Tensor) -> list[float]:
        rows = maps.flatten(1).tolist()
        products = [[sum(p * q for p, q in zip(a, b, strict=True)) for b in rows] for a in rows]
        return [product / math.hypot(*row) for row in products for product in row]

    pairs = list(zip(similarities(student), similarities(teacher), strict=True))
    return sum((s - t) ** 2 for s, t in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((5, 3, 4, 4), (5, 6, 4, 4)), ((4, 1, 3, 5), (4, 2, 7, 2)), ((3, 6), (3, 2)), ((2, 5, 4), (2, 3, 4))],
    ids=["widths differ", "odd and one channel", "embeddings", "tokens"],
)
def test_sp_loss_equals_plain_loops(student, teacher):
    student, teacher = normal(*student), normal(*teacher, seed=1)
    assert sp_loss(student, teacher).item() == pytest.approx(naive(student, teacher), rel=1e-9)


def test_sp_loss_of_a_scaled_teacher_is_zero():
    teacher = normal(8, 4, 3, 3)
    assert sp_loss(7 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_sp_loss_of_one_image_is_zero_unless_one_layer_is():
    student, teacher = normal(1, 4, 3, 3).requires_grad_(), normal(1, 2, 5, 5, seed=1)
    value = sp_loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12
    assert sp_loss(torch.zeros(1, 4, 3, 3), teacher.float()).item() == pytest.approx(1)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_sp_loss_stays_small_with_a_map_of_zeros(side):
    """The map's row of G is 0, the other side's has length 1."""
    student, teacher = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1)
    if side != "teacher":
        student[1] = 0
    if side != "student":
        teacher[1] = 0
    student.requires_grad_()
    value = sp_loss(student, teacher)
    value.backward()
    assert 0 <= value.item() < 1 and student.grad.norm() < 10


def test_sp_loss_sends_a_gradient_to_a_map_of_zeros_by_its_column():
    """Of the other rows of G: F_j / ‖A_j‖ for each entry (j, i); its own row is constant."""
    student, teacher = normal(3, 4), normal(3, 4, seed=1)
    student[1] = 0
    student.requires_grad_()
    sp_loss(student, teacher).backward()
    similar = student.detach() @ student.detach().T
    similar = similar / similar.norm(dim=1, keepdim=True).clamp(min=1e-12)
    difference = similar - naive_matrix(teacher)
    lengths = (student.detach() @ student.detach().T).norm(dim=1)
    by_hand = sum(2 / 9 * difference[j, 1] * student.detach()[j] / lengths[j] for j in (0, 2))
    assert torch.allclose(student.grad[1], by_hand) and student.grad[1].norm() > 1e-3


def naive_matrix(rows: torch.Tensor) -> torch.Tensor:
    products = rows @ rows.T
    return products / products.norm(dim=1, keepdim=True)


def test_sp_loss_of_two_layers_of_zeros_is_zero_without_gradient():
    dead = torch.zeros(3, 2, 2, 2, requires_grad=True)
    value = sp_loss(dead, torch.zeros(3, 1, 4, 4))
    value.backward()
    assert value.item() == 0 and dead.grad.count_nonzero() == 0


def test_similarity_preserving_compares_its_tap():
    student, teacher = normal(3, 4, 2, 2), normal(3, 7, 5, 3, seed=1)
    objective = SimilarityPreserving(Sp(tap="body"), SETTING)
    value = objective(lesson({"body": student}, {"body": teacher}))
    assert value.item() == sp_loss(student, teacher).item() > 0 and not objective.state_dict()
