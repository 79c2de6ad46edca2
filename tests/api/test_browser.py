"""The web page in a real browser: Chromium renders it, and the tests read its text."""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from sqlalchemy import update

from api.app import create_app
from bench.browser import CHROMIUM, FLAGS, MISSING, Browser
from bench.browser import browser as start_browser
from kdcore.catalog.facts import LeftOut
from store import alerts, checkpoints, lifecycle, metrics, predictions, registry
from store.artifacts import NewArtifact
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings
from store.tables import jobs
from tests.api.conftest import DATASET, MODEL, SUPERVISED, FakeInspector
from tests.servers import served

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=MISSING),
]


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    with served(create_app(settings, wake_workers=lambda: None, inspector=FakeInspector())) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests. Each test has a server on a port of its own, so an origin with no stored data."""
    with start_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def page_text(tmp_path: Path, url: str) -> str:
    """The page's text after its scripts have run. A message on the console fails the test, as of a broken policy."""
    assert CHROMIUM is not None
    logging = ("--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    ended = subprocess.run(
        [CHROMIUM, "--headless", *FLAGS, *logging, profile, "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
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
    shown = " ".join(page_text(tmp_path, f"{address}/#/models/big").split())
    assert "digits 91.2 % 88.0 % to 93.6 % 360" in shown
    first = submit(address, SUPERVISED)
    submit(address, {**SUPERVISED, "method": "kd", "teacher": {"checkpoint": f"job:{first['id']}"}})
    listed = " ".join(page_text(tmp_path, address).split())
    assert "waits for its teacher" in listed and "how good big, digits" in listed and "91.2 %" in listed


WARNING = {
    "code": "normalization_guessed",
    "pointer": "/teacher/preprocessing",
    "message": "nothing says how <b>its</b> images were normalized",
    "hint": "give <script>mean</script> and std",
}
CHECK = {"accuracy": 0.702, "interval": [0.67, 0.73], "images": 1_000, "test_samples": 10_000}


def change_job(settings: Settings, job: dict[str, Any], **values: Any) -> None:
    database = Database(settings.database_url)
    with database.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(**values))
    database.dispose()


def test_job_page_shows_data_teacher_and_warnings(settings: Settings, address: str, browser: Browser) -> None:
    job = submit(address, {**SUPERVISED, "method": "kd", "teacher": teacher(address)})
    database, _ = claim_job(settings, job, {}, {})
    database.dispose()
    change_job(settings, job, warnings=[WARNING, {**WARNING, "pointer": "", "hint": None}], teacher_check=CHECK)
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "2 WARNINGS")
    text = browser.value("document.body.innerText")
    for part in (
        "data digits",
        "teacher 70.2 % on 1,000 of 10,000 test images",
        "nothing says how <b>its</b> images were normalized",
        "give <script>mean</script> and std",
        "normalization_guessed /teacher/preprocessing",
    ):
        assert part in text, part
    assert browser.value("document.querySelectorAll('.warnings b, .warnings script').length") == 0
    browser.open(address, 1200, "2 warnings")


def test_job_page_of_a_job_that_failed_before_its_training_has_no_charts(
    settings: Settings, address: str, browser: Browser
) -> None:
    job = submit(address, SUPERVISED)
    database, fence = claim_job(settings, job, {}, {})
    error = {"code": "dataset_unreadable", "message": "a bad file", "retryable": False, "hint": None}
    with database.begin() as connection:
        assert lifecycle.finish_failed(connection, job["id"], fence, error, retry_in_s=None)
    database.dispose()
    # Not the message: it stands in the events, too, which may come first.
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "ended before its models were measured")
    text = browser.value("document.body.innerText")
    assert "a bad file" in text
    assert "No measurement yet" not in text
    assert "WARNING" not in text


