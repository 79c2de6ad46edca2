import itertools

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.fsp import SolutionFlow, from_options, fsp_loss, fsp_matrix
from kdcore.spec.methods.features import Fsp
from tests.kdcore.objectives.feature_pairs import SETTING, UP_TO_DEEP, Looker, changed_by_training
from tests.kdcore.objectives.lessons import lesson, maps, parameters


def matrix_by_loops(shallow: torch.Tensor, deep: torch.Tensor) -> list:
    """Equation 1 for each sample; equal sizes."""
    places = [(row, column) for row in range(shallow.shape[2]) for column in range(shallow.shape[3])]
    return [
        [
            [sum(float(a[place]) * float(b[place]) for place in places) / len(places) for b in of_deep]
            for a in of_shallow
        ]
        for of_shallow, of_deep in zip(shallow, deep, strict=True)
    ]


def loss_by_loops(student: tuple, teacher: tuple) -> float:
    of_student, of_teacher = matrix_by_loops(*student), matrix_by_loops(*teacher)
    n, a, b = len(of_student), len(of_student[0]), len(of_student[0][0])
    entries = itertools.product(range(n), range(a), range(b))
    return sum((of_student[i][j][k] - of_teacher[i][j][k]) ** 2 for i, j, k in entries) / (n * a * b)


def layers(n: int, channels: tuple[int, int], size: tuple[int, int], seed: int, dtype=torch.float64) -> tuple:
    return maps(n, channels[0], *size, seed=seed, dtype=dtype), maps(n, channels[1], *size, seed=seed + 1, dtype=dtype)


# One sample, two places: A has the channel (1, 2), B the channels (3, 4) and (0, 2).
SHALLOW, DEEP = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(1, 2, 1, 2)


def test_the_flow_worked_out_by_hand():
    """(1·3 + 2·4) / 2 = 5.5 and (1·0 + 2·2) / 2 = 2."""
    assert fsp_matrix(SHALLOW, DEEP).tolist() == [[[5.5, 2.0]]]


def test_the_loss_worked_out_by_hand():
    """Against a teacher of zeros: (5.5² + 2²) / 2 = 17.125."""
    assert fsp_loss(SHALLOW, DEEP, torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 3, 3)).item() == 17.125


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (3, 5)], ids=str)
@pytest.mark.parametrize(("n", "size"), [(1, (1, 1)), (1, (3, 5)), (4, (4, 3))], ids=str)
def test_the_loss_agrees_with_loops(n, size, channels, dtype, tolerance):
    student, teacher = layers(n, channels, size, 0, dtype), layers(n, channels, size, 2, dtype)
    value = fsp_loss(*student, *teacher)
    assert value.dtype == dtype and value.item() == pytest.approx(loss_by_loops(student, teacher), rel=tolerance)


@pytest.mark.parametrize("sizes", [((6, 6), (3, 3)), ((7, 4), (3, 5)), ((2, 2), (5, 5))], ids=str)
def test_the_larger_layer_of_a_flow_is_averaged_down_first(sizes):
    shallow, deep = maps(2, 3, *sizes[0]), maps(2, 4, *sizes[1], seed=1)
    pooled = torch.nn.AdaptiveAvgPool2d([min(pair) for pair in zip(*sizes, strict=True)])
    expected = matrix_by_loops(pooled(shallow), pooled(deep))
    assert torch.allclose(fsp_matrix(shallow, deep), torch.tensor(expected, dtype=torch.float64))


def test_student_and_teacher_may_differ_in_size():
    assert fsp_loss(*layers(2, (3, 4), (6, 5), 0), *layers(2, (3, 4), (2, 3), 2)).isfinite()


def test_the_gradient_is_right_and_never_reaches_the_teacher():
    student, teacher = layers(2, (2, 3), (3, 2), 0), layers(2, (2, 3), (3, 2), 2)
    for layer in (*student, *teacher):
        layer.requires_grad_()
    held = [layer.detach() for layer in teacher]
    assert torch.autograd.gradcheck(lambda shallow, deep: fsp_loss(shallow, deep, *held), student)
    fsp_loss(*student, *teacher).backward()
    assert all(layer.grad.abs().sum() > 0 for layer in student)
    assert all(layer.grad is None for layer in teacher)


@pytest.mark.parametrize(
    "same", [layers(3, (2, 3), (4, 5), 0), (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1))], ids=["random", "zero"]
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(same):
    student = [layer.clone().requires_grad_() for layer in same]
    value = fsp_loss(*student, *same)
    value.backward()
    assert value.item() == 0 and not any(layer.grad.any() for layer in student)


@pytest.mark.parametrize("dead", ["student", "teacher"])
def test_maps_of_zeros_give_a_finite_gradient(dead):
    sides = {"student": layers(2, (2, 3), (4, 4), 0), "teacher": layers(2, (2, 3), (4, 4), 2)}
    sides[dead] = tuple(map(torch.zeros_like, sides[dead]))
    for layer in sides["student"]:
        layer.requires_grad_()
    value = fsp_loss(*sides["student"], *sides["teacher"])
    value.backward()
    assert value.isfinite() and all(layer.grad.isfinite().all() for layer in sides["student"])


def options(*taps: str) -> Fsp:
    return Fsp(taps=taps, pretraining_epochs=3)


def test_the_objective_sums_over_each_layer_and_the_next():
    names = ("stem", "layer1", "layer2")
    student = {name: maps(2, 3 + i, 8 // 2**i, 8 // 2**i, seed=i) for i, name in enumerate(names)}
    teacher = {name: maps(2, 3 + i, 8 // 2**i, 8 // 2**i, seed=9 + i) for i, name in enumerate(names)}
    flow = SolutionFlow(options(*names), SETTING)
    flow.build(lesson(student, teacher))
    expected = sum(
        fsp_loss(student[a], student[b], teacher[a], teacher[b]).item() for a, b in itertools.pairwise(names)
    )
    assert flow(lesson(student, teacher)).item() == pytest.approx(expected)
    assert flow.needs.student_taps == flow.needs.teacher_taps == names


def test_training_changes_the_student_alone():
    flow = SolutionFlow(options("shallow", "deep"), SETTING)
    assert changed_by_training(flow, Looker(3, 4, seed=0), Looker(3, 4, seed=1)) == UP_TO_DEEP
    assert parameters(flow) == 0 and not flow.state_dict()


def test_layers_of_other_widths_are_refused():
    flow = SolutionFlow(options("stem", "layer1"), SETTING)
    stem = maps(2, 3, 4, 4)
    with pytest.raises(SpecInvalid, match=r"tap 'layer1' has 4 channels, the teacher's 'layer1' has 6") as refusal:
        flow.build(lesson({"stem": stem, "layer1": maps(2, 4, 2, 2)}, {"stem": stem, "layer1": maps(2, 6, 2, 2)}))
    assert "fitnet" in refusal.value.hint


def test_flows_come_alone_and_labels_alone_after_them():
    stages = from_options(options("stem", "layer1"), SETTING)
    assert isinstance(stages.first, SolutionFlow) and stages.then is None
