from sqlalchemy import insert

from store import collections, tables
from store.collections import Collection
from store.database import Database
from tests.clock import SettableClock
from tests.store.helpers import run_concurrently


def begun(database: Database, every_s: float = 0) -> str | None:
    with database.begin() as connection:
        return collections.begin(connection, "gpu-7", every_s)


def listed(database: Database) -> list[Collection]:
    with database.connect() as connection:
        return list(collections.list_collections(connection))


def test_begin_concurrently_begins_one(database: Database):
    ids = run_concurrently([lambda: begun(database, every_s=3600)] * 6)
    assert len([id for id in ids if isinstance(id, str)]) == 1
    assert ids.count(None) == 5
    assert len(listed(database)) == 1


def test_begin_when_due_even_if_the_last_has_not_ended(database: Database, clock: SettableClock):
    assert begun(database, every_s=3600) is not None
    assert begun(database, every_s=3600) is None
    clock.advance(3601)
    with database.connect() as connection:
        assert collections.is_due(connection, 3600)
        assert not collections.is_due(connection, 3700)
    assert begun(database, every_s=3600) is not None
    assert [row.ended_at for row in listed(database)] == [None, None]


def test_begin_ignores_a_row_in_the_future(database: Database, clock: SettableClock):
    """The clock was wrong when it was written."""
    clock.advance(1e7)
    begun(database)
    clock.advance(-1e7)
    assert begun(database, every_s=3600) is not None


def test_end_writes_what_was_removed_and_the_error(database: Database):
    id = str(begun(database))
    with database.begin() as connection:
        collections.end(connection, id, {"logs": {"count": 1, "bytes": 7}}, "tidy_uploads: Permission denied")
    (row,) = listed(database)
    assert (row.id, row.host, row.removed) == (id, "gpu-7", {"logs": {"count": 1, "bytes": 7}})
    assert row.error == "tidy_uploads: Permission denied"
    assert row.ended_at is not None and row.ended_at >= row.began_at


def test_end_keeps_the_newest_hundred_rows(database: Database):
    with database.begin() as connection:
        rows = [{"id": f"col_{number:03}", "host": "gpu-7", "began_at": float(number)} for number in range(101)]
        connection.execute(insert(tables.collections), rows)
    newest = str(begun(database))
    with database.begin() as connection:
        collections.end(connection, newest, {})
    assert [row.id for row in listed(database)] == [newest, *(f"col_{number:03}" for number in range(100, 1, -1))]
    with database.connect() as connection:
        assert [row.id for row in collections.list_collections(connection, limit=1)] == [newest]


def test_has_collected_for_needs_an_old_enough_row(database: Database, clock: SettableClock):
    with database.connect() as connection:
        assert not collections.has_collected_for(connection, 60)
    begun(database)
    with database.connect() as connection:
        assert not collections.has_collected_for(connection, 60)
    clock.advance(61)
    begun(database)
    with database.connect() as connection:
        assert collections.has_collected_for(connection, 60)
        assert not collections.has_collected_for(connection, 3600)


def test_has_collected_for_is_true_with_as_many_rows_as_are_kept(database: Database):
    with database.begin() as connection:
        for _ in range(collections.MAX_ROWS):
            collections.begin(connection, "gpu-7", 0)
    with database.connect() as connection:
        assert collections.has_collected_for(connection, 3600)
