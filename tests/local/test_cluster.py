"""`local.cluster` with real PostgreSQL, Valkey, API and workers, which are killed and started again."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from local import servers
from store.settings import Settings
from tests.worker.job_database import REPOSITORY, JobDatabase
from tests.worker.processes import FAKE_ENGINE, refused, until

# The lease is long: the lock of a killed worker is free, so its job continues at once, also on a busy machine.
QUICK = {
    "DISTILLERY_ENGINE": json.dumps(FAKE_ENGINE),
    "DISTILLERY_LEASE_S": "300",
    "DISTILLERY_HEARTBEAT_S": "0.2",
    "DISTILLERY_LOOK_S": "0.3",
    "DISTILLERY_BACK_OFF_S": "0.05",
    "DISTILLERY_MIN_FREE_BYTES": "0",
}


@pytest.fixture
def home() -> Iterator[Path]:
    """Not pytest's own folder: PostgreSQL never runs as root and could not enter it."""
    with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def cluster(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any], Path]]:
    ready, log = home / "ready.json", home / "cluster.log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "local.cluster", "--home", str(home), "--port", "0", "--ready-file", str(ready)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **QUICK}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until(lambda: ready.exists() or process.poll() is not None, "the cluster to be ready", timeout_s=60)
        yield process, json.loads(ready.read_text()), log
    finally:
        process.terminate()
        process.wait(60)


def test_cluster_starts_killed_processes_again_and_the_job_continues(home: Path):
    with cluster(home) as (process, addresses, log):
        with urllib.request.urlopen(f"{addresses['url']}/healthz", timeout=30) as answer:  # noqa: S310 - our own server
            assert answer.status == 200
        with jobs_of(home, addresses) as db:
            job_id = db.submit(steps=120, step_s=0.025, checkpoint_every=10)
            db.until_checkpoint(job_id)
            os.kill(worker_of(db, job_id), signal.SIGKILL)
            until(lambda: "SIGKILL and is started again" in log.read_text(), "the cluster to log it")
            for name, server in (("valkey", valkey_at(addresses["broker"])), ("postgres", postgres_in(home))):
                os.kill(server, signal.SIGKILL)
                until(lambda: f"{name} ended with SIGKILL" in log.read_text(), f"the cluster to log the end of {name}")  # noqa: B023
            until(lambda: answers(addresses["database"]), "PostgreSQL to be back")
            until(lambda: valkey_at(addresses["broker"]), "Valkey to be back")
            db.assert_trained(job_id, 120)
            assert [attempt.how for attempt in db.attempts(job_id)] == ["failed", "succeeded"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert log.read_text().endswith("stopped\n")
        assert not members(home)


def test_cluster_that_is_killed_leaves_no_process_and_the_next_one_continues(home: Path):
    with cluster(home) as (process, addresses, _):
        with jobs_of(home, addresses) as db:
            job_id = db.submit(steps=120, step_s=0.025, checkpoint_every=10)
            db.until_checkpoint(job_id)
        process.kill()
        until(lambda: not members(home), "the members to end with the cluster")
    with cluster(home) as (_, addresses, log), jobs_of(home, addresses) as db:
        db.assert_trained(job_id, 120)
        assert "Traceback" not in log.read_text()


def test_cluster_refuses_a_home_in_use_with_the_servers_own_error(home: Path):
    with servers.postgres(home / "postgres", durable=True):
        error = refused("local.cluster", "--home", str(home), "--port", "0")
    assert "postmaster.pid" in error
    assert "Traceback" not in error


@contextmanager
def jobs_of(home: Path, addresses: dict[str, Any]) -> Iterator[JobDatabase]:
    db = JobDatabase(Settings(home=home, database_url=addresses["database"]))
    try:
        yield db
    finally:
        db.database.dispose()


def worker_of(db: JobDatabase, job_id: str) -> int:
    return int((db.job(job_id).owner or "").split("-")[-2])


def postgres_in(home: Path) -> int:
    return int((home / "postgres" / "data" / "postmaster.pid").read_text().split()[0])


def valkey_at(url: str) -> int | None:
    """Its process id; None while it is away."""
    try:
        with redis.Redis.from_url(url) as client:
            return client.info("server")["process_id"]
    except redis.ConnectionError:
        return None


def answers(url: str) -> bool:
    try:
        with psycopg.connect(url) as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def members(home: Path) -> list[str]:
    """Living processes of this cluster except itself: they work below its home or have it in their environment."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            in_environment = f"DISTILLERY_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0")
            if in_environment or (process / "cwd").readlink().is_relative_to(home):
                processes.append((process / "cmdline").read_text())
        except OSError:
            continue
    return processes
