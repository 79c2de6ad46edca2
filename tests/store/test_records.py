import time

import pytest
from sqlalchemy import select

from store import records, tables
from store.database import Database
from store.records import DIGITS, Job, columns, database_now, new_id
from tests.clock import SettableClock
from tests.store.helpers import SHA256, read_job, submitted


def test_columns_of_a_job_are_those_its_fields_are_named_after(database: Database):
    assert [column.name for column in columns(tables.jobs, Job)][:3] == ["project", "name", "kind"]
    job = submitted(database, priority=3)
    assert read_job(database, job.id) == job
    assert (job.priority, job.spec_sha256, job.status) == (3, SHA256, "queued")


def test_new_id_begins_with_its_prefix_and_fits_its_column():
    assert new_id("job").startswith("job_")
    assert len(new_id("job")) == 28 <= tables.ID.length


def test_new_id_sorts_by_time(monkeypatch):
    monkeypatch.setattr(records, "_newest_id", 0)  # and what it was before, afterwards: these times are far ahead
    moments_ms = [0, 1, 31, 32, 1_795_266_002_033, 2**50 - 1]
    ids = []
    for moment_ms in moments_ms:
        monkeypatch.setattr(records.time, "time_ns", lambda moment_ms=moment_ms: moment_ms * 1_000_000)
        ids.append(new_id("job"))
    assert ids == sorted(ids)


def test_new_id_differs_and_sorts_within_one_moment(monkeypatch):
    monkeypatch.setattr(records, "_newest_id", 0)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000)
    made = [new_id("job") for _ in range(1000)]
    assert made == sorted(set(made))


def test_digits_are_in_ascii_order_without_letters_that_look_like_others():
    assert list(DIGITS) == sorted(set(DIGITS))
    assert not set("ilou") & set(DIGITS)


def test_database_now_is_seconds_since_1970_with_fractions(database: Database):
    with database.connect() as connection:
        now = connection.execute(select(database_now())).scalar_one()
    assert now == pytest.approx(time.time(), abs=60)
    assert now % 1 != 0


def test_database_now_advances_within_a_transaction(database: Database):
    with database.begin() as connection:
        first = connection.execute(select(database_now())).scalar_one()
        time.sleep(0.02)
        assert connection.execute(select(database_now())).scalar_one() > first


def test_database_now_takes_added_seconds(database: Database):
    with database.connect() as connection:
        now, later = connection.execute(select(database_now(), database_now() + 30)).one()
    assert later - now == pytest.approx(30, abs=1)


def test_database_now_follows_the_clock_of_a_test_on_open_connections(database: Database, clock: SettableClock):
    query = select(database_now())
    with database.connect() as connection:
        before = connection.execute(query).scalar_one()
        clock.advance(3600)
        assert connection.execute(query).scalar_one() - before == pytest.approx(3600, abs=60)
