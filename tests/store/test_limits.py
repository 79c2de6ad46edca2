"""The limits of projects: exact also when many come at once, on both databases."""

import pytest
from sqlalchemy import update

from store import artifacts, checkpoints, jobs, lifecycle, limits, projects, registry, uploads, workers
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import LimitReached, NotFound, QuotaExceeded
from store.file_store import Blob
from store.limits import Limits, Room
from store.records import Job, upsert
from store.registry import NewEntry
from store.settings import Settings
from store.tables import jobs as job_rows
from store.tables import project_blobs
from tests.store.helpers import LEASE_S, SHA256, claimed, new_job, run_concurrently, submitted


def queue(database: Database, bound: int | None, project: str = "ours") -> Job:
    with database.begin() as connection:
        return jobs.submit(connection, new_job(project=project), bound)[0]


def claim(database: Database, bound: int | None = None, takeover: bool = False) -> lifecycle.Claim | None:
    with database.begin() as connection:
        return lifecycle.claim(connection, "worker", LEASE_S, takeover=takeover, max_running=bound)


def bound_project(database: Database, name: str, **changes: int | None) -> dict[str, int]:
    with database.begin() as connection:
        try:
            projects.get(connection, name)
        except NotFound:
            projects.create(connection, name)
        return limits.set_own(connection, name, changes)


# ── the limits of a project ──


def test_defaults_are_those_of_the_settings():
    settings = Settings(limit_jobs_queued=7, upload_max_bytes=5)
    found = limits.defaults(settings)
    assert (found.jobs_queued, found.upload_bytes, found.jobs_running) == (7, 5, None)
    assert all(bound is None or bound >= 100 for bound in limits.defaults(Settings()).model_dump().values())


def test_set_own_changes_and_removes_limits(database: Database):
    assert bound_project(database, "ours", jobs_queued=3, jobs_running=0) == {"jobs_queued": 3, "jobs_running": 0}
    assert bound_project(database, "ours", jobs_queued=None) == {"jobs_running": 0}
    bound_project(database, "theirs")
    with database.connect() as connection:
        assert limits.own(connection, "ours") == {"jobs_running": 0}
        assert limits.own(connection, "theirs") == {}
    with database.begin() as connection, pytest.raises(NotFound, match="there is no project 'none'"):
        limits.set_own(connection, "none", {"jobs_queued": 1})


def test_set_own_at_once_loses_none(database: Database):
    bound_project(database, "ours")
    names = ["jobs_queued", "jobs_running", "bytes_stored", "event_streams"]
    run_concurrently([lambda name=name: bound_project(database, "ours", **{name: 9}) for name in names])
    with database.connect() as connection:
        assert limits.own(connection, "ours") == dict.fromkeys(names, 9)


