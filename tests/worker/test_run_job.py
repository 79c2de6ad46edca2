"""One attempt, in this process, with a real store and a real child: what becomes of the job in each case."""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, update

from base.clock import boottime
from store import checkpoints, jobs, lifecycle, metrics, tables
from store.errors import NotFound
from store.settings import Settings
from tests.worker.conftest import CPU
from tests.worker.processes import until
from tests.worker.table import ENDED, OPTIONS, Table
from worker.desk import Desk
from worker.engines import Engines
from worker.run_job import run_job
from worker.service import Worker

Start = Callable[..., Worker]
Arm = Callable[[str], None]


LONG = 200
"""Steps of 0.02 s: seconds in which a request can be heard, on a busy machine too."""


def test_a_job_from_claim_to_artifacts(table: Table, start_worker: Start):
    job_id = table.submit(steps=10, checkpoint_every=2)
    start_worker()
    table.assert_trained(job_id, 10)
    types = table.types(job_id)
    assert types[:2] == ["queued", "claimed"]
    assert types[-1] == "succeeded"
    assert types.count("checkpoint") == 5
    phases = [event.data["phase"] for event in table.events(job_id) if event.type == "phase"]
    assert phases == ["validating", "training", "exporting", "publishing"]
    with table.database.connect() as connection:
        curve = metrics.series(connection, job_id)["student"]["train/loss"]
        kept = checkpoints.newest(connection, job_id)
    assert [step for step, _ in curve] == list(range(1, 11))
    assert [checkpoint.step for checkpoint in kept] == [10, 8]
    assert sorted(path.name for path in (table.files.folder / "checkpoints").rglob("*.pt")) == [
        "000000008.pt",
        "000000010.pt",
    ]
    assert "the fake engine starts" in table.files.log_path(job_id, 1).read_text()
    table.assert_nothing_left()


def test_jobs_run_one_after_the_other_by_age(table: Table, start_worker: Start):
    ids = [table.submit(steps=2) for _ in range(3)]
    start_worker()
    ended = [table.until(job_id, *ENDED) for job_id in ids]
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
def test_what_may_be_chance_is_tried_again(
    table: Table, start_worker: Start, tmp_path: Any, misbehaviour: str, code: str, words: str
):
    job_id = table.submit(steps=4, checkpoint_every=100, at={"2": misbehaviour}, once=str(tmp_path / "once"))
    start_worker()
    table.assert_trained(job_id, 4)
    error = next(event.data["error"] for event in table.events(job_id) if "error" in event.data)
    assert error["code"] == code
    assert words in error["message"]
    assert [attempt.how for attempt in table.attempts(job_id)] == ["failed", "succeeded"]
    table.assert_nothing_left()


def waited_for_room(table: Table, job_id: str) -> None:
    """Postponed once, for a while, and no attempt spent."""
    (told,) = [event for event in table.events(job_id) if event.type == "released"]
    assert (told.data["reason"], told.data["error"]["code"]) == ("storage_full", "storage_full")
    assert [attempt.how for attempt in table.attempts(job_id)] == ["released", "succeeded"]
    assert table.job(job_id).attempts_without_progress == 1
    claimed = [event.at for event in table.events(job_id) if event.type == "claimed"]
    assert claimed[1] - told.at >= 0.9 * OPTIONS.room_wait_s, "the two are told a moment apart"
    table.assert_nothing_left()


def test_an_engine_without_room_waits_for_it(table: Table, start_worker: Start, tmp_path: Any):
    """With the one attempt that it has."""
    job_id = table.submit(max_attempts=1, steps=4, at={"2": "storage_full"}, once=str(tmp_path / "once"))
    start_worker()
    table.assert_trained(job_id, 4)
    waited_for_room(table, job_id)


@pytest.mark.parametrize("moment", ["engine.started", "publish.stored"])
def test_a_worker_without_room_waits_for_it(table: Table, start_worker: Start, moment: str, arm: Arm):
    arm(f"{moment}=full")
    job_id = table.submit(max_attempts=1, steps=4)
    start_worker()
    table.assert_trained(job_id, 4)
    waited_for_room(table, job_id)


def test_a_job_that_waits_for_room_can_be_cancelled(table: Table, start_worker: Start, arm: Arm):
    arm("publish.stored=full")
    job_id = table.submit(steps=1)
    worker = start_worker()
    worker.desk.options = OPTIONS.model_copy(update={"room_wait_s": 600})
    until(lambda: "released" in table.types(job_id), "the job to wait for room")
    assert table.ask(jobs.cancel, job_id).status == "cancelled"


@pytest.mark.parametrize("move", ["cancel", "delete", "lose"])
def test_a_claim_that_is_overtaken_is_harmless(table: Table, settings: Settings, move: str):
    """Between the claim and the first look at it the job is cancelled, is gone, or belongs to another attempt."""
    job_id = table.submit(steps=100_000)
    desk = Desk(settings, OPTIONS, ring=lambda: None)
    engines = Engines(desk, CPU)
    claimed_at = boottime()
    with desk.database.begin() as connection:
        claim = lifecycle.claim(connection, desk.owner, settings.lease_s, rescue=False)
    if move == "cancel":
        table.ask(jobs.cancel, job_id)
    else:
        overtaken = tables.jobs.c.id == job_id
        with table.database.begin() as connection:
            connection.execute(
                delete(tables.jobs).where(overtaken)
                if move == "delete"
                else update(tables.jobs).where(overtaken).values(fence=tables.jobs.c.fence + 1)
            )
    run_job(claim, desk, engines, claimed_at, lambda: None)
    engines.let_go()
    desk.close()
    table.assert_nothing_left()
    if move == "delete":
        with pytest.raises(NotFound):
            table.job(job_id)
    else:
        job = table.job(job_id)
        assert (job.status, job.fence) == (("cancelled", 1) if move == "cancel" else ("running", 2))


def test_the_last_words_are_in_the_feed(table: Table, start_worker: Start):
    job_id = table.submit(max_attempts=1, at={"2": "exit_three"})
    start_worker()
    table.until(job_id, "failed")
    seen = next(event.data for event in table.events(job_id) if event.type == "warning")
    assert (seen["code"], seen["how"], seen["exit_code"]) == ("engine_ended", "crashed", 3)
    assert seen["log"] == ["the fake engine starts"]


