"""Something that a worker does again and again, on a thread of its own, for as long as it lives."""

import logging
import threading
from abc import ABC, abstractmethod

from base.clock import jittered

log = logging.getLogger("distillery.rounds")


class Rounds(ABC):
    """The first round comes after `first_s`, each further one at most `every_s` after the one before."""

    def __init__(self, name: str, every_s: float, first_s: float = 0) -> None:
        self._name, self._every_s, self._first_s = name, every_s, first_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def round(self) -> None:
        """Do it once."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ask it to end and wait for that; False when it has not come in time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait_s = self._first_s
        while not self._stop.wait(wait_s):
            try:
                self.round()
            except Exception:
                # The next one may go better; without any, what was lost would stay lost, and the disk fill up.
                log.exception("a round of the %s failed", self._name)
            wait_s = jittered(self._every_s)
