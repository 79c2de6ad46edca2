"""Whether a slot is fit to work. A sick one fails each job within seconds, and so would win most claims of a night.

Its device is lost, its environment broken, its files are used up: what it shows is attempts that fail before they have
told of any progress. Of one job they may be that job's fault; of several jobs in a row they are the slot's.
"""

import logging
from typing import Literal

log = logging.getLogger("distillery.health")

LONGEST_PAUSE_S = 600.0
JOBS_IN_A_ROW = 2

Sign = Literal["sound", "sick", "none"]
"""What an attempt shows of its slot: it made progress; it failed before, for no reason of the spec's; or neither."""


class Health:
    """Of one slot. `pause_s`: how long it has to wait after its attempts, so that others come first."""

    def __init__(self, name: str, first_pause_s: float) -> None:
        self._name, self._first_pause_s = name, first_pause_s
        self._failed: set[str] = set()
        self.pause_s = 0.0

    def note(self, job_id: str, sign: Sign) -> None:
        if sign == "sound":
            self._recover()
        elif sign == "sick":
            self._failed.add(job_id)
            if len(self._failed) >= JOBS_IN_A_ROW:
                self._slow_down()

    def _recover(self) -> None:
        if self.pause_s:
            log.warning("%s: jobs make progress here again", self._name)
        self._failed.clear()
        self.pause_s = 0.0

    def _slow_down(self) -> None:
        if not self.pause_s:
            log.error("%s: jobs fail here one after the other before they begin: a pause after each", self._name)
        self.pause_s = min(2 * self.pause_s or self._first_pause_s, LONGEST_PAUSE_S)
