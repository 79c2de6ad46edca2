"""Predictions on both databases: who may ask how much, and how workers share the answering."""

import pytest
from sqlalchemy import select

from store import jobs, lifecycle, predictions, workers
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import LimitReached, NotFound
from store.predictions import KEEP_S, LEASE_S, MOST_ATTEMPTS, MOST_WAITING, Claimed, Prediction
from store.tables import predictions as rows
from tests.clock import SettableClock
from tests.store.helpers import ERROR, SHA256, run_concurrently, running

BLOBS = {name: letter * 64 for name, letter in (("student.safetensors", "a"), ("alone.safetensors", "b"))}


def done(database: Database, *names: str, **resolved: object) -> str:
    """A job that has succeeded with these files."""
    claim = running(database, resolved_spec={"method": "kd", **resolved})
    files = [NewArtifact(name, BLOBS[name], 1, "application/octet-stream") for name in ("student.safetensors", *names)]
    with database.begin() as connection:
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {"dataset": {"facts": "of it"}}, files)
    return claim.job.id


def ask(database: Database, job_id: str, project: str = "ours") -> Prediction:
    with database.begin() as connection:
        return predictions.add(connection, project, job_id, predictions.make_id(), SHA256)


def claim(database: Database, owner: str = "worker") -> Claimed | None:
    with database.begin() as connection:
        return predictions.claim(connection, owner)


def finish(database: Database, prediction_id: str, owner: str = "worker", **result: object) -> bool:
    with database.begin() as connection:
        return predictions.finish(connection, prediction_id, owner, **result)


def read(database: Database, asked: Prediction) -> Prediction:
    with database.connect() as connection:
        return predictions.get(connection, asked.project, asked.id)


def expire(database: Database) -> list[str]:
    with database.begin() as connection:
        return list(predictions.expire(connection))


def test_claim_takes_the_oldest_with_what_a_worker_needs(database: Database):
    job_id = done(database, "alone.safetensors")
    first, second = ask(database, job_id), ask(database, job_id)
    assert (first.state, first.answer, first.finished_at) == ("waiting", None, None)
    with database.connect() as connection:
        assert predictions.has_claimable(connection)
    claimed = claim(database)
    assert claimed == Claimed(
        first.id, job_id, "ours", SHA256, {"method": "kd"}, {"facts": "of it"}, "a" * 64, "b" * 64
    )  # fmt: skip
    assert read(database, first).state == "running"
    other = claim(database)
    assert other is not None and other.id == second.id
    assert claim(database) is None
    with database.connect() as connection:
        assert not predictions.has_claimable(connection)


def test_claim_lets_projects_take_turns(database: Database):
    job_id = done(database)
    first, second, third = (ask(database, job_id) for _ in range(3))
    other = ask(database, job_id, project="theirs")
    order = [claimed.id for _ in range(4) if (claimed := claim(database)) is not None]
    assert order == [first.id, other.id, second.id, third.id]


def test_claim_takes_the_student_alone_of_another_job_from_the_resolved_spec(database: Database):
    ask(database, done(database, baseline="blob:sha256:" + "c" * 64))
    claimed = claim(database)
    assert claimed is not None and claimed.alone == "c" * 64
    ask(database, done(database, baseline="none"))
    claimed = claim(database)
    assert claimed is not None and claimed.alone is None


def test_claim_of_a_job_without_a_student_or_facts_raises_nothing(database: Database):
    """Such a row would be the first one for ever."""
    claimed_job = running(database, resolved_spec={"method": "kd"})
    with database.begin() as connection:
        lifecycle.finish_succeeded(connection, claimed_job.job.id, claimed_job.fence, {}, [])
    ask(database, claimed_job.job.id)
    claimed = claim(database)
    assert claimed is not None and (claimed.student, claimed.dataset) == ("", {})


def test_finish_is_accepted_from_the_owner_once(database: Database):
    asked = ask(database, done(database))
    claim(database)
    assert not finish(database, asked.id, "another", answer={})
    assert finish(database, asked.id, answer={"student": 1})
    assert not finish(database, asked.id, answer={"student": 2})
    found = read(database, asked)
    assert (found.state, found.answer, found.error) == ("answered", {"student": 1}, None)
    assert found.finished_at is not None and found.finished_at >= found.created_at


