"""One attempt in this process, with a real database and a real engine process: the job's end in each case."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from base.clock import boottime
from base.memory import host_memory
from kdcore.spec.measured import teacher_check_key
from store import checkpoints, jobs, lifecycle, metrics, tables
from store.errors import NotFound
from store.settings import Settings
from tests.worker.conftest import CPU
from tests.worker.job_database import ENDED, OPTIONS, JobDatabase
from tests.worker.processes import until
from worker.attempt import inputs, run_job
from worker.context import WorkerContext
from worker.engine import EnginePool
from worker.worker import Worker
from worker.writer import AttemptWriter

Start = Callable[..., Worker]
Arm = Callable[[str], None]


LONG = 200
"""Steps of 0.02 s: time for a request to reach the engine, on a busy machine too."""


def test_run_job_from_claim_to_artifacts(db: JobDatabase, start_worker: Start, settings: Settings):
    job_id = db.submit(steps=10, checkpoint_every=2)
    start_worker()
    db.assert_trained(job_id, 10)
    types = db.types(job_id)
    assert types[:2] == ["queued", "claimed"]
    assert types[-1] == "succeeded"
    assert types.count("checkpoint") == 5
    phases = [event.data["phase"] for event in db.events(job_id) if event.type == "phase"]
    assert phases == ["validating", "training", "exporting", "publishing"]
    with db.database.connect() as connection:
        curve = metrics.series(connection, job_id)["student"]["train/loss"]
        kept = checkpoints.list_checkpoints(connection, job_id)
    assert [step for step, _ in curve] == list(range(1, 11))
    assert [checkpoint.step for checkpoint in kept] == [10, 8]
    assert sorted(path.name for path in (db.files.folder / "checkpoints").rglob("*.pt")) == [
        "000000008.pt",
        "000000010.pt",
    ]
    assert "the fake engine starts" in db.files.log_path(job_id, 1).read_text()
    assert (settings.home / "cache" / "projects" / "p").is_dir(), "each project has a cache of its own"
    db.assert_nothing_left()


@pytest.mark.parametrize("cost", [{"stages": "none"}, None, {}])
def test_run_job_succeeds_when_the_cost_in_its_report_cannot_be_kept(db: JobDatabase, start_worker: Start, cost: Any):
    job_id = db.submit(steps=2, report={"cost": cost})
    start_worker()
    db.assert_trained(job_id, 2)
    with db.database.connect() as connection:
        assert connection.execute(select(tables.measurements)).all() == []


def test_run_job_takes_jobs_one_after_the_other_by_age(db: JobDatabase, start_worker: Start):
    ids = [db.submit(steps=2) for _ in range(3)]
    start_worker()
    ended = [db.until(job_id, *ENDED) for job_id in ids]
    assert [job.status for job in ended] == ["succeeded"] * 3
    assert ended[0].finished_at <= ended[1].started_at and ended[1].finished_at <= ended[2].started_at


@pytest.mark.parametrize(
    ("misbehaviour", "code", "words"),
    [
        ("segfault", "internal", "SIGSEGV"),
        ("kill_itself", "worker_lost", "SIGKILL"),
        ("vanish", "worker_lost", "exit code 0"),
        ("exit_three", "internal", "exit code 3"),
        ("out_of_memory", "out_of_memory", "memory"),
    ],
)
def test_run_job_retries_after_an_error_that_may_pass(
    db: JobDatabase, start_worker: Start, tmp_path: Any, misbehaviour: str, code: str, words: str
):
    job_id = db.submit(steps=4, checkpoint_every=100, at={"2": misbehaviour}, once=str(tmp_path / "once"))
    start_worker()
    db.assert_trained(job_id, 4)
    error = next(event.data["error"] for event in db.events(job_id) if "error" in event.data)
    assert error["code"] == code
    assert words in error["message"]
    assert [attempt.how for attempt in db.attempts(job_id)] == ["failed", "succeeded"]
    db.assert_nothing_left()


def test_run_job_stops_an_engine_that_prints_nothing_for_long(db: JobDatabase, settings: Settings, tmp_path: Any):
    """It is deaf, so that it is killed; its attempt counts, and the next one continues from the checkpoint."""
    quick = settings.model_copy(update={"stop_grace_s": 0.1})
    context = WorkerContext(
        quick, OPTIONS.model_copy(update={"engine_silence_s": 0.3, "warm": False}), wake_workers=lambda: None
    )
    options = {"at": {"4": "deaf"}, "once": str(tmp_path / "once")}
    job_id = db.submit(steps=6, checkpoint_every=2, **options)
    engines = EnginePool(context, CPU)
    for _ in range(2):
        with db.database.begin() as connection:
            connection.execute(update(tables.jobs).values(not_before=None))
            claim = lifecycle.claim(connection, "w", settings.lease_s, takeover=False)
        assert claim is not None
        run_job(claim, context, engines, boottime(), lambda: None)
    context.close()
    db.assert_trained(job_id, 6)
    assert [attempt.how for attempt in db.attempts(job_id)] == ["failed", "succeeded"]
    error = next(event.data["error"] for event in db.events(job_id) if "error" in event.data)
    assert (error["code"], error["retryable"]) == ("engine_silent", True)
    assert "no line for 0.3 s" in error["message"]
    db.assert_nothing_left()


def test_run_job_takes_signs_of_work_as_no_events(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=3, at={"2": "work"})
    start_worker()
    db.assert_trained(job_id, 3)
    assert not {"working", "waiting"} & set(db.types(job_id))


def test_run_job_raises_alerts_of_metrics(db: JobDatabase, start_worker: Start):
    nothing = {"above": None, "from_epoch": None, "no_progress_s": None}
    low = {**nothing, "metric": "train/loss", "below": 0.3, "from_epoch": 2}
    asked = [low, {**nothing, "metric": None, "below": None, "no_progress_s": 600.0}]
    epochs = {str(step): 1 + step // 6 for step in range(1, 11)}
    job_id = db.submit(steps=10, epochs=epochs, resolved={"scheduling": {"alerts": asked}})
    start_worker()
    db.assert_trained(job_id, 10)
    (alert,) = [event.data for event in db.events(job_id) if event.type == "alert"]
    assert alert == {"number": 0, "metric": "train/loss", "below": 0.3, "value": 1 / 6, "epoch": 2, "step": 6}


def test_run_job_whose_engine_takes_too_much_memory_fails_at_once(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    """Another attempt would take as much: none is made."""
    monkeypatch.setattr("worker.engine.LOOK_S", 0.05)
    monkeypatch.setattr("worker.engine.LIST_S", 0.05)
    job_id = db.submit(steps=4, at={"2": "swell"})
    worker = start_worker()
    assert worker.context.engine_memory_bytes == int(0.8 * (host_memory() or 0)), "one slot"
    worker.context.engine_memory_bytes = 200_000_000
    error = db.until(job_id, *ENDED).error
    assert (error["code"], error["retryable"]) == ("out_of_memory", False)
    assert "it may take 0.2 GB here" in error["message"] and "batch_size" in error["hint"]
    assert [attempt.how for attempt in db.attempts(job_id)] == ["failed"]


def assert_waited_for_disk_space(db: JobDatabase, job_id: str) -> None:
    """Postponed once, and no attempt was spent."""
    (released,) = [event for event in db.events(job_id) if event.type == "released"]
    assert (released.data["reason"], released.data["error"]["code"]) == ("storage_full", "storage_full")
    assert [attempt.how for attempt in db.attempts(job_id)] == ["released", "succeeded"]
    assert db.job(job_id).attempts_without_progress == 1
    claimed = [event.at for event in db.events(job_id) if event.type == "claimed"]
    assert claimed[1] - released.at >= 0.9 * OPTIONS.room_wait_s, "the two events are a moment apart"
    db.assert_nothing_left()


def test_run_job_waits_when_the_engine_meets_a_full_disk(db: JobDatabase, start_worker: Start, tmp_path: Any):
    """The job has one attempt."""
    job_id = db.submit(max_attempts=1, steps=4, at={"2": "storage_full"}, once=str(tmp_path / "once"))
    start_worker()
    db.assert_trained(job_id, 4)
    assert_waited_for_disk_space(db, job_id)


@pytest.mark.parametrize("moment", ["engine.started", "publish.stored"])
def test_run_job_waits_when_the_worker_meets_a_full_disk(db: JobDatabase, start_worker: Start, moment: str, arm: Arm):
    arm(f"{moment}=full")
    job_id = db.submit(max_attempts=1, steps=4)
    start_worker()
    db.assert_trained(job_id, 4)
    assert_waited_for_disk_space(db, job_id)


def test_run_job_that_waits_for_disk_space_can_be_cancelled(db: JobDatabase, start_worker: Start, arm: Arm):
    arm("publish.stored=full")
    job_id = db.submit(steps=1)
    worker = start_worker()
    worker.context.options = OPTIONS.model_copy(update={"room_wait_s": 600})
    until(lambda: "released" in db.types(job_id), "the job to wait for disk space")
    assert db.request(jobs.cancel, job_id).status == "cancelled"


def test_run_job_wakes_the_workers_for_the_jobs_that_waited_for_its_student(db: JobDatabase, settings: Settings):
    teacher = db.submit(steps=1)
    wake_ups: list[str] = []
    context = WorkerContext(settings, OPTIONS, wake_workers=lambda: wake_ups.append(db.job(teacher).status))
    engines = EnginePool(context, CPU)
    claimed_at = boottime()
    with context.database.begin() as connection:
        claim = lifecycle.claim(connection, context.owner, settings.lease_s, takeover=False)
    assert claim is not None
    run_job(claim, context, engines, claimed_at, lambda: None)
    engines.close()
    context.close()
    assert wake_ups == ["succeeded"], "after the commit"


@pytest.mark.parametrize("move", ["cancel", "delete", "lose"])
def test_run_job_ends_when_its_claim_is_overtaken(db: JobDatabase, settings: Settings, move: str):
    """Between the claim and its attempt the job is cancelled, deleted, or claimed by another attempt."""
    job_id = db.submit(steps=100_000)
    context = WorkerContext(settings, OPTIONS, wake_workers=lambda: None)
    engines = EnginePool(context, CPU)
    claimed_at = boottime()
    with context.database.begin() as connection:
        claim = lifecycle.claim(connection, context.owner, settings.lease_s, takeover=False)
    if move == "cancel":
        db.request(jobs.cancel, job_id)
    else:
        overtaken = tables.jobs.c.id == job_id
        with db.database.begin() as connection:
            connection.execute(
                delete(tables.jobs).where(overtaken)
                if move == "delete"
                else update(tables.jobs).where(overtaken).values(fence=tables.jobs.c.fence + 1)
            )
    run_job(claim, context, engines, claimed_at, lambda: None)
    engines.close()
    context.close()
    db.assert_nothing_left()
    if move == "delete":
        with pytest.raises(NotFound):
            db.job(job_id)
    else:
        job = db.job(job_id)
        assert (job.status, job.fence) == (("cancelled", 1) if move == "cancel" else ("running", 2))


def test_run_job_writes_the_last_log_lines_into_an_event(db: JobDatabase, start_worker: Start):
    job_id = db.submit(max_attempts=1, at={"2": "exit_three"})
    start_worker()
    db.until(job_id, "failed")
    observed = next(event.data for event in db.events(job_id) if event.type == "warning")
    assert (observed["code"], observed["how"], observed["exit_code"]) == ("engine_ended", "crashed", 3)
    assert observed["log"] == ["the fake engine starts"]


def test_run_job_retries_when_the_last_lines_cannot_be_written(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    """The engine is done; the last point of its curve is not written."""
    record, refused = metrics.record, []

    def refuse_once(*place: Any, step: int, **more: Any) -> None:
        if step == 4 and not refused:
            refused.append(step)
            raise ValueError("an error of a driver")
        record(*place, step=step, **more)

    monkeypatch.setattr(metrics, "record", refuse_once)
    job_id = db.submit(steps=4, step_s=0)
    start_worker()
    db.assert_trained(job_id, 4)
    assert [attempt.how for attempt in db.attempts(job_id)] == ["failed", "succeeded"]
    error = next(event.data["error"] for event in db.events(job_id) if "error" in event.data)
    assert error["message"] == "the engine's lines could not be written: an error of a driver"
    with db.database.connect() as connection:
        curve = metrics.series(connection, job_id)["student"]["train/loss"]
    assert [step for step, _ in curve] == [1, 2, 3, 4]


def test_run_job_warns_of_a_checkpoint_that_cannot_be_stored(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    worker = start_worker()
    monkeypatch.setattr(worker.context.files, "put_checkpoint", refuse)
    job_id = db.submit(max_attempts=1, steps=4, checkpoint_every=2)
    db.assert_trained(job_id, 4)
    warnings = [event.data for event in db.events(job_id) if event.type == "warning"]
    assert [(one["code"], "Input/output error" in one["message"]) for one in warnings] == [
        ("checkpoint_not_kept", True)
    ] * 2


def test_run_job_does_not_retry_a_final_error(db: JobDatabase, start_worker: Start):
    job_id = db.submit(at={"2": "diverge"})
    start_worker()
    job = db.until(job_id, *ENDED)
    assert (job.status, job.attempts_without_progress) == ("failed", 1)
    assert job.error == {
        "code": "loss_diverged",
        "message": "the loss is not a number",
        "retryable": False,
        "hint": "lower lr",
    }


def test_run_job_fails_a_poison_job_after_its_attempts_and_runs_the_next(db: JobDatabase, start_worker: Start):
    poison = db.submit(max_attempts=2, steps=10, checkpoint_every=100, at={"2": "segfault"})
    next_one = db.submit(steps=2)
    start_worker()
    db.assert_trained(next_one, 2)
    job = db.until(poison, *ENDED)
    assert (job.status, job.attempts_without_progress, job.fence) == ("failed", 2, 2)
    assert "SIGSEGV" in job.error["message"]


def test_run_job_does_not_count_attempts_that_get_further(db: JobDatabase, start_worker: Start):
    """Two attempts are allowed and four needed; each gets one checkpoint further."""
    job_id = db.submit(
        max_attempts=2, steps=8, checkpoint_every=2, at={"2": "kill_itself", "4": "kill_itself", "6": "kill_itself"}
    )
    start_worker()
    db.assert_trained(job_id, 8)
    assert len(db.attempts(job_id)) == 4


def test_run_job_stops_the_engine_before_the_job_is_cancelled(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=100_000)
    start_worker()
    db.until_checkpoint(job_id)
    assert db.request(jobs.cancel, job_id).status == "running"
    db.until(job_id, "cancelled")
    db.assert_nothing_left()
    types = db.types(job_id)
    assert types.index("cancel_requested") < types.index("cancelled") == len(types) - 1


@pytest.mark.parametrize("how", ["deaf", "hold_the_interpreter"])
def test_run_job_kills_an_engine_that_does_not_stop_in_time(db: JobDatabase, start_worker: Start, how: str):
    job_id = db.submit(steps=10, at={"2": how})
    start_worker()
    until(lambda: db.job(job_id).progress, "the second step")
    db.request(jobs.cancel, job_id)
    db.until(job_id, "cancelled")
    db.assert_nothing_left()


def test_run_job_paused_and_resumed_costs_no_attempt_and_no_bit(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=LONG, step_s=0.02, checkpoint_every=1000)
    start_worker()
    until(lambda: db.job(job_id).progress, "the first step")
    db.request(jobs.pause, job_id)
    paused = db.until(job_id, "paused")
    assert paused.attempts_without_progress == 0
    assert 0 < paused.checkpoint_step < LONG
    assert db.request(jobs.resume, job_id).status == "queued"
    db.assert_trained(job_id, LONG)
    assert [attempt.how for attempt in db.attempts(job_id)] == ["paused", "succeeded"]


def test_run_job_of_a_drained_worker_requeues_the_job(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=LONG, step_s=0.02, checkpoint_every=1000)
    first = start_worker()
    until(lambda: db.job(job_id).progress, "the first step")
    assert first.stop()
    requeued = db.job(job_id)
    assert (requeued.status, requeued.attempts_without_progress) == ("queued", 0)
    assert requeued.checkpoint_step
    start_worker()
    db.assert_trained(job_id, LONG)


def test_run_job_fails_a_job_at_its_deadline(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=100_000, deadline_s=0.5)
    start_worker()
    job = db.until(job_id, *ENDED)
    assert (job.status, job.error["code"]) == ("failed", "deadline_exceeded")


def test_run_job_skips_a_damaged_checkpoint_with_a_warning(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=100_000, checkpoint_every=2)
    first = start_worker()
    until(lambda: "checkpoint" in db.types(job_id) and (db.job(job_id).checkpoint_step or 0) > 4, "checkpoints")
    first.stop()
    with db.database.connect() as connection:
        newest, before = checkpoints.list_checkpoints(connection, job_id)
    (db.files.folder / newest.path).write_bytes(b"half a")
    start_worker()
    until(lambda: len(db.attempts(job_id)) == 2 and "warning" in db.types(job_id), "the warning")
    log = db.files.log_path(job_id, 2)
    until(lambda: log.exists() and "continues" in log.read_text(), "the second attempt to resume")
    warning = next(event.data for event in db.events(job_id) if event.type == "warning")
    assert (warning["code"], warning["step"]) == ("checkpoint_skipped", newest.step)
    assert f"continues after step {before.step}\n" in log.read_text()


@pytest.mark.parametrize("kind", ["blobs", "checkpoints"])
def test_run_job_waits_for_a_file_store_that_is_not_mounted(db: JobDatabase, start_worker: Start, kind: str):
    """Neither an attempt nor a checkpoint is lost."""
    blob = db.files.put_stream([b"a teacher"])
    fake = {"teacher": f"blob:sha256:{blob.sha256}"} if kind == "blobs" else {}
    job_id = db.submit(max_attempts=1, steps=LONG, step_s=0.02, checkpoint_every=2, **fake)
    first = start_worker()
    db.until_checkpoint(job_id)
    first.stop()
    step = db.job(job_id).checkpoint_step
    mounted, away = db.files.folder / kind, db.files.folder / "away"
    mounted.rename(away)
    start_worker()
    until(lambda: db.types(job_id).count("released") >= 2, "the job to be postponed")
    (*_, released) = [event.data for event in db.events(job_id) if event.type == "released"]
    assert released["reason"] == "storage_full"
    assert released["error"]["message"] == f"the file store at {db.files.folder} has no folder {kind}: is it mounted?"
    away.rename(mounted)
    db.assert_trained(job_id, LONG)
    assert "warning" not in db.types(job_id), "no checkpoint was discarded"
    resumed = db.attempts(job_id)[-1]
    assert (resumed.attempts_without_progress, resumed.first_step) == (1, step)


@pytest.mark.parametrize(
    ("owner", "place"), [(EnginePool, "start"), (EnginePool, "take"), (AttemptWriter, "__enter__")]
)
def test_run_job_spends_no_attempt_for_want_of_a_descriptor(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch, owner: type, place: str
):
    before, refused = getattr(owner, place), []

    def refuse(self: Any, *arguments: Any) -> Any:
        if len(refused) < 3:
            refused.append(True)
            raise OSError(errno.EMFILE, "Too many open files")
        return before(self, *arguments)

    monkeypatch.setattr(owner, place, refuse)
    job_id = db.submit(max_attempts=1, steps=2)
    start_worker()
    db.assert_trained(job_id, 2)
    released = next(event.data for event in db.events(job_id) if event.type == "released")
    assert released["reason"] == "too_many_files"


def test_run_job_waits_if_its_engine_can_open_no_file(db: JobDatabase, start_worker: Start, tmp_path: Path):
    job_id = db.submit(max_attempts=1, steps=2, at={"1": "too_many_files"}, once=str(tmp_path / "once"))
    start_worker()
    db.assert_trained(job_id, 2)
    assert [attempt.attempts_without_progress for attempt in db.attempts(job_id)] == [1, 1]


def test_run_job_passes_inputs_by_digest(db: JobDatabase, start_worker: Start):
    blob = db.files.put_stream([b"a teacher"])
    job_id = db.submit(steps=2, teacher=f"blob:sha256:{blob.sha256}")
    start_worker()
    db.assert_trained(job_id, 2)


@pytest.mark.parametrize(("content", "words"), [(None, "is not in the file store"), (b"rotten", "is damaged")])
def test_run_job_names_an_input_that_is_missing_or_damaged(
    db: JobDatabase, start_worker: Start, content: bytes | None, words: str
):
    digest = "ab" * 32
    db.files.put_stream([b"another input"])
    if content is not None:
        path = db.files.path(digest)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    job_id = db.submit(max_attempts=5, teacher=f"blob:sha256:{digest}")
    start_worker()
    job = db.until(job_id, "failed")
    assert (job.error["code"], job.error["retryable"], job.attempts_without_progress) == ("input_lost", False, 1)
    assert f"blob:sha256:{digest} (/fake/teacher in the resolved spec) {words}" in job.error["message"]
    assert "upload" in job.error["hint"]


def test_run_job_does_not_publish_a_file_outside_of_the_engines_folder(db: JobDatabase, start_worker: Start):
    job_id = db.submit(steps=4, at={"2": "escape"})
    start_worker()
    db.assert_trained(job_id, 4)
    published = next(event.data["artifacts"] for event in db.events(job_id) if event.type == "succeeded")
    assert [artifact["name"] for artifact in published] == ["student.safetensors", "report.json"]


def locked_for(db: JobDatabase, duration_s: float) -> None:
    """Hold SQLite's write lock, as a writer does that froze in its transaction."""
    with db.database.begin():
        time.sleep(duration_s)


