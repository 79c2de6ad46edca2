"""What a heart tells the guard while the table hangs, and when it is back."""

import time

from store import lifecycle
from store.contact import boottime
from store.settings import Settings
from tests.worker.processes import until
from tests.worker.table import OPTIONS, Table
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
        claim = lifecycle.claim(connection, desk.owner, short_lease.lease_s, rescue=False)
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
        claim = lifecycle.claim(connection, desk.owner, short_lease.lease_s, rescue=False)
    assert claim is not None
    with table.database.begin():
        beat = _Beat(claim, desk)
        let_go = boottime()
    beat.join()
    assert beat.reached
    assert beat.deadline < let_go + SAFE_PART * short_lease.lease_s
    desk.close()
