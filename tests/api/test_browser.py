"""The page in a real browser: Chromium draws it, and what it drew is read back."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from api.main import create_app
from store.settings import Settings
from tests.api.conftest import SUPERVISED, ToldInspector

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    """A server on a free port, in a thread."""
    app = create_app(settings, ring=lambda: None, inspector=ToldInspector())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def drawn(tmp_path: Path, url: str) -> str:
    """The page's text once its scripts have run; no complaint on the console, which is where a broken policy shows."""
    assert CHROMIUM is not None
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}",
    )  # fmt: skip
    ended = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True
    )
    complaints = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line and "[DOM]" not in line]
    assert complaints == []
    return re.sub(r"<[^>]+>", " ", ended.stdout)


def test_an_empty_service_tells_how_to_begin(address: str, tmp_path: Path) -> None:
    text = drawn(tmp_path, address)
    assert "Nothing distilled yet" in text
    assert f"curl {address}/v1/jobs" in text


def test_the_list_and_a_job(address: str, tmp_path: Path) -> None:
    job = httpx.post(f"{address}/v1/jobs", json={**SUPERVISED, "name": "<b>bold</b> name"}).json()
    listed = drawn(tmp_path, address)
    assert "&lt;b&gt;bold&lt;/b&gt; name" in listed
    assert "1 waiting" in listed
    httpx.post(f"{address}{job['links']['self']}/cancel")
    shown = drawn(tmp_path, f"{address}/#/jobs/{job['id']}")
    assert "cancelled" in shown
    assert "Retry" in shown
    assert "No measurement yet" in shown


def test_the_reference_tells_every_route(address: str, tmp_path: Path) -> None:
    text = drawn(tmp_path, f"{address}/docs")
    for path in httpx.get(f"{address}/openapi.json").json()["paths"]:
        assert path in text
