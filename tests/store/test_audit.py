"""The audit log: entries are added, found and deleted by age."""

import pytest
from pydantic import ValidationError
from sqlalchemy import update

from store import audit, tables
from store.audit import Actor, AuditQuery
from store.database import Database

ADA = Actor("ours", "key_1", "ada", "member", "10.0.0.7", "req_1")
EVE = Actor("ours", "key_2", "eve", "admin", "10.0.0.8", "req_2")
OTHER = Actor("theirs", "key_3", "ada", "admin", "10.0.0.9", "req_3")


@pytest.fixture
def filled(database: Database) -> Database:
    with database.begin() as connection:
        audit.append(connection, ADA, "job.submit", "job_1", name="first")
        audit.append(connection, EVE, "job.cancel", "job_1")
        audit.append(connection, EVE, "request.refused", None, "refused")
        audit.append(connection, OTHER, "job.submit", "job_2")
        audit.append(connection, Actor(None, None, None, None, "1.2.3.4", "req_4"), "key.refused", None, "refused")
    return database


def found(database: Database, project: str | None, query: dict[str, object]) -> list[str]:
    with database.connect() as connection:
        rows, _ = audit.list_page(connection, project, AuditQuery.model_validate(query))
    return [f"{row.action} {row.key_name}" for row in rows]


def test_append_keeps_who_what_and_where(filled: Database):
    with filled.connect() as connection:
        (entry,), _ = audit.list_page(connection, "ours", AuditQuery(key="ada"))
    assert (entry.project, entry.key_id, entry.key_name, entry.role) == ("ours", "key_1", "ada", "member")
    assert (entry.address, entry.request_id, entry.outcome) == ("10.0.0.7", "req_1", "done")
    assert (entry.action, entry.resource, entry.details) == ("job.submit", "job_1", {"name": "first"})
    assert entry.id.startswith("audit_") and entry.at > 0


@pytest.mark.parametrize(
    ("project", "query", "expected"),
    [
        ("ours", {}, ["request.refused eve", "job.cancel eve", "job.submit ada"]),
        ("ours", {"project": "theirs"}, []),
        (None, {"project": "theirs"}, ["job.submit ada"]),
        (None, {"action": "job.submit"}, ["job.submit ada"] * 2),
        (None, {"resource": "job_1", "key": "key_2"}, ["job.cancel eve"]),
        (None, {"outcome": "refused"}, ["key.refused None", "request.refused eve"]),
        (None, {"until": "2001-01-01T00:00Z"}, []),
        ("ours", {"since": "2001-01-01T00:00:00+02:00", "outcome": "refused"}, ["request.refused eve"]),
    ],
)
def test_list_page_filters(filled: Database, project, query, expected):
    assert found(filled, project, query) == expected


def test_list_page_goes_from_newest_to_oldest(filled: Database):
    with filled.connect() as connection:
        first, following = audit.list_page(connection, None, AuditQuery(limit=3))
        second, end = audit.list_page(connection, None, AuditQuery(limit=3, after=following))
    assert len({row.id for row in [*first, *second]}) == 5
    assert end is None


@pytest.mark.parametrize(
    "query",
    [
        {"since": "2001-01-01"},
        {"since": "1700000000"},
        {"until": "2001-02-30T00:00:00Z"},
        {"action": "a\x00"},
        {"outcome": "x"},
        {"key": "k" * 101},
    ],
)
def test_query_refuses_what_it_cannot_look_up(query):
    with pytest.raises(ValidationError):
        AuditQuery.model_validate(query)


def test_append_of_hostile_text_is_cut_and_made_printable(database: Database):
    nasty = Actor("ours", None, "n\x00\ud800\x1b[2J" + "x" * 200, None, "a" * 99, None)
    with database.begin() as connection:
        audit.append(connection, nasty, "job.submit", "r" * 500)
        (entry,), _ = audit.list_page(connection, "ours", AuditQuery())
    assert entry.key_name == "n\ufffd\ufffd\ufffd[2J" + "x" * 93
    assert (len(entry.address or ""), len(entry.resource or "")) == (64, 200)


def test_delete_older_than_deletes_the_oldest_first(filled: Database):
    with filled.begin() as connection:
        assert audit.delete_older_than(connection, 60, 10) == 0
        connection.execute(update(tables.audit).values(at=tables.audit.c.at - 100))
        audit.append(connection, ADA, "job.pause", "job_1")
        assert audit.delete_older_than(connection, 60, 3) == 3
        assert audit.delete_older_than(connection, 60, 3) == 2
    assert found(filled, None, {}) == ["job.pause ada"]
