"""Ended jobs in MLflow: what is sent, to a real store; and that a tracker that fails costs a job nothing."""

import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from store import events, jobs, lifecycle, metrics
from store.artifacts import NewArtifact
from tests.store.helpers import new_job
from tests.worker.job_database import JobDatabase
from tests.worker.processes import FAKE_ENGINE, until
from worker import context as context_module
from worker import tracking
from worker.context import Options, WorkerContext
from worker.tracking import Tracker, child_environment, params_of, run_of
from worker.worker import Worker

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="the extra `mlflow` is not installed")
REPORT = {
    "verdict": "The student is right.",
    "student": {"accuracy": 0.75, "parameters": 3000},
    "teacher": {"accuracy": 0.8, "agreement": None},
    "alone": None,
    "proof": {"gap_closed": {"value": 0.5, "low": 0.1, "high": 0.9}, "gain": None},
    "seconds": 12.5,
}


def ended(db: JobDatabase, error: dict[str, Any] | None = None, kind: str = "distillation") -> str:
    """A job with a curve that has succeeded with two files, or failed."""
    spec = {"method": {"name": "kd"}, "training": {"epochs": 3}, "student": [{"architecture": "convnet4"}]}
    with db.database.begin() as connection:
        job, _ = jobs.submit(connection, new_job(project="p", kind=kind, resolved_spec=spec, labels={"team": "vision"}))
        claim = lifecycle.claim(connection, "w", 30, takeover=False)
        assert claim is not None
        for step, value in ((1, 2.0), (2, None), (3, 1.0)):
            metrics.record(connection, job.id, claim.fence, "student", step=step, epoch=1, values={"train/loss": value})
        if error is not None:
            lifecycle.finish_failed(connection, job.id, claim.fence, error, None)
            return job.id
        stored = {name: db.files.put_stream([name.encode()]) for name in ("report.json", "student.safetensors")}
        made = [NewArtifact(name, blob.sha256, blob.bytes, "text/plain") for name, blob in stored.items()]
        lifecycle.finish_succeeded(connection, job.id, claim.fence, REPORT, made)
    return job.id


def warnings_of(db: JobDatabase, job_id: str) -> list[str]:
    return [f"{one['code']}: {one['message']}" for one in db.job(job_id).warnings]


def test_params_of_a_resolved_spec_are_flat_and_short():
    spec = {
        "teacher": {"checkpoint": "blob:1", "weight": None, "class_map": {}},
        "student": [{"architecture": "a"}, {"architecture": "b"}],
        "method": {"name": "kd", "milestones": [3, 5], "ä": True},
        "long": "x" * 9000,
    }
    found = params_of(spec)
    assert found.pop("long") == "x" * 499 + "…"
    assert found == {
        "teacher.checkpoint": "blob:1",
        "student.0.architecture": "a",
        "student.1.architecture": "b",
        "method.name": "kd",
        "method.milestones": "[3, 5]",
        "method._": "true",
    }
    assert len(params_of({str(number): number for number in range(9999)})) == tracking.MOST_PARAMS


def test_run_of_a_job_has_its_curves_and_figures(db: JobDatabase):
    job_id = ended(db)
    with db.database.connect() as connection:
        curves = metrics.series(connection, job_id)
    run = run_of(db.job(job_id), curves, {"report.json": "/there"}, {"more": "tags"}, "file:/x")
    assert (run.experiment, run.name, run.status) == ("distillery-p", "a job", "FINISHED")
    assert run.points[:2] == [("student/train/loss", 2.0, 1), ("student/train/loss", 1.0, 3)]
    assert dict((key, value) for key, value, _ in run.points[2:]) == {
        "final/teacher/accuracy": 0.8,
        "final/student/accuracy": 0.75,
        "final/student/parameters": 3000.0,
        "final/gap_closed": 0.5,
        "final/gap_closed_low": 0.1,
        "final/gap_closed_high": 0.9,
        "final/seconds": 12.5,
    }
    assert run.tags["distillery.job"] == job_id and run.tags["label.team"] == "vision" and run.tags["more"] == "tags"
    assert run.tags["mlflow.note.content"] == "The student is right." and "distillery.error" not in run.tags
    assert run.started_ms <= run.ended_ms and run.files == {"report.json": "/there"}


def test_run_of_a_job_that_failed(db: JobDatabase):
    error = {"code": "loss_diverged", "message": "nan", "retryable": False, "hint": None}
    run = run_of(db.job(ended(db, error)), {}, {}, {}, "file:/x")
    assert run.status == "FAILED" and run.tags["distillery.error"] == "loss_diverged: nan" and run.points == []


@needs_mlflow
def test_track_writes_a_run_that_mlflow_reads(context: WorkerContext, db: JobDatabase, tmp_path: Path):
    """By MLflow's own store in a folder, whose files are read as they are."""
    store = tmp_path / "runs"
    job_id = ended(db)
    Tracker(context, f"file://{store}").track(job_id)
    assert warnings_of(db, job_id) == []
    (params,) = store.rglob("params")
    run = params.parent
    assert (run / "params" / "training.epochs").read_text() == "3"
    assert [line.split()[1:] for line in (run / "metrics/student/train/loss").read_text().splitlines()] == [
        ["2.0", "1"],
        ["1.0", "3"],
    ]
    assert (run / "tags" / "distillery.job").read_text() == job_id
    assert {path.name: path.read_text() for path in (run / "artifacts").iterdir()} == {
        "report.json": "report.json",
        "student.safetensors": "student.safetensors",
    }


