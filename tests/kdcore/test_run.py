import errno
import json
import os
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from base import cores, files
from base.errors import LossDiverged, SpecInvalid, StorageFull, TeacherMismatch
from base.warning import WarningItem
from kdcore import device, models
from kdcore.checkpoint import Stopped
from kdcore.data import streaming
from kdcore.measure import evaluate
from kdcore.protocol import REPORT_OF_ATTEMPTS, Lines
from kdcore.run import run
from kdcore.spec import METHODS as METHODS_BY_NAME
from kdcore.spec import parse
from kdcore.spec.cost import JobCost
from kdcore.spec.shipping import Quantization
from kdcore.training import StageTraining
from tests.kdcore.engine import (
    as_by_the_version_before,
    distilled,
    events,
    job,
    same,
    supervised,
    workspace,
    write_arrays,
    write_pool,
    write_teacher,
)

EARLIER = {"batch_norm": "running", "kernels": "eager"}
"""How versions computed that had no choice."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    where, _ = workspace(tmp_path_factory.mktemp("teacher"))
    run(supervised(data, epochs=4), where)
    return where.out / "student.safetensors"


def finish(spec, folder):
    where, stream = workspace(folder)
    report = run(spec, where)
    return report, load_file(where.out / "student.safetensors"), stream


def test_run_a_job_ends_with_a_student_and_the_proof(data, teacher, tmp_path):
    report, weights, stream = finish(distilled(data, teacher), tmp_path)
    phases = ["preparing", "checking_teacher", "training", "evaluating", "exporting"]
    assert [line["phase"] for line in events(stream, "phase")] == phases
    files = {
        "student.safetensors",
        "student.py",
        "alone.safetensors",
        "report.json",
        "spec.json",
        "report.html",
        "model_card.zip",
    }
    assert {line["name"] for line in events(stream, "artifact")} == files
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["gain"] == report["student"]["accuracy"] - report["alone"]["accuracy"]
    assert report["test_samples"] == 30 and 0 <= report["student"]["agreement"] <= 1
    plain = models.build("convnet4", 3, 1)
    plain.load_state_dict(weights)
    assert sum(p.numel() for p in plain.parameters()) == report["student"]["parameters"]


def test_run_the_exported_file_says_how_to_use_it(data, teacher, tmp_path):
    finish(distilled(data, teacher, baseline="none"), tmp_path)
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        said = json.loads(file.metadata()["distillery"])
    assert said["architecture"] == "convnet4" and said["class_names"] == ["0", "1", "2"]
    assert said["spec"]["training"]["seed"] == 0 and len(said["mean"]) == 1 and "accuracy" in said["metrics"]


def test_run_the_same_spec_and_seed_give_the_same_bits(data, teacher, tmp_path):
    spec = distilled(data, teacher, mix="mixup", ema=0.9, label_smoothing=0.1)
    _, once, first = finish(spec, tmp_path / "once")
    _, twice, second = finish(spec, tmp_path / "twice")
    assert same(once, twice)
    assert events(first, "metric") == events(second, "metric")


def test_run_another_seed_gives_other_weights(data, tmp_path):
    _, one, _ = finish(supervised(data, seed=1), tmp_path / "one")
    _, two, _ = finish(supervised(data, seed=2), tmp_path / "two")
    assert not same(one, two)


def stop_after(steps, monkeypatch, where):
    """Ask for a stop once `steps` steps are done, as SIGTERM would."""
    done, step = [0], StageTraining._step

    def counted(self, batch):
        step(self, batch)
        done[0] += 1
        where.stop_requested = done[0] == steps

    monkeypatch.setattr(StageTraining, "_step", counted)


@pytest.mark.parametrize(
    ("method", "steps"),
    [("kd", 1), ("kd", 6), ("kd", 9), ("kd", 12), ("kd", 13), ("kd", 20), ("factor_transfer", 3),
     ("factor_transfer", 6), ("factor_transfer", 7), ("factor_transfer", 17), ("factor_transfer", 18)],
)  # fmt: skip
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(method, steps, data, teacher, tmp_path, monkeypatch):
    """Six steps an epoch, twelve a trial: stopped in the middle, at an epoch's end, at a trial's, and in the baseline.
    With a first stage of six: in it, at its end, and after it."""
    spec = distilled(data, teacher, method=method, ema=0.8, clip_norm=1.0)
    report, whole, undisturbed = finish(spec, tmp_path / "whole")
    where, stream = workspace(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(steps, patch, where)
        with pytest.raises(Stopped):
            run(spec, where)
    checkpoint = where.out / events(stream, "checkpoint")[-1]["path"]
    onward, later = workspace(tmp_path / "resumed")
    onward.warnings = list(where.warnings)  # A worker gives them to the next engine by --known.
    resumed = run(spec, onward, checkpoint)
    assert same(whole, load_file(onward.out / "student.safetensors"))
    assert events(stream, "metric") + events(later, "metric") == events(undisturbed, "metric")
    of_attempts = dict.fromkeys(REPORT_OF_ATTEMPTS)
    assert {**resumed, **of_attempts} == {**report, **of_attempts}
    assert resumed["timings"]["training"].keys() == {"student", "alone"}
    assert report["seconds"] >= report["timings"]["exporting"] + sum(report["timings"]["training"].values())
    assert resumed["cost"]["stages"].keys() == report["cost"]["stages"].keys()


def test_run_a_teacher_beside_its_student_makes_the_same_bits_and_its_thread_ends_with_every_end(
    data, teacher, tmp_path, monkeypatch
):
    """Factor transfer has two stages of six steps. Both models have one thread each, which harms no neighbour."""

    def spec(**training):
        recipe = {"batch_size": 16, "epochs": 1, **training}
        return job(data, teacher, method={"name": "factor_transfer", "pretraining_epochs": 1}, training=recipe)

    alive, own, beside = threading.active_count(), torch.get_num_threads(), spec(threads=1, overlap=True)
    try:
        _, in_turn, _ = finish(spec(threads=1), tmp_path / "in-turn")
        report, weights, _ = finish(beside, tmp_path / "beside")
        assert same(weights, in_turn) and report["computing"]["overlap"] and torch.get_num_threads() == 1
        where, stream = workspace(tmp_path / "stopped")
        with monkeypatch.context() as patch:
            stop_after(8, patch, where)
            with pytest.raises(Stopped):
                run(beside, where)
        assert threading.active_count() == alive
        onward, _ = workspace(tmp_path / "resumed")
        run(beside, onward, where.out / events(stream, "checkpoint")[-1]["path"])
        assert same(load_file(onward.out / "student.safetensors"), in_turn)
        with pytest.raises(LossDiverged):
            run(
                spec(threads=1, overlap=True, epochs=40, optimizer={"name": "sgd", "lr": 99, "momentum": 0.999}),
                workspace(tmp_path / "bad")[0],
            )
        assert threading.active_count() == alive
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("steps", [3, 9])
def test_run_a_streamed_job_that_was_stopped_goes_on_to_the_bits_of_a_stored_one(
    steps, data, teacher, tmp_path, monkeypatch
):
    """Data, unlabelled images and held-out images are decoded as they are needed, in both attempts."""
    pool = {"source": f"file:{write_pool(tmp_path / 'pool.npz')}"}
    spec = job(data, teacher, method="kd", unlabelled=pool, training={"batch_size": 16})
    report, whole, undisturbed = finish(spec, tmp_path / "whole")
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 0)
    where, stream = workspace(tmp_path / "stopped")
    where.cache_max_bytes = 0
    with monkeypatch.context() as patch:
        stop_after(steps, patch, where)
        with pytest.raises(Stopped):
            run(spec, where)
    onward, later = workspace(tmp_path / "resumed", tmp_path / "another host")
    onward.cache_max_bytes, onward.warnings = 0, list(where.warnings)
    resumed = run(spec, onward, where.out / events(stream, "checkpoint")[-1]["path"])
    assert same(whole, load_file(onward.out / "student.safetensors"))
    assert events(stream, "metric") + events(later, "metric") == events(undisturbed, "metric")
    assert resumed["student"] == report["student"] and resumed["dataset"] == report["dataset"]
    said = [one["pointer"] for one in resumed["warnings"] if one["code"] == "decoded_again"]
    assert said == ["/dataset", "/unlabelled"]


def stopped(spec, folder, steps, monkeypatch, resume=None):
    """Return the workspace and the lines of a run that was stopped, and its last checkpoint."""
    where, stream = workspace(folder)
    with monkeypatch.context() as patch:
        stop_after(steps, patch, where)
        with pytest.raises(Stopped):
            run(spec, where, resume)
    return stream, where.out / events(stream, "checkpoint")[-1]["path"]


@pytest.mark.parametrize("steps", [3, 9, 12, 20])
def test_run_a_job_of_the_version_before_continues_with_running_averages_to_the_same_bits(
    steps, data, teacher, tmp_path, monkeypatch
):
    """Neither its spec nor its checkpoint says anything about batch norms. The second attempt is stopped, too."""
    running, spec = (distilled(data, teacher, ema=0.8, **kind) for kind in (EARLIER, {}))
    _, whole, _ = finish(running, tmp_path / "whole")
    _, checkpoint = stopped(running, tmp_path / "before", steps, monkeypatch)
    as_by_the_version_before(checkpoint)
    second, checkpoint = stopped(spec, tmp_path / "second", 2, monkeypatch, checkpoint)
    where, third = workspace(tmp_path / "third")
    run(spec, where, checkpoint)
    assert same(whole, load_file(where.out / "student.safetensors"))
    assert json.loads((where.out / "spec.json").read_text())["training"]["batch_norm"] == "running"
    codes = {line["code"] for stream in (second, third) for line in events(stream, "warning")}
    assert "bits_not_repeatable" not in codes


def test_run_a_job_keeps_to_the_precision_that_it_began_with(data, tmp_path, monkeypatch):
    """A later attempt on a machine without native bf16, and one by another version's default, have the same bits."""
    spec = supervised(data, precision="auto")
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    report, whole, _ = finish(spec, tmp_path / "whole")
    assert report["computing"]["bf16"] and report["cost"]["precision"] == "bf16"
    assert report["computing"].items() >= {"device": "cpu", "threads": 1, "step": "eager", "overlap": False}.items()
    _, checkpoint = stopped(spec, tmp_path / "stopped", 5, monkeypatch)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    where, _ = workspace(tmp_path / "resumed")
    resumed = run(spec, where, checkpoint)
    assert same(whole, load_file(where.out / "student.safetensors")) and resumed["computing"] == report["computing"]
    assert not resumed["warnings"] or "bits_not_repeatable" not in {one["code"] for one in resumed["warnings"]}
    report, plain, _ = finish(spec, tmp_path / "plain")
    assert not report["computing"]["bf16"] and not same(whole, plain)


