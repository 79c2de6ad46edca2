"""Each alarm is forced, and silent in a healthy run."""

import math

import pytest
import torch
from safetensors.torch import load_file

from kdcore.checkpoint import Stopped
from kdcore.classifier import FrozenTeacher, TeacherEnsemble
from kdcore.measure import alarms as alarms_module
from kdcore.measure.alarms import Alarms, mean_entropy
from kdcore.objectives import kd
from kdcore.run import run
from kdcore.training import StageTraining
from tests.kdcore.engine import events, job, same, workspace, write_arrays
from tests.kdcore.tiny import constant

RECIPE = {"batch_size": 16, "augmentation": "none", "optimizer": {"name": "adamw", "lr": 0.01}}


def warned(points, level=0.25, held_out=1000, objective=True):
    """The codes of a stage of 1,000 steps with these points: step, and figures."""
    found = []
    alarms = Alarms(found.append, level=level, held_out=held_out, objective=objective)
    for step, values in points:
        alarms.see(step, 1000, values, images=10_000)
    return [warning.code for warning in found]


def losses(*values):
    return [(100 * number, {"train/distillation_loss": value}) for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ((0.0, 0.0, 0.0), ["distillation_loss_zero"]),
        ((0.0, 0.0, 0.0, 0.0, 0.0), ["distillation_loss_zero"]),
        ((0.7, 0.7, 0.7), ["distillation_loss_constant"]),
        ((0.7, 0.7000001, 0.7), ["distillation_loss_constant"]),
        ((-3.0, -3.0, -3.0), ["distillation_loss_constant"]),
        ((0.0, 0.0), []),
        ((0.7, 0.69, 0.69, 0.69, 0.69), []),  # It has moved: a rate that falls to zero may stop it.
        ((0.0, 0.0, 1e-4), []),
        ((math.pi, 3.0, 2.9), []),
    ],
)
def test_alarms_distillation_loss_that_never_moves(values, codes):
    assert warned(losses(*values)) == codes


def test_alarms_distillation_loss_is_not_watched_in_a_stage_without_one():
    assert warned(losses(0.0, 0.0, 0.0), objective=False) == []


def test_alarms_distillation_loss_of_a_few_steps_is_not_judged():
    assert warned([(step, {"train/distillation_loss": 0.0}) for step in (10, 20, 30)]) == []


def accuracies(step, training, held_out):
    return [(step, {"train/accuracy": training, "validation/accuracy": held_out})]


@pytest.mark.parametrize(
    ("step", "training", "held_out", "codes"),
    [
        (100, 0.25, 0.25, ["student_at_chance"]),
        (100, 0.251, 0.26, ["student_at_chance"]),
        (100, 0.3, 0.25, []),  # 10,000 training images are certainly above 25 %.
        (100, 0.25, 0.3, []),
        (99, 0.25, 0.25, []),  # Not a tenth of the steps.
    ],
)
def test_alarms_student_at_chance_after_a_tenth_of_the_steps(step, training, held_out, codes):
    assert warned(accuracies(step, training, held_out)) == codes


def test_alarms_student_at_chance_is_judged_once():
    assert warned([*accuracies(100, 0.25, 0.25), *accuracies(200, 0.25, 0.25)]) == ["student_at_chance"]
    assert warned([*accuracies(100, 0.5, 0.5), *accuracies(200, 0.25, 0.25)]) == []


def test_alarms_state_carries_what_was_seen_over_a_resume():
    found = []
    before = Alarms(found.append, objective=True)
    for step, values in losses(0.5, 0.5):
        before.see(step, 1000, values, 100)
    after = Alarms(found.append, objective=True)
    after.restore(before.state)
    after.see(300, 1000, {"train/distillation_loss": 0.5}, 100)
    assert [warning.code for warning in found] == ["distillation_loss_constant"]
    again = Alarms(found.append, objective=True)
    again.restore(after.state)
    again.see(400, 1000, {"train/distillation_loss": 0.5}, 100)
    assert len(found) == 1


# The teacher's soft targets


def test_mean_entropy_of_one_teacher():
    """-(0.9 ln 0.9 + 0.1 ln 0.1) = 0.3251; at T = 2 the odds 9 : 1 become 3 : 1, and it is 0.5623."""
    teacher = FrozenTeacher(constant(0.9, 0.1))
    logits = [torch.tensor([[math.log(0.9), math.log(0.1)]])]
    assert mean_entropy(teacher, logits, 1.0) == pytest.approx(0.3251, abs=1e-4)
    assert mean_entropy(teacher, logits, 2.0) == pytest.approx(0.5623, abs=1e-4)


def test_mean_entropy_of_labels_is_zero_and_of_no_knowledge_the_logarithm_of_the_classes():
    teacher = FrozenTeacher(constant(0.5, 0.5))
    none = mean_entropy(teacher, [torch.tensor([[0.0, -1000.0]])], 1.0)
    assert f"{none:.4f}" == "0.0000"  # not -0.0000
    assert mean_entropy(teacher, [torch.zeros(3, 4)], 1.0) == pytest.approx(math.log(4))


