"""The bell: a ring makes a worker look that would not have looked for a minute."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from store.settings import Settings
from tests.worker.processes import until
from tests.worker.table import REPOSITORY, Table, worker_process
from worker.app import Listener, make_app, ring_others
from worker.service import Worker

DEAF_FOR_S = 600
DEAF = {"look_s": DEAF_FOR_S, "rering_s": DEAF_FOR_S, "lease_s": 4 * DEAF_FOR_S}


def ring(broker_url: str) -> None:
    app = make_app(broker_url, lambda: None)
    ring_others(app)
    app.close()


def rings_until(table: Table, job_id: str, broker_url: str) -> None:
    """One ring may come before the worker listens; a lost one is not what is tested."""

    def rung() -> bool:
        ring(broker_url)
        return table.job(job_id).status != "queued"

    until(rung, "the ring to be heard")


def test_a_ring_in_memory_wakes_a_slot(settings: Settings, table: Table, start_worker: Callable[..., Worker]):
    quiet = settings.model_copy(update=DEAF)
    worker = start_worker(quiet, listens=True)
    until(lambda: worker.looked, "its first look")
    job_id = table.submit(steps=2)
    rings_until(table, job_id, settings.broker_url)
    table.assert_trained(job_id, 2)


def test_a_ring_over_valkey_wakes_a_worker_on_postgres(
    postgres_database_url: str, valkey_url: str, settings: Settings, tmp_path: Path
):
    """As on a cluster: each its own process."""
    changes = {"database_url": postgres_database_url, "broker_url": valkey_url, **DEAF}
    settings = settings.model_copy(update=changes)
    table = Table(settings)
    with worker_process(settings, tmp_path / "log"):
        until(lambda: "is at work" in (tmp_path / "log").read_text(), "the worker to start")
        first = table.submit(steps=2)
        rings_until(table, first, valkey_url)
        table.assert_trained(first, 2)
        # After a job the slot looks again by itself: no ring is needed for what came meanwhile.
        both = [table.submit(steps=20), table.submit(steps=2)]
        rings_until(table, both[0], valkey_url)
        table.assert_trained(both[1], 2)
    table.assert_nothing_left()
    table.database.dispose()


def test_a_busy_worker_leaves_the_ring_to_others():
    heard, idle = threading.Event(), threading.Event()
    app = make_app("memory://localhost/", heard.set)
    listener = Listener(app, idle.is_set)
    listener.start()
    try:
        ring("memory://localhost/")
        assert not heard.wait(0.5)
        idle.set()
        until(heard.is_set, "the ring to be heard")
    finally:
        listener.stop()


def test_without_a_broker_ringing_is_told_and_forgotten(caplog: pytest.LogCaptureFixture):
    ring("redis://127.0.0.1:1/0")
    assert "the bell cannot be rung" in caplog.text


def test_the_worker_loads_no_torch():
    program = (
        "import pkgutil, sys, importlib, worker\n"
        "for found in pkgutil.iter_modules(worker.__path__):\n"
        "    if found.name != '__main__': importlib.import_module(f'worker.{found.name}')\n"
        "import worker.__main__\n"
        "sys.exit(bool({'torch', 'torchvision', 'numpy', 'fastapi', 'api'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
