"""The health check of a container with a worker."""

import socket

import pytest
from sqlalchemy import update

from store import tables, workers
from store.database import Database
from store.records import database_now
from worker import healthcheck

IDLE = {"name": "cpu", "job": None, "state": "idle", "seen_s": 1.0}


@pytest.fixture(autouse=True)
def settings(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_DATABASE_URL", database_url)


def test_healthcheck_of_a_worker_that_was_just_seen(database: Database) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", socket.gethostname(), [IDLE], None)
    assert healthcheck.main() == 0


def test_healthcheck_ignores_workers_of_other_hosts(database: Database) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", "elsewhere", [IDLE], None)
    assert healthcheck.main() == 1


def test_healthcheck_fails_for_a_silent_worker(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", socket.gethostname(), [IDLE], None)
        connection.execute(update(tables.workers).values(seen_at=database_now() - 31))
    assert healthcheck.main() == 1
    assert "no worker of this host has proved for 30 s that it consumes jobs" in capsys.readouterr().err


def test_healthcheck_fails_for_a_worker_that_takes_no_jobs(database: Database) -> None:
    with database.begin() as connection:
        workers.record_heartbeat(
            connection, "one", socket.gethostname(), [{**IDLE, "state": "stuck", "seen_s": 40.0}], None
        )
    assert healthcheck.main() == 1
    with database.begin() as connection:
        workers.record_heartbeat(connection, "one", socket.gethostname(), [{**IDLE, "state": "stuck"}, IDLE], None)
    assert healthcheck.main() == 0


def test_healthcheck_reports_a_database_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTILLERY_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    assert healthcheck.main() == 1
    assert "cannot be queried" in capsys.readouterr().err
