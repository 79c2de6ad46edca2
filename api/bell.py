"""The doorbell: tells the workers to look at the table. It may be lost, doubled or late, and no job is.

A ring is sent from a thread of its own, so that an answer never waits for the broker, nor fails with it.
"""

import logging
import queue
import threading

from celery import Celery

from base.failpoints import failpoint
from base.wakeup import EXPIRES_S, QUEUE, SOCKET_S, TASK, transport_options

log = logging.getLogger("distillery.bell")

WAITING_RINGS = 64
"""A burst of jobs wakes as many slots; beyond that, one more ring would tell nothing new."""


class Bell:
    """`ring` is what the API needs; `close` ends the thread."""

    def __init__(self, broker_url: str) -> None:
        self._celery = _producer(broker_url)
        self._rings: queue.Queue[bool] = queue.Queue(WAITING_RINGS)
        self._reachable = True
        self._thread = threading.Thread(target=self._send_all, name="bell", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        try:
            self._rings.put_nowait(True)
        except queue.Full:
            return

    def close(self, timeout_s: float = 3) -> None:
        """Rings that still wait are dropped where the broker is away: the workers look by themselves."""
        try:
            self._rings.put(False, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _send_all(self) -> None:
        while self._rings.get():
            self._send()
        self._celery.close()

    def _send(self) -> None:
        failpoint("ring.unsent")
        try:
            self._celery.send_task(TASK, queue=QUEUE, expires=EXPIRES_S, ignore_result=True, retry=False)
        except Exception as error:
            # Whatever a broker library may throw, the next ring must still be tried; the workers look by themselves.
            if self._reachable:
                log.warning("the bell cannot be rung, workers find jobs by looking: %s", error)
            self._reachable = False
        else:
            self._reachable = True


def _producer(broker_url: str) -> Celery:
    celery = Celery("distillery-bell", broker=broker_url, set_as_current=False)
    celery.conf.update(
        task_ignore_result=True,
        task_publish_retry=False,
        broker_connection_timeout=SOCKET_S,
        broker_transport_options=transport_options(broker_url),
        redis_socket_timeout=float(SOCKET_S),
        redis_socket_connect_timeout=float(SOCKET_S),
    )
    return celery