def test_run_a_job_of_the_version_before_continues_in_fp32(data, tmp_path, monkeypatch):
    """By default it computed in fp32 on every CPU. What is stored of it does not say so."""
    _, whole, _ = finish(supervised(data, **EARLIER), tmp_path / "whole")
    spec = supervised(data, batch_norm="running", precision="auto")
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    before = supervised(data, precision="auto", **EARLIER)
    _, checkpoint = stopped(before, tmp_path / "before", 5, monkeypatch)
    as_by_the_version_before(checkpoint)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    _, checkpoint = stopped(spec, tmp_path / "second", 2, monkeypatch, checkpoint)
    where, _ = workspace(tmp_path / "third")
    assert not run(spec, where, checkpoint)["computing"]["bf16"]
    assert same(whole, load_file(where.out / "student.safetensors"))


def test_run_a_resumed_job_with_fewer_threads_says_that_its_bits_are_not_repeatable(data, tmp_path, monkeypatch):
    _, checkpoint = stopped(supervised(data), tmp_path / "before", 5, monkeypatch)
    state = torch.load(checkpoint, weights_only=True)
    state["computing"]["threads"] = 64
    torch.save(state, checkpoint)
    warnings = run(supervised(data), workspace(tmp_path / "after")[0], checkpoint)["warnings"]
    (warning,) = [one for one in warnings if one["code"] == "bits_not_repeatable"]
    assert "with 1 instead of 64 threads" in warning["message"]


