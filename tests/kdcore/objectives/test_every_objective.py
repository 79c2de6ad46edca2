"""Properties that all objectives share, for every method and every form of it.

A new method is included automatically: the methods and their forms are read from the options classes. The sets below
name the methods of which a property is not true, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from base.errors import EngineError, SpecInvalid
from kdcore.lesson import EMBEDDING, Batch, Lesson, View
from kdcore.objectives import OBJECTIVES
from kdcore.objectives.objective import Objective, TwoStages
from kdcore.objectives.standardized import Standardized
from kdcore.spec.methods import METHODS, Method, Options
from tests.kdcore.objectives.lessons import LABELS, NoHostReads, built, normal, setting

EQUAL_WIDTHS = {"byot", "fsp"}
"""Methods without a layer between student and teacher; the others are tested with different widths."""

TEACHER_ALONE = {"factor_transfer first"}
"""Objectives that prepare something of their own and read no student."""

READ_LABELS = {"dkd", "nkd"}
"""Methods whose loss depends on the batch's labels. Rules refuse mixed and unknown labels for them."""

HALVED = {"pkt", "sp"}
"""Relational losses that divide by N² and normalise rows: a batch that is repeated gives half the value."""

DEPENDS_ON_ORDER = {"cc", "crd"}
"""cc multiplies the errors of neighbouring samples (its gaussian form has a test of its own); crd draws negatives."""

NOT_A_DISTANCE = {"activation_boundary", "born_again", "byot", "kd form=cross_entropy", "nkd", "ttm"}
"""Cross-entropies, a hinge with a margin, a temperature on one side only: they are not 0 for equal sides."""

POOLED = {"activation_boundary", "attention", "feature", "fitnet", "nst", "ofd", "vid"}
"""Methods that average the larger of two maps down. The linear regressor of fitnet reads all of both maps instead."""

ANY_SHAPE = {"cc", "crd", "fitnet regressor=linear", "pkt", "rkd", "sp"}
"""Methods that flatten an activation to one vector for each image."""

REFUSES_ONE_IMAGE = {"fitnet regressor=linear"}
"""A batch norm over vectors has no variance in a batch of one; torch's error says so."""

STEEP_AT_ZERO = {"pkt"}
"""The authors divide by the length plus 1e-7: the gradient of a zero vector beside others is up to 1e7 times larger."""

HELD_CONSTANT = {"nst kernel=gaussian"}
"""A part of the loss is constant for its gradient, so that the numerical gradient differs; its own test compares it."""


def made_by(method: Options) -> Objective | TwoStages:
    options = method.loss_options
    return OBJECTIVES[options.name](options, setting(temperature=3.0))


@dataclass(frozen=True)
class Case:
    """One form of one method, and which of its two stages."""

    name: str
    form: str
    stage: str
    options: Options

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.form, self.stage)))

    def among(self, names: set[str]) -> bool:
        """The set names the method, one of its stages, or this very form."""
        return not names.isdisjoint({self.name, f"{self.name} {self.stage}", str(self)})

    def objective(self) -> Objective:
        torch.manual_seed(0)
        made = made_by(self.options)
        if isinstance(made, TwoStages):
            made = made.first if self.stage == "first" else made.then
            assert made is not None
        return Standardized(made) if self.options.standardizes else made

    @property
    def teacher_sizes(self) -> dict[str, tuple[int, ...]]:
        return STUDENT if self.name in EQUAL_WIDTHS else TEACHER


def forms(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The method's defaults, and for each of its switches each other value."""
    yield {}
    for name, field in fields.items():
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        values = (True, False) if field.annotation is bool else values
        yield from ({name: value} for value in values if value != field.default)


def needed(fields: dict[str, Any]) -> dict[str, Any]:
    """Values of the options that resolve() would fill in."""
    pairs = [{"student": name, "teacher": f"teacher.{name}"} for name in ("early", "late")]
    filled = {"tap": pairs[1], "taps": pairs, "margins": ["early_norm", "late_norm"]}
    epochs = {name: 1 for name in fields if name.endswith("_epochs")}
    return epochs | {name: value for name, value in filled.items() if name in fields}


def cases() -> Iterator[Case]:
    method = TypeAdapter(Method)
    for name in METHODS:
        if name == "supervised":
            continue  # Labels alone.
        fields = METHODS[name].model_fields
        for form in forms(fields):
            options = method.validate_python({"name": name, **needed(fields), **form})
            made = made_by(options)
            text = ",".join(f"{key}={value}" for key, value in form.items())
            if isinstance(made, TwoStages):
                yield Case(name, text, "first", options)
            if not isinstance(made, TwoStages) or made.then is not None:
                yield Case(name, text, "then" if isinstance(made, TwoStages) else "", options)


CASES = list(cases())
every_case = pytest.mark.parametrize("case", CASES, ids=str)

CLASSES = 3
STUDENT = {"early": (3, 6, 5), "late": (4, 3, 2), EMBEDDING: (4,)}
TEACHER = {"early": (5, 6, 5), "late": (6, 3, 2), EMBEDDING: (4,)}

Tensors = dict[str, Tensor]
"""One side's logits, input gradient and taps, by name."""


def side(sizes: dict[str, tuple[int, ...]], images: int, seed: int, dtype: torch.dtype) -> Tensors:
    shapes = {"logits": (CLASSES,), "input_gradient": (2, 4, 4), **sizes}
    return {
        name: normal(images, *shape, seed=seed + at, dtype=dtype) for at, (name, shape) in enumerate(shapes.items())
    }


def sides(case: Case, images: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    return side(STUDENT, images, 0, dtype), side(case.teacher_sizes, images, 50, dtype)


def lesson(student: Tensors, teacher: Tensors, labels: Tensor | None = None, index: Tensor | None = None) -> Lesson:
    """The lesson of these tensors; taps of the teacher have paths of their own."""
    norms = {f"{name}_norm": nn.BatchNorm2d(teacher[name].shape[1]) for name in ("early", "late")}
    taps = {f"teacher.{name}": tensor for name, tensor in teacher.items()} | {EMBEDDING: teacher[EMBEDDING]}
    index = torch.arange(len(student["logits"])) % 9 if index is None else index
    labels = LABELS[index] % CLASSES if labels is None else labels
    return Lesson(
        View(student["logits"], student, student["input_gradient"]),
        View(teacher["logits"], taps, teacher["input_gradient"], norms),
        Batch(torch.empty(0), labels, index),
    )


def leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def gradients(tensors: Tensors) -> Tensors:
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def made(case: Case, student: Tensors, teacher: Tensors) -> Objective:
    return built(case.objective(), lesson(student, teacher))


def loss_and_gradients(objective: Objective, student: Tensors, teacher: Tensors, **batch: Any) -> list[Tensor]:
    """The loss, then the gradients of the student's tensors and of the objective's own parameters."""
    student = leaves(student)
    objective.zero_grad()
    value = objective(lesson(student, teacher, **batch))
    value.backward()
    own = [p.grad for p in objective.parameters() if p.grad is not None]
    return [value.detach(), *gradients(student).values(), *own]


@every_case
def test_objective_reads_the_taps_of_its_options(case):
    needs, pairs = case.objective().needs, case.options.pairs
    by_gradient = case.options.compares_gradients
    expected = () if by_gradient or str(case).endswith("two then") else pairs
    assert needs.teacher_taps == tuple(pair.teacher for pair in expected)
    assert needs.student_taps == (() if case.among(TEACHER_ALONE) else tuple(pair.student for pair in expected))
    assert needs.input_gradient == by_gradient
    assert needs.teacher_layers == (getattr(case.options, "margins", None) or ())


@every_case
def test_objective_sends_its_gradient_to_the_student_and_its_own_parameters(case):
    """To each tensor that it needs of the student, and to each parameter that it owns."""
    student, teacher = sides(case)
    objective, student = made(case, student, teacher), leaves(student)
    value = objective(lesson(student, teacher))
    value.backward()
    assert value.shape == ()
    needs = objective.needs
    read = needs.student_taps or (("input_gradient",) if needs.input_gradient else ("logits",))
    read = () if case.among(TEACHER_ALONE) else read
    assert set(gradients(student)) == {*read, *([EMBEDDING] if case.name == "byot" else [])}
    own = [p.grad for p in objective.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in [*gradients(student).values(), *own])
    assert not any(figure.requires_grad or figure.shape for figure in objective.observed.values())


@every_case
def test_objective_sends_no_gradient_to_the_teacher(case):
    """Neither to the teacher's tensors nor to its layers, even if they would accept one."""
    student, teacher = sides(case)
    objective, student, teacher = made(case, student, teacher), leaves(student), leaves(teacher)
    seen = lesson(student, teacher)
    owned = {id(p) for p in objective.parameters()}
    objective(seen).backward()
    assert not gradients(teacher)
    for layer in seen.teacher.layers.values():
        assert all(p.grad is None and id(p) not in owned for p in layer.parameters())


@every_case
def test_objective_is_a_mean_over_the_batch(case):
    """A batch that is repeated gives the same value."""
    if case.among(DEPENDS_ON_ORDER):
        pytest.skip("the order of the samples, or the draw of negatives, matters")
    student, teacher = sides(case, dtype=torch.float64)
    objective = made(case, student, teacher)
    twice = [{name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()} for tensors in (student, teacher)]
    index = torch.arange(4)
    once = objective(lesson(student, teacher, index=index)).item()
    expected = once / 2 if case.among(HALVED) else once
    assert objective(lesson(*twice, index=index.repeat(2))).item() == pytest.approx(expected, rel=1e-5)


@every_case
def test_objective_is_zero_for_equal_sides(case):
    """Value and gradient."""
    student, _ = sides(case, dtype=torch.float64)
    objective = made(case, student, student)
    if list(objective.parameters()) or case.among(NOT_A_DISTANCE):
        pytest.skip("no distance between the two sides, or one behind layers of its own")
    for number in loss_and_gradients(objective, student, student):
        assert number.abs().max().item() < 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if case.among(POOLED)], ids=str)