def test_job_page_of_an_evaluation(settings: Settings, address: str, browser: Browser) -> None:
    job = submit(address, SUPERVISED)
    database, fence = claim_job(settings, job, {}, {})
    result = {
        **measured(0.7263, "resnet56"),
        "interval": [0.7175, 0.7349],
        "accuracy_top5": 0.9194,
        "test_samples": 10_000,
        "per_class": [{"name": "apple", "accuracy": 0.5, "test_samples": 100}],
    }
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, job["id"], fence, result, [])
    database.dispose()
    spec = {"model": "cifar100-resnet56", "dataset": "cifar100"}
    change_job(settings, job, kind="evaluation", method="evaluation", spec=spec, resolved_spec=spec)
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "72.6 %")
    text = browser.value("document.body.innerText")
    for part in ("cifar100-resnet56", "data cifar100", "71.8 % to 73.5 %", "10,000"):
        assert part in text, part
    assert "No measurement yet" not in text
    assert "Student" not in text
    browser.open(address, 1200, "72.6 %")


HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>"]


def register(settings: Settings, kind: registry.Registry[Any], name: str, **found: Any) -> str:
    """Make a row that another server inspects; with `found` it is ready. Returns its id."""
    database = Database(settings.database_url)
    with database.begin() as connection:
        entry = kind.register(connection, registry.NewEntry("default", name, "0" * 64, {}, {}), "another server", 3600)
        kind.renew(connection, "another server", 3600, {entry.id: {"done": 1200, "total": 60000}})
        if "error" in found:
            kind.refuse(connection, entry, "another server", found["error"])
        elif found:
            kind.finish(connection, entry, "another server", found)
    database.dispose()
    return entry.id


def hostile_dataset(settings: Settings) -> str:
    """A data set of two classes, with two thumbnails: a red square and a blue one."""
    file = BytesIO()
    sheet = Image.new("RGB", (16, 8), "red")
    sheet.paste("blue", (8, 0, 16, 8))
    sheet.save(file, "PNG")
    blob = FileStore(settings.files).put_stream([file.getvalue()])
    left = LeftOut(what="<b>extra</b>", count=7, why="it is named like no split")
    counts = {"train": [300, 100], "test": [60, 40]}
    facts = DATASET.model_copy(
        update={
            "num_classes": 2, "class_names": HOSTILE, "class_counts": counts, "left_out": [left],
            "layout": "<split>/<class>", "splits": {"Training": 400, "Testing": 100}, "pictures": {"sixteen_bit": 3},
            "options": {"resize": "pad"},
        }
    )  # fmt: skip
    places = {"sha256": blob.sha256, "side": 8, "columns": 2, "classes": [0, 1]}
    found = {"facts": facts.model_dump(mode="json"), "warnings": [WARNING], "thumbnails": places}
    return register(settings, registry.datasets, "flowers", **found)


def test_dataset_page_shows_what_was_found_as_text(settings: Settings, address: str, browser: Browser) -> None:
    entry_id = hostile_dataset(settings)
    browser.open(f"{address}/#/datasets/{entry_id}", 1200, "WHAT WAS FOUND")
    text = browser.value("document.body.innerText")
    for part in (
        *HOSTILE, "flowers", "<split>/<class>", "Training 400, Testing 100", "8 × 8 pixels, grey", "sixteen bit 3",
        "<b>extra</b>", "7: it is named like no split", '"pad"', "1 WARNING", "normalization_guessed",
    ):  # fmt: skip
        assert part in text, part
    assert browser.value("document.querySelectorAll('main img, main script, main b').length") == 0
    cells = browser.value("[...document.querySelectorAll('.found td')].map((one) => one.innerText)")
    at = cells.index(HOSTILE[1])
    assert cells[at : at + 3] == [HOSTILE[1], "100", "40"]
    pixel = (
        "[...document.querySelectorAll('canvas')].map((one) => [...one.getContext('2d').getImageData(4, 4, 1, 1).data])"
    )
    deadline = time.monotonic() + 30
    while browser.value(pixel) != [[255, 0, 0, 255], [0, 0, 255, 255]]:
        assert time.monotonic() < deadline, browser.value(pixel)
        time.sleep(0.05)


