"""The page: small, from here alone, and nothing in it that a strict policy would have to allow."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from api.routes.page import WEB
from tests.api.conftest import Service

pytestmark = pytest.mark.anyio

NODE = shutil.which("node")
OURS = [path for path in sorted(WEB.glob("*")) if path.is_file()]


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/static/app.js", "/static/style.css", "/static/vendor/uPlot.iife.min.js"]
)
async def test_files_come_with_a_strict_policy(service: Service, path: str) -> None:
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


async def test_whatever_a_page_names_is_there(service: Service) -> None:
    for page in ("/", "/docs"):
        text = (await service.http.get(page)).text
        for reference in re.findall(r'(?:src|href)="(/[^"#]*)"', text):
            assert (await service.http.get(reference)).status_code == 200, reference


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_inline_and_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    assert "innerHTML" not in text


def printed(script: str) -> str:
    """What a module of ours prints, run outside of a browser."""
    if NODE is None:
        pytest.skip("no Node.js on this machine")
    return subprocess.run(
        [NODE, "--input-type=module"], input=script, capture_output=True, text=True, check=True
    ).stdout.strip()


async def test_all_curves_of_a_job_are_asked_for_at_once(service: Service) -> None:
    """The names of all that may be graded fit into one query of the length that the route takes."""
    named = re.search(r"const numbered = .*?\nconst CURVES = \[.*?\];", (WEB / "job.js").read_text(), re.DOTALL)
    assert named is not None
    curves = printed(f"{named[0]}\nconsole.log(CURVES.join())")
    assert {"validation/accuracy", "validation/student-8/accuracy", "validation/exit-16/accuracy"} <= {
        *curves.split(",")
    }
    job_id = await service.submit()
    assert (await service.http.get(f"/v1/jobs/{job_id}/metrics?max_points=300&keys={curves}")).status_code == 200


@pytest.mark.parametrize(
    ("spec", "says"),
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
def test_a_job_names_who_teaches_whom(spec: dict[str, Any], says: str) -> None:
    common = (WEB / "common.js").read_text()
    assert printed(f"{common}\nconsole.log(models({{spec: {json.dumps(spec)}}}));") == says


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in WEB.rglob("*") if path.is_file()) < 150_000


def test_vendored_files_are_what_their_note_says() -> None:
    note = (WEB / "vendor" / "VENDOR.md").read_text()
    named = re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", note, re.MULTILINE)
    assert {name for name, _ in named} == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in named:
        assert hashlib.sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest
