"""Keys: `dk_<prefix>_<secret>`. The prefix finds the row; the row has the digest of the whole key, never the key.

A key has 160 random bits, so that its plain SHA-256 cannot be turned back, and no slow digest is needed.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, and_, exists, insert, or_, select, update

from store import projects, tables
from store.errors import NotFound
from store.records import DIGITS, PageQuery, as_record, columns, database_now, new_id, read_page

Role = Literal["operator", "admin", "member", "reader"]
"""What a key may do, from everything to reading. Each may do what those after it may."""

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
    expires_at: float | None = None,
) -> tuple[Key, str]:
    """Add a key. Returns its row and the key itself, which nothing returns again. Raises NotFound for the project."""
    projects.get(connection, project)
    key, prefix = new_key()
    values: dict[str, Any] = {"id": new_id("key"), "project": project, "name": name, "role": role, "prefix": prefix}
    values |= {"sha256": digest_of(key), "created_by": created_by, "expires_at": expires_at}
    added = insert(tables.keys).values(**values, created_at=database_now()).returning(*KEY_COLUMNS)
    return as_record(Key, connection.execute(added).one()), key


def find(connection: Connection, prefix: str) -> Key | None:
    """Return the key of a prefix, if it can be used now."""
    query = select(*KEY_COLUMNS).where(tables.keys.c.prefix == prefix, _usable())
    row = connection.execute(query).one_or_none()
    return None if row is None else as_record(Key, row)


def any_exists(connection: Connection) -> bool:
    """Return True if a key was ever made, whether it can still be used or not."""
    return bool(connection.execute(select(exists(select(tables.keys.c.id)))).scalar_one())


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
    """Give a key another secret and prefix: the old key ends. Returns what `create` does. Raises NotFound."""
    key, prefix = new_key()
    changed = update(tables.keys).where(_is(project, key_id), _usable()).values(prefix=prefix, sha256=digest_of(key))
    row = connection.execute(changed.values(last_used_at=None).returning(*KEY_COLUMNS)).one_or_none()
    if row is None:
        raise NotFound("usable key", key_id)
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
