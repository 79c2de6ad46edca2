"""The bell: heard where somebody listens, never in the way where nobody does."""

import time

import pytest
from celery import Celery

from api.bell import WAITING_RINGS, Bell
from base.wakeup import QUEUE, TASK


def drain(broker_url: str, wanted: int) -> list[str]:
    """Names of the tasks on the queue; waits until there are as many as wanted."""
    names: list[str] = []
    with Celery("listener", broker=broker_url, set_as_current=False).connection_for_read() as connection:
        queue = connection.SimpleQueue(QUEUE)
        for _ in range(wanted):
            message = queue.get(timeout=5)
            names.append(message.headers["task"])
            message.ack()
        queue.close()
    return names


def test_a_ring_is_a_task_by_name_that_carries_nothing() -> None:
    bell = Bell("memory://")
    bell.ring()
    assert drain("memory://", 1) == [TASK]
    bell.close()


def test_ringing_returns_at_once_where_the_broker_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """Port 9 answers nobody; more rings than may wait are dropped, and none is an error for whoever rings."""
    bell = Bell("redis://127.0.0.1:9/0")
    for _ in range(3 * WAITING_RINGS):
        bell.ring()
    deadline = time.monotonic() + 10
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "the bell cannot be rung" in caplog.text
    bell.close(timeout_s=0.1)
