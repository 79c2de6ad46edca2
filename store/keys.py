"""Keys: `dk_<prefix>_<secret>`. The prefix finds the row; the row has the digest of the whole key, never the key.

A key has 160 random bits, so that its plain SHA-256 cannot be turned back, and no slow digest is needed.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, insert, inspect, or_, select, update

from base.defaults import is_loopback
from base.wire import Role
from store import projects, tables
from store.database import Database
from store.errors import KeyEnded, NotFound
from store.records import DIGITS, PageQuery, as_record, columns, database_now, new_id, read_page


class KeyNeeded(Exception):
    """A server that other machines can reach has no key."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"host {host} can be reached from other machines, and there is no key; make one with `python -m store key "
            "NAME --role operator`, or set DISTILLERY_ADMIN_KEY_HASH to the SHA-256 of one, or DISTILLERY_HOST to "
            "127.0.0.1"
        )


_KEY = re.compile(f"dk_([{DIGITS}]{{10}})_[{DIGITS}]{{32}}")


@dataclass(frozen=True)
class Key:
    """One row of `keys`."""

    id: str
    project: str
    name: str
    role: Role
    prefix: str
    sha256: str
    created_at: float
    created_by: str | None
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


KEY_COLUMNS = columns(tables.keys, Key)


def prefix_of(key: str) -> str | None:
    """Return the part that finds a key's row; None if the text has not the form of a key."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def digest_of(key: str) -> str:
    """Return the digest that rows and settings have in the place of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> tuple[str, str]:
    """Return a new key and its prefix."""
    prefix, secret = ("".join(secrets.choice(DIGITS) for _ in range(length)) for length in (10, 32))
    return f"dk_{prefix}_{secret}", prefix


def create(
    connection: Connection,
    project: str,
    name: str,
    role: Role,
    *,
    created_by: str | None = None,
    expires_in_s: float | None = None,
    key_id: str | None = None,
) -> tuple[Key, str]:
    """Add a key. Returns its row and the key itself, which nothing returns again. Raises NotFound for the project."""
    projects.get(connection, project)
    key, prefix = new_key()
    values: dict[str, Any] = {
        "id": key_id or new_id("key"),
        "project": project,
        "name": name,
        "role": role,
        "prefix": prefix,
    }
    values |= {"sha256": digest_of(key), "created_by": created_by}
    times = {
        "created_at": database_now(),
        "expires_at": None if expires_in_s is None else database_now() + expires_in_s,
    }
    added = insert(tables.keys).values(**values, **times).returning(*KEY_COLUMNS)
    return as_record(Key, connection.execute(added).one()), key


def find(connection: Connection, prefix: str) -> Key | None:
    """Return the key of a prefix, if it can be used now."""
    query = select(*KEY_COLUMNS).where(tables.keys.c.prefix == prefix, _usable())
    row = connection.execute(query).one_or_none()
    return None if row is None else as_record(Key, row)


def any_exists(connection: Connection) -> bool:
    """Return True if a key was ever made, whether it can still be used or not."""
    return bool(connection.execute(select(exists(select(tables.keys.c.id)))).scalar_one())


def has_operator(connection: Connection) -> bool:
    """Return True if an operator's key can be used."""
    operators = select(tables.keys.c.id).where(tables.keys.c.role == "operator", _usable())
    return connection.execute(operators.limit(1)).one_or_none() is not None


def require_if_reachable(database_url: str, host: str, operator_hash: str | None) -> None:
    """Raise KeyNeeded if other machines can reach the address that a server is to listen on, and it would need no key.

    The database may be of an earlier version, or not exist yet.
    """
    if operator_hash is not None or is_loopback(host):
        return
    database = Database(database_url)
    try:
        if database.is_sqlite and not Path(str(database.url.database)).exists():
            raise KeyNeeded(host)
        with database.connect() as connection:
            if not (inspect(connection).has_table(tables.keys.name) and any_exists(connection)):
                raise KeyNeeded(host)
    finally:
        database.dispose()


def get(connection: Connection, project: str | None, key_id: str) -> Key:
    """Return a key of a project, or of any with None."""
    row = connection.execute(select(*KEY_COLUMNS).where(_is(project, key_id))).one_or_none()
    if row is None:
        raise NotFound("key", key_id)
    return as_record(Key, row)


def list_page(connection: Connection, project: str | None, query: PageQuery) -> tuple[list[Key], str | None]:
    """Return a page of the keys of a project, or of all with None, newest first, and the `after` of the next page."""
    conditions = [] if project is None else [tables.keys.c.project == project]
    return read_page(connection, tables.keys, Key, query, *conditions)


def rotate(connection: Connection, project: str | None, key_id: str) -> tuple[Key, str]:
    """Give a key another prefix and secret: the old key ends. Returns as `create`. Raises NotFound or KeyEnded."""
    key, prefix = new_key()
    changed = update(tables.keys).where(_is(project, key_id), _usable()).values(prefix=prefix, sha256=digest_of(key))
    row = connection.execute(changed.values(last_used_at=None).returning(*KEY_COLUMNS)).one_or_none()
    if row is None:
        raise KeyEnded(get(connection, project, key_id).id)
    return as_record(Key, row), key


def revoke(connection: Connection, project: str | None, key_id: str) -> Key:
    """End a key for good. Idempotent. Raises NotFound."""
    rows = tables.keys.c
    ended = update(tables.keys).where(_is(project, key_id), rows.revoked_at.is_(None))
    connection.execute(ended.values(revoked_at=database_now()))
    return get(connection, project, key_id)


def mark_used(connection: Connection, key_id: str) -> None:
    """Write that a key was used just now."""
    connection.execute(update(tables.keys).where(tables.keys.c.id == key_id).values(last_used_at=database_now()))


def _is(project: str | None, key_id: str) -> ColumnElement[bool]:
    is_id = tables.keys.c.id == key_id
    return is_id if project is None else and_(is_id, tables.keys.c.project == project)


def _usable() -> ColumnElement[bool]:
    rows = tables.keys.c
    return and_(rows.revoked_at.is_(None), or_(rows.expires_at.is_(None), rows.expires_at > database_now()))
