"""Ready or not: each thing that keeps a job from being accepted, made to happen, and undone again."""

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

from api.routes import health
from local import servers
from store import database as databases
from store.database import migrate
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving
from tests.worker.processes import PATIENCE_S

pytestmark = pytest.mark.anyio


def not_now(answer: httpx.Response) -> str:
    """What it says that is in the way; and that one may come back."""
    told = problem(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    return str(told["detail"])


async def test_alive_and_ready(service: Service) -> None:
    assert (await service.http.get("/healthz")).json() == {"status": "ok"}
    assert (await service.http.get("/readyz")).json() == {"status": "ready"}


async def test_below_the_floor_it_is_not_ready_and_a_job_is_accepted_and_waits(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"min_free_bytes": 10**18})) as service:
        assert f"{10**18} are needed to start a job" in not_now(await service.http.get("/readyz"))
        assert (await service.http.get("/healthz")).status_code == 200
        assert (await service.http.post("/v1/jobs", json=SUPERVISED)).status_code == 201


async def test_without_a_database_the_process_lives_and_says_when_to_come_back(tmp_path: Path) -> None:
    missing = Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path}/nowhere/distillery.db")
    async with serving(missing) as service:
        assert (await service.http.get("/healthz")).status_code == 200
        for path in ("/readyz", "/v1/jobs", "/metrics"):
            not_now(await service.http.get(path))
        not_now(await service.http.post("/v1/jobs", json=SUPERVISED))


@contextmanager
def unchangeable(path: Path) -> Iterator[None]:
    """Root may write whatever its mode says: only an attribute of the file system stops it."""
    lock, unlock = (["chattr", "+i"], ["chattr", "-i"]) if os.geteuid() == 0 else (["chmod", "a-w"], ["chmod", "u+w"])
    if subprocess.run([*lock, path], check=False, capture_output=True).returncode:
        pytest.skip("this file system knows no file that root may not write to")
    try:
        yield
    finally:
        subprocess.run([*unlock, path], check=True)


async def test_a_read_only_database_is_not_ready(settings: Settings) -> None:
    with unchangeable(Path(settings.database_url.removeprefix("sqlite:///"))):
        async with serving(settings) as service:
            not_now(await service.http.get("/readyz"))
            not_now(await service.http.post("/v1/jobs", json=SUPERVISED))
    async with serving(settings) as service:
        assert (await service.http.get("/readyz")).status_code == 200


async def test_a_read_only_folder_of_files_is_not_ready(service: Service) -> None:
    service.files.folder.mkdir()
    with unchangeable(service.files.folder):
        assert "no file can be kept" in not_now(await service.http.get("/readyz"))
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


async def test_a_full_disk_of_the_database_is_told_as_such_and_forgiven(settings: Settings, small_disk: Path) -> None:
    path = shutil.copy(settings.database_url.removeprefix("sqlite:///"), small_disk)
    async with serving(settings.model_copy(update={"database_url": f"sqlite:///{path}"})) as service:
        await service.submit()
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(1 << 20))
        assert "no disk space to write" in not_now(await service.http.get("/readyz"))
        problem(await service.http.post("/v1/jobs", json=SUPERVISED), 507, "storage_full")
        ballast.unlink()
        assert (await service.http.get("/readyz")).status_code == 200
        assert (await service.http.post("/v1/jobs", json=SUPERVISED)).status_code == 201


async def test_a_frozen_writer_of_sqlite_is_not_ready_within_seconds_and_stops_no_reader(
    service: Service, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "READY_S", 0.2)
    holder = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert "within 0.2 s" in not_now(await service.http.get("/readyz"))
    assert (await service.http.get("/v1/jobs")).status_code == 200
    holder.execute("ROLLBACK")
    holder.close()
    monkeypatch.setattr(health, "READY_S", PATIENCE_S)
    assert (await service.http.get("/readyz")).status_code == 200


@contextmanager
def frozen(url: str) -> Iterator[None]:
    """Every process of the server stopped: the kernel still takes connections, and nobody answers."""
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


async def test_a_frozen_postgres_is_told_in_bounded_time_and_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "k1"}
    monkeypatch.setattr(health, "READY_S", PATIENCE_S)
    with servers.postgres() as url:
        migrate(url)
        async with serving(Settings(home=tmp_path, database_url=url, min_free_bytes=0)) as service:
            assert (await service.http.post("/v1/jobs", json=SUPERVISED)).status_code == 201
            with monkeypatch.context() as impatient, frozen(url):
                impatient.setattr(health, "READY_S", 0.5)
                impatient.setattr(databases, "ANSWER_S", 0.5)
                assert "within 0.5 s" in not_now(await service.http.get("/readyz"))
                not_now(await service.http.post("/v1/jobs", json=SUPERVISED, headers=key))
                assert (await service.http.get("/healthz")).status_code == 200
            assert (await service.http.get("/readyz")).status_code == 200
            assert (await service.http.post("/v1/jobs", json=SUPERVISED, headers=key)).status_code == 201


async def test_a_postgres_that_only_reads_is_not_ready(postgres_database_url: str, tmp_path: Path) -> None:
    """As one that stands by after a failover."""
    with psycopg.connect(postgres_database_url, autocommit=True) as operator:
        operator.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        try:
            async with serving(
                Settings(home=tmp_path, database_url=postgres_database_url, min_free_bytes=0)
            ) as service:
                not_now(await service.http.get("/readyz"))
                not_now(await service.http.post("/v1/jobs", json=SUPERVISED))
                assert (await service.http.get("/v1/jobs")).status_code == 200
        finally:
            operator.execute("SET default_transaction_read_only = off")
            operator.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
