"""The web page's files: they are small, load nothing from other servers, and fit a strict content policy."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from api.routes.page import WEB
from base.wire import JobFilters
from tests.api.conftest import Service

pytestmark = pytest.mark.anyio

NODE = shutil.which("node")
OWN_FILES = [path for path in sorted(WEB.glob("*")) if path.is_file()]


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/static/app.js", "/static/style.css", "/static/vendor/uPlot.iife.min.js"]
)
async def test_files_have_a_strict_content_policy(service: Service, path: str) -> None:
    answer = await service.http.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


async def test_scripts_are_served_as_scripts(service: Service) -> None:
    for path in ("app.js", "vendor/uPlot.iife.min.js"):
        answer = await service.http.get(f"/static/{path}")
        assert answer.headers["content-type"].startswith(("text/javascript", "application/javascript"))


async def test_nothing_outside_the_folder_is_served(service: Service) -> None:
    assert (await service.http.get("/static/../main.py")).status_code == 404
    assert (await service.http.get("/static/%2e%2e/main.py")).status_code == 404


async def test_files_that_a_page_links_to_are_served(service: Service) -> None:
    for page in ("/", "/docs"):
        text = (await service.http.get(page)).text
        for reference in re.findall(r'(?:src|href)="(/[^"#]*)"', text):
            assert (await service.http.get(reference)).status_code == 200, reference


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_files_have_nothing_inline_and_no_foreign_urls(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    assert "innerHTML" not in text


def printed(script: str) -> str:
    """The output of a script, run by Node.js."""
    if NODE is None:
        pytest.skip("no Node.js on this machine")
    return subprocess.run(
        [NODE, "--input-type=module"], input=script, capture_output=True, text=True, check=True
    ).stdout.strip()


async def test_job_js_fetches_all_curves_in_one_request(service: Service) -> None:
    """The keys of all curves fit into one query of the length that the route accepts."""
    constants = re.search(r"const numbered = .*?\nconst CURVES = \[.*?\];", (WEB / "job.js").read_text(), re.DOTALL)
    assert constants is not None
    curves = printed(f"{constants[0]}\nconsole.log(CURVES.join())")
    assert {"validation/accuracy", "validation/student-8/accuracy", "validation/exit-16/accuracy"} <= {
        *curves.split(",")
    }
    job_id = await service.submit()
    assert (await service.http.get(f"/v1/jobs/{job_id}/metrics?max_points=300&keys={curves}")).status_code == 200


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"student": "convnet4"}, "convnet4"),
        ({"teacher": {"checkpoint": "job:job_1"}, "student": {"architecture": "a"}}, "job:job_1 → a"),
        ({"teacher": {"program": "blob:sha256:00"}, "student": "a"}, "program → a"),
        ({"teacher": None, "assistants": [], "student": ["a", "a", "b"]}, "2 × a + b"),
        (
            {
                "teacher": [{"architecture": "x"}, {"architecture": "y"}],
                "assistants": ["m", {"architecture": "n"}],
                "student": "a",
            },
            "x + y → m → n → a",
        ),
    ],
)
def test_common_js_models(spec: dict[str, Any], expected: str) -> None:
    common = (WEB / "common.js").read_text()
    assert printed(f"{common}\nconsole.log(models({{spec: {json.dumps(spec)}}}));") == expected


def test_app_js_knows_all_filters_of_a_list_of_jobs() -> None:
    constant = re.search(r"const FILTERS = (\[.*?\]);", (WEB / "app.js").read_text(), re.DOTALL)
    assert constant is not None
    assert set(re.findall(r'"(\w+)"', constant[1])) == set(JobFilters.__annotations__)


def test_page_is_small() -> None:
    assert sum(path.stat().st_size for path in WEB.rglob("*") if path.is_file()) < 200_000


def test_vendored_files_match_their_note() -> None:
    note = (WEB / "vendor" / "VENDOR.md").read_text()
    named = re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", note, re.MULTILINE)
    assert {name for name, _ in named} == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in named:
        assert hashlib.sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest
