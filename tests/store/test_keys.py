"""Keys: what a row has of them, which can be used, and when a server needs one."""

import hashlib
import re
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from store import keys, projects, tables
from store.database import Database
from store.errors import KeyEnded, NotFound
from store.keys import KeyNeeded
from store.records import PageQuery, database_now

ANYWHERE = ".".join("0000")


@pytest.fixture
def project(database: Database) -> str:
    with database.begin() as connection:
        return projects.create(connection, "ours").name


def made(database: Database, project: str, **more):
    with database.begin() as connection:
        return keys.create(connection, project, "ann", "member", **more)


def found(database: Database, key: str):
    with database.connect() as connection:
        return keys.find(connection, str(keys.prefix_of(key)))


def test_create_stores_the_digest_and_not_the_key(database: Database, project: str):
    row, key = made(database, project)
    assert re.fullmatch(r"dk_[0-9a-z]{10}_[0-9a-z]{32}", key)
    secret = key.rpartition("_")[2]
    assert row.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert row.prefix == key.split("_")[1]
    with database.connect() as connection:
        stored = connection.execute(select(tables.keys)).one()
    assert secret not in str(stored)
    assert made(database, project)[1] != key


def test_create_needs_a_project_and_a_role(database: Database, project: str):
    with pytest.raises(NotFound, match="there is no project 'theirs'"):
        made(database, "theirs")
    with pytest.raises(IntegrityError), database.begin() as connection:
        keys.create(connection, project, "ann", "god")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "dk_", "dk_short_x", "distillery_abc", "dk_" + "a" * 43, "dk_0123456789_\ud800"])
def test_prefix_of_takes_the_form_of_a_key_only(text: str):
    assert keys.prefix_of(text) is None
    assert len(keys.digest_of(text)) == 64


def test_find_returns_only_a_key_that_can_be_used(database: Database, project: str):
    row, key = made(database, project, expires_in_s=60)
    assert found(database, key) == row
    with database.begin() as connection:
        connection.execute(update(tables.keys).values(expires_at=database_now() - 1))
    assert found(database, key) is None, "it has expired"
    row, key = made(database, project)
    with database.begin() as connection:
        assert keys.revoke(connection, "ours", row.id).revoked_at is not None
        first = keys.get(connection, "ours", row.id).revoked_at
        assert keys.revoke(connection, "ours", row.id).revoked_at == first, "the first end counts"
    assert found(database, key) is None, "it is revoked"


def test_rotate_ends_the_old_secret_and_keeps_the_row(database: Database, project: str):
    row, old = made(database, project)
    with database.begin() as connection:
        rotated, new = keys.rotate(connection, "ours", row.id)
    assert (rotated.id, rotated.name, rotated.role) == (row.id, row.name, row.role)
    assert found(database, old) is None
    assert found(database, new) == rotated
    with database.begin() as connection, pytest.raises(KeyEnded):
        keys.revoke(connection, "ours", row.id)
        keys.rotate(connection, "ours", row.id)


def test_keys_of_another_project_are_not_found(database: Database, project: str):
    row, _ = made(database, project)
    with database.begin() as connection:
        for act in (keys.get, keys.rotate, keys.revoke):
            with pytest.raises(NotFound):
                act(connection, "theirs", row.id)
        assert keys.list_page(connection, "theirs", PageQuery())[0] == []
        assert keys.list_page(connection, None, PageQuery())[0] == [row]
        assert keys.get(connection, None, row.id) == row


def test_require_if_reachable_counts_keys_and_the_operators_hash(
    database: Database, database_url: str, project: str, tmp_path: Path
):
    url = database_url
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        keys.require_if_reachable(url, host, None)
    keys.require_if_reachable(url, ANYWHERE, "a" * 64)
    with pytest.raises(KeyNeeded, match="host gpu-7 can be reached from other machines, and there is no key"):
        keys.require_if_reachable(url, "gpu-7", None)
    with pytest.raises(KeyNeeded):
        keys.require_if_reachable(f"sqlite:///{tmp_path}/new/distillery.db", ANYWHERE, None)
    assert not (tmp_path / "new").exists()
    row, _ = made(database, project)
    keys.require_if_reachable(url, ANYWHERE, None)
    with database.begin() as connection:
        keys.revoke(connection, None, row.id)
    keys.require_if_reachable(url, ANYWHERE, None)  # Revoked keys open nothing: every request needs another one.


def test_has_operator_counts_usable_keys(database: Database, project: str):
    made(database, project)
    with database.begin() as connection:
        assert not keys.has_operator(connection)
        row, _ = keys.create(connection, project, "root", "operator")
        assert keys.has_operator(connection)
        keys.revoke(connection, None, row.id)
        assert not keys.has_operator(connection)
