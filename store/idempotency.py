"""Idempotency keys: a request that is sent again under its key makes nothing new.

A key belongs to a project, whatever the address. Its row is written in the transaction that makes the thing, and names
it. A key is remembered for as long as the thing exists; after that it is free, and the collector deletes its row.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Self

from pydantic_core import to_json
from sqlalchemy import Column, ColumnElement, Connection, and_, delete, exists, select

from store import tables
from store.errors import IdempotencyConflict
from store.records import database_now, upsert
from store.tables import idempotency

KINDS = {
    "jobs": "job",
    "uploads": "upload",
    "models": "model",
    "datasets": "data set",
    "keys": "key",
    "projects": "project",
    "webhooks": "webhook",
}
"""What keys make, by its table."""


@dataclass(frozen=True)
class Once:
    """A request that is to be executed once."""

    project: str
    key: str
    kind: str
    """The table of what it makes."""
    digest: str
    """Of the meaning of the request: the same key with another digest is a conflict."""

    @classmethod
    def of(cls, project: str, key: str | None, kind: str, meaning: Any) -> Self | None:
        """Return the request under a key; None without one."""
        return None if key is None else cls(project, key, kind, digest_of(kind, meaning))


def digest_of(kind: str, meaning: Any) -> str:
    """Return the SHA-256 of what a request means: the order of keys does not count, and 1.0 is 1."""
    return hashlib.sha256(to_json([kind, _canonical(meaning)])).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _canonical(value[name]) for name in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(one) for one in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def find(connection: Connection, once: Once) -> str | None:
    """Return the id of what the key has made, if that still exists. Raises IdempotencyConflict if it was asked for
    something else."""
    row = connection.execute(select(idempotency).where(_is(once))).one_or_none()
    if row is None:
        return None
    identity = identity_of(row.kind)
    if connection.execute(select(identity).where(identity == row.resource)).one_or_none() is None:
        return None
    if row.digest != once.digest:
        raise IdempotencyConflict(once.key, KINDS[row.kind], row.resource)
    resource: str = row.resource
    return resource


def reserve(connection: Connection, once: Once | None, resource: str) -> str | None:
    """Write that the key makes `resource`, which the caller adds in the same transaction, and return None.

    If the key has made something before, nothing is written, and that is returned: see `find`. Of several transactions
    at once the later ones wait for the first, and then find what it has made.
    """
    if once is None:
        return None
    values = {**vars(once), "resource": resource, "created_at": database_now()}
    added = upsert(connection, idempotency).values(**values).on_conflict_do_nothing().returning(idempotency.c.resource)
    while connection.execute(added).one_or_none() is None:
        if (known := find(connection, once)) is not None:
            return known
        _free(connection, and_(_is(once)))
    return None


def delete_free(connection: Connection, limit: int) -> int:
    """Delete rows of keys whose things are gone, at most `limit` of each kind. Returns how many there were."""
    count = 0
    for kind in KINDS:
        identity = identity_of(kind)
        gone = and_(idempotency.c.kind == kind, ~exists(select(identity).where(identity == idempotency.c.resource)))
        keys = connection.execute(select(idempotency.c.project, idempotency.c.key).where(gone).limit(limit)).all()
        for row in keys:
            _free(connection, and_(idempotency.c.project == row.project, idempotency.c.key == row.key))
        count += len(keys)
    return count


def identity_of(kind: str) -> Column[Any]:
    """Return the column that tells the rows of a table apart."""
    (column,) = tables.metadata.tables[kind].primary_key.columns
    return column


def _free(connection: Connection, where: ColumnElement[bool]) -> None:
    """Delete the row of a key whose thing is gone. What was made under the key meanwhile keeps it."""
    for kind in KINDS:
        identity = identity_of(kind)
        gone = ~exists(select(identity).where(identity == idempotency.c.resource))
        connection.execute(delete(idempotency).where(where, idempotency.c.kind == kind, gone))


def _is(once: Once) -> ColumnElement[bool]:
    return and_(idempotency.c.project == once.project, idempotency.c.key == once.key)
