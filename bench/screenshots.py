"""Pictures of the page, of a real service with real jobs: `python -m bench.screenshots [--to FOLDER] [--url URL]`.

Starts a service in a folder that is removed afterwards, trains a teacher and a student of the digits, and takes
each view in a wide and a narrow window, light and dark. `--readme` also writes docs/page.png. With `--url` it takes the
pictures of a service that runs already: of its list and its newest jobs of each kind.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.browser import CHROMIUM, MISSING, Browser, browser
from bench.processes import REPOSITORY
from client.demo import TEACHER, student_spec
from client.local_server import local_server

PAGE = REPOSITORY / "docs" / "page.png"
PAGE_WIDTH, PAGE_HEIGHT = 1180, 900
WIDTHS = {"wide": 1280, "narrow": 420}
EXPORTS = ["safetensors", "onnx", "onnx_int8"]
KINDS = ("distillation", "evaluation", "export", "benchmark")
TERMINAL = ("succeeded", "failed", "cancelled")
JOB_S = 300.0


@dataclass(frozen=True)
class View:
    """A view of the page: the name of its pictures, the address after #, and a text that says it is there."""

    name: str
    path: str
    until: str


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures and print their names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("screenshots"), help="the folder of the pictures")
    parser.add_argument("--url", help="a service that runs already")
    parser.add_argument("--readme", action="store_true", help="also write docs/page.png, of the student's job")
    options = parser.parse_args(arguments)
    if CHROMIUM is None:
        print(MISSING, file=sys.stderr)
        return 1
    options.to.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        url = options.url
        if url is None:
            url = stack.enter_context(local_server(scratch / "home")).url
            make_jobs(url)
        chromium = stack.enter_context(browser(scratch / "profile"))
        found = list(views(url))
        for view, window, dark in (
            (view, window, dark) for view in found for window in WIDTHS for dark in (False, True)
        ):
            file = options.to / f"{view.name}-{window}{'-dark' if dark else ''}.png"
            chromium.open(f"{url}/#{view.path}", WIDTHS[window], view.until, dark=dark)
            settle(chromium)
            chromium.picture(file)
            print(file)
        if options.readme:
            job = next(view for view in found if view.name == "distillation")
            chromium.open(f"{url}/#{job.path}", PAGE_WIDTH, job.until)
            settle(chromium)
            chromium.picture(scratch / "page.png", PAGE_HEIGHT)
            shutil.copyfile(scratch / "page.png", PAGE)
            print(PAGE.relative_to(REPOSITORY))
    return 0


def make_jobs(url: str) -> None:
    """A teacher, a job that fails, an export, a benchmark, and the teacher's student, with files of each kind."""
    with httpx.Client(base_url=url, timeout=60) as http:
        teacher = ended(http, sent(http, "/v1/jobs", TEACHER))
        late = {"deadline_s": 5, "alerts": [{"metric": "train/loss", "above": 0.01}]}
        ended(
            http,
            sent(
                http,
                "/v1/jobs",
                {**TEACHER, "name": "too long for its deadline", "training": {"epochs": 9_000}, "scheduling": late},
            ),
        )
        sent(http, "/v1/benchmarks", {"architecture": "convnet4", "channels": 1, "image_size": 8, "export": EXPORTS})
        labels = {"study": "demo"}
        spec = {**student_spec(teacher["id"], 0), "export": EXPORTS, "quantization": {"aware": True}, "labels": labels}
        student = ended(http, sent(http, "/v1/jobs", spec))
        files = {"export": ["torch_export"], "checkpoint": "last"}
        ended(http, sent(http, f"/v1/jobs/{student['id']}/exports", files))


def sent(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json=body)
    if answer.status_code not in (200, 201, 202):
        raise RuntimeError(f"POST {path} was answered {answer.status_code}: {answer.text}")
    made: dict[str, Any] = answer.json()
    return made


def ended(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """Wait for the end of a job, and return it."""
    deadline = time.monotonic() + JOB_S
    while job["status"] not in TERMINAL:
        if time.monotonic() > deadline:
            raise RuntimeError(f"job {job['id']} has not ended after {JOB_S:g} s")
        time.sleep(0.3)
        job = http.get(f"/v1/jobs/{job['id']}").json()
    return job


def views(url: str) -> Iterator[View]:
    """The list, the newest job of each kind, the newest job that failed, the form, and the registered data."""
    yield View("list", "/", "Jobs")
    for kind in KINDS:
        if found := newest(url, kind=kind, status="succeeded"):
            yield View(kind, f"/jobs/{found['id']}", "As submitted")
            if kind == "distillation":
                yield View("again", f"/submit?from={found['id']}", "As it was sent")
    if found := newest(url, status="failed"):
        yield View("failed", f"/jobs/{found['id']}", "As submitted")
    yield View("registered", "/registered", "digits")


def newest(url: str, **filters: str) -> dict[str, Any] | None:
    answer = httpx.get(f"{url}/v1/jobs", params={**filters, "limit": 1})
    answer.raise_for_status()
    (found,) = answer.json()["data"] or (None,)
    return found


def settle(chromium: Browser) -> None:
    """Wait until nothing has been asked of the service for a quarter of a second, and curves and bars are drawn."""
    chromium.value(
        "new Promise((done) => { let seen = -1; const look = () => {"
        " const now = performance.getEntriesByType('resource').length;"
        " if (now === seen) done(true); else { seen = now; setTimeout(look, 700); } }; look(); })"
    )


if __name__ == "__main__":
    sys.exit(main())
