"""When an expired lease may be taken over."""

import pytest

from base.clock import JITTER, Contact, boottime, jittered
from base.errors import DatabaseUnavailable
from tests.clock import SettableClock


def in_contact(contact: Contact, clock: SettableClock, every_s: float, times: int) -> None:
    for _ in range(times):
        clock.advance(every_s)
        contact.made()


def test_boottime_follows_the_clock_of_a_test(clock: SettableClock):
    before = boottime()
    clock.advance(3600)
    assert boottime() - before == pytest.approx(3600, abs=60)


def test_contact_counts_from_the_first_answer(clock: SettableClock):
    contact = Contact(longest_gap_s=15)
    assert not contact.unbroken_for(0)
    in_contact(contact, clock, every_s=5, times=7)
    assert contact.unbroken_for(30)
    assert not contact.unbroken_for(31)


def test_contact_counts_again_after_an_outage(clock: SettableClock):
    contact = Contact(longest_gap_s=15)
    in_contact(contact, clock, every_s=5, times=10)
    contact.lost()
    contact.made()
    assert not contact.unbroken_for(1)
    in_contact(contact, clock, every_s=5, times=6)
    assert contact.unbroken_for(30)


def test_contact_counts_again_after_the_host_slept(clock: SettableClock):
    contact = Contact(longest_gap_s=15)
    in_contact(contact, clock, every_s=5, times=10)
    clock.advance(16)
    assert not contact.unbroken_for(30), "before the next contact"
    contact.made()
    assert not contact.unbroken_for(1), "and after"


@pytest.fixture
def long_contact(clock: SettableClock) -> Contact:
    contact = Contact(longest_gap_s=15)
    in_contact(contact, clock, every_s=5, times=10)
    return contact


def test_takeover_gate_opens_after_a_lease_of_contact(long_contact: Contact, clock: SettableClock):
    with long_contact.takeover_gate(boottime(), lease_s=30, heartbeat_s=5) as allowed:
        assert allowed
    with Contact(longest_gap_s=15).takeover_gate(boottime(), lease_s=30, heartbeat_s=5) as allowed:
        assert not allowed


def test_takeover_gate_stays_shut_after_a_wait_for_the_turn_to_write(long_contact: Contact, clock: SettableClock):
    requested_at = boottime()
    clock.advance(6)
    with long_contact.takeover_gate(requested_at, lease_s=30, heartbeat_s=5) as allowed:
        assert not allowed
    in_contact(long_contact, clock, every_s=5, times=6)
    assert long_contact.unbroken_for(30), "the wait ended a contact and began the next one"


def test_takeover_gate_takes_back_what_a_suspended_process_was_allowed(long_contact: Contact, clock: SettableClock):
    gate = long_contact.takeover_gate(boottime(), lease_s=30, heartbeat_s=5)
    assert gate.__enter__()
    clock.advance(6)
    with pytest.raises(DatabaseUnavailable, match="longer than a heartbeat"):
        gate.__exit__(None, None, None)


def test_takeover_gate_leaves_a_slow_transaction_alone_that_was_allowed_nothing(clock: SettableClock):
    with Contact(longest_gap_s=15).takeover_gate(boottime(), lease_s=30, heartbeat_s=5) as allowed:
        clock.advance(60)
    assert not allowed


def test_jittered_spreads_periods_that_began_together():
    waits = {jittered(10) for _ in range(50)}
    assert len(waits) > 1
    assert all(10 * (1 - JITTER) <= wait <= 10 for wait in waits)
