"""API keys: an admin makes, lists, rotates and revokes those of the project, the operator those of any.

A key is in the answer that makes it and in no other. What is done here holds in this process at once, and in every
other one within five seconds.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.auth import Member
from api.dependencies import AdminCaller, AuditDep, Auth, Config, Db
from api.openapi import made_once
from api.problems import IdempotencyConflict, KeyEnded, NotFound, OperatorKeyNeeded, RoleForbidden, responses
from api.routes.jobs import Key as IdempotencyKey
from api.schemas import Filter, Id, Json, NewKey, Page, key_view, page
from base.wire import KeyView, NewKeyView, Role
from store import idempotency, keys
from store.database import Database
from store.idempotency import Once
from store.keys import Key
from store.records import PageQuery, new_id

router = APIRouter(prefix="/v1/keys", tags=["keys"])


class KeyQuery(PageQuery):
    project: Filter | None = None


@router.post(
    "",
    status_code=201,
    response_model=NewKeyView,
    responses={
        **made_once(NewKeyView, "Cache-Control"),
        **responses(NotFound, RoleForbidden, OperatorKeyNeeded, IdempotencyConflict),
    },
)
async def create(
    *,
    new: NewKey,
    caller: AdminCaller,
    db: Db,
    settings: Config,
    auth: Auth,
    audit: AuditDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Make a key. `key` is shown in this answer only: keep it, it cannot be read again. A replay under an
    `Idempotency-Key` has null in its place: rotate the key if the first answer was lost.

    A service that runs without keys on one machine needs one for every request from its first key on, so that one must
    have the role `operator`.
    """
    project = _project(caller, new.project) or caller.project
    _require_role(caller, new.role)
    once = Once.of(project, idempotency_key, "keys", new.model_dump(mode="json", exclude_unset=True))
    key_id = new_id("key")

    def write(connection: Connection) -> tuple[Key, str | None]:
        if (known := idempotency.reserve(connection, once, key_id)) is not None:
            return keys.get(connection, project, known), None
        if settings.admin_key_hash is None and new.role != "operator" and not keys.has_operator(connection):
            raise OperatorKeyNeeded(
                "from the first key on every request needs one, and nobody could make another key with this one; make "
                "an operator's key first: role operator",
                needs="operator",
            )
        expires = new.expires_in_s
        how: dict[str, Any] = {"created_by": caller.key_name, "expires_in_s": expires, "key_id": key_id}
        key, secret = keys.create(connection, project, new.name, new.role, **how)
        audit.append(connection, "key.create", key.id, project=project, name=key.name, role=key.role)
        return key, secret

    key, secret = await db.write(write)
    auth.forget()
    return _with_secret(key, secret, 201 if secret else 200)


@router.get("", response_model=Page[KeyView], responses=responses(RoleForbidden))
async def listing(caller: AdminCaller, db: Db, query: Annotated[KeyQuery, Query()]) -> Response:
    """Keys, newest first, revoked ones too: of the project; for the operator of all projects, or of `project`."""
    rows, following = await db.read(keys.list_page, _project(caller, query.project), query)
    return page([key_view(key) for key in rows], following)


@router.get("/{key_id}", response_model=KeyView, responses=responses(NotFound, RoleForbidden))
async def one(key_id: Id, caller: AdminCaller, db: Db) -> Response:
    """A key, without its secret."""
    return Json(key_view(await db.read(keys.get, _project(caller), key_id)))


@router.post(
    "/{key_id}/rotate",
    response_model=NewKeyView,
    responses=responses(NotFound, RoleForbidden, KeyEnded),
)
async def rotate(key_id: Id, caller: AdminCaller, db: Db, auth: Auth, audit: AuditDep) -> Response:
    """Give a key another secret: the old one ends, role and name stay. `key` is shown in this answer only."""
    await _require_role_of(key_id, caller, db)

    def write(connection: Connection) -> tuple[Key, str]:
        key, secret = keys.rotate(connection, _project(caller), key_id)
        audit.append(connection, "key.rotate", key.id, project=key.project, name=key.name)
        return key, secret

    key, secret = await db.write(write)
    auth.forget()
    return _with_secret(key, secret, 200)


@router.delete("/{key_id}", status_code=204, responses=responses(NotFound, RoleForbidden))
async def revoke(key_id: Id, caller: AdminCaller, db: Db, auth: Auth, audit: AuditDep) -> Response:
    """End a key for good. It stays in the list, and its name on the jobs that it sent. Idempotent."""
    await _require_role_of(key_id, caller, db)

    def write(connection: Connection) -> None:
        key = keys.revoke(connection, _project(caller), key_id)
        audit.append(connection, "key.revoke", key.id, project=key.project, name=key.name)

    await db.write(write)
    auth.forget()
    return Response(status_code=204)


def _project(caller: Member, named: str | None = None) -> str | None:
    """Return the project whose keys are meant; None for all, which only the operator may mean."""
    if caller.is_at_least("operator"):
        return named
    if named not in (None, caller.project):
        raise RoleForbidden("only the operator names another project", needs="operator")
    return caller.project


async def _require_role_of(key_id: str, caller: Member, db: Database) -> None:
    _require_role(caller, (await db.read(keys.get, _project(caller), key_id)).role)


def _require_role(caller: Member, role: Role) -> None:
    """Refuse what would give the caller, or take from others, more than it may do itself."""
    if not caller.is_at_least(role):
        raise RoleForbidden(f"this key has the role {caller.role}, which is less than {role}", needs=role)


def _with_secret(key: Key, secret: str | None, status: int) -> Response:
    headers = {"Location": f"/v1/keys/{key.id}", "Cache-Control": "no-store"}
    if secret is None:
        headers["Idempotent-Replayed"] = "true"
    return Json({**key_view(key), "key": secret}, status, headers)
