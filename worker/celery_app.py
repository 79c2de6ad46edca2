"""The Celery part of a worker, which receives wake-up messages. A message has no content and may be lost.

The settings, which were measured (docs/developing.md, Decisions): a pool of threads, since the task only wakes slots;
messages are acknowledged before they are run, since a lost one is harmless; no results, time limits, revokes,
countdowns or messages between workers, since the database does all that; reconnecting without end. A worker whose slots
are all busy takes no message, so that a worker with a free slot gets it.
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

from base import wakeup

log = logging.getLogger("distillery.celery")

START_AGAIN_S = 5.0


def make_app(broker_url: str, wake_up: Callable[[], None]) -> Celery:
    """Return an application with one task, `distillery.look`, which calls `wake_up`."""
    app = Celery("distillery-worker", broker=broker_url, set_as_current=False)
    app.conf.update(
        wakeup.celery_settings(broker_url),
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=not broker_url.startswith(wakeup.MEMORY),
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )

    # By default Celery would share the task with every other application of this process.
    @app.task(name=wakeup.TASK, ignore_result=True, shared=False)
    def look() -> None:
        wake_up()

    return app


def wake_workers(app: Celery) -> None:
    """Wake a worker that listens. If the broker cannot be reached, no message is sent; the workers poll anyway."""
    try:
        wakeup.send_wakeup(app)
    except Exception as error:
        # Any exception: an error of a broker's library must not stop the worker.
        log.warning("the wake-up message cannot be sent: %s", error)


class Listener:
    """Celery's own worker in a thread. It is started again if it ends."""

    def __init__(self, app: Celery, is_idle: Callable[[], bool]) -> None:
        self._app = app
        self._in_memory = app.conf.broker_url.startswith(wakeup.MEMORY)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        app.steps["consumer"].add(_only_when(is_idle))

    def start(self) -> None:
        state.should_stop = None
        # Celery's pool looks tasks up in the process's default application, not in that of its worker.
        self._app.set_default()
        self._thread.start()

    def stop(self, timeout_s: float = 5) -> None:
        """Stop the thread. Celery checks this flag between messages; another thread cannot stop it in another way."""
        self._stopping.set()
        state.should_stop = os.EX_OK  # type: ignore[assignment]
        if self._thread.is_alive():
            # From a broker in memory, Celery waits two seconds for a message, and once more after it has read the flag.
            for _ in range(2 if self._in_memory else 0):
                wake_workers(self._app)
            self._thread.join(timeout_s)
        self._app.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._controller().start()
            except Exception:
                log.exception("Celery's worker ended")
            if not self._stopping.wait(START_AGAIN_S):
                log.warning("starting Celery's worker again")

    def _controller(self) -> Any:
        return WorkController(
            app=self._app,
            pool_cls="threads",
            concurrency=1,
            queues=[wakeup.QUEUE],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )


def _only_when(is_idle: Callable[[], bool]) -> type[bootsteps.StartStopStep]:
    """Return a step of Celery's consumer that makes it take no message while this worker has no free slot.

    It replaces the channel's `can_consume`, as Celery's own `worker_disable_prefetch` does; Celery has no hook for it.
    """

    class OnlyWhenIdle(bootsteps.StartStopStep):
        requires = (Tasks,)

        def start(self, consumer: Any) -> None:
            qos = consumer.task_consumer.channel.qos
            can_consume = qos.can_consume
            qos.can_consume = MethodType(lambda _: is_idle() and can_consume(), qos)

    return OnlyWhenIdle
