import pytest

from base.clock import Contact, boottime
from tests.clock import SettableClock


def make_contact(contact: Contact, clock: SettableClock, every_s: float, times: int) -> None:
    for _ in range(times):
        clock.advance(every_s)
        contact.made()


def test_boottime_follows_the_clock_of_a_test(clock: SettableClock):
    before = boottime()
    clock.advance(3600)
    assert boottime() - before == pytest.approx(3600, abs=60)


def test_contact_counts_from_the_first_one(clock: SettableClock):
    contact = Contact(longest_gap_s=15)
    assert not contact.unbroken_for(0)
    make_contact(contact, clock, every_s=5, times=7)
    assert contact.unbroken_for(30)
    assert not contact.unbroken_for(33)


def test_contact_counts_again_after_an_outage(clock: SettableClock):
    contact = Contact(longest_gap_s=15)
    make_contact(contact, clock, every_s=5, times=10)
    contact.lost()
    contact.made()
    assert not contact.unbroken_for(1)
    make_contact(contact, clock, every_s=5, times=6)
    assert contact.unbroken_for(30)


def test_contact_counts_again_after_a_suspend(clock: SettableClock):
    contact = Contact(longest_gap_s=15)
    make_contact(contact, clock, every_s=5, times=10)
    clock.advance(16)
    assert not contact.unbroken_for(30), "before the next contact"
    contact.made()
    assert not contact.unbroken_for(1), "and after it"
