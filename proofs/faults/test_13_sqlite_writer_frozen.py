"""Row 13: a process is frozen during a write to SQLite, and holds the write lock for longer than a lease.

Reads are answered, writes get 503 after their wait, and trainings go on. When it wakes or is killed, no attempt
is lost: a process that held the lock may not take over jobs whose owners waited for it.
"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from proofs.faults.workers import SHORT_LEASE, Workers
from store.records import database_now
from tests.servers import STEPS, api_process
from tests.worker.processes import until


def in_training(workers: Workers, gate: Path) -> str:
    """Start a worker in this process, and its job, which ends when the file `gate` is there."""
    job_id = workers.db.submit(steps=10, at={"7": "wait"}, gate=str(gate))
    workers.start()
    workers.db.until_checkpoint(job_id)
    return job_id


def until_stopped(process: int) -> None:
    stat = Path(f"/proc/{process}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the process to freeze")


def until_expired(workers: Workers, job_id: str) -> None:
    def expired() -> bool:
        with workers.db.database.connect() as connection:
            now = connection.execute(select(database_now())).scalar_one()
        lease_until = workers.db.job(job_id).lease_until
        assert lease_until is not None, workers.db.attempts(job_id)
        return lease_until < now

    until(expired, "the lease to expire")


@pytest.mark.parametrize(("moment", "then"), [("claim.begun", signal.SIGCONT), ("claim.before_commit", signal.SIGKILL)])
def test_sqlite_writer_frozen_worker_in_its_claim(
    tmp_path: Path, sqlite_database_url: str, moment: str, then: signal.Signals
):
    """It was in contact long enough to take over jobs, and wakes before the processes that waited get their turn."""
    with Workers(tmp_path, sqlite_database_url, **SHORT_LEASE) as workers:
        training = in_training(workers, tmp_path / "gate")
        claiming = workers.start_process(f"{moment}=freeze")
        workers.until_at_work()
        time.sleep(1.5 * workers.settings.lease_s)
        waiting = workers.db.submit(steps=5)
        until_stopped(claiming.pid)
        until_expired(workers, training)
        claiming.send_signal(then)
        if then == signal.SIGKILL:
            (tmp_path / "gate").touch()
        workers.db.assert_trained(waiting, 5)
        (tmp_path / "gate").touch()
        workers.assert_succeeded(training, 10, ["succeeded"])
        workers.assert_nothing_left()


def test_sqlite_writer_frozen_server_in_its_submit(tmp_path: Path, sqlite_database_url: str):
    with (
        Workers(tmp_path, sqlite_database_url, **SHORT_LEASE) as workers,
        api_process(workers.settings, tmp_path / "frozen.log", "submit.before_commit=freeze") as frozen,
        api_process(workers.settings, tmp_path / "other.log") as other,
        ThreadPoolExecutor(1) as sender,
    ):
        training = in_training(workers, tmp_path / "gate")
        response = sender.submit(frozen.post)
        until_stopped(frozen.process.pid)
        assert other.http.get("/v1/jobs").status_code == 200
        refused = other.post()
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) > 0
        until_expired(workers, training)
        frozen.process.send_signal(signal.SIGCONT)
        first = response.result(60)
        assert first.status_code == 201, first.text
        second = other.submit()
        (tmp_path / "gate").touch()
        workers.assert_succeeded(training, 10, ["succeeded"])
        for job_id in (first.json()["id"], second):
            workers.assert_succeeded(job_id, STEPS, ["succeeded"])
        workers.assert_nothing_left()
