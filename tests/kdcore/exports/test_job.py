"""Jobs of the kind export: which weights they take, and that these are the job's own to the last bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from base.errors import SpecInvalid, WarningRefused
from kdcore import checkpoint
from kdcore.__main__ import _runner, _spec
from kdcore.checkpoint import Stopped
from kdcore.data import inspect
from kdcore.exports.job import run_export
from kdcore.run import run
from kdcore.spec import DataOptions, ExportOptions, ExportSpec, Known, Quantization, resolve
from kdcore.training import StageTraining
from kdcore.weights import open_teacher
from tests.kdcore.engine import distilled, events, same, workspace, write_arrays, write_teacher

CPU = torch.device("cpu")
UNMEASURED = ExportOptions(measure=False)
"""Measuring starts a process for each file, which the tests of exports have; here it is about the weights."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a whole job: its spec, its report, and checkpoints of its last two ends of stages."""
    folder = tmp_path_factory.mktemp("exporting")
    data, teacher = write_arrays(folder / "data.npz"), write_teacher(folder / "teacher.safetensors")
    spec = distilled(data, teacher, threads=1, ema=0.9).model_copy(update={"export_options": UNMEASURED})
    where, _ = workspace(folder / "out")
    run(spec, where)
    return folder


def resolved(folder) -> dict:
    return json.loads((folder / "out" / "spec.json").read_text())


def asked(folder, weights, **fields) -> ExportSpec:
    kind = "checkpoint" if weights.suffix == ".pt" else "safetensors"
    options = {"export_options": UNMEASURED.model_dump()}
    body = {"distillation": resolved(folder), "weights": f"file:{weights}", "weights_format": kind, **options, **fields}
    return ExportSpec.parse(body)


def exported(spec: ExportSpec, tmp_path, cache=None):
    where, stream = workspace(tmp_path / "export", cache)
    return run_export(spec, where), where.out / "student.safetensors", stream


def test_run_export_of_a_students_file_has_the_accuracy_of_the_jobs_report(trained, tmp_path):
    before = json.loads((trained / "out" / "report.json").read_text())["student"]
    report, file, stream = exported(asked(trained, trained / "out" / "student.safetensors"), tmp_path)
    assert same(load_file(file), load_file(trained / "out" / "student.safetensors"))
    assert {name: report["measured"][name] for name in ("accuracy", "accuracy_top5", "parameters", "bytes")} == {
        name: before[name] for name in ("accuracy", "accuracy_top5", "parameters", "bytes")
    }
    assert [line["phase"] for line in events(stream, "phase")] == ["preparing", "evaluating", "exporting"]
    assert {line["name"] for line in events(stream, "artifact")} == {"student.safetensors", "student.py", "report.json"}
    assert json.loads((file.parent / "report.json").read_text()) == report


def test_run_export_takes_best_and_last_of_a_student_whose_baseline_is_still_in_training(trained, tmp_path):
    path = sorted((trained / "out" / "checkpoints").glob("*.pt"))[0]
    outcome = checkpoint.load(path, CPU).finished["student"]["student"]
    for which, weights, epoch in (("best", outcome.best, outcome.best_epoch), ("last", outcome.last, 2)):
        report, file, _ = exported(asked(trained, path, checkpoint=which, step=12), tmp_path / which)
        assert same(load_file(file), {name: value.contiguous() for name, value in weights.items()})
        assert report["checkpoint"] == {"which": which, "step": 12, "epoch": epoch}


def stopped(folder, monkeypatch, steps: int, **fields):
    """Run a job for some steps only. Returns its checkpoint, and the student as it would be graded then."""
    data, teacher = write_arrays(folder / "data.npz"), write_teacher(folder / "teacher.safetensors")
    quantization = fields.pop("quantization", None)
    spec = distilled(data, teacher, threads=1, **fields).model_copy(update={"quantization": quantization})
    where, _ = workspace(folder / "out")
    step, graded = StageTraining._step, []

    def counted(self, batch):
        step(self, batch)
        if self.global_step + 1 == steps:
            where.stop_requested = True
            graded.append(self.grading.graded("student")[0] if "student" in self.scheme.models else None)

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "_step", counted)
        with pytest.raises(Stopped):
            run(spec, where)
    (folder / "out" / "spec.json").write_text(json.dumps(resolved_of(spec, data)))
    (path,) = (folder / "out" / "checkpoints").glob("*.pt")
    return path, graded[0]