def test_a_job_whose_last_lines_cannot_be_written_is_not_done(
    table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    """The engine is done; the curve's last point is not in."""
    record, refused = metrics.record, []

    def refuse_once(*place: Any, step: int, **more: Any) -> None:
        if step == 4 and not refused:
            refused.append(step)
            raise ValueError("a driver's own opinion")
        record(*place, step=step, **more)

    monkeypatch.setattr(metrics, "record", refuse_once)
    job_id = table.submit(steps=4, step_s=0)
    start_worker()
    table.assert_trained(job_id, 4)
    assert [attempt.how for attempt in table.attempts(job_id)] == ["failed", "succeeded"]
    error = next(event.data["error"] for event in table.events(job_id) if "error" in event.data)
    assert error["message"] == "what the engine said could not be written: a driver's own opinion"
    with table.database.connect() as connection:
        curve = metrics.series(connection, job_id)["student"]["train/loss"]
    assert [step for step, _ in curve] == [1, 2, 3, 4]


def test_a_checkpoint_that_the_disk_refuses_costs_a_warning(
    table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    worker = start_worker()
    monkeypatch.setattr(worker.desk.files, "put_checkpoint", refuse)
    job_id = table.submit(max_attempts=1, steps=4, checkpoint_every=2)
    table.assert_trained(job_id, 4)
    warnings = [event.data for event in table.events(job_id) if event.type == "warning"]
    assert [(told["code"], "Input/output error" in told["message"]) for told in warnings] == [
        ("checkpoint_not_kept", True)
    ] * 2


def test_a_final_error_is_not_tried_again(table: Table, start_worker: Start):
    job_id = table.submit(at={"2": "diverge"})
    start_worker()
    job = table.until(job_id, *ENDED)
    assert (job.status, job.attempts_without_progress) == ("failed", 1)
    assert job.error == {
        "code": "loss_diverged",
        "message": "the loss is not a number",
        "retryable": False,
        "hint": "lower lr",
    }


def test_a_poison_job_fails_after_its_attempts_and_the_next_one_runs(table: Table, start_worker: Start):
    poison = table.submit(max_attempts=2, steps=10, checkpoint_every=100, at={"2": "segfault"})
    next_one = table.submit(steps=2)
    start_worker()
    table.assert_trained(next_one, 2)
    job = table.until(poison, *ENDED)
    assert (job.status, job.attempts_without_progress, job.fence) == ("failed", 2, 2)
    assert "SIGSEGV" in job.error["message"]


def test_attempts_that_get_further_are_not_counted(table: Table, start_worker: Start):
    """Two attempts allowed, four needed: each dies one checkpoint later than the one before."""
    job_id = table.submit(
        max_attempts=2, steps=8, checkpoint_every=2, at={"2": "kill_itself", "4": "kill_itself", "6": "kill_itself"}
    )
    start_worker()
    table.assert_trained(job_id, 8)
    assert len(table.attempts(job_id)) == 4


def test_cancel_stops_the_engine_first(table: Table, start_worker: Start):
    job_id = table.submit(steps=100_000)
    start_worker()
    table.until_checkpoint(job_id)
    assert table.ask(jobs.cancel, job_id).status == "running"
    table.until(job_id, "cancelled")
    table.assert_nothing_left()
    types = table.types(job_id)
    assert types.index("cancel_requested") < types.index("cancelled") == len(types) - 1


@pytest.mark.parametrize("how", ["deaf", "hold_the_interpreter"])
def test_an_engine_that_hears_nothing_is_killed_after_the_grace(table: Table, start_worker: Start, how: str):
    job_id = table.submit(steps=10, at={"2": how})
    start_worker()
    until(lambda: table.job(job_id).progress, "the second step")
    table.ask(jobs.cancel, job_id)
    table.until(job_id, "cancelled")
    table.assert_nothing_left()


def test_pause_and_resume_cost_no_attempt_and_no_bit(table: Table, start_worker: Start):
    job_id = table.submit(steps=LONG, step_s=0.02, checkpoint_every=1000)
    start_worker()
    until(lambda: table.job(job_id).progress, "the first step")
    table.ask(jobs.pause, job_id)
    paused = table.until(job_id, "paused")
    assert paused.attempts_without_progress == 0
    assert 0 < paused.checkpoint_step < LONG
    assert table.ask(jobs.resume, job_id).status == "queued"
    table.assert_trained(job_id, LONG)
    assert [attempt.how for attempt in table.attempts(job_id)] == ["paused", "succeeded"]


def test_a_drained_worker_hands_its_job_back(table: Table, start_worker: Start):
    job_id = table.submit(steps=LONG, step_s=0.02, checkpoint_every=1000)
    first = start_worker()
    until(lambda: table.job(job_id).progress, "the first step")
    assert first.stop()
    handed_back = table.job(job_id)
    assert (handed_back.status, handed_back.attempts_without_progress) == ("queued", 0)
    assert handed_back.checkpoint_step
    start_worker()
    table.assert_trained(job_id, LONG)


def test_past_its_deadline_a_job_fails(table: Table, start_worker: Start):
    job_id = table.submit(steps=100_000, deadline_s=0.5)
    start_worker()
    job = table.until(job_id, *ENDED)
    assert (job.status, job.error["code"]) == ("failed", "deadline_exceeded")


def test_a_damaged_checkpoint_is_skipped_by_name(table: Table, start_worker: Start):
    job_id = table.submit(steps=100_000, checkpoint_every=2)
    first = start_worker()
    until(lambda: "checkpoint" in table.types(job_id) and (table.job(job_id).checkpoint_step or 0) > 4, "checkpoints")
    first.stop()
    with table.database.connect() as connection:
        newest, before = checkpoints.newest(connection, job_id)
    (table.files.folder / newest.path).write_bytes(b"half a")
    start_worker()
    until(lambda: len(table.attempts(job_id)) == 2 and "warning" in table.types(job_id), "the warning")
    log = table.files.log_path(job_id, 2)
    until(lambda: log.exists() and "goes on" in log.read_text(), "the second attempt to go on")
    warning = next(event.data for event in table.events(job_id) if event.type == "warning")
    assert (warning["code"], warning["step"]) == ("checkpoint_skipped", newest.step)
    assert f"goes on after step {before.step}\n" in log.read_text()


@pytest.mark.parametrize("kind", ["blobs", "checkpoints"])
def test_a_file_store_that_is_not_mounted_is_waited_for(table: Table, start_worker: Start, kind: str):
    """Neither an attempt nor a checkpoint is lost with it."""
    blob = table.files.put_stream([b"a teacher"])
    fake = {"teacher": f"blob:sha256:{blob.sha256}"} if kind == "blobs" else {}
    job_id = table.submit(max_attempts=1, steps=LONG, step_s=0.02, checkpoint_every=2, **fake)
    first = start_worker()
    table.until_checkpoint(job_id)
    first.stop()
    step = table.job(job_id).checkpoint_step
    mounted, away = table.files.folder / kind, table.files.folder / "away"
    mounted.rename(away)
    start_worker()
    until(lambda: table.types(job_id).count("released") >= 2, "the job to be postponed")
    (*_, told) = [event.data for event in table.events(job_id) if event.type == "released"]
    assert told["reason"] == "storage_full"
    assert told["error"]["message"] == f"the file store at {table.files.folder} has no folder {kind}: is it mounted?"
    away.rename(mounted)
    table.assert_trained(job_id, LONG)
    assert "warning" not in table.types(job_id), "no checkpoint was given up"
    resumed = table.attempts(job_id)[-1]
    assert (resumed.attempts_without_progress, resumed.first_step) == (1, step)


def test_inputs_are_given_by_digest(table: Table, start_worker: Start):
    blob = table.files.put_stream([b"a teacher"])
    job_id = table.submit(steps=2, teacher=f"blob:sha256:{blob.sha256}")
    start_worker()
    table.assert_trained(job_id, 2)


@pytest.mark.parametrize(("content", "words"), [(None, "not in the file store"), (b"rotten", "damaged")])
def test_an_input_that_is_not_itself_is_named(table: Table, start_worker: Start, content: bytes | None, words: str):
    digest = "ab" * 32
    table.files.put_stream([b"another input"])
    if content is not None:
        path = table.files.path(digest)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    job_id = table.submit(max_attempts=1, teacher=f"blob:sha256:{digest}")
    start_worker()
    job = table.until(job_id, "failed")
    assert words in job.error["message"] and digest in job.error["message"]


def test_a_file_outside_of_the_engines_folder_is_not_published(table: Table, start_worker: Start):
    job_id = table.submit(steps=4, at={"2": "escape"})
    start_worker()
    table.assert_trained(job_id, 4)
    published = next(event.data["artifacts"] for event in table.events(job_id) if event.type == "succeeded")
    assert [artifact["name"] for artifact in published] == ["student.safetensors", "report.json"]
