"""The page: small, from here alone, and nothing in it that a strict policy would have to allow."""

import hashlib
import re
from pathlib import Path

import pytest

from api.routes.page import WEB
from tests.api.conftest import Service

pytestmark = pytest.mark.anyio

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


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in WEB.rglob("*") if path.is_file()) < 150_000


def test_vendored_files_are_what_their_note_says() -> None:
    note = (WEB / "vendor" / "VENDOR.md").read_text()
    named = re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", note, re.MULTILINE)
    assert {name for name, _ in named} == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in named:
        assert hashlib.sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest
