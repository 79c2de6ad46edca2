"""The double fault: a worker is killed while its guard is frozen. Single ones are rows of `tests/faults/`."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store import jobs
from store.settings import Settings
from tests.worker.processes import until
from tests.worker.table import Table, engines, worker_process


@contextmanager
def nobody_guards(settings: Settings, table: Table, folder: Path) -> Iterator[str]:
    """The job, whose engine says no word and lives on."""
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
