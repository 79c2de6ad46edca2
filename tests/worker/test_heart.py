"""What a heart tells the guard while the table hangs, and when it is back."""

import time
from typing import Any

import pytest

from base.clock import boottime
from store import lifecycle
from store.settings import Settings
from tests.worker.processes import until
from tests.worker.table import OPTIONS, Table
from worker import heart as hearts
from worker.desk import Desk
from worker.heart import SAFE_PART, Heart, _Beat


class Guard:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []

    def tick(self, deadline: float) -> None:
        self.deadlines.append(deadline)


def test_a_beat_that_hung_takes_back_nothing_that_was_granted_meanwhile(short_lease: Settings, table: Table):
    """The table is locked for longer than the beat's own deadline: told late, that would end the training at once."""
    table.submit()
    desk = Desk(short_lease, OPTIONS, ring=lambda: None)
    guard, claimed_at = Guard(), boottime()
    with desk.begin() as (connection, _):
        claim = lifecycle.claim(connection, desk.owner, short_lease.lease_s, takeover=False)
    assert claim is not None
    proofs: list[float] = []
    with Heart(claim, desk, claimed_at, lambda: proofs.append(boottime())) as heart:
        heart.keep(guard)
        until(lambda: proofs, "a first beat")
        with table.database.begin():
            hung_from = boottime()
            time.sleep(SAFE_PART * short_lease.lease_s + 0.5)
            locked_until = boottime()
        until(lambda: proofs[-1] > locked_until, "a beat to come through")
    assert guard.deadlines == sorted(guard.deadlines)
    assert guard.deadlines[-1] > locked_until > hung_from + SAFE_PART * short_lease.lease_s
    assert table.job(claim.job.id).fence == 1
    desk.close()


def test_a_late_answer_stretches_no_deadline(short_lease: Settings, table: Table):
    """The lease may have begun when the beat was sent, and not when the table at last let it through."""
    table.submit()
    desk = Desk(short_lease, OPTIONS, ring=lambda: None)
    with desk.begin() as (connection, _):
        claim = lifecycle.claim(connection, desk.owner, short_lease.lease_s, takeover=False)
    assert claim is not None
    with table.database.begin():
        beat = _Beat(claim, desk)
        let_go = boottime()
    beat.join()
    assert beat.reached
    assert beat.deadline < let_go + SAFE_PART * short_lease.lease_s
    desk.close()


def test_a_beat_that_cannot_be_started_proves_nothing_and_the_next_one_does(
    short_lease: Settings, table: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """No room for another thread, twice."""
    table.submit()
    desk = Desk(short_lease, OPTIONS, ring=lambda: None)
    with desk.begin() as (connection, _):
        claim = lifecycle.claim(connection, desk.owner, short_lease.lease_s, takeover=False)
    assert claim is not None
    begun: list[None] = []

    def begin(*arguments: Any) -> _Beat:
        begun.append(None)
        if len(begun) < 3:
            raise RuntimeError("can't start new thread")
        return _Beat(*arguments)

    monkeypatch.setattr(hearts, "_Beat", begin)
    proofs: list[int] = []
    with Heart(claim, desk, boottime(), lambda: proofs.append(len(begun))):
        until(lambda: proofs, "a beat to come through")
    assert proofs[0] == 3
    assert caplog.text.count("no heartbeat can be sent: can't start new thread") == 2
    desk.close()
