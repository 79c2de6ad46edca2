"""Wake-up messages reach the queue, and a broker that is away delays nothing."""

import time

import pytest
from celery import Celery

from api.wakeup_sender import MAX_PENDING, WakeUpSender
from base.wakeup import QUEUE, TASK


def receive(broker_url: str) -> str:
    """The name of the next task on the queue."""
    with (
        Celery("receiver", broker=broker_url, set_as_current=False).connection_for_read() as connection,
        connection.SimpleQueue(QUEUE) as queue,
    ):
        message = queue.get(timeout=5)
        message.ack()
        return str(message.headers["task"])


def test_wake_workers_sends_a_message() -> None:
    sender = WakeUpSender("memory://")
    sender.wake_workers()
    assert receive("memory://") == TASK
    sender.close()


def test_wake_workers_returns_at_once_if_the_broker_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """No process listens on port 9. Messages beyond MAX_PENDING are dropped without an error."""
    sender = WakeUpSender("redis://127.0.0.1:9/0")
    for _ in range(3 * MAX_PENDING):
        sender.wake_workers()
    deadline = time.monotonic() + 10
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "no wake-up message can be sent" in caplog.text
    sender.close(timeout_s=0.1)