def test_registered_page_lists_states_and_cancels_an_inspection(
    settings: Settings, address: str, browser: Browser
) -> None:
    hostile_dataset(settings)
    entry_id = register(settings, registry.datasets, "large")
    error = {"code": "unusable", "message": "<b>junk</b>", "hint": "a <i>hint</i>", "errors": []}
    refused = register(settings, registry.models, "junk", error=error)
    ready = register(settings, registry.models, "big", facts=MODEL.model_dump(mode="json"), warnings=[])
    browser.open(f"{address}/#/registered", 1200, "<b>junk</b>")
    text = browser.value("document.body.innerText")
    for part in ("flowers", "1,200 of 60,000 images", "inspecting", "refused", "digits", "built in", "convnet32"):
        assert part in text, part
    assert browser.value("document.querySelector('.bar').getAttribute('aria-valuenow')") == "2"
    browser.open(f"{address}/#/models/{refused}", 1200, "a <i>hint</i>")
    browser.open(f"{address}/#/models/{ready}", 1200, "46,410")
    browser.open(f"{address}/#/datasets/digits", 1200, "WHAT WAS FOUND")
    browser.open(f"{address}/#/datasets/{entry_id}", 1200, "Cancel the inspection")
    browser.value("document.querySelector('.verbs button').click()")
    deadline = time.monotonic() + 30
    while httpx.get(f"{address}/v1/datasets/large").status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pages_fit_a_narrow_window(settings: Settings, address: str, browser: Browser) -> None:
    """At 420 pixels nothing is scrolled sideways, except for code inside of its box."""
    long = {**WARNING, "message": "x" * 300, "hint": f"blob:sha256:{'0' * 64}"}
    spec = {**SUPERVISED, "method": ["kd", "dkd"], "teacher": teacher(address), "name": "a long name " * 8}
    job = submit(address, spec)
    curves = {"student": {"validation/accuracy": 0.633, "train/loss": 0.655}}
    database, fence = claim_job(settings, job, curves, {})
    change_job(settings, job, warnings=[long], teacher_check=CHECK)
    models = {"teacher-1": measured(0.91, "torchvision/mobilenet_v3_small"), "assistant-1": measured(0.8, "convnet16")}
    report = {
        "teacher": measured(0.95, "torchvision/mobilenet_v3_large"),
        "student": measured(0.9, "torchvision/mobilenet_v3_small"),
        "alone": measured(0.85, "torchvision/mobilenet_v3_small"),
        "gain": 0.05,
        "models": models,
    }
    file = NewArtifact("student.safetensors", "5" * 64, 123_456, "application/octet-stream")
    with database.begin() as connection:
        checkpoints.record(connection, job["id"], fence, step=40, sha256="5" * 64, bytes=1, path="x")
        assert lifecycle.finish_succeeded(connection, job["id"], fence, report, [file])
    database.dispose()
    out_of_sight = (
        "[...document.querySelectorAll('body *')].filter((one) => !one.closest('pre')"
        " && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)"
        ".map((one) => `${one.tagName}.${one.className}`)"
    )
    data = f"#/datasets/{hostile_dataset(settings)}"
    register(settings, registry.datasets, "a-long-name-" * 8)
    for path, until in (
        (f"#/jobs/{job['id']}", "student.safetensors"),
        ("", "Accuracy"),
        ("docs", "/v1/jobs"),
        (data, "WHAT WAS FOUND"),
        ("#/registered", "digits"),
    ):
        browser.open(f"{address}/{path}", 420, until)
        browser.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.value("document.documentElement.scrollWidth") <= 420, path
        assert browser.value(out_of_sight) == [], path


def test_docs_page_lists_every_route(address: str, tmp_path: Path) -> None:
    text = page_text(tmp_path, f"{address}/docs")
    for path in httpx.get(f"{address}/openapi.json").json()["paths"]:
        assert path in text