def test_run_a_job_that_asks_for_more_threads_than_there_are_cores_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 1)
    report, _, _ = finish(supervised(data, threads=5, epochs=1), tmp_path)
    (warning,) = [one for one in report["warnings"] if one["code"] == "bits_not_repeatable"]
    assert warning["pointer"] == "/training/threads" and "training.threads is 5" in warning["message"]
    assert report["computing"]["threads"] == 1


def test_run_a_job_that_leaves_a_core_to_another_process_says_it_once(data, tmp_path, monkeypatch):
    set_now = iter([None, 1, None, 2])
    monkeypatch.setattr(device.LoadWatch, "after_step", lambda _: next(set_now, None))
    report, _, stream = finish(supervised(data), tmp_path)
    (warning,) = [one for one in report["warnings"] if one["code"] == "bits_not_repeatable"]
    assert warning["pointer"] == "/training/threads" and warning in [
        {name: line[name] for name in warning} for line in events(stream, "warning")
    ]


@pytest.mark.parametrize("steps", [3, 9, 14])
def test_run_a_validation_split_chooses_the_best_epoch_and_the_job_resumes_to_the_same_bits(
    steps, teacher, tmp_path, monkeypatch
):
    """All 120 training images are trained on, seven batches of 16 an epoch; without the split they are 108, six."""
    spec = distilled(write_arrays(tmp_path / "with.npz", validation=9), teacher, ema=0.8)
    report, whole, stream = finish(spec, tmp_path / "whole")
    assert (report["dataset"]["train"], report["dataset"]["validation"], report["test_samples"]) == (120, 9, 30)
    assert max(line["step"] for line in events(stream, "metric")) % 7 == 0
    accuracies = [
        line["values"]["validation/accuracy"]
        for line in events(stream, "metric")
        if "validation/accuracy" in line["values"]
    ]
    assert accuracies and all((9 * one) == pytest.approx(round(9 * one), abs=1e-4) for one in accuracies)
    _, checkpoint = stopped(spec, tmp_path / "stopped", steps, monkeypatch)
    where, _ = workspace(tmp_path / "resumed")
    run(spec, where, checkpoint)
    assert same(whole, load_file(where.out / "student.safetensors"))


