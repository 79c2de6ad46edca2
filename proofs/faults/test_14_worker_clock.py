"""Row 14: a worker whose clock is an hour fast or slow. It takes over no job early, and its lease is not longer.

Leases are measured by the database's clock only.
"""

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from proofs.faults.workers import SHORT_LEASE, Workers
from store.records import database_now
from tests.worker.job_database import until_at_work, worker_process
from tests.worker.processes import until

HOUR_S = 3600
SHIFTED = """
import datetime, time
_time, _time_ns, _datetime = time.time, time.time_ns, datetime.datetime
time.time = lambda: _time() + {shift}
time.time_ns = lambda: _time_ns() + {shift} * 10**9
class Shifted(_datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds={shift})
    @classmethod
    def utcnow(cls):
        return super().utcnow() + datetime.timedelta(seconds={shift})
datetime.datetime = Shifted
print("the clock is", round(time.time() - _time()), "s off", flush=True)
"""


@pytest.mark.parametrize("shift", [HOUR_S, -HOUR_S])
def test_worker_clock_changes_no_lease(tmp_path: Path, database_url: str, shift: int):
    (tmp_path / "sitecustomize.py").write_text(SHIFTED.format(shift=shift))
    gates = [tmp_path / "ours", tmp_path / "theirs"]
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        ours, theirs = [{"steps": 10, "at": {"7": "wait"}, "gate": str(gate), "checkpoint_every": 5} for gate in gates]
        first = workers.db.submit(**ours)
        worker = workers.start()
        workers.db.until_checkpoint(first)
        elsewhere = workers.settings.model_copy(update={"home": tmp_path / "elsewhere"})
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        log = tmp_path / "elsewhere.log"
        with worker_process(elsewhere, log, PYTHONPATH=path) as shifted:
            until_at_work(log)
            assert f"the clock is {shift} s off" in log.read_text()
            time.sleep(1.5 * workers.settings.lease_s)  # so that it may take over expired leases
            second = workers.db.submit(**theirs)
            workers.db.until_checkpoint(second)
            assert workers.db.job(first).fence == 1
            until_heartbeat(workers, second)
            assert 0 < lease_left(workers, second) <= workers.settings.lease_s
            shifted.kill()
            shifted.wait()
            gates[0].touch()
            workers.assert_succeeded(first, 10, ["succeeded"])
            gates[1].touch()
            workers.assert_succeeded(second, 10, ["lost", "succeeded"])
            assert workers.db.attempts(second)[-1].owner == worker.context.owner


def lease_left(workers: Workers, job_id: str) -> float:
    with workers.db.database.connect() as connection:
        now: float = connection.execute(select(database_now())).scalar_one()
    return (workers.db.job(job_id).lease_until or 0) - now


def until_heartbeat(workers: Workers, job_id: str) -> None:
    """Wait for a heartbeat: the lease that the claim set does not depend on the worker's clock."""
    before = workers.db.job(job_id).lease_until
    until(lambda: workers.db.job(job_id).lease_until != before, "a heartbeat")
