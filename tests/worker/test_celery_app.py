"""A wake-up message makes a worker poll that would not have polled for ten minutes."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from store.settings import Settings
from tests.worker.job_database import REPOSITORY, JobDatabase, until_at_work, worker_process
from tests.worker.processes import until
from worker.celery_app import Listener, make_app, wake_workers
from worker.worker import Worker

RARELY_S = 600
RARE_POLLS = {"look_s": RARELY_S, "rering_s": RARELY_S, "lease_s": 4 * RARELY_S}


def send_wakeup(broker_url: str) -> None:
    app = make_app(broker_url, lambda: None)
    wake_workers(app)
    app.close()


def wake_until_claimed(db: JobDatabase, job_id: str, broker_url: str) -> None:
    """The first message may come before the worker listens."""

    def claimed() -> bool:
        send_wakeup(broker_url)
        return db.job(job_id).status != "queued"

    until(claimed, "the message to be received")


def test_wake_up_in_memory_wakes_a_slot(settings: Settings, db: JobDatabase, start_worker: Callable[..., Worker]):
    quiet = settings.model_copy(update=RARE_POLLS)
    worker = start_worker(quiet, listens=True)
    until(lambda: worker.has_polled, "the first poll")
    job_id = db.submit(steps=2)
    wake_until_claimed(db, job_id, settings.broker_url)
    db.assert_trained(job_id, 2)


def test_wake_up_over_valkey_wakes_a_worker_on_postgres(
    postgres_database_url: str, valkey_url: str, settings: Settings, tmp_path: Path
):
    """As on a cluster: worker, database and broker are processes of their own."""
    changes = {"database_url": postgres_database_url, "broker_url": valkey_url, **RARE_POLLS}
    settings = settings.model_copy(update=changes)
    db = JobDatabase(settings)
    with worker_process(settings, tmp_path / "log"):
        until_at_work(tmp_path / "log")
        first = db.submit(steps=2)
        wake_until_claimed(db, first, valkey_url)
        db.assert_trained(first, 2)
        # After a job the slot polls again, so a job that came meanwhile needs no message.
        both = [db.submit(steps=20), db.submit(steps=2)]
        wake_until_claimed(db, both[0], valkey_url)
        db.assert_trained(both[1], 2)
    db.assert_nothing_left()
    db.database.dispose()


def test_listener_of_a_busy_worker_leaves_the_message_to_others():
    received, idle = threading.Event(), threading.Event()
    app = make_app("memory://localhost/", received.set)
    listener = Listener(app, idle.is_set)
    listener.start()
    try:
        send_wakeup("memory://localhost/")
        assert not received.wait(0.5)
        idle.set()
        until(received.is_set, "the message to be received")
    finally:
        listener.stop()


def test_wake_workers_without_a_broker_logs_a_warning(caplog: pytest.LogCaptureFixture):
    send_wakeup("redis://127.0.0.1:1/0")
    assert "the wake-up message cannot be sent" in caplog.text


def test_worker_loads_no_torch():
    program = (
        "import pkgutil, sys, importlib, worker\n"
        "for module in pkgutil.iter_modules(worker.__path__):\n"
        "    if module.name != '__main__': importlib.import_module(f'worker.{module.name}')\n"
        "import worker.__main__\n"
        "sys.exit(bool({'torch', 'torchvision', 'numpy', 'fastapi', 'api'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
