import sys
from pathlib import Path

import pytest

from client import local_server as module
from client.local_server import NotStarted, local_server

READY = """
import json, os, pathlib, sys, time
print("up", os.environ.get("DISTILLERY_HOST"), flush=True)
pathlib.Path(sys.argv[1]).write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid()}))
time.sleep(60)
"""


def serving(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(module, "serve_command", lambda options: [sys.executable, "-c", code, options[-1]])


def test_local_server_runs_within_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISTILLERY_HOST", "0.0.0.0")  # noqa: S104 - meant for another server, and not to be passed on
    serving(monkeypatch, READY)
    with local_server(tmp_path / "home") as server:
        assert server.url == "http://127.0.0.1:1"
        assert server.log_tail() == ["up None"]
    with pytest.raises(ZeroDivisionError), local_server(tmp_path / "home"):
        raise ZeroDivisionError


def test_local_server_that_does_not_start_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serving(monkeypatch, "raise SystemExit('serve: the port is taken')")
    with pytest.raises(NotStarted, match="serve: the port is taken"), local_server(tmp_path):
        pass


def test_local_server_that_does_not_answer_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "START_TIMEOUT_S", 0.0)
    serving(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(NotStarted, match="did not answer within 0 s"), local_server(tmp_path):
        pass
