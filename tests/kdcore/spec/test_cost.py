"""Estimates made of measured costs: every figure by hand."""

import pytest

from kdcore.spec.cost import JobCost, Prediction, StageCost, cost_keys, cost_rows, least_memory, predict
from tests.kdcore.spec.specs import DATA, known, resolved

STEP, OTHER_STEP = StageCost(step_s=0.5, held_out_image_s=0.01), StageCost(step_s=0.25, held_out_image_s=0.02)
COST = JobCost(
    basis="measured",
    device="cpu",
    device_name="x86_64",
    threads=2,
    precision="fp32",
    preparing_s=3.0,
    stages={"student": STEP, "alone": OTHER_STEP},
    test_image_s=0.1,
    memory_bytes=900,
    memory_fixed_bytes=100,
    exporting_s=20.0,
)
FACTS = known({"dataset": "mine"}, dataset=DATA)
RECIPE = {"epochs": 4, "batch_size": 100}


def spec_of(**changes):
    training = {**RECIPE, **changes.pop("training", {})}
    return resolved(**{"baseline": "train", "training": training, **changes})


ROWS = cost_rows(spec_of(), FACTS, COST)


def test_predict_adds_up_steps_evaluations_and_preparation():
    """1000 training images, 100 of them held out: 9 steps an epoch, 4 epochs, two trials; 100 test images."""
    prediction = predict(spec_of(), FACTS, ROWS, "cpu")
    training = 36 * 0.5 + 36 * 0.25
    evaluating = 4 * 100 * 0.01 + 4 * 100 * 0.02 + 100 * 0.1
    expected = {"preparing": 3.0, "training": training, "evaluating": evaluating, "exporting": 20.0}
    assert prediction.seconds_by_phase == pytest.approx(expected)
    assert prediction.seconds == pytest.approx(3 + 27 + 22 + 20)
    assert (prediction.memory_bytes, prediction.device) == (900, "cpu, 2 threads")
    assert (prediction.basis, prediction.device_kind) == ("measured", "cpu")


def test_predict_takes_other_epochs_and_seeds_as_they_are():
    prediction = predict(spec_of(training={"epochs": 8, "seed": 5, "label_smoothing": 0.1}), FACTS, ROWS, "cpu")
    assert prediction.seconds_by_phase["training"] == pytest.approx(54)


def test_predict_scales_another_batch_in_proportion_to_its_images():
    """Half the images in a batch: 18 steps an epoch at half the seconds. What no batch needs stays."""
    prediction = predict(spec_of(training={"batch_size": 50}), FACTS, ROWS, "cpu")
    assert prediction.seconds_by_phase["training"] == pytest.approx(27)
    assert prediction.memory_bytes == 100 + 400
    assert prediction.seconds_by_phase["preparing"] is None
    assert prediction.seconds == pytest.approx(27 + 22 + 20)


def test_predict_knows_no_preparation_of_other_data():
    other = known({"dataset": "mine"}, dataset=DATA.model_copy(update={"train": 2000}))
    prediction = predict(spec_of(dataset="another"), other, ROWS, "cpu")
    assert prediction.seconds_by_phase["preparing"] is None
    assert prediction.seconds_by_phase["training"] == pytest.approx(54)


@pytest.mark.parametrize(
    "changes",
    [
        {"student": "resnet32"},
        {"network": "resnet110"},
        {"method": "dkd"},
        {"method": ["kd", "attention"]},
        {"method": "supervised", "teacher": None, "baseline": "none"},
        {"assistants": ["resnet32"]},
        {"training": {"precision": "bf16"}},
        {"training": {"optimizer": {"name": "adamw"}}},
        {"training": {"ema": 0.9}},
        {"training": {"kernels": "eager"}},
        {"training": {"batch_norm": "running"}},
        {"more": {"dataset": DATA.model_copy(update={"image_size": (64, 64)})}},
    ],
    ids="-".join,
)
def test_predict_returns_none_where_a_part_of_the_job_was_never_measured(changes):
    facts = known({"dataset": "mine"}, **{"dataset": DATA, **changes.get("more", {})})
    assert predict(spec_of(**changes), facts, ROWS, "cpu") is None


def test_predict_keeps_kinds_of_devices_apart():
    assert predict(spec_of(), FACTS, ROWS, "cuda") is None
    gpu = cost_rows(spec_of(), FACTS, COST.model_copy(update={"device": "cuda", "device_name": "NVIDIA H200"}))
    assert predict(spec_of(), FACTS, gpu, "cuda").device == "cuda, NVIDIA H200"


def test_predict_keeps_auto_apart_which_is_another_precision_on_each_cpu():
    assert predict(spec_of(training={"precision": "auto"}), FACTS, ROWS, "cpu") is not None
    assert predict(spec_of(training={"precision": "fp32"}), FACTS, ROWS, "cpu") is None


def test_predict_a_stage_is_known_from_a_job_with_other_stages_too():
    """The student alone costs what a supervised job's student costs, and weights change no cost."""
    alone = spec_of(method="supervised", teacher=None, baseline="none")
    cost = COST.model_copy(update={"stages": {"student": OTHER_STEP}})
    assert set(cost_rows(alone, FACTS, cost)) & set(ROWS)
    assert predict(spec_of(alpha=0.5, beta=2, temperature=1), FACTS, ROWS, "cpu") is not None


def test_predict_is_a_probe_if_one_part_was_probed():
    probed = cost_rows(spec_of(), FACTS, COST.model_copy(update={"basis": "probe", "preparing_s": None}))
    (some, *_) = probed
    assert predict(spec_of(), FACTS, {**ROWS, some: probed[some]}, "cpu").basis == "probe"