def resolved_of(spec, data) -> dict:
    """The spec as a service resolves it."""
    facts = inspect(data, DataOptions())
    return resolve(spec, Known(dataset=facts, teachers={"/teacher": open_teacher_facts(spec)})).as_json()


def open_teacher_facts(spec):
    return open_teacher(Path(spec.teachers[0].checkpoint.removeprefix("file:")), None).facts


@pytest.mark.parametrize("fields", [{"ema": 0.9}, {}, {"batch_norm": "running"}], ids=["averaged", "plain", "running"])
def test_run_export_takes_the_last_weights_of_a_student_in_training_as_they_would_be_graded(
    fields, tmp_path, monkeypatch
):
    path, graded = stopped(tmp_path, monkeypatch, 9, **fields)
    report, file, _ = exported(asked(tmp_path, path, checkpoint="last"), tmp_path)
    assert same(load_file(file), {name: value.contiguous() for name, value in graded.items()})
    assert report["checkpoint"]["epoch"] == 1 and report["measured"]["test_samples"] == 30
    best, other, _ = exported(asked(tmp_path, path, checkpoint="best"), tmp_path / "best")
    assert best["checkpoint"]["epoch"] == 1 and not same(load_file(file), load_file(other))


def test_run_export_in_a_training_for_int8_has_its_ranges_or_the_best_float_weights(tmp_path, monkeypatch):
    """Stopped in the middle of the one epoch that trains for int8: no such epoch has ended."""
    path, graded = stopped(tmp_path, monkeypatch, 9, quantization=Quantization(epochs=1))
    notes = {}
    for which in ("last", "best"):
        report, file, _ = exported(asked(tmp_path, path, checkpoint=which), tmp_path / which)
        with safe_open(file, "pt") as opened:
            notes[which] = json.loads(opened.metadata()["distillery"])
        assert report["checkpoint"]["epoch"] == (1 if which == "last" else None)
        if which == "last":
            assert same(load_file(file), {name: value.contiguous() for name, value in graded.items()})
    assert notes["last"]["activation_ranges"] and "activation_ranges" not in notes["best"]


def test_run_export_refuses_the_best_epoch_before_one_has_ended(tmp_path, monkeypatch):
    path, _ = stopped(tmp_path, monkeypatch, 3)
    with pytest.raises(SpecInvalid, match="no epoch is the best") as refused:
        exported(asked(tmp_path, path), tmp_path)
    assert "'last'" in str(refused.value.hint)
    report, _, _ = exported(asked(tmp_path, path, checkpoint="last"), tmp_path)
    assert report["checkpoint"]["epoch"] is None


def test_run_export_refuses_a_checkpoint_of_a_stage_before_the_student(tmp_path, monkeypatch):
    path, _ = stopped(tmp_path, monkeypatch, 3, method="factor_transfer")
    with pytest.raises(SpecInvalid, match="student/factor_transfer: the training of the student itself has not begun"):
        exported(asked(tmp_path, path, checkpoint="last"), tmp_path)


def test_run_export_fails_for_a_refused_file_only_if_it_is_strict(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.spec.shipping.find_spec", lambda name: None if name == "openvino" else name)
    weights, formats = trained / "out" / "student.safetensors", ["safetensors", "openvino"]
    report, _, stream = exported(asked(trained, weights, export=formats), tmp_path / "lenient")
    assert [one["refused"] is None for one in report["files"]] == [True, False]
    assert [line["code"] for line in events(stream, "warning")] == ["export_unavailable"]
    with pytest.raises(WarningRefused, match=r"export_unavailable: student\.openvino\.zip cannot be made") as refused:
        exported(asked(trained, weights, export=formats, strict=True), tmp_path / "strict")
    assert "install the extra" in str(refused.value.hint)


def test_the_engine_runs_a_spec_by_its_kind_and_names_the_kinds_for_another_one(trained, tmp_path):
    path = tmp_path / "spec.json"
    for kind in ("exports", ["export"], None):
        path.write_text(json.dumps({"kind": kind}))
        with pytest.raises(SpecInvalid, match="there is no kind of job") as refused:
            _spec(path)
        assert "distillation, evaluation, export" in str(refused.value.hint)
    path.write_text(json.dumps(asked(trained, trained / "out" / "student.safetensors").as_json()))
    where, _ = workspace(tmp_path / "out")
    report = _runner(_spec(path))(where, None)
    assert report["measured"]["architecture"] == "convnet4" and report["checkpoint"]["which"] == "best"
