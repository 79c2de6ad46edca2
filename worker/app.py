"""The Celery side of a worker: it hears the doorbell. Nothing travels in a message, so that losing one costs nothing.

The settings and why (measured, and told in the README's Decisions): a pool of threads, since ringing is all that a
task does; messages are acknowledged before they are run, since a lost ring is harmless and a repeated one is noise; no
results, time limits, revokes, countdowns or chatter between workers, since the table does all that; and it reconnects
for ever. A worker whose slots are all busy does not listen: the ring is for somebody who is free.
"""

import logging
import os
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

from celery import Celery, bootsteps
from celery.worker import WorkController, state
from celery.worker.consumer.tasks import Tasks

from base.wakeup import EXPIRES_S, MEMORY, QUEUE, SOCKET_S, TASK, transport_options
from worker import tasks

log = logging.getLogger("distillery.app")

POLL_S = 0.02
"""In memory a ring is heard by polling; this costs a hundredth of a core."""
START_AGAIN_S = 5.0


def make_app(broker_url: str, ring: Callable[[], None]) -> Celery:
    """An application that knows one task, `distillery.look`, and does `ring` for it."""
    app = Celery("distillery-worker", broker=broker_url, set_as_current=False)
    in_memory = broker_url.startswith(MEMORY)
    app.conf.update(
        task_default_queue=QUEUE,
        task_acks_late=False,
        task_ignore_result=True,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=not in_memory,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=SOCKET_S,
        broker_transport_options={"polling_interval": POLL_S} if in_memory else transport_options(broker_url),
    )
    tasks.register(app, ring)
    return app


def ring_others(app: Celery) -> None:
    """Wake some worker that listens. Without a broker nobody hears it, and all look by themselves."""
    try:
        app.send_task(TASK, queue=QUEUE, expires=EXPIRES_S, ignore_result=True, retry=False)
    except Exception as error:
        # Whatever a broker library may throw: the bell is a help, and never a reason to stop.
        log.warning("the bell cannot be rung: %s", error)


class Listener:
    """Celery's own worker in a thread; it is started again if it ends by itself."""

    def __init__(self, app: Celery, is_idle: Callable[[], bool]) -> None:
        self._app = app
        self._in_memory = app.conf.broker_url.startswith(MEMORY)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        app.steps["consumer"].add(_only_when(is_idle))

    def start(self) -> None:
        state.should_stop = None
        # Celery's pool looks a task up in the process's default application, whatever its worker was given.
        self._app.set_default()
        self._thread.start()

    def stop(self, timeout_s: float = 5) -> None:
        """Celery looks at this flag between messages; it is the only way to stop it from another thread."""
        self._stopping.set()
        state.should_stop = os.EX_OK  # type: ignore[assignment]
        if self._thread.is_alive():
            # In memory it would wait two seconds for a message, and once more after it has seen the flag.
            for _ in range(2 if self._in_memory else 0):
                ring_others(self._app)
            self._thread.join(timeout_s)
        self._app.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._controller().start()
            except Exception:
                log.exception("Celery's worker ended")
            if not self._stopping.wait(START_AGAIN_S):
                log.warning("nobody hears the bell: starting Celery's worker again")

    def _controller(self) -> Any:
        return WorkController(
            app=self._app,
            pool_cls="threads",
            concurrency=1,
            queues=[QUEUE],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )


def _only_when(is_idle: Callable[[], bool]) -> type[bootsteps.StartStopStep]:
    """A step of Celery's consumer after which it takes no message while nobody here could act on it."""

    class OnlyWhenIdle(bootsteps.StartStopStep):
        requires = (Tasks,)

        def start(self, consumer: Any) -> None:
            qos = consumer.task_consumer.channel.qos
            can_consume = qos.can_consume
            qos.can_consume = MethodType(lambda _: is_idle() and can_consume(), qos)

    return OnlyWhenIdle
