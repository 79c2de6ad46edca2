from collections.abc import Callable

import pytest
from sqlalchemy import func, select, update

from base.jobs import ALLOWED_ACTIONS, allowed_actions
from store import artifacts, checkpoints, jobs, lifecycle, metrics
from store.artifacts import NewArtifact
from store.clock import database_now
from store.database import Database
from store.errors import ActionNotAllowed, IdempotencyConflict, NotFound
from store.jobs import Job
from store.tables import jobs as job_rows
from store.tables import metadata
from tests.store.scene import SHA256, at_once, claimed, feed, now, running, submitted

VERBS = {
    "cancel": jobs.cancel,
    "pause": jobs.pause,
    "resume": jobs.resume,
    "retry": jobs.retry,
    "delete": jobs.delete,
}
DONE_ALREADY = {("cancelled", "cancel"), ("paused", "pause")}
"""No moves, but asking twice is asking once."""


def test_a_new_job_waits_first_in_line_with_its_spec_as_sent(database: Database):
    job = submitted(database, spec={"method": "kd", "note": "ä ∑"}, deadline_s=60)
    assert (job.status, job.attempts_without_progress, job.fence, job.event_seq) == ("queued", 0, 0, 1)
    assert (job.spec, job.deadline_at - job.created_at) == ({"method": "kd", "note": "ä ∑"}, pytest.approx(60, abs=0.1))
    assert now(database, job.id) == job
    assert feed(database, job.id) == ["queued"]


def test_the_same_key_and_body_is_the_same_job(database: Database):
    first = submitted(database, idempotency_key="k")
    assert submitted(database, idempotency_key="k") == first
    assert feed(database, first.id) == ["queued"]


def test_the_key_of_a_finished_job_still_answers_with_it(database: Database):
    claim = running(database, idempotency_key="k")
    with database.begin() as connection:
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, [])
    assert submitted(database, idempotency_key="k").status == "succeeded"


def test_another_body_under_a_used_key_is_refused_and_named(database: Database):
    first = submitted(database, idempotency_key="k")
    with pytest.raises(IdempotencyConflict, match=f"used for another body, which became job {first.id}"):
        submitted(database, idempotency_key="k", spec_sha256="6" * 64)


def test_a_key_belongs_to_its_project_and_no_key_repeats_nothing(database: Database):
    submitted(database, idempotency_key="k")
    submitted(database, idempotency_key="k", project="theirs")
    submitted(database)
    submitted(database)
    with database.connect() as connection:
        assert jobs.by_status(connection) == {"queued": 4}
        assert jobs.by_status(connection, "theirs") == {"queued": 1}


def test_racing_senders_of_a_key_get_one_job_and_no_error(database: Database):
    for key in ("a", "b", "c"):
        answers = at_once([lambda key=key: submitted(database, idempotency_key=key)] * 8)
        assert len({answer.id for answer in answers if isinstance(answer, Job)}) == 1
        assert all(isinstance(answer, Job) for answer in answers), answers


def test_a_job_is_seen_in_its_own_project_only(database: Database):
    job = submitted(database)
    with database.connect() as connection:
        assert jobs.get(connection, job.id, project="ours") == job
        with pytest.raises(NotFound, match=f"there is no job '{job.id}'"):
            jobs.get(connection, job.id, project="theirs")


def test_pages_are_newest_first_and_whole(database: Database):
    sent = [submitted(database).id for _ in range(5)]
    submitted(database, project="theirs")
    seen, after = [], None
    with database.connect() as connection:
        for size in (2, 2, 1):
            page, after = jobs.list_page(connection, project="ours", limit=2, after=after)
            assert len(page) == size
            seen += [job.id for job in page]
    assert after is None
    assert seen == sorted(sent, reverse=True)


def test_a_full_last_page_has_no_next(database: Database):
    submitted(database)
    submitted(database)
    with database.connect() as connection:
        assert jobs.list_page(connection, project="ours", limit=2)[1] is None


def test_pages_by_status_and_method(database: Database):
    first = submitted(database, method="fitnet")
    submitted(database)
    claimed(database)
    with database.connect() as connection:

        def ids(**wanted: str) -> list[str]:
            return [job.id for job in jobs.list_page(connection, project="ours", limit=9, **wanted)[0]]

        assert ids(status="running") == ids(method="fitnet") == [first.id]
        assert ids(status="running", method="kd") == []


@pytest.mark.parametrize("waiting", ["queued", "paused"])
def test_what_waits_is_cancelled_at_once(database: Database, waiting: str):
    job = submitted(database)
    with database.begin() as connection:
        if waiting == "paused":
            jobs.pause(connection, job.id)
        job = jobs.cancel(connection, job.id)
    assert (job.status, job.fence, job.finished_at is not None) == ("cancelled", 1, True)
    assert feed(database, job.id)[-1] == "cancelled"