def test_run_job_writes_its_end_when_the_database_is_back(short_lease: Settings, db: JobDatabase, start_worker: Start):
    """The engine ends while the database is locked, for longer than a lease."""
    job_id = db.submit(steps=30, step_s=0.02)
    start_worker(short_lease)
    until(lambda: db.job(job_id).progress, "the first step")
    locked_for(db, 1.5 * short_lease.lease_s)
    db.assert_trained(job_id, 30)
    assert len(db.attempts(job_id)) == 1


def test_run_job_requeues_a_job_after_too_long_without_the_database(
    short_lease: Settings, db: JobDatabase, start_worker: Start
):
    settings = short_lease.model_copy(update={"max_unproven_s": 0.5})
    job_id = db.submit(steps=100, step_s=0.02, checkpoint_every=10)
    start_worker(settings)
    db.until_checkpoint(job_id)
    locked_for(db, 1.5 * short_lease.lease_s)
    until(lambda: "released" in db.types(job_id), "the job to be requeued")
    db.assert_trained(job_id, 100)
    assert [attempt.how for attempt in db.attempts(job_id)] == ["released", "succeeded"]


def test_run_job_writes_what_a_student_has_taken_as_an_event(db: JobDatabase, start_worker: Start):
    found = {"pointer": "/student", "taken": 900, "parameters": 1000, "fresh": ["fc.weight"], "classifier": "fresh"}
    job_id = db.submit(steps=1, weights_taken=found)
    start_worker()
    db.until(job_id, "succeeded")
    (event,) = [event for event in db.events(job_id) if event.type == "weights_taken"]
    assert event.data == found


