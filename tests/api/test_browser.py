"""The web page in a real browser: Chromium renders it, and the tests read its text."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.app import create_app
from store import checkpoints, lifecycle, metrics
from store.database import Database
from store.settings import Settings
from tests.api.conftest import SUPERVISED, FakeInspector

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    """A server on a free port, in a thread."""
    app = create_app(settings, wake_workers=lambda: None, inspector=FakeInspector())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def page_text(tmp_path: Path, url: str) -> str:
    """The page's text after its scripts have run. A message on the console fails the test, as of a broken policy."""
    assert CHROMIUM is not None
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}",
    )  # fmt: skip
    ended = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True
    )
    messages = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line and "[DOM]" not in line]
    assert messages == []
    return re.sub(r"<[^>]+>", " ", ended.stdout)


def test_list_page_without_jobs_shows_a_first_command(address: str, tmp_path: Path) -> None:
    text = page_text(tmp_path, address)
    assert "No jobs yet" in text
    assert f"curl {address}/v1/jobs" in text


def test_list_page_and_job_page(address: str, tmp_path: Path) -> None:
    job = httpx.post(f"{address}/v1/jobs", json={**SUPERVISED, "name": "<b>bold</b> name"}).json()
    listed = page_text(tmp_path, address)
    assert "&lt;b&gt;bold&lt;/b&gt; name" in listed
    assert "1 waiting" in listed
    assert "no worker" in listed
    httpx.post(f"{address}{job['links']['self']}/cancel")
    shown = page_text(tmp_path, f"{address}/#/jobs/{job['id']}")
    assert "cancelled" in shown
    assert "Retry" in shown
    assert "No measurement yet" in shown


def teacher(address: str, weights: bytes = b"weights") -> dict[str, str]:
    """An uploaded checkpoint that the fake inspector accepts as a convnet32."""
    blob = httpx.post(f"{address}/v1/uploads", content=weights).json()["blob"]
    return {"checkpoint": f"blob:{blob}", "architecture": "convnet32"}


def submit(address: str, spec: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{address}/v1/jobs", json=spec)
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()
    return job


def claim_job(
    settings: Settings, job: dict[str, Any], curves: dict[str, dict[str, float]], progress: dict[str, Any]
) -> tuple[Database, int]:
    """Claim a job as a worker, and record each trial's metrics at steps 10 and 20."""
    database = Database(settings.database_url)
    with database.begin() as connection:
        claim = lifecycle.claim(connection, "worker-1", 60, takeover=False)
        assert claim is not None
        assert claim.job.id == job["id"]
        for trial, values in curves.items():
            for step in (10, 20):
                metrics.record(
                    connection, job["id"], claim.fence, trial, step=step, epoch=step / 10, values=dict(values)
                )
        lifecycle.set_phase(connection, job["id"], claim.fence, "training")
        lifecycle.set_progress(connection, job["id"], claim.fence, progress)
    return database, claim.fence


def measured(accuracy: float, architecture: str) -> dict[str, Any]:
    return {"architecture": architecture, "parameters": 3_000, "bytes": 12_000, "accuracy": accuracy, "agreement": 0.5}


def test_job_page_shows_all_models(settings: Settings, address: str, tmp_path: Path) -> None:
    spec = {
        **SUPERVISED,
        "method": ["kd", "dkd"],
        "teacher": [teacher(address), teacher(address, b"other weights")],
        "assistants": ["convnet16"],
        "baseline": "train",
    }
    job = submit(address, spec)
    curves = {
        "assistant-1": {"validation/accuracy": 0.611, "train/loss": 0.622},
        "student": {"validation/accuracy": 0.633, "validation/exit-1/accuracy": 0.644, "train/loss": 0.655},
        "student/fsp": {"validation/accuracy": 0.111, "train/loss": 12.3},
        **{f"generation-{number}": {"validation/accuracy": 0.7} for number in range(1, 6)},
    }
    database, fence = claim_job(settings, job, curves, {})
    models = {"teacher-1": measured(0.91, "convnet32"), "assistant-1": measured(0.812, "convnet16")}
    report = {
        "teacher": measured(0.95, "convnet32 + convnet32"),
        "student": measured(0.9, "convnet8"),
        "alone": measured(0.85, "convnet8"),
        "gain": 0.05,
        "models": models,
    }
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, job["id"], fence, report, [])
    database.dispose()
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "2 × convnet32 → convnet16 → convnet8" in shown
    assert "kd + dkd" in shown
    assert "assistant 1 convnet16 81.2 % 3,000 12.0 kB 50.0 %" in shown
    assert "Distillation gained 5.0 points over the same student alone." in shown
    assert "student 63.3 %" in shown
    for curve in ("assistant 1 61.1 %", "exit 1 64.4 %", "generation 3 70.0 %", "and 2 more", "assistant 1 0.622"):
        assert curve in shown, curve
    assert "fsp stage" not in shown, "the curves of the stage end when the student's own begin"