@pytest.mark.parametrize("field", [{"jobs_queued": -1}, {"jobs_running": 2**53 + 1}, {"upload_bytes": 0}, {"job": 1}])
def test_limits_refuse_what_is_no_limit(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Limits(**field)


# ── queued jobs ──


def test_submit_beyond_the_queue_of_the_project_raises_limit_reached(database: Database):
    first = queue(database, 2)
    queue(database, 2)
    with pytest.raises(LimitReached, match="limit jobs_queued is 2, and it has 2; try again in 30 s") as caught:
        queue(database, 2)
    assert (caught.value.retry_after_s, caught.value.details["used"]) == (30, 2)
    queue(database, 2, "theirs")
    with database.begin() as connection:
        jobs.pause(connection, first.id)
    with pytest.raises(LimitReached):
        queue(database, 2)  # A paused job keeps its place: it can be resumed.
    claim(database)
    queue(database, 2)


def test_submit_of_many_at_once_keeps_the_queue_within_its_limit(database: Database):
    answers = run_concurrently([lambda: queue(database, 3)] * 12)
    assert sum(isinstance(one, Job) for one in answers) == 3
    assert sum(isinstance(one, LimitReached) for one in answers) == 9


def test_submit_again_under_its_key_is_not_refused(database: Database):
    job = submitted(database, idempotency_key="k")
    with database.begin() as connection:
        assert jobs.submit(connection, new_job(idempotency_key="k"), 1) == (job, False)


def test_retry_counts_as_a_queued_job(database: Database):
    job = submitted(database)
    with database.begin() as connection:
        jobs.cancel(connection, job.id)
    queue(database, 1)
    with database.begin() as connection, pytest.raises(LimitReached):
        jobs.retry(connection, job.id, "ours", max_queued=1)
    with database.begin() as connection:
        assert jobs.retry(connection, job.id, "ours", max_queued=2).status == "queued"


# ── running jobs ──


def test_claim_leaves_the_jobs_of_a_full_project_and_starves_no_other(database: Database):
    bound_project(database, "ours", jobs_running=1)
    mine = [submitted(database, priority=5) for _ in range(3)]
    theirs = submitted(database, project="theirs")
    claims = [claim(database) for _ in range(3)]
    assert [one and one.job.id for one in claims] == [mine[0].id, theirs.id, None]
    with database.connect() as connection:
        assert not lifecycle.has_claimable(connection, takeover=True)
    assert claims[0] is not None
    with database.begin() as connection:
        lifecycle.finish_cancelled(connection, mine[0].id, claims[0].fence)
    following = claim(database)
    assert following is not None and following.job.id == mine[1].id


def test_job_that_its_project_holds_back_says_so(database: Database):
    bound_project(database, "ours", jobs_running=0)
    mine, theirs = submitted(database), submitted(database, project="theirs")
    with database.connect() as connection:
        reasons = workers.waiting_reasons(connection, [mine, theirs], LEASE_S)
    assert (reasons[mine.id].reason, reasons[mine.id].position) == ("project_limit", 1)
    assert reasons[theirs.id].reason == "no_worker"


def test_claim_applies_the_default_to_projects_without_a_limit(database: Database):
    bound_project(database, "theirs", jobs_running=2)
    for project in ("ours", "ours", "theirs", "theirs", "theirs"):
        submitted(database, project=project)
    taken = [one.job.project for one in iter(lambda: claim(database, 1), None)]
    assert taken == ["ours", "theirs", "theirs"]


def test_claim_takes_over_a_job_of_a_full_project(database: Database):
    bound_project(database, "ours", jobs_running=1)
    job = submitted(database)
    claimed(database, lease_s=-1)
    again = claim(database, takeover=True)
    assert again is not None and again.job.id == job.id


def test_claim_starts_none_of_a_project_whose_limit_is_zero(database: Database):
    bound_project(database, "ours", jobs_running=0)
    submitted(database)
    assert claim(database) is None


def test_claim_of_many_at_once_keeps_a_project_within_its_limit(database: Database):
    bound_project(database, "ours", jobs_running=2)
    for _ in range(8):
        submitted(database)
    claims = run_concurrently([lambda: claim(database)] * 8)
    assert sum(isinstance(one, lifecycle.Claim) for one in claims) == 2
    assert sum(one is None for one in claims) == 6


def test_sweep_wakes_no_worker_for_a_full_project(database: Database):
    bound_project(database, "ours", jobs_running=0)
    mine, theirs = submitted(database), submitted(database, project="theirs")
    with database.begin() as connection:
        connection.execute(update(job_rows).values(created_at=0))
        assert lifecycle.sweep(connection, takeover=True) == [theirs.id]
        limits.set_own(connection, "ours", {"jobs_running": None})
        assert lifecycle.sweep(connection, takeover=True) == [mine.id, theirs.id]


# ── inspections ──


def register(database: Database, name: str, bound: int, kind: registry.Registry = registry.models) -> object:
    with database.begin() as connection:
        new = NewEntry("ours", name, SHA256, {}, {})
        return kind.register_once(connection, None, new, "server", LEASE_S, bound)[0]


def test_register_beyond_the_inspections_of_the_project_raises_limit_reached(database: Database):
    entry = register(database, "one", 2)
    register(database, "two", 2, registry.datasets)
    with pytest.raises(LimitReached, match="inspections is 2, and it has 2"):
        register(database, "three", 2)
    with database.begin() as connection:
        registry.models.finish(connection, entry, "server", {"facts": {}})
    register(database, "three", 2)


def test_register_of_many_at_once_keeps_within_the_limit(database: Database):
    made = run_concurrently([lambda name=f"m{n}": register(database, name, 2) for n in range(8)])
    assert sum(isinstance(one, LimitReached) for one in made) == 6


# ── bytes ──


def upload(database: Database, bytes: int | None, bound: int, others: int = 0) -> uploads.Upload:
    with database.begin() as connection:
        return uploads.create_once(connection, None, "ours", bytes=bytes, room=Room(bound, others))[0]


def test_upload_beyond_the_bytes_of_the_project_raises_quota_exceeded(database: Database):
    upload(database, 60, 100)
    with pytest.raises(QuotaExceeded, match="bytes_stored is 100, it has 60, and this needs 50 more; delete") as caught:
        upload(database, 50, 100)
    assert caught.value.details == {"limit": "bytes_stored", "value": 100, "used": 60}
    upload(database, 40, 100)
    with pytest.raises(QuotaExceeded):
        upload(database, 1, 100)
    with pytest.raises(QuotaExceeded):
        upload(database, 50, 160, others=20)


def test_upload_of_many_at_once_keeps_within_the_bytes(database: Database):
    made = run_concurrently([lambda: upload(database, 10, 35)] * 8)
    assert sum(isinstance(one, uploads.Upload) for one in made) == 3


def test_append_of_bytes_that_were_not_announced_is_checked(database: Database):
    begun = upload(database, None, 100)
    with database.begin() as connection, pytest.raises(QuotaExceeded):
        uploads.append(connection, "ours", begun.id, offset=0, length=101, room=Room(100, 0))
    with database.begin() as connection:
        assert uploads.append(connection, "ours", begun.id, offset=0, length=100, room=Room(100, 0)).offset == 100


def test_submit_of_a_project_without_room_raises_quota_exceeded(database: Database):
    with database.begin() as connection, pytest.raises(QuotaExceeded):
        jobs.submit(connection, new_job(), None, Room(5, 5))
    with database.begin() as connection:
        assert jobs.submit(connection, new_job(), None, Room(6, 5))[1]


def test_bytes_count_each_content_once(database: Database):
    """Two uploads of the same 10 bytes, 5 announced; artifacts of 7, 7 again, the uploaded 10; a checkpoint of 3."""
    with database.begin() as connection:
        for _ in range(2):
            done = uploads.create(connection, "ours", bytes=10)
            uploads.append(connection, "ours", done.id, offset=0, length=10)
            uploads.complete(connection, "ours", done.id, Blob("a" * 64, 10))
        uploads.create(connection, "ours", bytes=5)
    for name in ("one", "two"):
        submitted(database)
        held = claimed(database)
        with database.begin() as connection:
            if name == "one":
                saved = {"step": 1, "sha256": "c" * 64, "bytes": 3, "path": "path"}
                checkpoints.record(connection, held.job.id, held.fence, **saved)
            made = [NewArtifact("student", "b" * 64, 7, "x"), NewArtifact("same", "a" * 64, 10, "x")]
            artifacts.publish(connection, held.job.id, made)
    with database.begin() as connection:
        blobs = [{"project": "ours", "sha256": digest * 64, "seen_at": 1.0} for digest in "abd"]
        connection.execute(upsert(connection, project_blobs).on_conflict_do_nothing(), blobs)
        assert limits.bytes_of_uploads(connection, "ours") == 15
        assert limits.bytes_of_jobs(connection, "ours") == 10
        assert limits.other_blobs(connection, "ours") == ["d" * 64]
        assert limits.bytes_of_uploads(connection, "theirs") == limits.bytes_of_jobs(connection, "theirs") == 0
