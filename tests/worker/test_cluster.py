"""The cluster as a host would run it: real PostgreSQL and Valkey, API and workers, all of which are killed."""

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
from tests.worker.processes import FAKE_ENGINE, refused, until
from tests.worker.table import REPOSITORY, Table

QUICK = {
    "DISTILLERY_ENGINE": json.dumps(FAKE_ENGINE),
    "DISTILLERY_LEASE_S": "2",
    "DISTILLERY_HEARTBEAT_S": "0.2",
    "DISTILLERY_LOOK_S": "0.3",
    "DISTILLERY_BACK_OFF_S": "0.05",
    "DISTILLERY_MIN_FREE_BYTES": "0",
}


@pytest.fixture
def home() -> Iterator[Path]:
    """Not pytest's own folder: PostgreSQL, which never runs as root, could not look into it."""
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


def test_whatever_is_killed_is_started_again_and_the_job_goes_on(home: Path):
    with cluster(home) as (process, told, log):
        with urllib.request.urlopen(f"{told['url']}/healthz", timeout=30) as answer:  # noqa: S310 - our own server
            assert answer.status == 200
        table = Table(Settings(home=home, database_url=told["database"]))
        job_id = table.submit(steps=120, step_s=0.025, checkpoint_every=10)
        table.until_checkpoint(job_id)
        os.kill(worker_of(table, job_id), signal.SIGKILL)
        until(lambda: "SIGKILL and is started again" in log.read_text(), "the cluster to say so")
        for name, server in (("valkey", valkey_at(told["broker"])), ("postgres", postgres_in(home))):
            os.kill(server, signal.SIGKILL)
            until(lambda: f"{name} ended with SIGKILL" in log.read_text(), f"the cluster to tell of {name}")  # noqa: B023
        until(lambda: answers(told["database"]), "PostgreSQL to be back")
        until(lambda: valkey_at(told["broker"]), "Valkey to be back")
        table.assert_trained(job_id, 120)
        assert [attempt.how for attempt in table.attempts(job_id)] == ["failed", "succeeded"]
        table.database.dispose()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert log.read_text().endswith("stopped\n")
        assert not members(home)


def test_killed_itself_it_leaves_nobody_and_the_next_one_goes_on(home: Path):
    with cluster(home) as (process, told, _):
        table = Table(Settings(home=home, database_url=told["database"]))
        job_id = table.submit(steps=120, step_s=0.025, checkpoint_every=10)
        table.until_checkpoint(job_id)
        table.database.dispose()
        process.kill()
        until(lambda: not members(home), "the members to end with the cluster")
    with cluster(home) as (_, told, log):
        table = Table(Settings(home=home, database_url=told["database"]))
        table.assert_trained(job_id, 120)
        assert "Traceback" not in log.read_text()
        table.database.dispose()


def test_a_home_in_use_is_told_in_the_servers_own_words(home: Path):
    with servers.postgres(home / "postgres", durable=True):
        said = refused("local.cluster", "--home", str(home), "--port", "0")
    assert "postmaster.pid" in said
    assert "Traceback" not in said


def worker_of(table: Table, job_id: str) -> int:
    return int((table.job(job_id).owner or "").split("-")[-2])


def postgres_in(home: Path) -> int:
    return int((home / "postgres" / "data" / "postmaster.pid").read_text().split()[0])


def valkey_at(url: str) -> int | None:
    """Its process; None while it is away."""
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
    """Living processes of this cluster but itself: servers work below its home, the others are told of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = f"DISTILLERY_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0")
            if named or (process / "cwd").readlink().is_relative_to(home):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found
