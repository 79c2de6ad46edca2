import pytest

from base.warning import WarningItem
from store import events, lifecycle
from store.database import Database
from store.errors import LeaseLost
from tests.store.helpers import WARNING, event_types, read_job, run_concurrently, running


def test_list_events_after_a_number(database: Database):
    claim = running(database)
    with database.begin() as connection:
        events.append_warning(connection, claim.job.id, claim.fence, WARNING)
        (event,) = events.list_events(connection, claim.job.id, 2, 1)
        assert (event.seq, event.type, event.data) == (3, "warning", WARNING.as_dict())
        assert [event.seq for event in events.list_events(connection, claim.job.id, 1, limit=10)] == [2, 3]
        assert [event.seq for event in events.list_events(connection, claim.job.id, 0, limit=1)] == [1]
        assert events.list_events(connection, claim.job.id, 3, limit=10) == []


def test_event_times_do_not_decrease(database: Database):
    claim = running(database)
    with database.connect() as connection:
        first, second = events.list_events(connection, claim.job.id, 0, 10)
    assert claim.job.created_at <= first.at <= second.at


def test_append_event_concurrently_leaves_no_gap_and_no_repeat(database: Database):
    claim = running(database)

    def set_phases() -> None:
        for _ in range(5):
            with database.begin() as connection:
                lifecycle.set_phase(connection, claim.job.id, claim.fence, "training")

    assert run_concurrently([set_phases] * 5) == [None] * 5
    assert len(event_types(database, claim.job.id)) == read_job(database, claim.job.id).event_seq == 27


def test_update_job_that_is_rolled_back_takes_no_number(database: Database):
    claim = running(database)
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        lifecycle.set_phase(connection, claim.job.id, claim.fence, "training")
        _ = 1 / 0
    with database.begin() as connection:
        lifecycle.set_phase(connection, claim.job.id, claim.fence, "evaluating")
    assert event_types(database, claim.job.id) == ["queued", "claimed", "phase"]


def test_append_warning_adds_each_warning_to_the_job_and_its_events_once(database: Database):
    claim = running(database)
    other = WarningItem("bits_not_repeatable", "/training", "another number of threads")
    with database.begin() as connection:
        for warning in (WARNING, other, WARNING):
            events.append_warning(connection, claim.job.id, claim.fence, warning)
    assert read_job(database, claim.job.id).warnings == [WARNING.as_dict(), other.as_dict()]
    assert event_types(database, claim.job.id) == ["queued", "claimed", "warning", "warning"]


def test_append_warning_with_more_data_is_an_event_each_time(database: Database):
    """Two attempts can end in the same way: both ends are in the events, the warning is on the list once."""
    claim = running(database)
    with database.begin() as connection:
        for exit_code in (3, 4):
            events.append_warning(connection, claim.job.id, claim.fence, WARNING, {"exit_code": exit_code})
        data = [event.data for event in events.list_events(connection, claim.job.id, 2, 10)]
    assert data == [{**WARNING.as_dict(), "exit_code": 3}, {**WARNING.as_dict(), "exit_code": 4}]
    assert read_job(database, claim.job.id).warnings == [WARNING.as_dict()]


def test_append_warning_of_a_stale_attempt_is_refused(database: Database):
    claim = running(database)
    with database.begin() as connection, pytest.raises(LeaseLost):
        events.append_warning(connection, claim.job.id, claim.fence - 1, WARNING)
    assert read_job(database, claim.job.id).warnings == []