def test_objective_averages_the_larger_map_down_first(case):
    """Maps of 6 x 5 beside 4 x 7 give the same value as both averaged down to 4 x 5."""
    if "linear" in str(case) or not case.objective().needs.student_taps:
        pytest.skip("reads no maps, or all of them")
    student = {name: normal(4, *shape) for name, shape in (STUDENT | {"late": (4, 6, 5), "early": (3, 6, 5)}).items()}
    teacher = {name: normal(4, *shape, seed=1) for name, shape in (TEACHER | {"late": (6, 4, 7)}).items()}
    values = []
    for pool in (nn.Identity(), nn.AdaptiveAvgPool2d((4, 5))):
        pair = [side(STUDENT, 4, 0, torch.float64) | student, side(TEACHER, 4, 0, torch.float64) | teacher]
        for tensors in pair:
            tensors["late"] = pool(tensors["late"])
        values.append(made(case, *pair)(lesson(*pair)).item())
    assert values[0] == pytest.approx(values[1])


def scaled(of_student: float, of_teacher: float) -> Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]:
    def change(student: Tensors, teacher: Tensors) -> tuple[Tensors, Tensors]:
        return times(student, of_student), times(teacher, of_teacher)

    return change


def times(tensors: Tensors, factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in tensors.items()}


def with_a_zero_image(tensors: Tensors) -> Tensors:
    return {name: torch.cat([tensor[:1] * 0, tensor[1:]]) for name, tensor in tensors.items()}


