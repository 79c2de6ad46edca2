"""Is a worker of this host at work? The table says."""

import socket

import pytest
from sqlalchemy import update

from store import tables, workers
from store.database import Database
from store.records import database_now
from worker import alive

IDLE = {"name": "cpu", "job": None, "state": "idle", "seen_s": 1.0}


@pytest.fixture(autouse=True)
def settings(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_DATABASE_URL", database_url)


def test_a_worker_that_was_just_seen_is_alive(database: Database) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", socket.gethostname(), [IDLE], None)
    assert alive.main() == 0


def test_one_of_another_host_is_not_ours(database: Database) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", "elsewhere", [IDLE], None)
    assert alive.main() == 1


def test_one_that_fell_silent_is_not_alive(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", socket.gethostname(), [IDLE], None)
        connection.execute(update(tables.workers).values(seen_at=database_now() - 31))
    assert alive.main() == 1
    assert "no worker of this host has proved for 30 s that it consumes" in capsys.readouterr().err


def test_one_that_is_there_and_takes_no_job_is_not_alive(database: Database) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(
            connection, "one", socket.gethostname(), [{**IDLE, "state": "stuck", "seen_s": 40.0}], None
        )
    assert alive.main() == 1
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", socket.gethostname(), [{**IDLE, "state": "stuck"}, IDLE], None)
    assert alive.main() == 0


def test_a_database_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DISTILLERY_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    assert alive.main() == 1
    assert "cannot be asked" in capsys.readouterr().err
