"""When somebody may take over what a silent owner left."""

import pytest

from base import clock as contacts
from base.clock import Contact
from tests.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(contacts, "boottime", clock)
    return clock


def heard(contact: Contact, clock: Clock, every_s: float, times: int) -> None:
    for _ in range(times):
        clock.now += every_s
        contact.made()


def test_contact_counts_from_the_first_answer(clock: Clock):
    contact = Contact(longest_gap_s=15)
    assert not contact.unbroken_for(0)
    heard(contact, clock, every_s=5, times=7)
    assert contact.unbroken_for(30)
    assert not contact.unbroken_for(31)


def test_an_outage_starts_the_count_again(clock: Clock):
    contact = Contact(longest_gap_s=15)
    heard(contact, clock, every_s=5, times=10)
    contact.lost()
    contact.made()
    assert not contact.unbroken_for(1)
    heard(contact, clock, every_s=5, times=6)
    assert contact.unbroken_for(30)


def test_a_worker_that_slept_does_not_know_what_happened_meanwhile(clock: Clock):
    contact = Contact(longest_gap_s=15)
    heard(contact, clock, every_s=5, times=10)
    clock.now += 16
    assert not contact.unbroken_for(30), "before it has asked again"
    contact.made()
    assert not contact.unbroken_for(1), "and after"