def with_equal_images(tensors: Tensors) -> Tensors:
    return {name: tensor[:1].expand_as(tensor).clone() for name, tensor in tensors.items()}


def first(tensors: Tensors, images: int) -> Tensors:
    return {name: tensor[:images] for name, tensor in tensors.items()}


CHANGES = {
    "as they are": scaled(1, 1),
    "zero student": scaled(0, 1),
    "zero teacher": scaled(1, 0),
    "zero both": scaled(0, 0),
    "a zero image of the student": lambda student, teacher: (with_a_zero_image(student), teacher),
    "a zero image of the teacher": lambda student, teacher: (student, with_a_zero_image(teacher)),
    "equal images": lambda student, teacher: (with_equal_images(student), with_equal_images(teacher)),
    "equal images of the student": lambda student, teacher: (with_equal_images(student), teacher),
    "huge": scaled(1e4, 1e4),
    "huge student": scaled(1e4, 1),
    "tiny": scaled(1e-6, 1e-6),
}


def one_place(sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: (shape[0], *(1 for _ in shape[1:])) for name, shape in sizes.items()}


def other_sizes(sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Odd sizes: 3 x 5, smaller or larger."""
    return {name: (shape[0], *(2 * at + 3 for at in range(len(shape) - 1))) for name, shape in sizes.items()}


SHAPES = {
    "several images": (4, torch.float32, dict, dict),
    "one image of one place": (1, torch.float32, one_place, other_sizes),
    "float64": (4, torch.float64, other_sizes, dict),
}
"""Images, precision, and what becomes of the student's and of the teacher's sizes."""


@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_objective_is_finite_on_degenerate_input(case, shape):
    """Value and gradient; no gradient is as large as a division by the length of a zero vector makes it."""
    images, dtype, of_student, of_teacher = SHAPES[shape]
    if images == 1 and case.among(REFUSES_ONE_IMAGE):
        pytest.skip("refuses one image")
    pair = side(of_student(STUDENT), 4, 0, dtype), side(of_teacher(case.teacher_sizes), 4, 50, dtype)
    objective = made(case, *pair)
    for name, change in CHANGES.items():
        value, *found = loss_and_gradients(objective, *(first(tensors, images) for tensors in change(*pair)))
        assert value.dtype == dtype and value.isfinite(), name
        limit = math.inf if case.among(STEEP_AT_ZERO) or name.startswith(("huge", "tiny")) else 1e5
        assert all(gradient.isfinite().all() and gradient.abs().max() < limit for gradient in found), name


@pytest.mark.parametrize("case", [case for case in CASES if case.among(REFUSES_ONE_IMAGE)], ids=str)
def test_objective_that_cannot_compare_one_image_refuses_it(case):
    objective = made(case, *sides(case))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        objective(lesson(*sides(case, images=1)))


@every_case
def test_objective_refuses_sides_of_unequal_length(case):
    """One row of the student beside four of the teacher, or the reverse, must not be broadcast."""
    if case.among(TEACHER_ALONE):
        pytest.skip("reads no student")
    (student, teacher), (one_student, one_teacher) = sides(case), sides(case, images=1)
    objective = made(case, student, teacher)
    for pair in ((one_student, teacher), (student, one_teacher)):
        with pytest.raises(EngineError, match=r"different numbers of rows|the student's .* the teacher's"):
            objective(lesson(*pair, index=torch.arange(4)))


@every_case
def test_objective_refuses_a_tap_that_is_no_map_by_name(case):
    """Tokens, N × L × D, are a map for no method."""
    student, teacher = sides(case)
    tokens = [
        {name: tensor.flatten(2) if tensor.dim() == 4 else tensor for name, tensor in t.items()}
        for t in (student, teacher)
    ]
    paths = {path for pair in case.options.pairs for path in (pair.student, pair.teacher)}
    if case.among(ANY_SHAPE) or not case.objective().needs.teacher_taps:
        assert made(case, *tokens)(lesson(*tokens)).isfinite()
    else:
        with pytest.raises(SpecInvalid, match=f"tap '({'|'.join(paths)})' gives [0-9]+ x [0-9]+ for each image"):
            made(case, *tokens)


@every_case
def test_objective_reads_labels_only_if_its_method_needs_them(case):
    """All others accept mixed labels, N × K, and unknown ones, -1."""
    losses = []
    for labels in (LABELS[:4], torch.full((4,), -1), torch.full((4, CLASSES), 1 / CLASSES)):
        if case.among(READ_LABELS) and labels.is_floating_point():
            continue
        losses.append(made(case, *sides(case))(lesson(*sides(case), labels=labels)).item())
    assert (len(set(losses)) == 1) != case.among(READ_LABELS)


@every_case
def test_objective_in_float32_agrees_with_float64(case):
    """Views are at least float32 (Classifier lifts a bfloat16 network's), so a page needs no casts."""
    double = sides(case, dtype=torch.float64)
    single = [{name: tensor.float() for name, tensor in tensors.items()} for tensors in double]
    objective, exact = made(case, *single), made(case, *double)
    exact.load_state_dict(objective.state_dict())
    values = []
    for one, tensors in ((objective, single), (exact, double)):
        torch.manual_seed(1)
        values.append(loss_and_gradients(one, *tensors))
    assert values[0][0].dtype == torch.float32 and values[1][0].dtype == torch.float64
    assert values[0][0].item() == pytest.approx(values[1][0].item(), rel=1e-4, abs=1e-5)
    for found, expected in zip(*values, strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-5


@every_case
def test_objective_has_the_gradient_of_its_value(case):
    """In eval mode, after one step, so that the value is a function of the student's tensors alone."""
    if case.among(HELD_CONSTANT | TEACHER_ALONE):
        pytest.skip("no gradient of the student, or one that a numerical gradient cannot equal")
    student, teacher = sides(case, images=3, dtype=torch.float64)
    objective = made(case, student, teacher)
    objective(lesson(student, teacher))
    objective.eval().requires_grad_(False)
    names = list(loss_and_gradients_by_name(objective, student, teacher))

    def value(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return objective(lesson({**student, **dict(zip(names, tensors, strict=True))}, teacher))

    given = [student[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(value, given, fast_mode=True)


def loss_and_gradients_by_name(objective: Objective, student: Tensors, teacher: Tensors) -> Tensors:
    student = leaves(student)
    objective(lesson(student, teacher)).backward()
    return gradients(student)


@every_case
def test_objective_is_deterministic(case):
    runs = []
    for _ in range(2):
        objective = made(case, *sides(case))
        torch.manual_seed(1)
        runs.append(loss_and_gradients(objective, *sides(case)))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@every_case
def test_objective_resumes_from_its_state(case):
    """Two objectives, built with different weights, continue with equal bits once one has the other's state."""
    student, teacher = sides(case)
    first = made(case, student, teacher)
    trained(first, student, teacher)
    torch.manual_seed(7)
    second = case.objective()
    torch.manual_seed(8)
    built(second, lesson(student, teacher)).load_state_dict(first.state_dict())
    ends = []
    for objective in (first, second):
        torch.manual_seed(1)
        trained(objective, student, teacher)
        ends.append([*loss_and_gradients(objective, student, teacher), *objective.state_dict().values()])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))


def trained(objective: Objective, student: Tensors, teacher: Tensors) -> None:
    """One step of gradient descent on the objective's own parameters."""
    loss_and_gradients(objective, student, teacher)
    with torch.no_grad():
        for value in objective.parameters():
            if value.grad is not None:
                value.sub_(1e-3 * value.grad)


@every_case
def test_objective_never_waits_for_the_device(case):
    student, teacher = sides(case)
    objective, student = made(case, student, teacher), leaves(student)
    seen = lesson(student, teacher)
    with NoHostReads():
        objective(seen).backward()