def test_what_runs_is_asked_and_asking_twice_is_asking_once(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        first = jobs.cancel(connection, job_id)
        assert (first.status, first.requested, first.finished_at) == ("running", "cancel", None)
        assert jobs.cancel(connection, job_id) == first
    assert feed(database, job_id) == ["queued", "claimed", "cancel_requested"]


def test_a_pause_is_asked_once_and_gives_way_to_a_cancel(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        assert jobs.pause(connection, job_id) == jobs.pause(connection, job_id)
        assert jobs.cancel(connection, job_id).requested == "cancel"
        with pytest.raises(ActionNotAllowed, match=r"asked to cancel, cannot be asked to pause; allowed now: cancel$"):
            jobs.pause(connection, job_id)
    assert feed(database, job_id) == ["queued", "claimed", "pause_requested", "cancel_requested"]


@pytest.mark.parametrize(("move", "done"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_what_was_done_at_once_is_told_again(database: Database, move: Callable[..., jobs.Job], done: str):
    """The first answer may have been lost."""
    job = submitted(database)
    with database.begin() as connection:
        first = move(connection, job.id)
        assert first.status == done
        assert move(connection, job.id) == first
    assert feed(database, job.id) == ["queued", done]


def test_a_paused_job_is_out_of_the_queue_until_it_is_resumed(database: Database):
    job = submitted(database)
    with database.begin() as connection:
        assert jobs.pause(connection, job.id).status == "paused"
        assert lifecycle.claim(connection, "worker", 30, rescue=True) is None
        assert jobs.resume(connection, job.id).status == "queued"
    assert claimed(database).job.id == job.id
    assert feed(database, job.id) == ["queued", "paused", "resumed", "claimed"]


def test_a_retry_has_all_attempts_again_and_keeps_its_checkpoints(database: Database):
    claim = running(database, max_attempts=1)
    error = {"code": "internal", "message": "", "retryable": True, "hint": None}
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, claim.fence, step=7, sha256=SHA256, bytes=1, path="x")
        lifecycle.finish_failed(connection, claim.job.id, claim.fence, error, None)
        job = jobs.retry(connection, claim.job.id)
    assert (job.status, job.attempts_without_progress, job.error, job.finished_at) == ("queued", 0, None, None)
    again = claimed(database)
    assert (again.fence, again.attempts_without_progress, again.checkpoints[0].step) == (2, 1, 7)
    assert feed(database, job.id) == ["queued", "claimed", "checkpoint", "failed", "retried", "claimed"]


def test_a_retry_from_scratch_forgets_checkpoints_and_curves_and_keeps_the_feed(database: Database):
    claim = running(database)
    job_id, fence = claim.job.id, claim.fence
    with database.begin() as connection:
        checkpoints.record(connection, job_id, fence, step=7, sha256=SHA256, bytes=1, path="x")
        metrics.record(connection, job_id, fence, "student", step=7, epoch=1, values={"loss": 1})
        lifecycle.progress(connection, job_id, fence, {"percent": 40})
        lifecycle.finish_failed(connection, job_id, fence, {"code": "loss_diverged"}, None)
        job = jobs.retry(connection, job_id, from_scratch=True)
        assert metrics.series(connection, job_id) == {}
    assert (job.checkpoint_step, job.progress) == (None, None)
    assert claimed(database).checkpoints == []
    assert feed(database, job_id) == ["queued", "claimed", "checkpoint", "failed", "retried", "claimed"]


def test_a_retry_has_as_long_a_deadline_again(database: Database):
    job = submitted(database, deadline_s=-1)
    with database.begin() as connection:
        lifecycle.sweep(connection, rescue=False)
        connection.execute(update(job_rows).values(deadline_s=60))
        again = jobs.retry(connection, job.id)
        now_s = connection.scalar(select(database_now()))
    assert again.deadline_at - now_s == pytest.approx(60, abs=1)


def test_a_deleted_job_leaves_no_row_behind(database: Database):
    claim = running(database)
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, claim.fence, step=1, sha256=SHA256, bytes=1, path="x")
        metrics.record(connection, claim.job.id, claim.fence, "student", step=1, epoch=1, values={"loss": 1})
        made = [NewArtifact("report.json", SHA256, 2, "application/json")]
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, made)
        assert artifacts.list(connection, claim.job.id)
        jobs.delete(connection, claim.job.id)
        tables = [table for table in metadata.tables.values() if table.name != "alembic_version"]
        left = {table.name: connection.scalar(select(func.count()).select_from(table)) for table in tables}
    assert set(left.values()) == {0}, left


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("status", ALLOWED_ACTIONS)
def test_moves_are_lawful_as_the_table_says(database: Database, status: str, verb: str):
    job = submitted(database)
    lease = 1e12 if status == "running" else None
    with database.begin() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job.id).values(status=status, lease_until=lease))
    with database.begin() as connection:
        if verb in ALLOWED_ACTIONS[status] or (status, verb) in DONE_ALREADY:
            VERBS[verb](connection, job.id, project="ours")
            return
        with pytest.raises(ActionNotAllowed) as refused:
            VERBS[verb](connection, job.id, project="ours")
    assert (refused.value.status, refused.value.verb, refused.value.allowed_actions) == (
        status,
        verb,
        allowed_actions(status, None),
    )
    assert str(refused.value).endswith(f"allowed now: {', '.join(ALLOWED_ACTIONS[status])}")
    assert now(database, job.id).event_seq == 1


@pytest.mark.parametrize("move", VERBS.values(), ids=VERBS)
def test_a_job_of_another_project_is_not_there(database: Database, move: Callable[..., object]):
    job = submitted(database)
    with pytest.raises(NotFound), database.begin() as connection:
        move(connection, job.id, project="theirs")
    assert now(database, job.id) == job
