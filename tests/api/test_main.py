"""The process `python -m api`: what it loads, and when it refuses to start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.__main__ import _refuse_an_old_schema
from base.errors import DatabaseUnavailable
from store.database import Database
from store.settings import Settings
from tests.servers import api_process
from tests.worker.processes import until


def test_main_loads_no_torch() -> None:
    load = "import sys, api.app, api.wakeup_sender, api.__main__; "
    show = "print([name for name in ('torch', 'numpy', 'worker') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", load + show], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_main_does_not_start_on_an_old_schema(tmp_path: Path) -> None:
    (tmp_path / "distillery.db").touch()
    environment = {**os.environ, "DISTILLERY_HOME": str(tmp_path), "DISTILLERY_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "run `python -m store migrate`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_refuse_an_old_schema_waits_for_a_database_server(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, waited = Database.connect, []

    def come_back_late(self: Database) -> object:
        if len(waited) < 2:
            raise DatabaseUnavailable("connection refused")
        return connect(self)

    monkeypatch.setattr(Database, "connect", come_back_late)
    monkeypatch.setattr("api.__main__.time.sleep", waited.append)
    _refuse_an_old_schema(postgres_database_url)
    assert len(waited) == 2


def test_refuse_an_old_schema_refuses_a_missing_database_file_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="store migrate"):
        _refuse_an_old_schema(f"sqlite:///{tmp_path}/no/such.db")


@pytest.mark.slow
def test_main_serves_with_several_processes_that_share_only_the_database(settings: Settings, tmp_path: Path) -> None:
    """A stream at one server follows a job that is paused, labelled and cancelled through the other one, which is two
    processes behind one address."""
    several = settings.model_copy(update={"api_processes": 2})
    with api_process(settings, tmp_path / "one.log") as one, api_process(several, tmp_path / "two.log") as two:
        children = until(lambda: len(_children(two.process.pid)) >= 2 and _children(two.process.pid), "two processes")
        job = f"/v1/jobs/{two.submit()}"
        tag = one.http.get(job).headers["etag"]
        with one.http.stream("GET", f"{job}/events/stream") as stream:
            events = _events(stream)
            assert next(events) == "queued"
            assert two.http.post(f"{job}/pause").status_code == 200
            assert next(events) == "paused"
            assert one.http.get(job, headers={"If-None-Match": tag}).json()["status"] == "paused"
            assert two.http.patch(job, json={"labels": {"team": "vision"}}).status_code == 200
            assert [row["id"] for row in one.http.get("/v1/jobs?labels=team:vision").json()["data"]] == [job[9:]]
            assert two.http.post(f"{job}/cancel").status_code == 200
            assert list(events) == ["cancelled"]
    assert not any(Path(f"/proc/{child}").exists() for child in children), two.log


def _children(pid: int) -> list[int]:
    """The processes that serve for a supervisor: multiprocessing starts one more, which tracks their semaphores."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _events(stream: httpx.Response) -> Iterator[str]:
    for line in stream.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))["type"]