@needs_mlflow
def test_track_of_a_tracker_that_hangs_is_a_warning(
    context: WorkerContext, db: JobDatabase, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job_id = ended(db)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        Tracker(context, uri).track(job_id)
    (warning,) = warnings_of(db, job_id)
    assert warning.startswith("tracking_failed: MLflow has not got the job: MlflowException: ")
    assert "timed out" in warning and "secret" not in warning
    assert db.job(job_id).status == "succeeded" and db.types(job_id)[-1] == "warning"


def test_send_ends_a_child_that_takes_too_long(context: WorkerContext, db: JobDatabase):
    tracker = Tracker(context, "http://127.0.0.1:9")
    run = run_of(db.job(ended(db)), {}, {}, {}, "http://127.0.0.1:9")
    assert tracker.send(run, 0.05) == "it did not answer within 0.05 s"
    assert tracker._child is None


def test_send_says_how_a_child_has_ended(
    context: WorkerContext, db: JobDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    run = run_of(db.job(ended(db)), {}, {}, {}, "http://127.0.0.1:9")
    assert Tracker(context, run.uri).send(run) == "its client ended with exit code 3: no such library"


@pytest.mark.parametrize("kind", ["evaluation", "export"])
def test_track_leaves_out_what_is_no_distillation_or_has_not_ended(
    context: WorkerContext, db: JobDatabase, monkeypatch: pytest.MonkeyPatch, kind: str
):
    tracker = Tracker(context, "http://127.0.0.1:9")
    monkeypatch.setattr(tracker, "send", lambda run: pytest.fail("it was sent"))
    tracker.track(ended(db, kind=kind))
    tracker.track(db.submit())
    tracker.track("job_gone")


def test_files_that_are_too_large_are_named_by_their_digest(
    context: WorkerContext, db: JobDatabase, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "FILE_BYTES", len("report.json"))
    runs: list[Any] = []
    tracker = Tracker(context, "http://127.0.0.1:9")
    monkeypatch.setattr(tracker, "send", runs.append)
    tracker.track(ended(db))
    (run,) = runs
    assert list(run.files) == ["report.json"]
    assert run.tags["distillery.file.student.safetensors"].startswith("sha256:")


def test_worker_tells_its_tracker_of_each_job_that_ends(
    settings: Any, db: JobDatabase, monkeypatch: pytest.MonkeyPatch
):
    """A tracker with a fault: the job is as without it, and the next one is tracked, too."""
    told: list[str] = []

    def fails(self: Tracker, job_id: str) -> None:
        told.append(job_id)
        raise RuntimeError("the tracker is broken")

    monkeypatch.setattr(Tracker, "track", fails)
    monkeypatch.setattr(context_module, "find_spec", lambda name: "found")
    options = Options(engine=FAKE_ENGINE, mlflow_tracking_uri="http://127.0.0.1:9")
    worker = Worker(settings, options, listens=False)
    worker.start()
    try:
        submitted = [db.submit(steps=1), db.submit(steps=1)]
        for job_id in submitted:
            db.assert_trained(job_id, 1)
        until(lambda: told == submitted, "the tracker to be told")
    finally:
        worker.stop()


def test_append_late_warning_adds_once_and_only_to_a_job_that_has_ended(db: JobDatabase):
    warning = tracking.WarningItem("tracking_failed", "", "why", "what to do")
    done, open_job = ended(db), db.submit()
    for job_id in (done, done, open_job, "job_gone"):
        with db.database.begin() as connection:
            events.append_late_warning(connection, job_id, warning)
    assert warnings_of(db, done) == ["tracking_failed: why"] and warnings_of(db, open_job) == []
    assert db.types(done).count("warning") == 1


def test_options_refuse_a_tracker_without_mlflow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(context_module, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'distillery\[mlflow\]'"):
        Options(mlflow_tracking_uri="http://127.0.0.1:9")
    assert Options(mlflow_tracking_uri="").mlflow_tracking_uri is None


def test_child_environment_has_mlflows_settings_and_none_of_ours():
    given = {
        "DISTILLERY_DATABASE_URL": "postgresql://secret",
        "MLFLOW_TRACKING_TOKEN": "token",
        "MLFLOW_DISABLE_TELEMETRY": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "PATH": "/bin",
    }
    found = child_environment(given)
    assert "DISTILLERY_DATABASE_URL" not in found
    assert found["MLFLOW_TRACKING_TOKEN"] == "token" and found["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert found["MLFLOW_DISABLE_TELEMETRY"] == found["DO_NOT_TRACK"] == "true"


def test_a_worker_imports_no_mlflow():
    """Only the child does: it takes seconds and starts threads. This process has imported all that a worker has."""
    assert "mlflow" not in sys.modules and "worker.tracking" in sys.modules
