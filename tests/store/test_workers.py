from sqlalchemy import update

from store import tables, workers
from store.clock import database_now
from store.database import Database


def test_a_worker_is_what_it_last_said(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "w1", "host-7", ["cuda:0"], None)
        (first,) = workers.list(connection)
        workers.beat(connection, "w1", "host-7", ["cuda:0"], "job_1")
        (later,) = workers.list(connection)
    assert (first.current_job, later.current_job, later.devices) == (None, "job_1", ["cuda:0"])
    assert first.started_at == later.started_at <= later.seen_at


def test_only_those_seen_lately_count_as_here(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "gone", "host-1", [], None)
        connection.execute(update(tables.workers).values(seen_at=database_now() - 100))
        workers.beat(connection, "here", "host-2", [], None)
        assert [worker.id for worker in workers.list(connection, seen_within_s=60)] == ["here"]
        assert {worker.id for worker in workers.list(connection)} == {"gone", "here"}


def test_a_worker_that_leaves_is_gone(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "w1", "host-7", [], None)
        workers.leave(connection, "w1")
        assert list(workers.list(connection)) == []
