"""Keys of requests: one thing for one meaning, whatever the order of fields."""

import pytest
from alembic import command
from sqlalchemy import func, select

from store import idempotency, jobs, registry, uploads
from store.database import Database, alembic_config, migrate
from store.errors import IdempotencyConflict
from store.idempotency import Once, digest_of
from store.registry import NewEntry
from tests.store.helpers import SHA256, claimed, new_job, run_concurrently, submitted

BODY = {"a": 1, "b": [1.5, {"x": "é", "y": None}], "c": True}


def once(key: str = "k", kind: str = "uploads", body: object = BODY, project: str = "ours") -> Once:
    made = Once.of(project, key, kind, body)
    assert made is not None
    return made


def begun(database: Database, request: Once | None) -> tuple[str, bool]:
    with database.begin() as connection:
        upload, created = uploads.create_once(connection, request, "ours")
    return upload.id, created


def rows(database: Database) -> int:
    with database.connect() as connection:
        return int(connection.scalar(select(func.count()).select_from(idempotency.idempotency)) or 0)


@pytest.mark.parametrize(
    "other",
    [
        {"c": True, "b": [1.5, {"y": None, "x": "\u00e9"}], "a": 1},
        {"a": 1.0, "b": [1.5, {"x": "é", "y": None}], "c": True},
    ],
    ids=["order", "number"],
)
def test_digest_is_that_of_the_meaning(other):
    assert digest_of("jobs", other) == digest_of("jobs", BODY)


@pytest.mark.parametrize(
    "other",
    [{"a": 2}, {"a": "1"}, {"a": True}, {"c": 1}, {"b": [{"x": "é", "y": None}, 1.5]}, {"d": None}, {"b": [1.5]}],
)
def test_digest_differs_with_the_meaning(other):
    assert digest_of("jobs", {**BODY, **other}) != digest_of("jobs", BODY)


def test_digest_differs_with_what_is_made():
    assert digest_of("models", BODY) != digest_of("datasets", BODY)


def test_of_without_a_key_is_none():
    assert Once.of("ours", None, "uploads", BODY) is None


def test_reserve_makes_one_thing_for_one_key(database: Database):
    first, created = begun(database, once())
    assert created
    assert begun(database, once()) == (first, False)
    assert begun(database, once("other"))[1]
    assert begun(database, None)[1]


def test_reserve_with_another_body_or_another_kind_raises_idempotency_conflict(database: Database):
    first, _ = begun(database, once())
    with pytest.raises(IdempotencyConflict, match=f"the key 'k' was used with another body, for upload {first}"):
        begun(database, once(body={}))
    with pytest.raises(IdempotencyConflict, match=first):
        submitted(database, idempotency_key="k")
    assert submitted(database, idempotency_key="k", project="theirs").project == "theirs"


def test_reserve_of_racing_transactions_makes_one_thing(database: Database):
    made = run_concurrently([lambda: begun(database, once())] * 20)
    assert len({id for id, _ in made}) == 1
    assert sum(created for _, created in made) == 1


def test_key_of_a_deleted_thing_is_free_again(database: Database):
    first = submitted(database, idempotency_key="k")
    with database.begin() as connection:
        jobs.cancel(connection, first.id)
        jobs.delete(connection, first.id)
    with database.connect() as connection:
        assert idempotency.find(connection, once(kind="jobs")) is None
    second, created = begun(database, once())
    assert created
    assert begun(database, once()) == (second, False)
    assert rows(database) == 1


def test_key_of_a_refused_registration_stays_with_its_row(database: Database):
    new, request = NewEntry("ours", "resnet", SHA256, BODY, {}), once(kind="models")
    with database.begin() as connection:
        entry, created = registry.models.register_once(connection, request, new, "server", 30)
        registry.models.refuse(connection, entry, "server", {"code": "unusable"})
    with database.begin() as connection:
        again, created_again = registry.models.register_once(connection, request, new, "server", 30)
    assert (created, created_again, again.id, again.state) == (True, False, entry.id, "refused")


def test_delete_free_deletes_the_keys_of_what_is_gone(database: Database):
    kept, gone = submitted(database, idempotency_key="kept"), submitted(database, idempotency_key="gone")
    begun(database, once("upload"))
    with database.begin() as connection:
        jobs.cancel(connection, gone.id)
        jobs.delete(connection, gone.id)
        assert idempotency.delete_free(connection, 100) == 1
        assert idempotency.delete_free(connection, 100) == 0
    assert rows(database) == 2
    assert submitted(database, idempotency_key="kept").id == kept.id


def test_keys_of_jobs_of_earlier_versions_are_taken_over_by_meaning(database: Database, database_url: str):
    spec = {"student": "convnet8", "training": {"epochs": 3.0}}
    first = submitted(database, idempotency_key="k", spec=spec)
    submitted(database)
    with database.begin() as connection:
        command.downgrade(alembic_config(connection), "0006")
    migrate(database_url)
    same = {"training": {"epochs": 3}, "student": "convnet8"}
    assert submitted(database, idempotency_key="k", spec_sha256=digest_of("jobs", same)).id == first.id
    with pytest.raises(IdempotencyConflict):
        submitted(database, idempotency_key="k", spec_sha256=digest_of("jobs", {}))
    assert rows(database) == 1


def test_find_of_an_ended_job_is_that_job(database: Database):
    job = submitted(database, idempotency_key="k")
    claimed(database)
    with database.connect() as connection:
        found = jobs.find_once(connection, Once("ours", "k", "jobs", new_job().spec_sha256))
    assert found is not None and (found.id, found.status) == (job.id, "running")
