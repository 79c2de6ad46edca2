import itertools

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.fsp import SolutionFlow, from_options, fsp_loss, fsp_matrix
from kdcore.spec.methods.features import Fsp
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal


def naive_matrix(shallow: torch.Tensor, deep: torch.Tensor) -> list:
    """Equation 1 for each sample; equal sizes."""
    places = [(row, column) for row in range(shallow.shape[2]) for column in range(shallow.shape[3])]
    return [
        [
            [sum(float(a[place]) * float(b[place]) for place in places) / len(places) for b in of_deep]
            for a in of_shallow
        ]
        for of_shallow, of_deep in zip(shallow, deep, strict=True)
    ]


def naive_loss(student: tuple, teacher: tuple) -> float:
    of_student, of_teacher = naive_matrix(*student), naive_matrix(*teacher)
    n, a, b = len(of_student), len(of_student[0]), len(of_student[0][0])
    entries = itertools.product(range(n), range(a), range(b))
    return sum((of_student[i][j][k] - of_teacher[i][j][k]) ** 2 for i, j, k in entries) / (n * a * b)


def layers(n: int, channels: tuple[int, int], size: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(n, channels[0], *size, seed=seed), normal(n, channels[1], *size, seed=seed + 1)


# One sample, two places: A has the channel (1, 2), B the channels (3, 4) and (0, 2).
SHALLOW, DEEP = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(1, 2, 1, 2)


def test_fsp_matrix_equals_a_value_computed_by_hand():
    """(1·3 + 2·4) / 2 = 5.5 and (1·0 + 2·2) / 2 = 2."""
    assert fsp_matrix(SHALLOW, DEEP).tolist() == [[[5.5, 2.0]]]


def test_fsp_loss_equals_a_value_computed_by_hand():
    """Against a teacher of zeros: (5.5² + 2²) / 2 = 17.125."""
    assert fsp_loss(SHALLOW, DEEP, torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 3, 3)).item() == 17.125


@pytest.mark.parametrize("channels", [(1, 1), (3, 5)], ids=str)
@pytest.mark.parametrize(("n", "size"), [(1, (1, 1)), (1, (3, 5)), (4, (4, 3))], ids=str)
def test_fsp_loss_equals_plain_loops(n, size, channels):
    student, teacher = layers(n, channels, size, 0), layers(n, channels, size, 2)
    assert fsp_loss(*student, *teacher).item() == pytest.approx(naive_loss(student, teacher), rel=1e-9)


@pytest.mark.parametrize("sizes", [((6, 6), (3, 3)), ((7, 4), (3, 5)), ((2, 2), (5, 5))], ids=str)
def test_fsp_matrix_averages_the_larger_layer_down_first(sizes):
    shallow, deep = normal(2, 3, *sizes[0]), normal(2, 4, *sizes[1], seed=1)
    pooled = torch.nn.AdaptiveAvgPool2d([min(pair) for pair in zip(*sizes, strict=True)])
    expected = naive_matrix(pooled(shallow), pooled(deep))
    assert torch.allclose(fsp_matrix(shallow, deep), torch.tensor(expected, dtype=torch.float64))


def options(*taps: str) -> Fsp:
    return Fsp(taps=taps)


def test_solution_flow_sums_over_each_layer_and_the_next():
    names = ("stem", "layer1", "layer2")
    student = {name: normal(2, 3 + i, 8 // 2**i, 8 // 2**i, seed=i) for i, name in enumerate(names)}
    teacher = {name: normal(2, 3 + i, 8 // 2**i, 8 // 2**i, seed=9 + i) for i, name in enumerate(names)}
    flow = built(SolutionFlow(options(*names), SETTING), lesson(student, teacher))
    expected = sum(
        fsp_loss(student[a], student[b], teacher[a], teacher[b]).item() for a, b in itertools.pairwise(names)
    )
    assert flow(lesson(student, teacher)).item() == pytest.approx(expected)


def test_solution_flow_refuses_layers_of_different_widths():
    flow, stem = SolutionFlow(options("stem", "layer1"), SETTING), normal(2, 3, 4, 4)
    with pytest.raises(SpecInvalid, match=r"tap 'layer1' has 4 channels, the teacher's 'layer1' has 6") as refusal:
        flow.build(lesson({"stem": stem, "layer1": normal(2, 4, 2, 2)}, {"stem": stem, "layer1": normal(2, 6, 2, 2)}))
    assert "fitnet" in refusal.value.hint


def test_from_options_puts_flows_first_and_leaves_no_objective():
    stages = from_options(options("stem", "layer1"), SETTING)
    assert isinstance(stages.first, SolutionFlow) and stages.then is None
