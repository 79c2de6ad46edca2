from collections.abc import Callable, Iterator
from threading import Event

import pytest

from base import failpoints
from tests.worker.processes import until


class Gate:
    """A point where a thread of this process waits until the test opens it."""

    def __init__(self) -> None:
        self._reached, self._open = Event(), Event()

    def await_arrival(self) -> None:
        until(self._reached.is_set, "a thread to reach the gate")

    def open(self) -> None:
        self._open.set()

    def __call__(self) -> None:
        self._reached.set()
        self._open.wait()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """An action for failpoints of this process: `arm("claim.committed=gate")`."""
    gate = Gate()
    monkeypatch.setitem(failpoints.ACTIONS, "gate", gate)
    yield gate
    gate.open()


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Arm failpoints of this process, for workers that run in it."""
    yield failpoints.arm
    failpoints.arm("")