def test_inputs_of_a_resumed_job_are_without_what_its_students_started_from():
    digests = {name: character * 64 for name, character in {"student": "a", "data": "b", "teacher": "c"}.items()}
    spec = {
        "dataset": {"source": f"blob:sha256:{digests['data']}"},
        "teacher": {"checkpoint": f"blob:sha256:{digests['teacher']}"},
        "student": [{"checkpoint": f"blob:sha256:{digests['student']}"}, {"checkpoint": None}],
        "assistants": [{"checkpoint": f"blob:sha256:{digests['teacher']}"}],
    }
    assert inputs(spec, resumed=False) == sorted(digests.values())
    assert inputs(spec, resumed=True) == [digests["data"], digests["teacher"]]


CHECK = {"accuracy": 0.7, "interval": [0.6, 0.8], "images": 100, "test_samples": 1000, "warnings": []}
TAUGHT = {
    "dataset": {"source": "digits", "image_size": None},
    "teacher": {"checkpoint": "weights:ResNet18_Weights.IMAGENET1K_V1", "preprocessing": None},
}


def test_run_job_keeps_the_check_of_its_teacher_for_later_jobs_of_its_project_only(
    db: JobDatabase, start_worker: Start
):
    line = {**CHECK, "key": teacher_check_key(TAUGHT)}
    start_worker()
    known = {}
    for name, project in (("first", "p"), ("second", "p"), ("theirs", "other")):
        job_id = db.submit(project=project, resolved=TAUGHT, steps=1, teacher_check=line)
        db.until(job_id, "succeeded")
        job = db.job(job_id)
        assert job.teacher_check == {name: value for name, value in CHECK.items() if name != "warnings"}
        assert db.types(job_id).count("teacher_check") == 1
        assert job.result is not None
        known[name] = job.result["known"]
    assert known == {"first": None, "second": line, "theirs": None}


def test_run_job_without_a_key_keeps_no_check(db: JobDatabase, start_worker: Start):
    start_worker()
    for _ in range(2):
        job_id = db.submit(resolved=TAUGHT, steps=1, teacher_check={**CHECK, "key": None})
        db.until(job_id, "succeeded")
        result = db.job(job_id).result
        assert result is not None and result["known"] is None