def test_predict_counts_first_stages_and_generations():
    """30 of 240 epochs before the labels, scaled to 1 of 8; each generation costs what the first one taught costs."""
    spec = spec_of(method="fsp", training={"epochs": 8}, baseline="none", network="resnet20")
    cost = COST.model_copy(update={"stages": {"student/fsp": STEP, "student": OTHER_STEP}})
    prediction = predict(spec, FACTS, cost_rows(spec, FACTS, cost), "cpu")
    assert prediction.seconds_by_phase["training"] == pytest.approx(9 * 0.5 + 72 * 0.25)
    born = spec_of(method={"name": "born_again", "generations": 3}, baseline="none")
    stages = {"generation-1": STEP, "generation-2": OTHER_STEP, "student": OTHER_STEP}
    rows = cost_rows(born, FACTS, COST.model_copy(update={"stages": stages}))
    assert predict(born, FACTS, rows, "cpu").seconds_by_phase["training"] == pytest.approx(36 * (0.5 + 0.25 + 0.25))


def test_cost_rows_leave_out_a_stage_that_was_not_measured():
    rows = cost_rows(spec_of(), FACTS, COST.model_copy(update={"stages": {"student": STEP}}))
    assert len(rows) == 5 and len(ROWS) == 7
    assert predict(spec_of(), FACTS, rows, "cpu") is None


def test_cost_keys_are_those_of_the_rows_on_every_kind_of_device():
    keys = cost_keys(spec_of(), FACTS)
    assert set(ROWS) < set(keys) and len(keys) == 14
    assert all(len(key) == 64 for key in keys)
    assert set(cost_keys(spec_of(), FACTS, ["cpu"])) == set(ROWS)


def test_predict_leaves_out_files_that_no_job_has_written():
    """A probe writes none, and a report of an earlier version does not say how long they took."""
    earlier = JobCost.model_validate(COST.model_dump(exclude={"exporting_s"}))
    prediction = predict(spec_of(), FACTS, cost_rows(spec_of(), FACTS, earlier), "cpu")
    assert prediction.seconds_by_phase["exporting"] is None
    assert (prediction.seconds, prediction.basis) == (pytest.approx(3 + 27 + 22), "measured")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {"epochs": 8, "batch_size": 50}, "method": "dkd"}, 20.0),
        ({"export_options": {"tolerance": 0.5}, "documents": []}, 20.0),
        ({"export": ["onnx"]}, None),
        ({"export_options": {"batch_size": 64}}, None),
        ({"export_options": {"measure": False}}, None),
        ({"student": "resnet32"}, None),
        ({"more": {"dataset": DATA.model_copy(update={"test": 200})}}, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_predict_knows_the_files_of_the_same_student_in_the_same_formats(changes, expected):
    """Of whatever training."""
    facts = known({"dataset": "mine"}, **{"dataset": DATA, **changes.pop("more", {})})
    spec = spec_of(**changes)
    stages = COST.model_copy(update={"exporting_s": None})
    prediction = predict(spec, facts, {**cost_rows(spec, facts, stages), **ROWS}, "cpu")
    assert prediction.seconds_by_phase["exporting"] == expected


INT8 = {"epochs": 1}


def test_predict_counts_epochs_for_int8_by_their_own_steps():
    """3 of 4 epochs in float at half a second a step, one at two seconds; the student alone is trained in the same way,
    and all rows of a float training are not enough."""
    spec = spec_of(quantization=INT8)
    assert predict(spec, FACTS, ROWS, "cpu") is None
    more = {
        "student/int8": StageCost(step_s=2, held_out_image_s=0.04),
        "alone/int8": StageCost(step_s=1, held_out_image_s=0.03),
    }
    rows = cost_rows(spec, FACTS, COST.model_copy(update={"stages": {**COST.stages, **more}}))
    prediction = predict(spec, FACTS, rows, "cpu")
    assert prediction.seconds_by_phase["training"] == pytest.approx(27 * 0.5 + 9 * 2 + 27 * 0.25 + 9 * 1)
    held_out = 3 * 100 * 0.01 + 100 * 0.04 + 3 * 100 * 0.02 + 100 * 0.03
    assert prediction.seconds_by_phase["evaluating"] == pytest.approx(held_out + 100 * 0.1)
    assert predict(spec_of(quantization={"epochs": 2}), FACTS, rows, "cpu").seconds_by_phase["training"] == (
        pytest.approx(18 * 0.5 + 18 * 2 + 18 * 0.25 + 18 * 1)
    )
    assert predict(spec_of(), FACTS, rows, "cpu") is None, "its memory is that of rounded networks"
    assert predict(spec_of(), FACTS, {**rows, **ROWS}, "cpu").seconds_by_phase["training"] == pytest.approx(27)
    assert predict(spec_of(quantization={"aware": False}), FACTS, ROWS, "cpu").seconds == pytest.approx(72)


@pytest.mark.parametrize(
    ("fixed", "needed", "memory", "largest"),
    [(100, 900, 500, 50), (100, 900, 515, 50), (100, 900, 516, 52), (100, 900, 110, None), (100, 100, 50, None)],
    ids=["half", "even", "two more", "no batch of two", "does not depend on the batch"],
)
def test_largest_batch_is_even_and_fits(fixed, needed, memory, largest):
    prediction = Prediction("measured", "cpu", "cpu", {}, needed, fixed, batch_size=100)
    assert prediction.largest_batch(memory) == largest


def test_least_memory_is_four_times_the_student_and_the_teacher_in_float32():
    assert least_memory(1000, 5000) == 4 * (4000 + 5000)
