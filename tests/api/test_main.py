"""The process: what it loads, how it starts and refuses to, and that no wait of one request is another's."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from api.__main__ import _refuse_an_old_schema
from base.errors import DatabaseUnavailable
from store.database import Database
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


def test_the_server_loads_no_torch() -> None:
    load = "import sys, api.main, api.bell, api.__main__; "
    look = "print([name for name in ('torch', 'numpy', 'worker') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", load + look], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def start(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DISTILLERY_HOME": str(tmp_path), "DISTILLERY_PORT": "0"}
    return subprocess.run(
        [sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_it_does_not_start_on_a_schema_that_is_not_the_newest(tmp_path: Path) -> None:
    (tmp_path / "distillery.db").touch()
    ended = start(tmp_path)
    assert ended.returncode == 1
    assert "run `python -m store migrate`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_does_not_start_without_a_database(tmp_path: Path) -> None:
    ended = start(tmp_path / "nowhere")
    assert ended.returncode == 1
    assert "python -m store migrate" in ended.stderr


async def test_a_held_write_lock_stops_no_reader(service: Service, settings: Settings) -> None:
    """A POST waits for the lock; GETs that come after it are answered before it."""
    job_id = await service.submit()
    holder = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(service.http.post("/v1/jobs", json=SUPERVISED))
    await asyncio.sleep(0.05)
    for path in (f"/v1/jobs/{job_id}", "/v1/jobs", f"/v1/jobs/{job_id}/events", "/healthz"):
        assert (await service.http.get(path)).status_code == 200
    assert not waiting.done()
    holder.execute("ROLLBACK")
    holder.close()
    assert (await waiting).status_code == 201


async def test_the_bell_is_rung_after_the_commit(service: Service) -> None:
    """Whoever hears the bell finds the job: it is seen over another connection at that moment."""
    seen: list[int] = []

    def look() -> None:
        with service.db.connect() as connection:
            seen.append(connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar_one())

    service.app.state.ring = look
    await service.submit()
    assert seen == [1]


async def test_a_job_of_another_project_is_not_there(service: Service) -> None:
    job_id = await service.submit()
    with service.db.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET project = 'theirs'")
    assert (await service.http.get("/v1/jobs")).json()["data"] == []
    for path in ("", "/events", "/metrics", "/logs", "/artifacts", "/checkpoint", "/events/stream"):
        problem(await service.http.get(f"/v1/jobs/{job_id}{path}"), 404, "not_found")
    problem(await service.http.post(f"/v1/jobs/{job_id}/cancel"), 404, "not_found")


def test_a_database_server_that_is_away_is_waited_for(
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


def test_a_database_file_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="store migrate"):
        _refuse_an_old_schema(f"sqlite:///{tmp_path}/no/such.db")
