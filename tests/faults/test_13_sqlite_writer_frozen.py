"""Row 13: a process is frozen in the middle of a write to SQLite, and holds the one lock for longer than a lease.

Reads are answered, writes are refused with 503 once they have waited long enough, and trainings go on. When it wakes or
is killed all goes on, and nobody has lost an attempt: who held the lock may not call those silent whom it kept out.
"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from store.clock import database_now
from tests.faults.servers import STEPS, api_process
from tests.faults.workers import QUICK, Night
from tests.worker.processes import until


def in_training(night: Night, gate: Path) -> str:
    """A worker in this process, and its job, which ends once the gate is there."""
    job_id = night.db.submit(steps=10, at={"7": "wait"}, gate=str(gate))
    night.worker()
    night.db.until_checkpoint(job_id)
    return job_id


def until_stopped(process: int) -> None:
    stat = Path(f"/proc/{process}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the process to freeze")


def until_lapsed(night: Night, job_id: str) -> None:
    def lapsed() -> bool:
        with night.db.database.connect() as connection:
            now = connection.execute(select(database_now())).scalar_one()
        return (night.db.job(job_id).lease_until or now) < now

    until(lapsed, "the lease to lapse")


@pytest.mark.parametrize(("moment", "then"), [("claim.begun", signal.SIGCONT), ("claim.before_commit", signal.SIGKILL)])
def test_a_worker_in_its_claim(tmp_path: Path, sqlite_database_url: str, moment: str, then: signal.Signals):
    """It had been in contact for long enough to rescue, and wakes before the kept out have had their turn."""
    with Night(tmp_path, sqlite_database_url, **QUICK) as night:
        training = in_training(night, tmp_path / "gate")
        claiming = night.process(f"{moment}=freeze")
        until(lambda: "is at work" in night.log, "the worker to start")
        time.sleep(1.5 * night.settings.lease_s)
        waiting = night.db.submit(steps=5)
        until_stopped(claiming.pid)
        until_lapsed(night, training)
        claiming.send_signal(then)
        if then == signal.SIGKILL:
            (tmp_path / "gate").touch()
        night.db.assert_trained(waiting, 5)
        (tmp_path / "gate").touch()
        night.assert_ended_well(training, 10, ["succeeded"])
        night.assert_nothing_left()


def test_a_server_in_its_submit(tmp_path: Path, sqlite_database_url: str):
    with (
        Night(tmp_path, sqlite_database_url, **QUICK) as night,
        api_process(night.settings, tmp_path / "frozen.log", "submit.before_commit=freeze") as frozen,
        api_process(night.settings, tmp_path / "other.log") as other,
        ThreadPoolExecutor(1) as sender,
    ):
        training = in_training(night, tmp_path / "gate")
        answer = sender.submit(frozen.post)
        until_stopped(frozen.process.pid)
        assert other.http.get("/v1/jobs").status_code == 200
        refused = other.post()
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) > 0
        until_lapsed(night, training)
        frozen.process.send_signal(signal.SIGCONT)
        first = answer.result(60)
        assert first.status_code == 201, first.text
        second = other.accept()
        (tmp_path / "gate").touch()
        night.assert_ended_well(training, 10, ["succeeded"])
        for job_id in (first.json()["id"], second):
            night.assert_ended_well(job_id, STEPS, ["succeeded"])
        night.assert_nothing_left()
