import pytest

from store import events, lifecycle
from store.database import Database
from store.errors import LeaseLost, NotFound
from tests.store.scene import at_once, feed, now, running, submitted


def test_events_are_read_from_behind_a_number(database: Database):
    claim = running(database)
    with database.begin() as connection:
        event = events.append(connection, claim.job.id, claim.fence, "warning", {"code": "slow_disk"})
        assert (event.seq, event.type, event.data) == (3, "warning", {"code": "slow_disk"})
        assert [told.seq for told in events.after(connection, claim.job.id, 1, limit=10)] == [2, 3]
        assert [told.seq for told in events.after(connection, claim.job.id, 0, limit=1)] == [1]
        assert events.after(connection, claim.job.id, 3, limit=10) == []


def test_times_do_not_go_back(database: Database):
    claim = running(database)
    with database.connect() as connection:
        first, second = events.after(connection, claim.job.id, 0, 10)
    assert claim.job.created_at <= first.at <= second.at


def test_racing_writers_leave_no_gap_and_no_repeat(database: Database):
    claim = running(database)

    def note() -> None:
        for _ in range(5):
            with database.begin() as connection:
                events.append(connection, claim.job.id, claim.fence, "warning", {})

    assert at_once([note] * 5) == [None] * 5
    assert len(feed(database, claim.job.id)) == now(database, claim.job.id).event_seq == 27


def test_a_rolled_back_move_takes_no_number(database: Database):
    claim = running(database)
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        lifecycle.phase(connection, claim.job.id, claim.fence, "training")
        _ = 1 / 0
    with database.begin() as connection:
        lifecycle.phase(connection, claim.job.id, claim.fence, "evaluating")
    assert feed(database, claim.job.id) == ["queued", "claimed", "phase"]


def test_an_event_without_a_fence_needs_only_the_job(database: Database):
    job = submitted(database)
    with database.begin() as connection:
        assert events.append(connection, job.id, None, "note", {}).seq == 2
        with pytest.raises(LeaseLost):
            events.append(connection, job.id, 0, "note", {})
        with pytest.raises(NotFound):
            events.append(connection, "job_none", None, "note", {})