@pytest.mark.parametrize("method", ["kd", "rkd"])
def test_run_a_job_with_teachers_of_other_classes_repeats_and_resumes_to_the_same_bits(
    method, data, teacher, tmp_path, monkeypatch
):
    """kd has an ensemble of a mapped teacher and a plain one; rkd has no map. The export is the student alone."""
    six = write_teacher(tmp_path / "six.safetensors", classes=6)
    mapped = {"checkpoint": f"file:{six}", "class_map": {"2": [0, 3], "0": 5, "1": [1, 2]}}
    both = [mapped, {"checkpoint": f"file:{teacher}"}]
    spec = job(data, both if method == "kd" else six, method=method, training={"batch_size": 16})
    report, whole, stream = finish(spec, tmp_path / "whole")
    assert whole["fc.bias"].shape == (3,) and (report["teacher"]["accuracy"] is None) == (method == "rkd")
    _, checkpoint = stopped(spec, tmp_path / "stopped", 5, monkeypatch)
    where, _ = workspace(tmp_path / "resumed")
    resumed = run(spec, where, checkpoint)
    assert same(whole, load_file(where.out / "student.safetensors")) and resumed["teacher"] == report["teacher"]
    written = json.loads((where.out / "spec.json").read_text())
    again, _ = workspace(tmp_path / "again")
    run(parse(written), again)
    assert same(whole, load_file(again.out / "student.safetensors")), "the resolved spec means the same"
    if method == "kd":
        assert written["teacher"][0]["class_map"] == {"0": [5], "1": [1, 2], "2": [0, 3]}
        dropped = [line["dropped"] for line in events(stream, "teacher_check")]
        assert len(dropped) == 1 and 0 < dropped[0] < 1, "output 4 is left out"


def test_run_a_job_of_the_version_before_keeps_to_its_held_out_part(teacher, tmp_path, monkeypatch):
    """It was accepted when validation splits were not read. A job that has no checkpoint yet uses the split."""
    without = write_arrays(tmp_path / "without.npz")
    having = write_arrays(tmp_path / "having.npz", validation=9)
    _, whole, _ = finish(distilled(without, teacher, **EARLIER), tmp_path / "whole")
    _, checkpoint = stopped(distilled(without, teacher, **EARLIER), tmp_path / "before", 4, monkeypatch)
    as_by_the_version_before(checkpoint)
    where, _ = workspace(tmp_path / "after")
    report = run(distilled(having, teacher), where, checkpoint)
    assert same(whole, load_file(where.out / "student.safetensors")) and report["dataset"]["validation"] == 0
    assert "bits_not_repeatable" not in {one["code"] for one in report["warnings"]}


