import time

import pytest
from sqlalchemy import select

from store.clock import database_now
from store.database import Database


def test_seconds_since_1970_to_the_millisecond(database: Database):
    with database.connect() as connection:
        told = connection.execute(select(database_now())).scalar_one()
    assert told == pytest.approx(time.time(), abs=60)
    assert told % 1 != 0


def test_time_goes_on_within_a_transaction(database: Database):
    with database.begin() as connection:
        first = connection.execute(select(database_now())).scalar_one()
        time.sleep(0.02)
        assert connection.execute(select(database_now())).scalar_one() > first


def test_seconds_can_be_added(database: Database):
    with database.connect() as connection:
        now, later = connection.execute(select(database_now(), database_now() + 30)).one()
    assert later - now == pytest.approx(30, abs=1)
