"""When a worker has to leave, and what it calls itself."""

import time

import pytest

from tests.clock import Clock
from tests.worker.processes import until
from worker import desk as desks
from worker.desk import Drain, new_owner


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(desks, "boottime", clock)
    return clock


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
