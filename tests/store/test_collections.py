from sqlalchemy import insert, update

from store import collections, tables
from store.clock import database_now
from store.collections import Collection
from store.database import Database
from tests.store.scene import at_once


def begun(database: Database, every_s: float = 0) -> str | None:
    with database.begin() as connection:
        return collections.begin(connection, "gpu-7", every_s)


def kept(database: Database) -> list[Collection]:
    with database.connect() as connection:
        return list(collections.list(connection))


def moved(database: Database, id: str, by_s: float) -> None:
    with database.begin() as connection:
        rows = tables.collections
        connection.execute(update(rows).where(rows.c.id == id).values(began_at=database_now() + by_s))


def test_of_many_that_begin_together_one_does(database: Database):
    begun_by = at_once([lambda: begun(database, every_s=3600)] * 6)
    assert len([id for id in begun_by if isinstance(id, str)]) == 1
    assert begun_by.count(None) == 5
    assert len(kept(database)) == 1


def test_the_next_begins_when_it_is_time_whether_or_not_the_last_has_ended(database: Database):
    first = str(begun(database, every_s=3600))
    assert begun(database, every_s=3600) is None
    moved(database, first, by_s=-3601)
    with database.connect() as connection:
        assert collections.due(connection, 3600)
        assert not collections.due(connection, 3700)
    assert begun(database, every_s=3600) is not None
    assert [one.ended_at for one in kept(database)] == [None, None]


def test_one_that_began_in_the_future_holds_up_nobody(database: Database):
    """The clock was wrong then: nobody should wait a year for it to be right."""
    moved(database, str(begun(database)), by_s=1e7)
    assert begun(database, every_s=3600) is not None


def test_a_collection_tells_what_it_removed_and_what_it_could_not(database: Database):
    id = str(begun(database))
    with database.begin() as connection:
        collections.end(connection, id, {"logs": {"count": 1, "bytes": 7}}, "tidy_uploads: Permission denied")
    (row,) = kept(database)
    assert (row.id, row.host, row.removed) == (id, "gpu-7", {"logs": {"count": 1, "bytes": 7}})
    assert row.error == "tidy_uploads: Permission denied"
    assert row.ended_at is not None and row.ended_at >= row.began_at


def test_the_newest_hundred_are_kept(database: Database):
    with database.begin() as connection:
        rows = [{"id": f"col_{number:03}", "host": "gpu-7", "began_at": float(number)} for number in range(101)]
        connection.execute(insert(tables.collections), rows)
    newest = str(begun(database))
    with database.begin() as connection:
        collections.end(connection, newest, {})
    assert [row.id for row in kept(database)] == [newest, *(f"col_{number:03}" for number in range(100, 1, -1))]
    with database.connect() as connection:
        assert [row.id for row in collections.list(connection, limit=1)] == [newest]


def test_a_database_is_known_once_it_has_collected_for_long_enough(database: Database):
    with database.connect() as connection:
        assert not collections.known_for(connection, 60)
    oldest = str(begun(database))
    with database.connect() as connection:
        assert not collections.known_for(connection, 60)
    moved(database, oldest, by_s=-61)
    begun(database)
    with database.connect() as connection:
        assert collections.known_for(connection, 60)
        assert not collections.known_for(connection, 3600)


def test_who_collects_more_often_than_rows_are_kept_for_is_known_too(database: Database):
    with database.begin() as connection:
        for _ in range(collections.KEPT):
            collections.begin(connection, "gpu-7", 0)
    with database.connect() as connection:
        assert collections.known_for(connection, 3600)
