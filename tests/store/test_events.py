import pytest

from store import events, lifecycle
from store.database import Database
from store.errors import LeaseLost, NotFound
from tests.store.helpers import event_types, read_job, run_concurrently, running, submitted


def test_list_events_after_a_number(database: Database):
    claim = running(database)
    with database.begin() as connection:
        event = events.append_note(connection, claim.job.id, claim.fence, "warning", {"code": "slow_disk"})
        assert (event.seq, event.type, event.data) == (3, "warning", {"code": "slow_disk"})
        assert [event.seq for event in events.list_events(connection, claim.job.id, 1, limit=10)] == [2, 3]
        assert [event.seq for event in events.list_events(connection, claim.job.id, 0, limit=1)] == [1]
        assert events.list_events(connection, claim.job.id, 3, limit=10) == []


def test_event_times_do_not_decrease(database: Database):
    claim = running(database)
    with database.connect() as connection:
        first, second = events.list_events(connection, claim.job.id, 0, 10)
    assert claim.job.created_at <= first.at <= second.at


def test_append_note_concurrently_leaves_no_gap_and_no_repeat(database: Database):
    claim = running(database)

    def note() -> None:
        for _ in range(5):
            with database.begin() as connection:
                events.append_note(connection, claim.job.id, claim.fence, "warning", {})

    assert run_concurrently([note] * 5) == [None] * 5
    assert len(event_types(database, claim.job.id)) == read_job(database, claim.job.id).event_seq == 27


def test_update_job_that_is_rolled_back_takes_no_number(database: Database):
    claim = running(database)
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        lifecycle.set_phase(connection, claim.job.id, claim.fence, "training")
        _ = 1 / 0
    with database.begin() as connection:
        lifecycle.set_phase(connection, claim.job.id, claim.fence, "evaluating")
    assert event_types(database, claim.job.id) == ["queued", "claimed", "phase"]


def test_append_note_without_a_fence_needs_only_the_job(database: Database):
    job = submitted(database)
    with database.begin() as connection:
        assert events.append_note(connection, job.id, None, "note", {}).seq == 2
        with pytest.raises(LeaseLost):
            events.append_note(connection, job.id, 0, "note", {})
        with pytest.raises(NotFound):
            events.append_note(connection, "job_none", None, "note", {})
