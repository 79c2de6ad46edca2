"""When a worker may take over what a silent owner left, and when it has to leave."""

import time

import pytest

from tests.worker.processes import until
from worker import desk as desks
from worker.desk import Contact, Drain, new_owner


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(desks, "boottime", clock)
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


def test_draining_has_one_end_however_often_it_is_asked_for(clock: Clock):
    drain = Drain(grace_s=30)
    clock.now += 1e6
    assert not drain.asked and not drain.over
    drain.ask()
    clock.now += 29
    drain.ask()
    assert drain.asked and not drain.over
    clock.now += 2
    assert drain.over


def test_owners_are_unique():
    assert new_owner() != new_owner()


def test_waiting_for_a_drain_ends_with_it():
    drain = Drain(grace_s=1)
    drain.ask()
    began = time.monotonic()
    assert drain.wait(60)
    until(lambda: drain.over, "the grace to end")
    assert time.monotonic() - began < 60