def test_job_page_shows_trial_and_stage_of_a_running_job(settings: Settings, address: str, tmp_path: Path) -> None:
    spec = {**SUPERVISED, "method": "fsp", "teacher": teacher(address), "student": "convnet32"}
    job = submit(address, spec)
    progress = {"trial": "student/fsp", "epoch": 2, "epochs": 30, "percent": 10.0, "seconds_remaining": None}
    database, _ = claim_job(settings, job, {"student/fsp": {"train/loss": 12.3}}, progress)
    database.dispose()
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "epoch 2 of 30, student, fsp stage" in shown
    assert "student, fsp stage 12.3" in shown


def test_job_page_shows_attempts_and_both_ways_to_retry(settings: Settings, address: str, tmp_path: Path) -> None:
    """A checkpoint at step 40, then out of memory: the job backs off. Once cancelled, it offers both kinds of retry."""
    job = submit(address, {**SUPERVISED, "scheduling": {"priority": 3}})
    database, fence = claim_job(settings, job, {}, {})
    error = {"code": "out_of_memory", "message": "the device is full", "retryable": True, "hint": None}
    with database.begin() as connection:
        checkpoints.record(connection, job["id"], fence, step=40, sha256="5" * 64, bytes=1, path="x")
        assert lifecycle.finish_failed(connection, job["id"], fence, error, retry_in_s=3600)
    database.dispose()
    assert "backing off" in page_text(tmp_path, address)
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "the last attempt ended with out_of_memory: the device is full; the next one follows after a pause" in shown
    assert "priority 3" in shown
    assert re.search(r"1 failed 0 40 \d+ s worker-1", shown), shown
    assert "Retry" not in shown
    httpx.post(f"{address}{job['links']['self']}/cancel")
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "Retry Retry from scratch" in shown


def test_job_page_of_peers_has_no_teacher(settings: Settings, address: str, tmp_path: Path) -> None:
    peers = {**SUPERVISED, "student": ["convnet8", "convnet4"], "method": "dml"}
    job = submit(address, peers)
    curves = {"student": {"validation/accuracy": 0.633, "validation/student-2/accuracy": 0.611}}
    database, fence = claim_job(settings, job, curves, {})
    report = {
        "teacher": None,
        "student": measured(0.9, "convnet8"),
        "alone": None,
        "gain": None,
        "models": {"student-2": measured(0.712, "convnet4")},
    }
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, job["id"], fence, report, [])
    database.dispose()
    listed = page_text(tmp_path, address)
    assert "convnet8 + convnet4" in listed
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "student 2 convnet4 71.2 %" in shown
    assert "student 2 61.1 %" in shown
    assert "Distilled without a teacher: 90.0 % accuracy" in shown


def test_page_shows_an_evaluation_and_a_job_that_waits_for_its_teacher(
    settings: Settings, address: str, tmp_path: Path
) -> None:
    uploaded = teacher(address)
    blob = uploaded["checkpoint"].removeprefix("blob:")
    httpx.post(f"{address}/v1/models", json={"name": "big", "blob": blob, "architecture": uploaded["architecture"]})
    asked = {"dataset": "digits", "name": "how good"}
    job = httpx.post(f"{address}/v1/models/big/evaluations", json=asked).json()
    database, fence = claim_job(settings, job, {}, {"percent": 50.0, "seconds_remaining": 3.0})
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "50 %" in shown and "The figures appear here when the model has been measured" in shown
    result = {
        **measured(0.912, "convnet32"),
        "interval": [0.88, 0.936],
        "accuracy_top5": 0.99,
        "test_samples": 360,
        "per_class": [{"name": "zero", "accuracy": 0.5, "test_samples": 36}],
    }
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, job["id"], fence, result, [])
    database.dispose()
    shown = " ".join(page_text(tmp_path, f"{address}/#/jobs/{job['id']}").split())
    assert "Accuracy 91.2 % 95 % interval 88.0 % to 93.6 %" in shown and "evaluation" in shown
    first = submit(address, SUPERVISED)
    submit(address, {**SUPERVISED, "method": "kd", "teacher": {"checkpoint": f"job:{first['id']}"}})
    listed = " ".join(page_text(tmp_path, address).split())
    assert "waits for its teacher" in listed and "how good convnet32" in listed and "91.2 %" in listed


def test_docs_page_lists_every_route(address: str, tmp_path: Path) -> None:
    text = page_text(tmp_path, f"{address}/docs")
    for path in httpx.get(f"{address}/openapi.json").json()["paths"]:
        assert path in text
