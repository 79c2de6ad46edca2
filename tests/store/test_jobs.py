from collections.abc import Callable

import pytest
from sqlalchemy import func, select, update

from base.jobs import ALLOWED_ACTIONS, allowed_actions
from store import artifacts, checkpoints, events, jobs, lifecycle, metrics
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import ActionNotAllowed, IdempotencyConflict, NotFound
from store.records import Job, database_now
from store.tables import jobs as job_rows
from store.tables import metadata
from tests.clock import SettableClock
from tests.store.helpers import SHA256, WARNING, claimed, event_types, read_job, run_concurrently, running, submitted

ACTIONS = {
    "cancel": jobs.cancel,
    "pause": jobs.pause,
    "resume": jobs.resume,
    "retry": jobs.retry,
    "delete": jobs.delete,
}
DONE_ALREADY = {("cancelled", "cancel"), ("paused", "pause")}
"""Not allowed, but answered: these actions are idempotent."""


def test_submit_queues_a_job_with_its_spec_as_sent(database: Database):
    job = submitted(database, spec={"method": "kd", "note": "ä ∑"}, deadline_s=60)
    assert (job.status, job.attempts_without_progress, job.fence, job.event_seq) == ("queued", 0, 0, 1)
    assert (job.spec, job.deadline_at - job.created_at) == ({"method": "kd", "note": "ä ∑"}, pytest.approx(60, abs=0.1))
    assert read_job(database, job.id) == job
    assert event_types(database, job.id) == ["queued"]


def test_submit_puts_its_warnings_into_the_events_without_a_gap(database: Database):
    job = submitted(database, warnings=[WARNING.as_dict(), {**WARNING.as_dict(), "pointer": "/dataset"}])
    with database.begin() as connection:
        found = events.list_events(connection, job.id, 0, 10)
    assert [(event.seq, event.type) for event in found] == [(1, "queued"), (2, "warning"), (3, "warning")]
    assert (found[1].data, job.event_seq) == (WARNING.as_dict(), 3)
    claim = claimed(database)
    assert claim.job.event_seq == 4


def test_submit_with_the_same_key_and_body_is_the_same_job(database: Database):
    first = submitted(database, idempotency_key="k")
    assert submitted(database, idempotency_key="k") == first
    assert event_types(database, first.id) == ["queued"]


def test_submit_with_the_key_of_a_finished_job_returns_it(database: Database):
    claim = running(database, idempotency_key="k")
    with database.begin() as connection:
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, [])
    assert submitted(database, idempotency_key="k").status == "succeeded"


def test_submit_with_another_body_raises_idempotency_conflict(database: Database):
    first = submitted(database, idempotency_key="k")
    with pytest.raises(IdempotencyConflict, match=f"used with another body, for job {first.id}"):
        submitted(database, idempotency_key="k", spec_sha256="6" * 64)


def test_submit_keys_are_unique_in_a_project(database: Database):
    submitted(database, idempotency_key="k")
    submitted(database, idempotency_key="k", project="theirs")
    submitted(database)
    submitted(database)
    with database.connect() as connection:
        assert jobs.count_by_status(connection) == {"queued": 4}
        assert jobs.count_by_status(connection, "theirs") == {"queued": 1}


def test_submit_concurrently_with_one_key_makes_one_job(database: Database):
    for key in ("a", "b", "c"):
        answers = run_concurrently([lambda key=key: submitted(database, idempotency_key=key)] * 8)
        assert len({answer.id for answer in answers if isinstance(answer, Job)}) == 1
        assert all(isinstance(answer, Job) for answer in answers), answers


def test_get_finds_a_job_in_its_project_only(database: Database):
    job = submitted(database)
    with database.connect() as connection:
        assert jobs.get(connection, job.id, project="ours") == job
        with pytest.raises(NotFound, match=f"there is no job '{job.id}'"):
            jobs.get(connection, job.id, project="theirs")


def test_list_jobs_pages_are_newest_first_and_complete(database: Database):
    sent = [submitted(database).id for _ in range(5)]
    submitted(database, project="theirs")
    ids, after = [], None
    with database.connect() as connection:
        for size in (2, 2, 1):
            page, after = jobs.list_jobs(connection, "ours", jobs.JobQuery(limit=2, after=after))
            assert len(page) == size
            ids += [job.id for job in page]
    assert after is None
    assert ids == sorted(sent, reverse=True)


def test_list_jobs_full_last_page_has_no_next(database: Database):
    submitted(database)
    submitted(database)
    with database.connect() as connection:
        assert jobs.list_jobs(connection, "ours", jobs.JobQuery(limit=2))[1] is None


def test_list_jobs_by_status_and_method(database: Database):
    first = submitted(database, method="fitnet")
    submitted(database)
    claimed(database)
    with database.connect() as connection:

        def ids(**filters: str) -> list[str]:
            return [job.id for job in jobs.list_jobs(connection, "ours", jobs.JobQuery(limit=9, **filters))[0]]

        assert ids(status="running") == ids(method="fitnet") == [first.id]
        assert ids(status="running", method="kd") == []


@pytest.mark.parametrize("waiting", ["queued", "paused"])
def test_cancel_of_a_waiting_job_is_immediate(database: Database, waiting: str):
    job = submitted(database)
    with database.begin() as connection:
        if waiting == "paused":
            jobs.pause(connection, job.id)
        job = jobs.cancel(connection, job.id)
    assert (job.status, job.fence, job.finished_at is not None) == ("cancelled", 1, True)
    assert event_types(database, job.id)[-1] == "cancelled"


