"""The embedded server as a process: it starts from nothing, stops at a checkpoint, and shares its home with nobody."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from store.settings import Settings
from tests.worker.processes import FAKE_ENGINE, refused, until
from tests.worker.table import REPOSITORY, Table

SPEC = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 1}}


@contextmanager
def serving(tmp_path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    ready = tmp_path / "ready.json"
    ready.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "DISTILLERY_ENGINE": json.dumps(FAKE_ENGINE),
        "DISTILLERY_LOOK_S": "600",
        "DISTILLERY_LEASE_S": "2400",
        "DISTILLERY_MIN_FREE_BYTES": "0",
    }
    command = [sys.executable, "-m", "serve", "--port", "0", "--home", str(tmp_path / "home"), *flags]
    with (tmp_path / "log").open("ab") as log:
        server = subprocess.Popen(
            [*command, "--ready-file", str(ready)], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
        )
    try:
        until(ready.exists, "the server to be ready")
        told = json.loads(ready.read_text())
        assert told["pid"] == server.pid
        yield server, told["url"]
    finally:
        server.kill()
        server.wait()


def asked(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})  # noqa: S310 - our own server
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


def test_a_posted_job_is_rung_for_and_run(tmp_path: Path):
    """Nobody looks for ten minutes: only the bell in memory can have told."""
    with serving(tmp_path) as (_, url):
        job = asked(f"{url}/v1/jobs", SPEC)
        until(lambda: asked(f"{url}/v1/jobs/{job['id']}")["status"] == "succeeded", "the job to succeed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_hands_its_job_back(tmp_path: Path, number: signal.Signals):
    with serving(tmp_path) as (server, url):
        table = Table(Settings(home=tmp_path / "home"))
        job_id = table.submit(steps=100_000)
        # That was written behind the server's back; this one rings, and the older job comes first.
        asked(f"{url}/v1/jobs", SPEC)
        table.until_checkpoint(job_id)
        server.send_signal(number)
        assert server.wait(30) == 0
        job = table.job(job_id)
        assert (job.status, job.attempts_without_progress) == ("queued", 0)
        table.assert_nothing_left()
        table.database.dispose()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_again_while_a_training_saves_its_state_it_still_hands_it_back(tmp_path: Path, number: signal.Signals):
    with serving(tmp_path) as (server, url):
        table = Table(Settings(home=tmp_path / "home"))
        job_id = table.submit(steps=100, step_s=2, checkpoint_every=1)
        asked(f"{url}/v1/jobs", SPEC)
        table.until_checkpoint(job_id)
        server.send_signal(number)
        # It stops after its step, which lasts: the second signal comes in between.
        until(lambda: "trainings save their state" in (tmp_path / "log").read_text(), "the answers to be over")
        server.send_signal(number)
        assert server.wait(30) == 0
        job = table.job(job_id)
        assert (job.status, job.attempts_without_progress) == ("queued", 0)
        table.assert_nothing_left()
        table.database.dispose()


def test_killed_and_started_again_it_goes_on_at_once(tmp_path: Path):
    """The lease would last for forty minutes: that the old worker is dead is known from its lock."""
    with serving(tmp_path) as (_, url):
        table = Table(Settings(home=tmp_path / "home"))
        job_id = table.submit(steps=120, step_s=0.02, checkpoint_every=10)
        asked(f"{url}/v1/jobs", SPEC)
        table.until_checkpoint(job_id)
    with serving(tmp_path):
        table.assert_trained(job_id, 120)
        assert len(table.attempts(job_id)) == 2
        table.assert_nothing_left()
        table.database.dispose()


def test_a_home_has_one_server(tmp_path: Path):
    with serving(tmp_path) as (server, _):
        said = refused("serve", "--port", "0", "--home", str(tmp_path / "home"))
    assert f"another server (process {server.pid}) uses" in said


def test_open_to_others_it_refuses_to_start_without_a_key(tmp_path: Path):
    said = refused("serve", "--host", "0.0.0.0", "--home", str(tmp_path))  # noqa: S104
    assert "DISTILLERY_ADMIN_KEY_HASH" in said
    assert not list(tmp_path.iterdir())
