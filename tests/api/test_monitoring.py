"""Health, numbers for Prometheus, workers and storage. /readyz: each cause of a failure is made and undone again."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from api.auth import Member
from api.routes import monitoring
from api.schemas import Page
from base.wire import WorkerView
from local import servers
from store import database as databases
from store import workers
from store.database import migrate
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving
from tests.worker.processes import PATIENCE_S

pytestmark = pytest.mark.anyio


def unavailable(answer: httpx.Response) -> str:
    """The detail of a 503, after checking that it has Retry-After."""
    body = problem(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    return str(body["detail"])


async def test_healthz_and_readyz(service: Service) -> None:
    assert (await service.http.get("/healthz")).json() == {"status": "ok"}
    assert (await service.http.get("/readyz")).json() == {"status": "ready"}


async def test_readyz_writes_once_for_all_who_ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key is needed to ask, and each trial is a durable write."""
    trials: list[bool] = []
    monkeypatch.setattr(monitoring, "_try_write", lambda connection: trials.append(True))
    answers = await asyncio.gather(*(service.http.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert (await service.http.get("/readyz")).status_code == 200
    assert len(trials) == 1
    service.app.state.readiness._ready_until = 0.0
    assert (await service.http.get("/readyz")).status_code == 200
    assert len(trials) == 2


async def test_readyz_fails_below_min_free_bytes_and_jobs_are_accepted(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"min_free_bytes": 10**18})) as service:
        assert f"{10**18} are needed to start a job" in unavailable(await service.http.get("/readyz"))
        assert (await service.http.get("/healthz")).status_code == 200
        assert (await service.http.post("/v1/jobs", json=SUPERVISED)).status_code == 201


async def test_readyz_fails_without_a_database_and_healthz_does_not(tmp_path: Path) -> None:
    missing = Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path}/nowhere/distillery.db")
    async with serving(missing) as service:
        assert (await service.http.get("/healthz")).status_code == 200
        for path in ("/readyz", "/v1/jobs", "/metrics"):
            unavailable(await service.http.get(path))
        unavailable(await service.http.post("/v1/jobs", json=SUPERVISED))


@contextmanager
def unchangeable(path: Path) -> Iterator[None]:
    """Make a file read-only. Root ignores its mode, so that an attribute of the file system is needed."""
    lock, unlock = (["chattr", "+i"], ["chattr", "-i"]) if os.geteuid() == 0 else (["chmod", "a-w"], ["chmod", "u+w"])
    if subprocess.run([*lock, path], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no files that root cannot write")
    try:
        yield
    finally:
        subprocess.run([*unlock, path], check=True)


async def test_readyz_fails_with_a_read_only_database(settings: Settings) -> None:
    with unchangeable(Path(settings.database_url.removeprefix("sqlite:///"))):
        async with serving(settings) as service:
            unavailable(await service.http.get("/readyz"))
            unavailable(await service.http.post("/v1/jobs", json=SUPERVISED))
    async with serving(settings) as service:
        assert (await service.http.get("/readyz")).status_code == 200


async def test_readyz_fails_with_a_read_only_folder_of_files(service: Service) -> None:
    service.files.folder.mkdir()
    with unchangeable(service.files.folder):
        assert "no file can be stored" in unavailable(await service.http.get("/readyz"))
    assert (await service.http.get("/readyz")).status_code == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_readyz_fails_while_the_disk_of_the_database_is_full(settings: Settings, small_disk: Path) -> None:
    path = shutil.copy(settings.database_url.removeprefix("sqlite:///"), small_disk)
    async with serving(settings.model_copy(update={"database_url": f"sqlite:///{path}"})) as service:
        await service.submit()
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(1 << 20))
        assert "no disk space to write" in unavailable(await service.http.get("/readyz"))
        problem(await service.http.post("/v1/jobs", json=SUPERVISED), 507, "storage_full")
        ballast.unlink()
        assert (await service.http.get("/readyz")).status_code == 200
        assert (await service.http.post("/v1/jobs", json=SUPERVISED)).status_code == 201


async def test_readyz_fails_while_another_process_holds_the_write_lock(
    service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "READY_S", 0.2)
    holder = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert "within 0.2 s" in unavailable(await service.http.get("/readyz"))
    assert (await service.http.get("/v1/jobs")).status_code == 200
    holder.execute("ROLLBACK")
    holder.close()
    monkeypatch.setattr(monitoring, "READY_S", PATIENCE_S)
    assert (await service.http.get("/readyz")).status_code == 200


