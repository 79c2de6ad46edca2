"""The sender of wake-up messages, which make idle workers poll the database at once instead of a few seconds later.

A separate thread sends them, so that no answer waits for the broker or fails with it. A message may be lost, doubled
or late: workers also poll without one.
"""

import logging
import queue
import threading

from celery import Celery

from base.failpoints import failpoint
from base.wakeup import celery_settings, send_wakeup

log = logging.getLogger("distillery.wakeup")

MAX_PENDING = 64
"""The largest number of pending messages. More would not wake further slots."""


class WakeUpSender:
    """The sender. `wake_workers` queues one message; `close` ends the thread."""

    def __init__(self, broker_url: str) -> None:
        self._celery = Celery("distillery-wakeup", broker=broker_url, set_as_current=False)
        self._celery.conf.update(celery_settings(broker_url))
        self._pending: queue.Queue[bool] = queue.Queue(MAX_PENDING)
        self._reachable = True
        self._thread = threading.Thread(target=self._send_all, name="wakeup", daemon=True)
        self._thread.start()

    def wake_workers(self) -> None:
        """Queue one message. Returns at once, also if the broker cannot be reached."""
        try:
            self._pending.put_nowait(True)
        except queue.Full:
            return

    def close(self, timeout_s: float = 3) -> None:
        """End the thread. If the broker cannot be reached, pending messages are dropped."""
        try:
            self._pending.put(False, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _send_all(self) -> None:
        while self._pending.get():
            self._send()
        self._celery.close()

    def _send(self) -> None:
        failpoint("wakeup.unsent")
        try:
            send_wakeup(self._celery)
        except Exception as error:
            # A broker library may raise any exception; the next message must still be tried.
            if self._reachable:
                log.warning("no wake-up message can be sent, workers find jobs by polling: %s", error)
            self._reachable = False
        else:
            self._reachable = True
