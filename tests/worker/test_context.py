"""The time that a worker has to leave, and its name."""

import time

import pytest

from tests.clock import Clock
from tests.worker.processes import until
from worker import context as context_module
from worker.context import Drain, new_owner


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(context_module, "boottime", clock)
    return clock


def test_drain_request_is_idempotent(clock: Clock):
    drain = Drain(grace_s=30)
    clock.now += 1e6
    assert not drain.requested and not drain.is_over
    drain.request()
    clock.now += 29
    drain.request()
    assert drain.requested and not drain.is_over
    clock.now += 2
    assert drain.is_over


def test_new_owner_is_unique():
    assert new_owner() != new_owner()


def test_drain_wait_ends_with_the_request():
    drain = Drain(grace_s=1)
    drain.request()
    began = time.monotonic()
    assert drain.wait(60)
    until(lambda: drain.is_over, "the time to leave to end")
    assert time.monotonic() - began < 60