@contextmanager
def frozen(url: str) -> Iterator[None]:
    """Stop every process of the server: the kernel still accepts connections, and no process answers."""
    with psycopg.connect(url) as connection:
        (data,) = connection.execute("SHOW data_directory").fetchone() or ("",)
    leader = int(Path(data, "postmaster.pid").read_text().split()[0])
    os.kill(leader, signal.SIGSTOP)
    backends = [int(pid) for pid in Path(f"/proc/{leader}/task/{leader}/children").read_text().split()]
    try:
        for pid in backends:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in (*backends, leader):
            os.kill(pid, signal.SIGCONT)


async def test_readyz_fails_in_bounded_time_while_postgres_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "k1"}
    monkeypatch.setattr(monitoring, "READY_S", PATIENCE_S)
    with servers.postgres() as url:
        migrate(url)
        async with serving(Settings(home=tmp_path, database_url=url, min_free_bytes=0)) as service:
            assert (await service.http.post("/v1/jobs", json=SUPERVISED)).status_code == 201
            with monkeypatch.context() as impatient, frozen(url):
                impatient.setattr(monitoring, "READY_S", 0.5)
                impatient.setattr(databases, "ANSWER_S", 0.5)
                assert "within 0.5 s" in unavailable(await service.http.get("/readyz"))
                unavailable(await service.http.post("/v1/jobs", json=SUPERVISED, headers=key))
                assert (await service.http.get("/healthz")).status_code == 200
            assert (await service.http.get("/readyz")).status_code == 200
            assert (await service.http.post("/v1/jobs", json=SUPERVISED, headers=key)).status_code == 201


async def test_readyz_fails_with_a_read_only_postgres(postgres_database_url: str, tmp_path: Path) -> None:
    """Such as a standby server."""
    with psycopg.connect(postgres_database_url, autocommit=True) as operator:
        operator.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        try:
            async with serving(
                Settings(home=tmp_path, database_url=postgres_database_url, min_free_bytes=0)
            ) as service:
                unavailable(await service.http.get("/readyz"))
                unavailable(await service.http.post("/v1/jobs", json=SUPERVISED))
                assert (await service.http.get("/v1/jobs")).status_code == 200
        finally:
            operator.execute("SET default_transaction_read_only = off")
            operator.execute("ALTER DATABASE postgres RESET default_transaction_read_only")


BUSY = {"name": "cuda:0", "job": "job_1", "state": "busy", "seen_s": 2.5, "memory_bytes": 80_000_000_000}
STUCK = {"name": "cuda:1", "job": None, "state": "stuck", "seen_s": 40.0, "memory_bytes": None}


async def test_workers_listing_shows_workers_alive_unless_all_slots_are_stuck(service: Service) -> None:
    assert (await service.http.get("/v1/workers")).json()["data"] == []
    await service.db.write(workers.record_heartbeat, "well", "gpu-0", [BUSY, STUCK], "job_1")
    await service.db.write(workers.record_heartbeat, "unwell", "gpu-1", [STUCK], None)
    body = (await service.http.get("/v1/workers")).json()
    assert [(worker["id"], worker["current_job"], worker["alive"]) for worker in body["data"]] == [
        ("well", "job_1", True),
        ("unwell", None, False),
    ]
    assert body["data"][0]["devices"] == [BUSY, STUCK]
    assert Page[WorkerView].model_validate(body, strict=True)
    assert figures((await service.http.get("/metrics")).text)["distillery_workers"] == 1


def figures(text: str) -> dict[str, float]:
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


async def test_prometheus_counts_jobs_workers_and_slots(service: Service) -> None:
    await service.submit()
    answer = await service.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    before = figures(answer.text)
    assert before['distillery_jobs{status="queued"}'] == before["distillery_queue_depth"] == 1
    assert 0 <= before["distillery_queue_oldest_seconds"] < 60
    assert (before["distillery_workers"], before["distillery_min_free_bytes"]) == (0, 0)
    assert before["distillery_free_bytes"] > 0
    await service.db.write(workers.record_heartbeat, "well", "gpu-0", [BUSY, STUCK], "job_1")
    after = figures((await service.http.get("/metrics")).text)
    assert after['distillery_slots{device="cuda",state="busy"}'] == 1
    assert after['distillery_slots{device="cuda",state="stuck"}'] == 1
    assert after['distillery_device_memory_bytes{device="cuda:0",host="gpu-0",worker="well"}'] == 8e10
    families = [line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


async def test_prometheus_shows_a_member_its_own_project_only(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.submit()

    async def member(scope: object) -> Member:
        return Member("theirs", "member", "key_1", "ci")

    monkeypatch.setattr(service.app.state.authentication, "member", member)
    text = (await service.http.get("/metrics")).text
    assert figures(text) == {"distillery_queue_depth": 0, "distillery_queue_oldest_seconds": 0}
