"""Row 21: two workers claim at the same time, two sweeps run at the same time. Each job has one owner and one end."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import pytest
from sqlalchemy import Connection, insert, select

from base.errors import DatabaseUnavailable
from store import attempts, jobs, lifecycle
from store.database import Database
from store.records import database_now
from store.tables import job_attempts
from store.tables import jobs as rows
from tests.store.helpers import SHA256, event_types, expire_lease, read_job, run_concurrently, running, submitted

T = TypeVar("T")

MANY = 500
"""On each of two databases."""


@pytest.fixture
def postgres(postgres_database_url: str) -> Iterator[Database]:
    database = Database(postgres_database_url)
    yield database
    database.dispose()


def retry(database: Database, move: Callable[[Connection], T]) -> T:
    """Try again as a worker does: SQLite's lock is not fair, and a wait for it may be too long."""
    while True:
        with suppress(DatabaseUnavailable), database.begin() as connection:
            return move(connection)


def claim_all(database: Database, owner: str) -> list[str]:
    claimed = []
    while claim := retry(database, lambda connection: lifecycle.claim(connection, owner, 600, takeover=True)):
        claimed.append(claim.job.id)
    return claimed


def queue_many(database: Database) -> set[str]:
    """Inserted at once: submitting is not what is tested."""
    like = {"project": "ours", "method": "kd", "spec": {}, "resolved_spec": {}, "spec_sha256": SHA256}
    new = [
        {"id": f"job_{number:04}", "status": "queued", "max_attempts": 3, "event_seq": 0, **like}
        for number in range(MANY)
    ]
    with database.begin() as connection:
        connection.execute(insert(rows).values(created_at=database_now()), new)
    return {row["id"] for row in new}


def test_claim_by_two_workers_shares_hundreds_of_jobs(database: Database):
    expected = queue_many(database)
    one, two = run_concurrently([lambda: claim_all(database, "one"), lambda: claim_all(database, "two")])
    assert isinstance(one, list)
    assert isinstance(two, list)
    assert (len(one) + len(two), {*one, *two}) == (MANY, expected)
    with database.connect() as connection:
        owners = dict(connection.execute(select(rows.c.id, rows.c.owner)).all())
        claims = connection.execute(select(job_attempts.c.job_id, job_attempts.c.fence)).all()
    assert owners == dict.fromkeys(one, "one") | dict.fromkeys(two, "two")
    assert sorted(claims) == [(job_id, 1) for job_id in sorted(expected)]


def test_claim_that_is_not_committed_yet_is_skipped_by_others(postgres: Database):
    """On SQLite the second transaction could not begin."""
    first, second = submitted(postgres), submitted(postgres)
    with postgres.begin() as one, postgres.begin() as two:
        claims = [lifecycle.claim(connection, "worker", 60, takeover=True) for connection in (one, two, two)]
    assert [claim and claim.job.id for claim in claims] == [first.id, second.id, None]


@pytest.mark.parametrize("requested", ["cancel", "none"])
def test_sweep_by_four_ends_an_abandoned_job_once(database: Database, requested: str):
    job_ids = [running(database, max_attempts=1).job.id for _ in range(20)]
    for job_id in job_ids:
        expire_lease(database, job_id)
        if requested == "cancel":
            with database.begin() as connection:
                jobs.cancel(connection, job_id)

    def sweep() -> list[str]:
        return retry(database, lambda connection: lifecycle.sweep(connection, takeover=True))

    assert run_concurrently([sweep] * 4) == [[]] * 4
    end = "cancelled" if requested == "cancel" else "failed"
    for job_id in job_ids:
        assert read_job(database, job_id).status == end
        assert event_types(database, job_id).count(end) == 1
        with database.connect() as connection:
            assert [attempt.how for attempt in attempts.list_attempts(connection, job_id)] == ["lost"]
