"""Row 14: a worker whose clock is an hour off, either way. It steals nothing, and its own lease is no longer than any.

Leases are measured by the database's clock alone.
"""

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from store.clock import database_now
from tests.faults.workers import QUICK, Night
from tests.worker.processes import until
from tests.worker.job_database import worker_process

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
def test_it_neither_steals_nor_keeps(tmp_path: Path, database_url: str, shift: int):
    (tmp_path / "sitecustomize.py").write_text(SHIFTED.format(shift=shift))
    gates = [tmp_path / "ours", tmp_path / "theirs"]
    with Night(tmp_path, database_url, **QUICK) as night:
        ours, theirs = [{"steps": 10, "at": {"7": "wait"}, "gate": str(gate), "checkpoint_every": 5} for gate in gates]
        first = night.db.submit(**ours)
        worker = night.worker()
        night.db.until_checkpoint(first)
        elsewhere = night.settings.model_copy(update={"home": tmp_path / "elsewhere"})
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        log = tmp_path / "elsewhere.log"
        with worker_process(elsewhere, log, PYTHONPATH=path) as shifted:
            until(lambda: "is at work" in log.read_text(), "the worker to start")
            assert f"the clock is {shift} s off" in log.read_text()
            time.sleep(1.5 * night.settings.lease_s)  # so that it may rescue, and looks what it could
            second = night.db.submit(**theirs)
            night.db.until_checkpoint(second)
            assert night.db.job(first).fence == 1
            beat_since(night, second)
            assert 0 < lease_left(night, second) <= night.settings.lease_s
            shifted.kill()
            shifted.wait()
            gates[0].touch()
            night.assert_ended_well(first, 10, ["succeeded"])
            gates[1].touch()
            night.assert_ended_well(second, 10, ["lost", "succeeded"])
            assert night.db.attempts(second)[-1].owner == worker.context.owner


def lease_left(night: Night, job_id: str) -> float:
    with night.db.database.connect() as connection:
        now: float = connection.execute(select(database_now())).scalar_one()
    return (night.db.job(job_id).lease_until or 0) - now


def beat_since(night: Night, job_id: str) -> None:
    """A heartbeat from now on: the lease of the claim alone would not tell of its clock."""
    before = night.db.job(job_id).lease_until
    until(lambda: night.db.job(job_id).lease_until != before, "a heartbeat")