def test_key_form_says_what_is_wrong_with_a_key_and_takes_the_next_one(settings: Settings, browser: Browser) -> None:
    secured = settings.model_copy(update={"admin_key_hash": hashlib.sha256(b"dk_right").hexdigest()})
    with served(create_app(secured, wake_workers=lambda: None, inspector=FakeInspector())) as url:
        browser.open(url, 1200, until="requires an API key")
        for key, answer in (("schlüssel", "of ASCII only"), ("dk_wrong", "is not known"), ("dk_right", "No jobs yet")):
            browser.value(
                "(() => { const form = document.getElementById('key-form');"
                f" form.elements.key.value = {json.dumps(key)}; form.requestSubmit(); }})()"
            )
            deadline = time.monotonic() + 10
            while answer not in (text := browser.value("document.body.innerText")):
                assert time.monotonic() < deadline, text
                time.sleep(0.05)
        assert browser.value("document.getElementById('key-form').hidden")


def finished(settings: Settings, address: str, report: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A job that has succeeded with this report, added to figures of three models."""
    job = submit(address, {**SUPERVISED, "method": "kd", "teacher": teacher(address), "baseline": "train", **spec})
    database, fence = claim_job(settings, job, {}, {})
    whole = {
        "teacher": measured(0.95, "convnet32"),
        "student": measured(0.9, "convnet8"),
        "alone": measured(0.85, "convnet8"),
        "gain": 0.05,
        "test_samples": 360,
        "dataset": DATASET.model_dump(mode="json"),
        **report,
    }
    weights = FileStore(settings.files).put_stream([b"weights"])
    files = [
        NewArtifact("student.safetensors", weights.sha256, weights.bytes, "application/octet-stream"),
        NewArtifact("student.onnx", "5" * 64, 123_456, "application/octet-stream"),
        NewArtifact("report.html", "6" * 64, 123_456, "text/html"),
    ]
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, job["id"], fence, whole, files)
    database.dispose()
    return job


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


PROOF: dict[str, Any] = {
    "gap_closed": interval(0.5, 0.31, 0.72),
    "no_gap": None,
    "gain": interval(0.05, 0.021, 0.083),
    "teacher_gap": interval(0.1, 0.06, 0.14),
    "seeds": [
        {"seed": 7, "student": 0.9, "alone": 0.85, "gap_closed": 0.5},
        {"seed": 8, "student": 0.91, "alone": 0.85, "gap_closed": 0.6},
    ],
    "over_seeds": {
        "seeds": 2,
        "student": interval(0.905, 0.84, 0.97),
        "alone": interval(0.85, 0.85, 0.85),
        "gain": interval(0.055, 0.01, 0.1),
        "gap_closed": interval(0.55, 0.1, 0.99),
        "gain_on_other_images": None,
        "gap_closed_on_other_images": None,
    },
}


def test_job_page_begins_with_the_verdict_and_its_intervals(settings: Settings, address: str, browser: Browser) -> None:
    report = {"version": 2, "verdict": "Distilling closed half of the <b>gap</b>.", "proof": PROOF}
    job = finished(settings, address, report)
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "Mean, for other seeds")
    shown = " ".join(browser.value("document.querySelector('.result').innerText").split())
    assert shown.startswith(
        "Gap closed 55 % 95 % interval 10 % to 99 %, for other seeds alone teacher"
        " Gain over the student alone +5.5 points 95 % interval +1.0 to +10.0, for other seeds no gain"
        " Distilling closed half of the <b>gap</b>."
    ), shown
    assert "Seed 7, delivered 90.0 % 85.0 % +5.0 +2.1 to +8.3 50 % 31 % to 72 %" in shown
    assert "Seed 8 91.0 % 85.0 % +6.0 60 %" in shown
    assert "Mean, for other seeds 90.5 % 85.0 % +5.5 +1.0 to +10.0 55 % 10 % to 99 %" in shown
    assert "Distillation gained" not in shown
    assert browser.value("[...document.querySelectorAll('.proof b')].map((one) => one.className)") == ["up", "up"]


def test_job_page_of_a_single_seed_has_the_intervals_over_images(
    settings: Settings, address: str, browser: Browser
) -> None:
    job = finished(settings, address, {"proof": {**PROOF, "seeds": PROOF["seeds"][:1], "over_seeds": None}})
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "Gap closed")
    shown = " ".join(browser.value("document.querySelector('.result').innerText").split())
    assert shown.startswith("Gap closed 50 % 95 % interval 31 % to 72 % alone teacher Gain over the student alone +5.0")
    assert browser.value("document.getElementById('service').textContent") == ""
    browser.open(address, 1200, "50 %")
    assert "NaN" not in browser.value("document.querySelector('.jobs').innerText")


def test_job_page_of_a_job_that_gained_nothing_states_no_gap(
    settings: Settings, address: str, browser: Browser
) -> None:
    message = "the interval of (teacher - alone) holds 0"
    nothing = {"gap_closed": None, "no_gap": {"code": "teacher_gap_holds_zero", "message": message}}
    proof = {**PROOF, **nothing, "gain": interval(0.01, -0.02, 0.03), "seeds": [], "over_seeds": None}
    job = finished(settings, address, {"verdict": "No measurable gain.", "proof": proof})
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "No measurable gain.")
    shown = " ".join(browser.value("document.querySelector('.result').innerText").split())
    assert f"Gap closed not stated {message}" in shown
    assert "+1.0 points 95 % interval −2.0 to +3.0" in shown
    assert browser.value("[...document.querySelectorAll('.proof b')].map((one) => one.className)") == ["", ""]
    assert "for other seeds" not in shown


def file_row(name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "format": kind, "bytes": 123_456, "sha256": "5" * 64, "runtime": "onnxruntime 1.28",
        "accuracy": 0.9, "agreement": 0.998, "latency": [{"batch": 1, "p50_ms": 0.421, "p95_ms": 0.5}],
        "threads": 1, "cpu": "A <i>CPU</i>", "peak_memory_bytes": 90_000_000, "quantization": None, "refused": None,
        **more,
    }  # fmt: skip


def test_job_page_shows_each_file_with_its_figures_and_why_one_was_refused(
    settings: Settings, address: str, browser: Browser
) -> None:
    refused = {"code": "export_mismatch", "message": "it is right on 12.0 %", "hint": None}
    files = [
        file_row("student.onnx", "onnx"),
        file_row("student.int8.onnx", "onnx_int8", accuracy=0.12, quantization="after_training", refused=refused),
        file_row("here.onnx", "onnx_int8", accuracy=0.85, accuracy_without_overflow=0.89, quantization="aware"),
    ]
    job = finished(settings, address, {"files": files})
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "Make files of the student")
    shown = " ".join(browser.value("document.querySelector('.files').innerText").split())
    assert "student.onnx onnxruntime 1.28 90.0 % 99.8 % 123 kB 0.421 ms 95 %: 0.500 ms 90.0 MB Download" in shown
    assert "int8 after the training refused it is right on 12.0 %" in shown
    assert "89.0 % where int8 does not overflow 99.8 %" in shown
    assert "measured on A <i>CPU</i>, 1 thread" in shown
    links = browser.value("[...document.querySelectorAll('.files a')].map((one) => one.getAttribute('href'))")
    names = ("report.html", "report.html", "student.onnx", "report.html", "student.safetensors")
    assert links == [f"/v1/jobs/{job['id']}/artifacts/{name}" for name in names]
    assert "Open the report" in shown


def test_job_page_makes_files_and_shows_them_beside_the_others(
    settings: Settings, address: str, browser: Browser
) -> None:
    job = finished(settings, address, {"files": [file_row("student.onnx", "onnx")]})
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "Make files of the student")
    browser.value("document.querySelector('.make [value=onnx]').click()")
    browser.value("document.querySelector('.make').open = true")
    browser.value("document.querySelector('.make [name=checkpoint]').value = 'last'")
    send = "document.querySelector('.make form').requestSubmit()"
    browser.value(send)
    browser.wait("only its best epoch is left")
    browser.value("document.querySelector('.make [name=checkpoint]').value = 'best'")
    browser.value(send)
    browser.wait("export of ONNX, int8")
    (export,) = httpx.get(f"{address}/v1/jobs/{job['id']}/exports").json()["data"]
    assert export["spec"] == {"job": job["id"], "export": ["onnx_int8"], "checkpoint": "best"}
    row = file_row("student.int8.onnx", "onnx_int8", accuracy=0.89, quantization="after_training")
    whole = {
        "job": job["id"],
        "checkpoint": {"which": "best", "step": None, "epoch": None},
        "measured": {**measured(0.9, "convnet8"), "interval": [0.86, 0.93], "test_samples": 360},
        "files": [row],
    }
    database, fence = claim_job(settings, export, {}, {})
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, export["id"], fence, whole, [])
    database.dispose()
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "made later")
    shown = " ".join(browser.value("document.querySelector('.files').innerText").split())
    assert "int8 after the training, best epoch, made later 89.0 % −1.0 99.8 %" in shown
    links = browser.value("[...document.querySelectorAll('.measured a.button')].map((one) => one.getAttribute('href'))")
    assert links[-1] == f"/v1/jobs/{export['id']}/artifacts/student.int8.onnx"
    browser.open(f"{address}/#/jobs/{export['id']}", 1200, "1 file made.")
    shown = " ".join(browser.value("document.querySelector('main').innerText").split())
    assert f"convnet32 → convnet8 export of the job {job['id']}" in shown
    assert "Weights best epoch, of the finished job Accuracy 90.0 % 95 % interval 86.0 % to 93.0 %" in shown
    assert "Again with changes" not in shown and "Make files" not in shown
    browser.open(f"{address}/#/?kind=export", 1200, "export of convnet8")
    assert "90.0 %" in browser.value("document.querySelector('.jobs').innerText")


def test_job_page_shows_the_data_and_the_teacher_before_the_training_ends(
    settings: Settings, address: str, browser: Browser
) -> None:
    job = submit(address, {**SUPERVISED, "method": "kd", "teacher": teacher(address), "baseline": "train"})
    database, _ = claim_job(settings, job, {}, {})
    database.dispose()
    change_job(settings, job, teacher_check=CHECK)
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "1,437 training images")
    shown = " ".join(browser.value("document.querySelector('.result').innerText").split())
    assert "Teacher convnet32 Student convnet8 Student alone convnet8" in shown
    assert "Accuracy 70.2 % 67.0 % to 73.0 % – –" in shown
    assert "Data: 10 classes, 8 × 8 pixels, grey, 1,437 training images, 360 test images." in shown


def test_job_page_shows_alerts(settings: Settings, address: str, browser: Browser) -> None:
    low = {"metric": "validation/accuracy", "below": 0.7, "from_epoch": 1}
    job = submit(address, {**SUPERVISED, "scheduling": {"alerts": [low]}})
    database = Database(settings.database_url)
    with database.begin() as connection:
        claim = lifecycle.claim(connection, "worker-1", 60, takeover=False)
        assert claim is not None
        asked = alerts.asked(claim.job.resolved_spec)
        values = {"validation/accuracy": 0.633}
        alerts.see_metrics(connection, job["id"], claim.fence, asked, step=20, epoch=2, values=values)
    database.dispose()
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "ALERTS")
    assert "validation/accuracy is 0.633, below 0.7, in epoch 2" in browser.value(
        "document.querySelector('.alerts').innerText"
    )


def prediction_answered(settings: Settings, answer: dict[str, Any]) -> None:
    """Answer the one prediction that waits, as a worker does."""
    database = Database(settings.database_url)
    deadline = time.monotonic() + 30
    claimed = None
    while claimed is None:
        assert time.monotonic() < deadline
        with database.begin() as connection:
            claimed = predictions.claim(connection, "worker-1")
        time.sleep(0.02)
    with database.begin() as connection:
        assert predictions.finish(connection, claimed.id, "worker-1", **answer)
    database.dispose()


def test_job_page_shows_the_answers_to_an_image_that_is_dropped_on_it(
    settings: Settings, address: str, browser: Browser
) -> None:
    job = finished(settings, address, {})
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "choose a file")
    drop = (
        "(() => { const data = new DataTransfer(); data.items.add(new File(['picture'], 'cat.png'));"
        " document.querySelector('.zone').dispatchEvent(new DragEvent('drop',"
        " { dataTransfer: data, bubbles: true, cancelable: true })); })()"
    )
    cat, dog = ({"class": name, "number": 0, "probability": 0.75} for name in ("<b>cat</b>", "dog"))
    answer = {
        "teacher": {"architecture": "convnet32", "top": [cat]},
        "student": {"architecture": "convnet8", "top": [dog, cat]},
        "alone": None,
        "agree": False,
        "image": {"width": 9, "height": 9, "kinds": [], "shown": "as it is"},
        "notes": ["a <i>note</i>"],
        "seconds": 0.1,
    }
    browser.value(drop)
    prediction_answered(settings, {"answer": answer})
    browser.wait("differ")
    shown = " ".join(browser.value("document.querySelector('.try').innerText").split())
    assert "cat.png; shown to the networks: as it is" in shown
    assert "Teacher convnet32 <b>cat</b> 75.0 % Student convnet8 dog 75.0 % <b>cat</b> 75.0 %" in shown
    assert "Teacher and student differ. Note: a <i>note</i>." in shown
    browser.value(drop)
    error = {"code": "dataset_unreadable", "message": "it is no picture", "retryable": False, "hint": "send a PNG"}
    prediction_answered(settings, {"error": error})
    browser.wait("it is no picture")


def test_list_page_names_filters_that_it_does_not_know(address: str, browser: Browser) -> None:
    submit(address, {**SUPERVISED, "name": "mine"})
    browser.open(f"{address}/#/?name=mi&colour=red", 1200, "mine")
    assert "No list has the filter colour" in browser.value("document.querySelector('.notice').innerText")
    browser.open(f"{address}/#/?status=lost", 1200, "status")
    browser.wait("queued")
    assert "mine" not in browser.value("document.querySelector('main').innerText")
    browser.open(f"{address}/#/?kind=evaluation", 1200, "No job matches.")
    browser.open(f"{address}/#/nothing", 1200, "No such page")


def test_form_sends_an_earlier_spec_with_changes(address: str, browser: Browser) -> None:
    """Numbers are sent as they were, also those that JavaScript cannot represent."""
    seed = 2**63 - 1
    spec = {**SUPERVISED, "name": "first", "training": {"epochs": 2, "seed": seed}}
    job = submit(address, spec)
    browser.open(f"{address}/#/jobs/{job['id']}", 1200, "Again with changes")
    browser.value("[...document.querySelectorAll('.verbs a')].at(-1).click()")
    browser.wait("The spec is valid".upper())
    text = browser.value("document.getElementById('spec-text').value")
    assert json.loads(text) == spec

    def write(changed: str) -> None:
        browser.value(
            f"(() => {{ const text = document.getElementById('spec-text'); text.value = {json.dumps(changed)};"
            " text.dispatchEvent(new Event('input')); })()"
        )

    submit_it = "document.querySelector('.submit form').requestSubmit()"
    write("{")
    browser.value(submit_it)
    browser.wait("This is no JSON")
    write(text.replace('"epochs": 2', '"epochs": -3'))
    browser.value(submit_it)
    browser.wait("/training/epochs")
    write(text.replace("first", "second"))
    browser.wait('/name "first" → "second"')
    browser.value(submit_it)
    browser.wait("As submitted")
    (newest, _) = httpx.get(f"{address}/v1/jobs?view=full").json()["data"]
    assert newest["spec"] == {**spec, "name": "second"}


def test_page_sends_nothing_more_with_a_key_that_was_refused(settings: Settings, browser: Browser) -> None:
    secured = settings.model_copy(update={"admin_key_hash": hashlib.sha256(b"dk_right").hexdigest()})
    with served(create_app(secured, wake_workers=lambda: None, inspector=FakeInspector())) as url:
        browser.open(url, 1200, until="requires an API key")
        sent = "performance.getEntriesByType('resource').filter(({ name }) => name.includes('/v1/')).length"
        before = browser.value(sent)
        browser.value("location.hash = '#/registered'")
        browser.wait("Data sets")
        browser.value("location.hash = '#/jobs/job_1'")
        browser.wait("EVENTS")
        assert browser.value(sent) == before
