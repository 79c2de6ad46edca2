"""`python -m worker`: one worker process, set up by DISTILLERY_… variables. It waits for the database and for jobs.

SIGTERM or Ctrl-C drains it: trainings stop at a checkpoint, and their jobs are requeued without spending an attempt.
It does not migrate the database: run `python -m store migrate` once.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `after_imports`

import os
import sys

from base.figures import WRITE_EVERY_S, Exchange
from base.logs import log_to_stderr
from base.processes import after_imports, raise_descriptor_limit, stop_signals
from base.wakeup import MEMORY
from store.settings import keep_private, settings_or_exit
from worker.context import Options
from worker.periodic import PeriodicTask
from worker.worker import Worker

POLL_WITHOUT_BROKER_S = 0.5


def main() -> int:
    after_imports()
    raise_descriptor_limit()
    settings, options = settings_or_exit("worker", Options)
    # Celery logs every message at the level INFO.
    log_to_stderr("celery", form=settings.log_format)
    keep_private(settings)
    # Messages in memory stay inside the process that sends them, which is another one.
    listens = not settings.broker_url.startswith(MEMORY)
    if not listens:
        settings = settings.model_copy(update={"look_s": min(settings.look_s, POLL_WITHOUT_BROKER_S)})
    worker = Worker(settings, options, listens=listens)
    shared = SharedFigures(Exchange(settings.home / "metrics", "worker"))
    signals = stop_signals()
    worker.start()
    shared.start()
    os.read(signals, 1)
    ended = worker.stop()
    shared.stop()
    return 0 if ended else 1


class SharedFigures(PeriodicTask):
    """Writes this process's figures for the API, which is asked for them."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__("figures", WRITE_EVERY_S, first_s=WRITE_EVERY_S)
        self._exchange = exchange

    def run(self) -> None:
        self._exchange.write()

    def stop(self, timeout_s: float | None = WRITE_EVERY_S) -> bool:
        ended = super().stop(timeout_s)
        self._exchange.remove()
        return ended


if __name__ == "__main__":
    sys.exit(main())