def test_run_a_job_of_the_version_before_on_data_that_is_read_otherwise_now_says_so(teacher, tmp_path, monkeypatch):
    """Earlier versions passed over `x_eval`, and set some of the training images aside."""
    data = write_arrays(tmp_path / "data.npz")
    arrays = dict(np.load(data))
    arrays |= {"x_eval": arrays.pop("x_test"), "y_eval": arrays.pop("y_test")}
    np.savez(data, **arrays)
    _, checkpoint = stopped(supervised(data, batch_norm="running"), tmp_path / "before", 3, monkeypatch)
    as_by_the_version_before(checkpoint)
    where, _ = workspace(tmp_path / "after")
    warnings = run(supervised(data), where, checkpoint)["warnings"]
    (warning,) = [one for one in warnings if one["code"] == "bits_not_repeatable"]
    assert warning["pointer"] == "/dataset" and "120 images of x_train, 30 images of x_eval" in warning["message"]


def test_run_a_job_of_the_version_before_with_large_images_says_that_its_bits_are_not_repeatable(
    data, tmp_path, monkeypatch
):
    """Evaluations of images as large are in smaller batches now. A job of this version has none of that."""
    monkeypatch.setattr(evaluate, "BATCH_PIXELS", 8 * 8 * 4)
    _, checkpoint = stopped(supervised(data), tmp_path / "before", 3, monkeypatch)
    where, stream = workspace(tmp_path / "of this one")
    assert "bits_not_repeatable" not in {one["code"] for one in run(supervised(data), where, checkpoint)["warnings"]}
    as_by_the_version_before(checkpoint)
    where, stream = workspace(tmp_path / "of the one before")
    report = run(supervised(data), where, checkpoint)
    assert next(line["code"] for line in events(stream, "warning")) == "bits_not_repeatable"
    assert report["warnings"][0]["code"] == "bits_not_repeatable"


def test_run_a_resumed_job_keeps_the_warnings_of_its_earlier_attempt(data, tmp_path, monkeypatch):
    warning = WarningItem("teacher_saturated", "/teacher", "its soft targets are its labels")
    where, stream = workspace(tmp_path / "before")
    where.warn(warning)
    stop_after(3, monkeypatch, where)
    with pytest.raises(Stopped):
        run(supervised(data), where)
    onward, _ = workspace(tmp_path / "after")
    report = run(supervised(data), onward, where.out / events(stream, "checkpoint")[-1]["path"])
    assert warning.as_dict() in report["warnings"]
    again, lines = workspace(tmp_path / "known")
    again.warnings.append(warning)
    run(supervised(data), again, where.out / events(stream, "checkpoint")[-1]["path"])
    assert again.warnings.count(warning) == 1 and warning.code not in {e["code"] for e in events(lines, "warning")}


def test_run_checkpoints_are_numbered_by_the_jobs_steps_and_two_are_kept(data, teacher, tmp_path):
    _, _, stream = finish(distilled(data, teacher, checkpoint_every_s=0), tmp_path)
    steps = [line["step"] for line in events(stream, "checkpoint")]
    assert steps == list(range(1, 25))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.fixture
