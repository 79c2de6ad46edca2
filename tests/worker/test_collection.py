import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert

from store import collections, tables
from store.collections import Collection as Row
from store.records import database_now
from store.settings import Settings
from tests.store.helpers import run_concurrently
from tests.worker.processes import until
from tests.worker.table import OPTIONS, Table
from worker.collection import Collection, told
from worker.desk import Desk
from worker.service import Worker

DAY = 86_400.0


@pytest.fixture
def desk(settings: Settings) -> Iterator[Desk]:
    desk = Desk(settings, OPTIONS, lambda: None)
    yield desk
    desk.close()


@pytest.fixture
def often(settings: Settings) -> Settings:
    return settings.model_copy(update={"collect_every_s": 0.2})


def rows(table: Table) -> list[Row]:
    with table.database.connect() as connection:
        return list(collections.list_collections(connection))


def collected_before(table: Table) -> None:
    """As a database that has been at it for two days."""
    with table.database.begin() as connection:
        row = {"id": "col_first", "host": "here", "began_at": database_now() - 2 * DAY}
        connection.execute(insert(tables.collections).values(**row))


def old_blob(table: Table) -> Path:
    sha256 = table.files.put_stream([b"of nobody"]).sha256
    path = table.files.path(sha256)
    os.utime(path, (0, 0))
    return path


def old_entry(desk: Desk, name: str) -> Path:
    folder = desk.cache / name
    folder.mkdir(parents=True)
    (folder / "train_pixels.npy").write_bytes(b"1234")
    os.utime(folder, (0, 0))
    return folder


def test_a_cache_that_cannot_be_trimmed_stops_no_collection(desk: Desk, table: Table, caplog: pytest.LogCaptureFixture):
    old_entry(desk, "half.partial")
    desk.cache.joinpath("half.lock").mkdir()
    collected_before(table)
    blob = old_blob(table)
    assert Collection(desk).once()["to_trash"]["count"] == 1
    assert not blob.exists()
    assert "the cache could not be trimmed" in caplog.text


def test_a_worker_collects_by_itself_after_its_jobs(table: Table, often: Settings, start_worker: Callable[..., Worker]):
    collected_before(table)
    start_worker(often)
    job_id = table.submit(steps=10)
    table.assert_trained(job_id, 10)
    folder = table.files.folder / "checkpoints" / job_id
    until(lambda: not folder.exists(), "the checkpoints of the succeeded job to go")
    until(lambda: any("checkpoints" in (row.removed or {}) for row in rows(table)), "a row that says so")
    assert {row.error for row in rows(table)} == {None}
    table.assert_trained(job_id, 10)


def test_a_collection_that_lost_the_database_is_made_up_for(
    table: Table, often: Settings, start_worker: Callable[..., Worker], arm: Callable[[str], None]
):
    path = old_blob(table)
    arm("collector.moved=away")
    start_worker(often)
    until(lambda: not path.exists(), "the blob to go to the trash")
    until(lambda: len([row for row in rows(table) if row.error is None and row.ended_at]) > 1, "the next collections")


def test_of_many_workers_one_collects_and_each_trims_its_own_cache(desk: Desk, table: Table):
    path, entry = old_blob(table), old_entry(desk, "set-native-v1")
    small = desk.settings.model_copy(update={"cache_max_bytes": 0})
    others = [
        Desk(small.model_copy(update={"home": small.home / f"host{number}"}), OPTIONS, print) for number in (1, 2)
    ]
    entries = [old_entry(other, "set-native-v1") for other in others]
    try:
        removed = run_concurrently([Collection(each).once for each in (desk, *others)])
    finally:
        for other in others:
            other.close()
    assert not any(isinstance(one, Exception) for one in removed), removed
    assert len(rows(table)) == 1
    assert not path.exists()
    assert sum("to_trash" in one for one in removed if isinstance(one, dict)) == 1
    assert entry.exists() and not any(each.exists() for each in entries)


def test_the_next_look_within_the_hour_collects_nothing(desk: Desk, table: Table):
    assert Collection(desk).once() == {}
    path = old_blob(table)
    assert Collection(desk).once() == {}
    assert path.exists()
    assert len(rows(table)) == 1


def test_a_worker_that_leaves_in_the_middle_says_so_and_leaves_the_rest_to_the_next(
    desk: Desk, table: Table, often: Settings
):
    path, collection = old_blob(table), Collection(desk)
    collection.stop()
    collection.once()
    assert path.exists()
    assert [row.error for row in rows(table)] == ["stopped before the end"]


def test_what_went_is_told_in_one_line():
    removed = {"blobs": {"count": 2, "bytes": 1_300_000}, "logs": {"count": 1, "bytes": 10}}
    assert told(removed) == "2 blobs (1.3 MB), 1 logs (0.0 MB)"
