"""The embedded server as a process: it starts from an empty folder, stops at a checkpoint, and is alone in its home."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import serve
from store.settings import Settings
from tests.worker.job_database import REPOSITORY, JobDatabase
from tests.worker.processes import FAKE_ENGINE, until

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
        address = json.loads(ready.read_text())
        assert address["pid"] == server.pid
        yield server, address["url"]
    finally:
        server.kill()
        server.wait()


def call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})  # noqa: S310 - our own server
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


def assert_requeued_at_exit(server: subprocess.Popen[bytes], db: JobDatabase, job_id: str) -> None:
    assert server.wait(30) == 0
    job = db.job(job_id)
    assert (job.status, job.attempts_without_progress) == ("queued", 0)
    db.assert_nothing_left()
    db.database.dispose()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_requeues_its_job_on_a_signal(tmp_path: Path, number: signal.Signals):
    with serving(tmp_path) as (server, url):
        db = JobDatabase(Settings(home=tmp_path / "home"))
        job_id = db.submit(steps=100_000)
        # That job was written without the server. This one sends a message, and the older job is claimed first.
        call(f"{url}/v1/jobs", SPEC)
        db.until_checkpoint(job_id)
        server.send_signal(number)
        assert_requeued_at_exit(server, db, job_id)


def test_serve_requeues_its_job_on_a_second_signal_while_it_saves_its_state(tmp_path: Path):
    with serving(tmp_path) as (server, url):
        db = JobDatabase(Settings(home=tmp_path / "home"))
        job_id = db.submit(steps=100, step_s=2, checkpoint_every=1)
        call(f"{url}/v1/jobs", SPEC)
        db.until_checkpoint(job_id)
        server.send_signal(signal.SIGTERM)
        # It stops after its step, which takes long: the second signal comes before.
        until(lambda: "trainings save their state" in (tmp_path / "log").read_text(), "the last answers to be sent")
        server.send_signal(signal.SIGINT)
        assert_requeued_at_exit(server, db, job_id)


def test_serve_killed_and_started_again_continues_its_job_at_once(tmp_path: Path):
    """The lease lasts forty minutes: the lock proves that the old worker is dead."""
    with serving(tmp_path) as (_, url):
        db = JobDatabase(Settings(home=tmp_path / "home"))
        job_id = db.submit(steps=120, step_s=0.02, checkpoint_every=10)
        call(f"{url}/v1/jobs", SPEC)
        db.until_checkpoint(job_id)
    with serving(tmp_path):
        db.assert_trained(job_id, 120)
        assert len(db.attempts(job_id)) == 2
        # The kill may have come while a checkpoint was stored; the collector deletes such a file when it is old.
        for path in db.files.temporaries(older_than_s=0):
            path.unlink(missing_ok=True)
        db.assert_nothing_left()
        db.database.dispose()


Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Call the program's `main` in this process, where it must refuse to run; returns its standard error."""

    def call_main(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve", *flags])
        monkeypatch.setattr(serve, "keep_private", lambda _: None)  # it sets the umask of the whole process
        monkeypatch.setattr(serve, "log_to_stderr", lambda *_, **__: None)  # it sets up logging of the whole process
        assert serve.main() == 1
        return capsys.readouterr().err

    return call_main


def test_serve_wakes_its_worker_for_a_posted_job_and_refuses_a_second_server(tmp_path: Path, refused: Refused):
    """The worker polls every ten minutes: only a wake-up message in memory can have reached it."""
    with serving(tmp_path) as (server, url):
        job = call(f"{url}/v1/jobs", SPEC)
        until(lambda: call(f"{url}/v1/jobs/{job['id']}")["status"] == "succeeded", "the job to succeed")
        error = refused("--port", "0", "--home", str(tmp_path / "home"))
    assert f"another server (process {server.pid}) uses" in error


def test_serve_refuses_a_public_address_without_a_key(tmp_path: Path, refused: Refused):
    error = refused("--host", "0.0.0.0", "--home", str(tmp_path))  # noqa: S104
    assert "host 0.0.0.0 can be reached from other machines, and there is no key" in error
    assert "python -m store key" in error and "DISTILLERY_ADMIN_KEY_HASH" in error
    assert not list(tmp_path.iterdir())
