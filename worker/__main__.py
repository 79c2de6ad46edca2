"""`python -m worker`: one worker process, set up by DISTILLERY_… variables. It waits for the database and for jobs.

SIGTERM or Ctrl-C drains it: trainings stop at a checkpoint, and their jobs are requeued without spending an attempt.
It does not migrate the database: run `python -m store migrate` once.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `after_imports`

import os
import sys

from base.processes import after_imports, log_to_stderr, raise_descriptor_limit, stop_signals
from base.wakeup import MEMORY
from store.settings import settings_or_exit
from worker.context import Options
from worker.worker import Worker

POLL_WITHOUT_BROKER_S = 0.5


def main() -> int:
    after_imports()
    # Celery logs every message at the level INFO.
    log_to_stderr("celery")
    raise_descriptor_limit()
    settings, options = settings_or_exit("worker", Options)
    # Messages in memory stay inside the process that sends them, which is another one.
    listens = not settings.broker_url.startswith(MEMORY)
    if not listens:
        settings = settings.model_copy(update={"look_s": min(settings.look_s, POLL_WITHOUT_BROKER_S)})
    worker = Worker(settings, options, listens=listens)
    signals = stop_signals()
    worker.start()
    os.read(signals, 1)
    return 0 if worker.stop() else 1


if __name__ == "__main__":
    sys.exit(main())
