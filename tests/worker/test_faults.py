"""Workers that are killed or frozen: nothing of the old training stays, and the job ends once, with the same bits."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store import jobs
from store.settings import Settings
from tests.worker.processes import until
from tests.worker.table import Table, engines, worker_process

LONG = {"steps": 120, "step_s": 0.025, "checkpoint_every": 10}


def test_a_killed_worker_leaves_no_process_and_another_goes_on(settings: Settings, table: Table, tmp_path: Path):
    """Its lock is free: so it is dead, and nobody has to wait for the lease to lapse."""
    job_id = table.submit(**LONG)
    with worker_process(settings, tmp_path / "first.log") as first:
        step = table.until_checkpoint(job_id)
        assert len(engines(settings.home)) == 2, "guard and engine"
        first.kill()
        first.wait()
        until(lambda: not engines(settings.home), "the guard to end the training", timeout_s=5)
    assert table.job(job_id).status == "running"
    with worker_process(settings, tmp_path / "second.log"):
        table.assert_trained(job_id, LONG["steps"])
        killed, last = table.attempts(job_id)
        assert (killed.how, last.how) == ("failed", "succeeded")
        assert last.first_step >= step
        errors = [event.data["error"] for event in table.events(job_id) if "error" in event.data]
        assert [error["code"] for error in errors] == ["worker_lost"]
        table.assert_nothing_left()


def test_a_frozen_worker_is_fenced_off(short_lease: Settings, table: Table, tmp_path: Path):
    """Its guard ends the training before the lease ends; when it wakes, nothing that it still says is taken."""
    job_id = table.submit(**LONG)
    with (
        worker_process(short_lease, tmp_path / "first.log") as first,
        worker_process(short_lease, tmp_path / "second.log") as second,
    ):
        table.until_checkpoint(job_id)
        owner, other = (first, second) if _is_owner(first, table.job(job_id).owner) else (second, first)
        # While the test holds the table, the owner does not: frozen in the middle of a write to SQLite it would keep
        # everybody out until it wakes.
        with table.database.begin():
            os.kill(owner.pid, signal.SIGSTOP)
        until(lambda: not engines(short_lease.home), "the guard to end the training")
        assert table.job(job_id).fence == 1, "the training was dead before anybody else could claim"
        until(lambda: table.job(job_id).fence == 2, "the other worker to take over")
        os.kill(owner.pid, signal.SIGCONT)
        table.assert_trained(job_id, LONG["steps"])
        lost, next_one, *_ = table.attempts(job_id)
        assert lost.how == "lost"
        assert _is_owner(other, next_one.owner)
        table.assert_nothing_left()


@contextmanager
def nobody_guards(settings: Settings, table: Table, folder: Path) -> Iterator[str]:
    """The double fault: the guard freezes, the worker is killed. The job, whose engine says no word and lives on."""
    job_id = table.submit(steps=10, checkpoint_every=2, at={"3": "deaf"}, once=str(folder / "once"))
    with worker_process(settings, folder / "first.log") as worker:
        table.until_checkpoint(job_id)
        until((folder / "once").exists, "the engine to fall silent")
        guard, engine = sorted(engines(settings.home))
        os.kill(guard, signal.SIGSTOP)
        worker.kill()
        worker.wait()
        assert engines(settings.home) == [guard, engine]
        yield job_id


def test_an_engine_that_nobody_guards_is_ended_before_its_successor_begins(
    short_lease: Settings, table: Table, tmp_path: Path
):
    """Its lock is held, so that its worker's death proves nothing: the lease decides."""
    log = tmp_path / "second.log"
    with nobody_guards(short_lease, table, tmp_path) as job_id, worker_process(short_lease, log):
        table.assert_trained(job_id, 10)
        assert [attempt.how for attempt in table.attempts(job_id)] == ["lost", "succeeded"]
        assert "outlived" in log.read_text()
        table.assert_nothing_left()


def test_an_engine_that_nobody_guards_and_nobody_succeeds_is_ended_too(
    short_lease: Settings, table: Table, tmp_path: Path
):
    with nobody_guards(short_lease, table, tmp_path) as job_id:
        table.ask(jobs.cancel, job_id)
        with worker_process(short_lease, tmp_path / "second.log"):
            table.until(job_id, "cancelled")
            table.assert_nothing_left()


def test_a_terminated_worker_leaves_with_its_job_handed_back(settings: Settings, table: Table, tmp_path: Path):
    job_id = table.submit(**LONG)
    with worker_process(settings, tmp_path / "log") as worker:
        table.until_checkpoint(job_id)
        worker.terminate()
        worker.terminate()
        assert worker.wait(20) == 0
    job = table.job(job_id)
    assert (job.status, job.attempts) == ("queued", 0)
    assert table.attempts(job_id)[0].how == "released"
    table.assert_nothing_left()


def test_a_job_that_kills_its_workers_is_given_up(settings: Settings, table: Table, tmp_path: Path):
    """The killed cannot say so: one who lives does."""
    job_id = table.submit(max_attempts=1, steps=100_000, checkpoint_every=100_000)
    with worker_process(settings, tmp_path / "first.log") as first:
        until(lambda: table.job(job_id).progress, "the first step")
        first.kill()
        first.wait()
    with worker_process(settings, tmp_path / "second.log"):
        job = table.until(job_id, "failed")
    assert job.error["code"] == "worker_lost"
    assert job.attempts == 1


def test_a_cancelled_job_whose_worker_is_gone_is_cancelled(settings: Settings, table: Table, tmp_path: Path):
    job_id = table.submit(**LONG)
    with worker_process(settings, tmp_path / "first.log") as first:
        table.until_checkpoint(job_id)
        first.kill()
        first.wait()
        until(lambda: not engines(settings.home), "the guard to end the training")
    assert table.ask(jobs.cancel, job_id).status == "running"
    with worker_process(settings, tmp_path / "second.log"):
        table.until(job_id, "cancelled")
    assert len(table.attempts(job_id)) == 1


def test_a_killed_engine_is_started_again(settings: Settings, table: Table, tmp_path: Path):
    job_id = table.submit(**LONG)
    with worker_process(settings, tmp_path / "log"):
        table.until_checkpoint(job_id)
        guard, engine = sorted(engines(settings.home))
        os.kill(engine, signal.SIGKILL)
        table.assert_trained(job_id, LONG["steps"])
        assert "SIGKILL" in next(e.data["error"]["message"] for e in table.events(job_id) if "error" in e.data)
        assert guard not in engines(settings.home)
        table.assert_nothing_left()


def _is_owner(worker: subprocess.Popen[bytes], owner: str | None) -> bool:
    return str(worker.pid) in (owner or "").split("-")