def test_cancel_of_a_running_job_is_a_request_and_idempotent(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        first = jobs.cancel(connection, job_id)
        assert (first.status, first.requested, first.finished_at) == ("running", "cancel", None)
        assert jobs.cancel(connection, job_id) == first
    assert event_types(database, job_id) == ["queued", "claimed", "cancel_requested"]


def test_pause_is_idempotent_and_cancel_replaces_it(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        assert jobs.pause(connection, job_id) == jobs.pause(connection, job_id)
        assert jobs.cancel(connection, job_id).requested == "cancel"
        with pytest.raises(ActionNotAllowed, match=r"pause is not allowed .* \(cancel requested\); allowed: cancel$"):
            jobs.pause(connection, job_id)
    assert event_types(database, job_id) == ["queued", "claimed", "pause_requested", "cancel_requested"]


@pytest.mark.parametrize(("action", "status"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_cancel_and_pause_done_at_once_are_idempotent(database: Database, action: Callable[..., Job], status: str):
    """The first answer may have been lost."""
    job = submitted(database)
    with database.begin() as connection:
        first = action(connection, job.id)
        assert first.status == status
        assert action(connection, job.id) == first
    assert event_types(database, job.id) == ["queued", status]


def test_pause_takes_a_job_out_of_the_queue_until_resume(database: Database):
    job = submitted(database)
    with database.begin() as connection:
        assert jobs.pause(connection, job.id).status == "paused"
        assert lifecycle.claim(connection, "worker", 30, takeover=True) is None
        assert jobs.resume(connection, job.id).status == "queued"
    assert claimed(database).job.id == job.id
    assert event_types(database, job.id) == ["queued", "paused", "resumed", "claimed"]


def test_retry_restores_all_attempts_and_keeps_checkpoints(database: Database):
    claim = running(database, max_attempts=1)
    error = {"code": "internal", "message": "", "retryable": True, "hint": None}
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, claim.fence, step=7, sha256=SHA256, bytes=1, path="x")
        lifecycle.finish_failed(connection, claim.job.id, claim.fence, error, None)
        job = jobs.retry(connection, claim.job.id)
    assert (job.status, job.attempts_without_progress, job.error, job.finished_at) == ("queued", 0, None, None)
    again = claimed(database)
    assert (again.fence, again.job.attempts_without_progress, again.checkpoints[0].step) == (2, 1, 7)
    assert event_types(database, job.id) == ["queued", "claimed", "checkpoint", "failed", "retried", "claimed"]


def test_retry_from_scratch_deletes_checkpoints_and_curves_and_keeps_the_events(database: Database):
    claim = running(database)
    job_id, fence = claim.job.id, claim.fence
    with database.begin() as connection:
        checkpoints.record(connection, job_id, fence, step=7, sha256=SHA256, bytes=1, path="x")
        metrics.record(connection, job_id, fence, "student", step=7, epoch=1, values={"loss": 1})
        lifecycle.set_progress(connection, job_id, fence, {"percent": 40})
        lifecycle.finish_failed(connection, job_id, fence, {"code": "loss_diverged"}, None)
        job = jobs.retry(connection, job_id, from_scratch=True)
        assert metrics.series(connection, job_id) == {}
    assert (job.checkpoint_step, job.progress) == (None, None)
    assert claimed(database).checkpoints == []
    assert event_types(database, job_id) == ["queued", "claimed", "checkpoint", "failed", "retried", "claimed"]


def test_retry_has_the_whole_deadline_again(database: Database, clock: SettableClock):
    job = submitted(database, deadline_s=60)
    clock.advance(61)
    with database.begin() as connection:
        lifecycle.sweep(connection, takeover=False)
        again = jobs.retry(connection, job.id)
        now_s = connection.scalar(select(database_now()))
    assert again.deadline_at - now_s == pytest.approx(60, abs=1)


def test_delete_leaves_no_row(database: Database):
    claim = running(database)
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, claim.fence, step=1, sha256=SHA256, bytes=1, path="x")
        metrics.record(connection, claim.job.id, claim.fence, "student", step=1, epoch=1, values={"loss": 1})
        made = [NewArtifact("report.json", SHA256, 2, "application/json")]
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, made)
        assert artifacts.list_artifacts(connection, claim.job.id)
        jobs.delete(connection, claim.job.id)
        # The project stays, and the collector takes its blobs' rows when it takes their files.
        kept = ("alembic_version", "projects", "project_blobs")
        tables = [table for table in metadata.tables.values() if table.name not in kept]
        left = {table.name: connection.scalar(select(func.count()).select_from(table)) for table in tables}
    assert set(left.values()) == {0}, left


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("status", ALLOWED_ACTIONS)
def test_actions_are_allowed_as_the_table_lists_them(database: Database, status: str, action: str):
    job = submitted(database)
    lease = 1e12 if status == "running" else None
    with database.begin() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job.id).values(status=status, lease_until=lease))
    with database.begin() as connection:
        if action in ALLOWED_ACTIONS[status] or (status, action) in DONE_ALREADY:
            ACTIONS[action](connection, job.id, project="ours")
            return
        with pytest.raises(ActionNotAllowed) as refused:
            ACTIONS[action](connection, job.id, project="ours")
    assert (refused.value.status, refused.value.action, refused.value.allowed_actions) == (
        status,
        action,
        allowed_actions(status, None),
    )
    assert str(refused.value).endswith(f"allowed: {', '.join(ALLOWED_ACTIONS[status])}")
    assert read_job(database, job.id).event_seq == 1


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_actions_on_a_job_of_another_project_raise_not_found(database: Database, action: Callable[..., object]):
    job = submitted(database)
    with pytest.raises(NotFound), database.begin() as connection:
        action(connection, job.id, project="theirs")
    assert read_job(database, job.id) == job
