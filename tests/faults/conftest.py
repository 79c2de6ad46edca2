from collections.abc import Callable, Iterator
from threading import Event

import pytest

from base import failpoints
from tests.worker.processes import until


class Gate:
    """Where a thread of this process waits until the test lets it go on."""

    def __init__(self) -> None:
        self._reached, self._open = Event(), Event()

    def await_arrival(self) -> None:
        until(self._reached.is_set, "somebody at the gate")

    def open(self) -> None:
        self._open.set()

    def __call__(self) -> None:
        self._reached.set()
        self._open.wait()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What a failpoint of this process may do: `arm("claim.committed=gate")`."""
    gate = Gate()
    monkeypatch.setitem(failpoints.ACTIONS, "gate", gate)
    yield gate
    gate.open()


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Failpoints of this process, for workers that run in it."""
    yield failpoints.arm
    failpoints.arm("")
