"""The deadlines that a lease keeper sets in the guard while the database hangs, and afterwards."""

import time
from typing import Any

import pytest

from base.clock import boottime
from store import lifecycle
from store.settings import Settings
from tests.worker.job_database import OPTIONS, JobDatabase
from tests.worker.processes import until
from worker import lease as lease_module
from worker.context import WorkerContext
from worker.engine import SAFE_PART
from worker.lease import LeaseKeeper, _Heartbeat


class FakeProcess:
    """Records its deadlines."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []

    def extend(self, deadline: float) -> None:
        self.deadlines.append(deadline)


def test_lease_keeper_never_sets_an_earlier_deadline_after_a_heartbeat_that_hung(
    short_lease: Settings, db: JobDatabase
):
    """The database is locked for longer than the heartbeat's own deadline, which must not replace a later one."""
    db.submit()
    context = WorkerContext(short_lease, OPTIONS, wake_workers=lambda: None)
    process, claimed_at = FakeProcess(), boottime()
    with context.begin() as (connection, _):
        claim = lifecycle.claim(connection, context.owner, short_lease.lease_s, takeover=False)
    assert claim is not None
    renewals: list[float] = []
    with LeaseKeeper(claim, context, claimed_at, lambda: renewals.append(boottime())) as lease:
        lease.attach(process)
        until(lambda: renewals, "a first heartbeat")
        with db.database.begin():
            hung_from = boottime()
            time.sleep(SAFE_PART * short_lease.lease_s + 0.5)
            locked_until = boottime()
        until(lambda: renewals[-1] > locked_until, "a heartbeat to be accepted")
    assert process.deadlines == sorted(process.deadlines)
    assert process.deadlines[-1] > locked_until > hung_from + SAFE_PART * short_lease.lease_s
    assert db.job(claim.job.id).fence == 1
    context.close()


def test_lease_keeper_sends_a_heartbeat_at_once_after_a_slow_claim(settings: Settings, db: JobDatabase):
    """The claim took longer than the guard's part of a lease, as with a database that hung."""
    db.submit()
    context = WorkerContext(settings, OPTIONS, wake_workers=lambda: None)
    claimed_at = boottime() - settings.lease_s
    with context.begin() as (connection, _):
        claim = lifecycle.claim(connection, context.owner, settings.lease_s, takeover=False)
    assert claim is not None
    with LeaseKeeper(claim, context, claimed_at, lambda: None) as lease:
        assert lease.deadline > boottime() + SAFE_PART * settings.lease_s / 2
    context.close()


def test_heartbeat_deadline_is_not_extended_by_a_late_answer(short_lease: Settings, db: JobDatabase):
    """The lease may have begun when the heartbeat was sent, and not when the database accepted it."""
    db.submit()
    context = WorkerContext(short_lease, OPTIONS, wake_workers=lambda: None)
    with context.begin() as (connection, _):
        claim = lifecycle.claim(connection, context.owner, short_lease.lease_s, takeover=False)
    assert claim is not None
    with db.database.begin():
        heartbeat = _Heartbeat(claim, context)
        unlocked_at = boottime()
    heartbeat.join()
    assert heartbeat.accepted
    assert heartbeat.deadline < unlocked_at + SAFE_PART * short_lease.lease_s
    context.close()


def test_lease_keeper_sends_the_next_heartbeat_after_one_that_could_not_be_sent(
    short_lease: Settings, db: JobDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Twice no other thread can be started."""
    db.submit()
    context = WorkerContext(short_lease, OPTIONS, wake_workers=lambda: None)
    with context.begin() as (connection, _):
        claim = lifecycle.claim(connection, context.owner, short_lease.lease_s, takeover=False)
    assert claim is not None
    sent: list[None] = []

    def send(*arguments: Any) -> _Heartbeat:
        sent.append(None)
        if len(sent) < 3:
            raise RuntimeError("can't start new thread")
        return _Heartbeat(*arguments)

    monkeypatch.setattr(lease_module, "_Heartbeat", send)
    renewals: list[int] = []
    with LeaseKeeper(claim, context, boottime(), lambda: renewals.append(len(sent))):
        until(lambda: renewals, "a heartbeat to be accepted")
    assert renewals[0] == 3
    assert caplog.text.count("no heartbeat can be sent: can't start new thread") == 2
    context.close()
