"""`python -m worker`: one worker process, set up by DISTILLERY_… variables; it waits for the database, and for jobs.

SIGTERM or Ctrl-C drains: trainings stop at a checkpoint, their jobs go back to the queue with the attempt unspent.
It does not migrate: `python -m store migrate` does, once.
"""

import logging
import os
import signal
import sys

from base.wakeup import MEMORY
from store.settings import settings_or_exit
from worker.desk import Options
from worker.service import Worker

LOOK_WITHOUT_BELL_S = 0.5


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # It tells of every ring; what goes wrong is louder than that.
    logging.getLogger("celery").setLevel(logging.WARNING)
    settings, options = settings_or_exit("worker", Options)
    # A bell in memory is heard only where it is rung, which is another process.
    listens = not settings.broker_url.startswith(MEMORY)
    if not listens:
        settings = settings.model_copy(update={"look_s": min(settings.look_s, LOOK_WITHOUT_BELL_S)})
    worker = Worker(settings, options, listens=listens)
    signals = _signals()
    worker.start()
    os.read(signals, 1)
    return 0 if worker.stop() else 1


def _signals() -> int:
    """A pipe that tells of SIGTERM and SIGINT: a handler must not touch locks that the interrupted code may hold."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return told


if __name__ == "__main__":
    sys.exit(main())
