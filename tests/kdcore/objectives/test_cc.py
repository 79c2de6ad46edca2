import math
from itertools import pairwise

import pytest
import torch

from kdcore.objectives.cc import CorrelationCongruence, cc_gaussian_loss, cc_pairs_loss
from kdcore.spec.methods.relations import Cc
from tests.kdcore.objectives.lessons import maps
from tests.kdcore.objectives.two_networks import BODY, EMBEDDING, SETTING, NoHostReads, Trial

LOSSES = [cc_pairs_loss, cc_gaussian_loss]


def test_pairs_worked_out_by_hand():
    """Errors (1, 2), (3, 0), (2, 5): neighbours give 3 + 0 and 6 + 0, over two pairs."""
    student = torch.tensor([[1.0, -2.0], [3.0, 1.0], [0.0, 5.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert cc_pairs_loss(student, teacher).item() == (3 + 6) / 2


def test_gaussian_worked_out_by_hand():
    """The student's two vectors meet at a right angle (kernel exp(-2γ)), the teacher's are one (kernel
    exp(-2γ) · (1 + 2γ + (2γ)²/2)): with γ = 1/2 they differ by 3/2 · exp(-1), off the diagonal alone."""
    student, teacher = 3 * torch.eye(2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    by_hand = 2 * (1.5 * math.exp(-1)) ** 2 / 4
    assert cc_gaussian_loss(student, teacher, gamma=0.5, order=2).item() == pytest.approx(by_hand)


def naive_pairs(student: torch.Tensor, teacher: torch.Tensor) -> float:
    errors = [
        [abs(s - t) for s, t in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    products = [sum(p * q for p, q in zip(*pair, strict=True)) for pair in pairwise(errors)]
    return sum(products) / len(products)


def naive_gaussian(student: torch.Tensor, teacher: torch.Tensor, gamma: float = 0.4, order: int = 2) -> float:
    def kernel(x: list[list[float]]) -> list[float]:
        unit = [[value / math.hypot(*row) for value in row] for row in x]
        cosines = [sum(p * q for p, q in zip(a, b, strict=True)) for a in unit for b in unit]
        return [
            math.exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))
            for cosine in cosines
        ]

    pairs = list(zip(kernel(student.tolist()), kernel(teacher.tolist()), strict=True))
    return sum((s - t) ** 2 for s, t in pairs) / len(pairs)


NAIVE = {cc_pairs_loss: naive_pairs, cc_gaussian_loss: naive_gaussian}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("n", "width"), [(2, 1), (5, 4), (8, 3)])
def test_losses_agree_with_plain_loops(loss, n, width):
    student, teacher = maps(n, width), maps(n, width, seed=1)
    by_loops = NAIVE[loss](student, teacher)
    assert loss(student, teacher).item() == pytest.approx(by_loops, rel=1e-9)
    assert loss(student.float(), teacher.float()).item() == pytest.approx(by_loops, rel=1e-5)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_gaussian_takes_any_order_and_gamma(order):
    student, teacher = maps(4, 3), maps(4, 3, seed=1)
    by_loops = naive_gaussian(student, teacher, gamma=1.3, order=order)
    assert cc_gaussian_loss(student, teacher, gamma=1.3, order=order).item() == pytest.approx(by_loops, rel=1e-9)


def test_a_long_series_is_the_rbf_kernel():
    student, teacher = maps(4, 3), maps(4, 3, seed=1)

    def kernel(x: torch.Tensor) -> torch.Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return torch.exp(-0.4 * (unit[:, None] - unit).square().sum(2))

    exact = (kernel(student) - kernel(teacher)).square().mean()
    assert cc_gaussian_loss(student, teacher, order=12).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_right_on_both_sides(loss):
    assert torch.autograd.gradcheck(loss, (maps(4, 3).requires_grad_(), maps(4, 3, seed=1).requires_grad_()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(maps(1, 4), maps(1, 4, seed=1)), (maps(5, 4), maps(5, 4)), (torch.zeros(3, 2), torch.zeros(3, 2))],
    ids=["batch of one", "equal sides", "zeros"],
)
def test_nothing_to_compare_is_zero_with_a_zero_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-15) and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_an_embedding_of_zeros_keeps_value_and_gradient_finite(loss):
    student, teacher = maps(3, 2), maps(3, 2, seed=1)
    student[1] = 0
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.norm() < 10


FORMS = pytest.mark.parametrize("form", ["pairs", "gaussian"])


def trial(form: str) -> Trial:
    return Trial(CorrelationCongruence(Cc(tap=EMBEDDING, form=form, width=5), SETTING))


@FORMS
def test_the_objective_owns_a_linear_embedding_of_each_side(form):
    objective = trial(form).objective
    assert (objective.needs.student_taps, objective.needs.teacher_taps) == (("fc@in",), ("head@in",))
    assert sum(p.numel() for p in objective.parameters()) == (4 + 1) * 5 + (7 + 1) * 5


@FORMS
def test_the_objective_compares_the_embeddings(form):
    built = trial(form)
    lesson = built.lesson([0, 4, 8])
    student = built.objective.student_embedding(lesson.student.taps["fc@in"])
    teacher = built.objective.teacher_embedding(lesson.teacher.taps["head@in"])
    loss = cc_pairs_loss if form == "pairs" else cc_gaussian_loss
    assert built.objective(lesson).item() == loss(student, teacher).item() > 0


@FORMS
def test_training_moves_the_student_and_both_embeddings_and_never_the_teacher(form):
    own = {f"objective.{side}_embedding.{part}" for side in ("student", "teacher") for part in ("weight", "bias")}
    assert trial(form).moved([0, 1, 2, 3, 4], [5, 6, 7]) == BODY | own


def test_the_teachers_network_gets_no_gradient_though_its_embedding_does():
    built = trial("pairs")
    built.teacher.requires_grad_(True)
    built.objective(built.lesson([0, 1, 2])).backward()
    assert all(p.grad is None for p in built.teacher.parameters())
    assert built.objective.teacher_embedding.weight.grad.abs().sum() > 0


@FORMS
def test_a_last_batch_of_one_does_no_harm(form):
    assert trial(form).moved([4]) == set()


def test_a_saved_state_gives_the_same_loss():
    first = trial("pairs")
    first.train([0, 1, 2])
    second = trial("pairs")
    second.objective.load_state_dict(first.objective.state_dict())
    second.student.load_state_dict(first.student.state_dict())
    assert second.objective(second.lesson([3, 4])).equal(first.objective(first.lesson([3, 4])))


@FORMS
def test_a_step_never_waits_for_the_device(form):
    built = trial(form)
    with NoHostReads():
        built.objective(built.lesson([0, 1, 2])).backward()