def test_finish_with_an_error(database: Database):
    asked = ask(database, done(database))
    claim(database)
    assert finish(database, asked.id, error=ERROR)
    found = read(database, asked)
    assert (found.state, found.answer, found.error) == ("failed", None, ERROR)


def test_release_lets_another_worker_run_it_without_an_attempt(database: Database):
    asked = ask(database, done(database))
    for _ in range(MOST_ATTEMPTS + 1):
        claim(database)
        with database.begin() as connection:
            assert predictions.release(connection, asked.id, "worker")
    assert claim(database, "another") is not None


def test_an_expired_lease_is_claimed_again_and_then_given_up(database: Database, clock: SettableClock):
    asked = ask(database, done(database))
    for owner in ("first", "second"):
        assert claim(database, owner) is not None
        assert claim(database, "thief") is None
        clock.advance(LEASE_S + 1)
    assert claim(database) is None
    assert not finish(database, asked.id, "first", answer={})
    assert expire(database) == [asked.id]
    found = read(database, asked)
    assert found.state == "failed" and found.error is not None and found.error["code"] == "worker_lost"
    assert not finish(database, asked.id, "second", answer={})


def test_expire_deletes_old_rows_in_any_state(database: Database, clock: SettableClock):
    job_id = done(database)
    old, answered = ask(database, job_id), ask(database, job_id)
    claim(database)
    claim(database)
    finish(database, answered.id, answer={})
    assert expire(database) == []
    clock.advance(KEEP_S + 1)
    young = ask(database, job_id)
    assert {old.id, answered.id} <= set(expire(database))
    with database.connect() as connection:
        assert predictions.known(connection, [old.id, answered.id, young.id]) == {young.id}
    with pytest.raises(NotFound):
        read(database, answered)


def test_add_refuses_more_than_a_project_may_have_waiting(database: Database):
    job_id = done(database)
    for _ in range(MOST_WAITING):
        ask(database, job_id)
    with pytest.raises(LimitReached) as caught:
        ask(database, job_id)
    assert caught.value.details["limit"] == "predictions_waiting" and caught.value.retry_after_s > 0
    assert ask(database, job_id, project="others").state == "waiting"
    claimed = claim(database)
    assert claimed is not None and finish(database, claimed.id, answer={})
    ask(database, job_id)


def test_get_shows_a_project_its_own_only(database: Database):
    asked = ask(database, done(database))
    with pytest.raises(NotFound), database.connect() as connection:
        predictions.get(connection, "theirs", asked.id)


def test_predictions_go_with_their_job(database: Database):
    job_id = done(database)
    ask(database, job_id)
    claimed = claim(database)
    with database.begin() as connection:
        jobs.delete(connection, job_id)
        assert not connection.scalars(select(rows.c.id)).all()
    assert claimed is not None and not finish(database, claimed.id, answer={})


def test_claims_at_the_same_time_get_different_ones(database: Database):
    job_id = done(database)
    asked = {ask(database, job_id).id for _ in range(4)}
    found = run_concurrently([lambda: claim(database)] * 4)
    ids = [one.id for one in found if isinstance(one, Claimed)]
    assert len(ids) == len(set(ids)) and set(ids) <= asked
    assert all(one is None or isinstance(one, Claimed) for one in found)


def test_why_it_waits_in_words(database: Database):
    job_id = done(database)
    first, second = ask(database, job_id), ask(database, job_id)
    with database.connect() as connection:
        assert str(predictions.why_it_waits(connection, first, 30)).startswith("no worker runs now")
    with database.begin() as connection:
        workers.record_heartbeat(connection, "w", "host", [{"name": "cpu"}], None)
    with database.connect() as connection:
        text = "2 images wait or are being answered, this one among them"
        assert predictions.why_it_waits(connection, second, 30) == text
    claim(database)
    with database.connect() as connection:
        assert predictions.why_it_waits(connection, read(database, first), 30) == "a worker runs the job's models on it"
    finish(database, first.id, answer={})
    with database.connect() as connection:
        assert predictions.why_it_waits(connection, second, 30) == "it is next"
        assert predictions.why_it_waits(connection, read(database, first), 30) is None
