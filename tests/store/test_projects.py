"""Projects and the blobs that they have."""

import pytest
from sqlalchemy import delete, select, update

from store import jobs, keys, lifecycle, projects, registry, tables, uploads
from store.artifacts import NewArtifact
from store.collector import named_by_project
from store.database import Database
from store.errors import NameTaken, NotFound, ProjectNotEmpty
from store.file_store import Blob
from store.records import database_now
from store.registry import NewEntry
from tests.store.helpers import running, submitted

DIGESTS = ["a" * 64, "b" * 64, "c" * 64]


def blobs(database: Database, project: str) -> list[str]:
    rows = tables.project_blobs.c
    with database.connect() as connection:
        return list(connection.scalars(select(rows.sha256).where(rows.project == project).order_by(rows.sha256)))


def test_create_refuses_a_name_twice(database: Database):
    with database.begin() as connection:
        assert projects.create(connection, "ours").name == "ours"
        with pytest.raises(NameTaken, match="there is already a project named 'ours'"):
            projects.create(connection, "ours")
        with pytest.raises(NotFound, match="there is no project 'theirs'"):
            projects.get(connection, "theirs")


def test_list_page_is_by_name(database: Database):
    with database.begin() as connection:
        connection.execute(delete(tables.projects))
        for name in ("c", "a", "b"):
            projects.create(connection, name)
        first, after = projects.list_page(connection, 2)
        rest, end = projects.list_page(connection, 2, after)
    assert [project.name for project in (*first, *rest)] == ["a", "b", "c"]
    assert (after, end) == ("b", None)


def test_remove_takes_an_empty_project_with_its_keys(database: Database):
    with database.begin() as connection:
        projects.create(connection, "ours")
        keys.create(connection, "ours", "ann", "admin")
        projects.add_blobs(connection, "ours", DIGESTS)
        key, _ = keys.create(connection, "ours", "ben", "member")
        projects.remove(connection, "ours")
        assert keys.get(connection, None, key.id).revoked_at is not None
        assert keys.any_exists(connection), "a key is needed as before"
        with pytest.raises(NotFound):
            projects.remove(connection, "ours")
        with pytest.raises(NotFound):
            keys.create(connection, "ours", "ann", "admin")
        assert "ours" not in [project.name for project in projects.list_page(connection, 10)[0]]
        with pytest.raises(NameTaken, match="'ours' was deleted, and its name is not given again"):
            projects.create(connection, "ours")
    assert blobs(database, "ours") == []


def test_remove_refuses_a_project_that_has_rows_and_the_default_one(database: Database):
    with database.begin() as connection:
        connection.execute(delete(tables.projects))
        projects.create(connection, "ours")
        projects.create(connection, "default")
        uploads.create(connection, "ours")
    submitted(database)
    with database.begin() as connection:
        with pytest.raises(ProjectNotEmpty, match="'ours' has jobs and uploads: delete these first"):
            projects.remove(connection, "ours")
        with pytest.raises(ProjectNotEmpty):
            projects.remove(connection, "default")


def test_project_has_the_blobs_that_it_uploaded_made_registered_or_named(database: Database):
    uploaded, made, named, registered, sheet = (digit * 64 for digit in "12345")
    claim = running(database, resolved_spec={"dataset": {"source": f"blob:sha256:{named}"}})
    with database.begin() as connection:
        row = uploads.create(connection, "ours")
        uploads.append(connection, "ours", row.id, offset=0, length=3)
        uploads.complete(connection, "ours", row.id, Blob(uploaded, 3))
        artifact = NewArtifact("report.json", made, 2, "application/json")
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, [artifact])
        entry = registry.datasets.register(connection, NewEntry("ours", "d", registered, {}, {}), "me", 30)
        registry.datasets.finish(connection, entry, "me", {"facts": {}, "thumbnails": {"sha256": sheet}})
    assert blobs(database, "ours") == [uploaded, made, named, registered, sheet]
    with database.connect() as connection:
        assert projects.has_blob(connection, "ours", uploaded)
        assert not projects.has_blob(connection, "theirs", uploaded)
    assert named_by_project(database) == {("ours", sha256) for sha256 in (uploaded, made, named, registered, sheet)}


def test_add_blobs_renews_an_old_row_and_leaves_a_new_one(database: Database):
    with database.begin() as connection:
        projects.add_blobs(connection, "ours", DIGESTS)
        old = update(tables.project_blobs).where(tables.project_blobs.c.sha256 == DIGESTS[0])
        connection.execute(old.values(seen_at=database_now() - 2 * projects.SEEN_EVERY_S))
        before = dict(connection.execute(select(tables.project_blobs.c.sha256, tables.project_blobs.c.seen_at)).all())
        projects.add_blobs(connection, "ours", DIGESTS)
        after = dict(connection.execute(select(tables.project_blobs.c.sha256, tables.project_blobs.c.seen_at)).all())
    assert after[DIGESTS[0]] > before[DIGESTS[0]]
    assert [after[digest] for digest in DIGESTS[1:]] == [before[digest] for digest in DIGESTS[1:]]


def test_forget_blobs_takes_old_rows_that_their_own_project_does_not_name(database: Database):
    day = 86_400.0
    with database.begin() as connection:
        for project in ("ours", "theirs"):
            projects.add_blobs(connection, project, DIGESTS)
        rows = tables.project_blobs
        connection.execute(update(rows).where(rows.c.sha256 != DIGESTS[2]).values(seen_at=database_now() - 2 * day))
        assert projects.forget_blobs(connection, {("ours", DIGESTS[0])}, day, 2) == 2
        assert projects.forget_blobs(connection, {("ours", DIGESTS[0])}, day, 2) == 1
        assert projects.forget_blobs(connection, {("ours", DIGESTS[0])}, day, 2) == 0
    assert blobs(database, "ours") == [DIGESTS[0], DIGESTS[2]]
    assert blobs(database, "theirs") == [DIGESTS[2]]


def test_job_of_another_project_is_not_found(database: Database):
    job = submitted(database)
    with database.connect() as connection:
        assert jobs.get(connection, job.id, "ours") == job
        with pytest.raises(NotFound):
            jobs.get(connection, job.id, "theirs")