def full(monkeypatch):
    """Names of files that find no room when they are to reach the disk."""
    names = set()

    def sync(path):
        if any(name in path.name for name in names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", sync)
    return names


def test_run_a_training_goes_on_over_a_full_disk_and_says_so_once_a_shortage(data, tmp_path, full):
    spec = supervised(data, checkpoint_every_s=0)
    _, undisturbed, _ = finish(spec, tmp_path / "roomy")
    full |= {f"{step:09d}.pt" for step in (3, 4, 5, 9)}
    _, weights, stream = finish(spec, tmp_path / "full")
    assert [line["step"] for line in events(stream, "checkpoint")] == [1, 2, 6, 7, 8, 10, 11, 12]
    warnings = events(stream, "warning")
    assert [warning["code"] for warning in warnings[:2]] == ["checkpoint_not_saved"] * 2
    assert [warning["code"] for warning in warnings[2:]] == ["student_ended_at_chance"]
    assert "no disk space to write 000000003.pt" in warnings[0]["message"] and "000000009.pt" in warnings[1]["message"]
    assert same(weights, undisturbed)
    assert not list((tmp_path / "full").rglob("*.tmp"))


def test_run_asked_to_stop_over_a_full_disk_it_says_so_and_the_last_good_state_stays(data, tmp_path, full, monkeypatch):
    full |= {f"{step:09d}.pt" for step in range(3, 13)}
    where, stream = workspace(tmp_path)
    stop_after(5, monkeypatch, where)
    with pytest.raises(StorageFull, match=r"000000005\.pt"):
        run(supervised(data, checkpoint_every_s=0), where)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["000000001.pt", "000000002.pt"]
    assert len(events(stream, "warning")) == 1


def test_run_results_that_find_no_room_are_an_error(data, tmp_path, full):
    full.add("student.safetensors")
    where, stream = workspace(tmp_path)
    with pytest.raises(StorageFull, match="student"):
        run(supervised(data), where)
    assert not events(stream, "artifact")


def test_run_progress_covers_the_baseline_too(data, teacher, tmp_path):
    _, _, stream = finish(distilled(data, teacher), tmp_path)
    last = events(stream, "progress")[-1]
    assert (last["trial"], last["step"], last["total_steps"], last["percent"]) == ("alone", 24, 24, 100)
    assert last["seconds_remaining"] == 0


@pytest.fixture
def each_progress(monkeypatch):
    """Every progress line is due."""
    monkeypatch.setattr(Lines, "progress_is_due", lambda _: True)


METHODS = [
    {"method": "supervised"},
    {"method": "kd", "baseline": "train", "assistants": ["convnet4"]},
    {"method": {"name": "factor_transfer", "pretraining_epochs": 1}, "baseline": "train"},
    {"method": {"name": "fitnet", "stages": "two", "pretraining_epochs": 1}},
    {"method": "dml", "student": ["convnet4", "convnet4"]},
    {"method": "one"},
    {"method": "byot"},
    {"method": {"name": "born_again", "generations": 2}},
]


@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: str(fields["method"]))
def test_run_progress_counts_evaluations_never_falls_and_ends_with_the_job(
    fields, data, teacher, tmp_path, each_progress
):
    needs = METHODS_BY_NAME[fields["method"] if isinstance(fields["method"], str) else fields["method"]["name"]]
    _, _, stream = finish(job(data, teacher if needs.facts.teacher == "required" else None, **fields), tmp_path)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    shown = [line["percent"] for line in lines if line["event"] == "progress"]
    assert shown == sorted(shown)
    assert lines[-1]["event"] == "progress" and shown[-1] == 100 and shown[-2] < 100
    phases = [line.get("phase") for line in lines]
    evaluating, exporting = phases.index("evaluating"), phases.index("exporting")
    measuring = [line["percent"] for line in lines[evaluating:exporting] if line["event"] == "progress"]
    assert measuring[0] > max(line["percent"] for line in lines[:evaluating] if line["event"] == "progress")
    assert measuring[-1] > measuring[0]
    steps = [line["step"] for line in lines if line["event"] == "progress"]
    assert steps == sorted(steps) and steps[-1] == lines[-1]["total_steps"]


@pytest.mark.parametrize("steps", [1, 6, 12, 13, 20])
def test_run_progress_does_not_fall_when_a_stopped_job_is_resumed(
    steps, data, teacher, tmp_path, monkeypatch, each_progress
):
    spec = distilled(data, teacher)
    stream, checkpoint = stopped(spec, tmp_path / "stopped", steps, monkeypatch)
    shown = [line["percent"] for line in events(stream, "progress")]
    where, later = workspace(tmp_path / "resumed")
    run(spec, where, checkpoint)
    shown += [line["percent"] for line in events(later, "progress")]
    assert shown == sorted(shown) and shown[-1] == 100


@pytest.mark.parametrize("form", ["kl", "cross_entropy", "logits_l2", "probabilities_l2"])
def test_run_every_form_teaches_the_student_and_never_the_teacher(form, data, teacher, tmp_path):
    before = load_file(teacher)
    report, weights, stream = finish(
        distilled(data, teacher, "none", {"name": "kd", "form": form, "standardize": form == "kl"}), tmp_path
    )
    assert same(before, load_file(teacher)) and not same(before, weights)
    assert all("train/distillation_loss" in line["values"] for line in events(stream, "metric"))
    assert report["alone"] is None and report["gain"] is None