def test_mean_entropy_of_an_ensemble_is_that_of_its_averaged_probabilities():
    """Two certain teachers that disagree: half and half, whatever the temperature of the job."""
    both = TeacherEnsemble([FrozenTeacher(constant(0.5, 0.5))] * 2, [1, 1], temperature=8.0)
    logits = [torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])]
    assert mean_entropy(both, logits, 1.0) == pytest.approx(math.log(2))


# In whole jobs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz", train=240, test=90)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    where, _ = workspace(tmp_path_factory.mktemp("teacher"))
    run(job(data, student="convnet8", training={**RECIPE, "epochs": 12}), where)
    return where.out / "student.safetensors"


def codes(stream):
    return [line["code"] for line in events(stream, "warning")]


def distil(data, teacher, folder, method="kd", resume=None, **fields):
    training = {**RECIPE, "epochs": 6, **fields.pop("training", {})}
    where, stream = workspace(folder)
    return run(job(data, teacher, method=method, training=training, **fields), where, resume), stream


def test_no_alarm_in_a_healthy_run(data, teacher, tmp_path):
    report, stream = distil(data, teacher, tmp_path, baseline="train", training={"epochs": 10})
    assert codes(stream) == [] and report["warnings"] == []
    assert report["student"]["accuracy"] > 0.7


@pytest.mark.parametrize(("loss", "code"), [(0.0, "distillation_loss_zero"), (0.5, "distillation_loss_constant")])
def test_alarm_for_a_loss_without_a_signal(loss, code, data, teacher, tmp_path, monkeypatch):
    def dead(self, lesson):
        student, _ = lesson.logits
        return student.sum() * 0 + loss

    monkeypatch.setattr(kd.KnowledgeDistillation, "forward", dead)
    report, stream = distil(data, teacher, tmp_path)
    assert codes(stream) == [code]
    assert [one["code"] for one in report["warnings"]] == [code]


def test_alarm_for_a_student_at_chance_and_the_verdict(data, teacher, tmp_path):
    """A rate at which nothing can be learned."""
    far_too_small = {"optimizer": {"name": "sgd", "lr": 1e-12, "momentum": 0}, "seed": 3}
    report, stream = distil(data, teacher, tmp_path, alpha=1, training=far_too_small)
    assert "student_at_chance" in codes(stream)
    assert "distillation_loss_constant" not in codes(stream)  # Batches differ: only its mean stays.
    assert report["student"]["accuracy"] < 0.6


def sharper(teacher, path, factor):
    """The same teacher, as certain as its logits times a factor."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(teacher, "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    state = load_file(teacher)
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name] * factor
    save_file(state, path, {"distillery": json.dumps(notes)})
    return path


@pytest.mark.parametrize(("factor", "hint"), [(1000, "raise the temperature"), (30, "temperature")])
def test_alarm_for_a_saturated_teacher_with_figures(factor, hint, data, teacher, tmp_path):
    hard = sharper(teacher, tmp_path / "hard.safetensors", factor)
    _, stream = distil(data, hard, tmp_path / "kd", temperature=4)
    (warning,) = [line for line in events(stream, "warning") if line["code"] == "teacher_saturated"]
    assert "at temperature 1" in warning["message"] and "at the job's temperature 4" in warning["message"]
    assert hint in warning["hint"] and warning["pointer"] == "/temperature"


def test_no_alarm_for_a_saturated_teacher_whose_soft_targets_are_not_used(data, teacher, tmp_path):
    hard = sharper(teacher, tmp_path / "hard.safetensors", 1000)
    _, stream = distil(data, hard, tmp_path / "rkd", method="rkd", training={"epochs": 1})
    assert "teacher_saturated" not in codes(stream)


def test_alarms_change_no_bits_and_are_the_same_after_a_resume(data, teacher, tmp_path, monkeypatch):
    def dead(self, lesson):
        student, _ = lesson.logits
        return student.sum() * 0 + 0.5

    monkeypatch.setattr(kd.KnowledgeDistillation, "forward", dead)
    spec = job(data, teacher, method="kd", training={**RECIPE, "epochs": 6})
    whole, stream = workspace(tmp_path / "whole")
    run(spec, whole)
    assert codes(stream) == ["distillation_loss_constant"]

    stopped, early = workspace(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        done, step = [0], StageTraining._step

        def counted(self, batch):
            step(self, batch)
            done[0] += 1
            stopped.stop_requested = done[0] == 30

        patch.setattr(StageTraining, "_step", counted)
        with pytest.raises(Stopped):
            run(spec, stopped)
    assert codes(early) == []
    onward, later = workspace(tmp_path / "onward")
    run(spec, onward, stopped.out / events(early, "checkpoint")[-1]["path"])
    assert codes(later) == ["distillation_loss_constant"]
    assert events(later, "warning") == events(stream, "warning")

    silent, _ = workspace(tmp_path / "silent")
    monkeypatch.setattr(Alarms, "see", lambda *_: None)
    monkeypatch.setattr(alarms_module, "warn_if_saturated", lambda *_: None)
    run(spec, silent)
    results = [load_file(where.out / "student.safetensors") for where in (whole, onward, silent)]
    assert same(results[0], results[1]) and same(results[0], results[2])