def test_run_a_baseline_of_an_earlier_job_is_measured_not_trained(data, teacher, tmp_path):
    earlier, _, _ = finish(supervised(data), tmp_path / "earlier")
    baseline = f"file:{tmp_path / 'earlier' / 'student.safetensors'}"
    report, _, stream = finish(distilled(data, teacher, baseline), tmp_path / "later")
    assert report["alone"]["accuracy"] == earlier["student"]["accuracy"]
    assert report["alone"]["agreement"] is not None and report["gain"] is not None
    assert {line["trial"] for line in events(stream, "metric")} == {"student"}


def test_run_a_baseline_of_another_network_is_refused(data, teacher, tmp_path):
    with pytest.raises(SpecInvalid, match="the baseline is a convnet8"):
        other = {**supervised(data).as_json(), "student": "convnet8", "training": {"epochs": 1, "batch_size": 16}}
        finish(parse(other), tmp_path / "other")
        baseline = f"file:{tmp_path / 'other' / 'student.safetensors'}"
        finish(distilled(data, teacher, baseline), tmp_path / "later")


def test_run_a_loss_that_leaves_the_reals_is_named(data, tmp_path):
    with pytest.raises(LossDiverged, match="epoch 1") as caught:
        finish(supervised(data, optimizer={"name": "sgd", "lr": 99, "momentum": 0.999}, epochs=40), tmp_path)
    assert "lr" in caught.value.hint


def test_run_a_teacher_of_other_classes_is_refused_before_anything_is_trained(data, teacher, tmp_path):
    two = write_arrays(tmp_path / "two.npz", classes=2)
    where, stream = workspace(tmp_path / "run")
    with pytest.raises(TeacherMismatch, match="3 classes"):
        run(distilled(two, teacher), where)
    assert not events(stream, "metric") and not list(where.out.glob("*.safetensors"))


def test_run_a_resolved_spec_runs_the_same(data, teacher, tmp_path):
    _, once, _ = finish(distilled(data, teacher, "none"), tmp_path / "once")
    resolved = parse(json.loads((tmp_path / "once" / "spec.json").read_text()))
    _, twice, _ = finish(resolved, tmp_path / "twice")
    assert same(once, twice)


def test_run_reports_the_cost_of_each_stage_and_of_all_attempts(data, teacher, tmp_path, monkeypatch):
    spec = distilled(data, teacher, method="factor_transfer").model_copy(
        update={"quantization": Quantization(epochs=1)}
    )
    where, stream = workspace(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(14, patch, where)
        with pytest.raises(Stopped):
            run(spec, where)
    checkpoint = where.out / events(stream, "checkpoint")[-1]["path"]
    saved = torch.load(checkpoint, weights_only=True)["cost"]
    # As if the first attempt had taken long, in much memory.
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "cost": {**saved, "seconds": 1000.0, "memory_bytes": 1 << 40}}, checkpoint)
    report = run(spec, workspace(tmp_path / "resumed")[0], checkpoint)
    assert saved["seconds"] > 0 and list(saved["stages"]) == ["student/factor_transfer", "student"]
    assert 1000 < report["seconds"] < 2000
    cost = JobCost.model_validate(report["cost"])
    assert cost.stages.keys() == {"student/factor_transfer", "student", "student/int8", "alone", "alone/int8"}
    assert all(one.step_s > 0 and one.held_out_image_s > 0 for one in cost.stages.values())
    assert (cost.basis, cost.device, cost.precision, cost.memory_bytes) == ("measured", "cpu", "fp32", 1 << 40)
    assert (
        cost.preparing_s > 0
        and cost.test_image_s > 0
        and cost.exporting_s > 0
        and 0 < cost.memory_fixed_bytes < 1 << 40
    )


def test_run_resumes_a_checkpoint_without_a_cost(data, teacher, tmp_path):
    """As versions before this one have written them."""
    _, _, stream = finish(distilled(data, teacher, checkpoint_every_s=0), tmp_path / "first")
    checkpoint = tmp_path / "first" / events(stream, "checkpoint")[-2]["path"]
    state = torch.load(checkpoint, weights_only=True)
    del state["cost"]
    torch.save(state, checkpoint)
    report = run(distilled(data, teacher), workspace(tmp_path / "second")[0], checkpoint)
    assert 0 < report["seconds"] < 100 and report["cost"]["stages"].keys() == {"alone"}
