"""The audit log of requests: an entry for each that has changed something, or that was refused for lack of rights.

A route writes its entry in the transaction of the change (`Auditor`). What no route writes, `AuditLog` writes just
after the answer: the changes of other routes, and refusals, of which it writes only so many that nobody can fill the
disk.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import READS, Member
from base.errors import DatabaseUnavailable, StorageFull
from store import audit, keys
from store.audit import Actor
from store.database import Database

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("distillery.api")

ACTIONS: dict[tuple[str, str], str | None] = {
    ("POST", "/v1/jobs"): "job.submit",
    ("POST", "/v1/jobs/validate"): None,
    ("POST", "/v1/models"): "model.register",
    ("POST", "/v1/datasets"): "dataset.register",
    ("POST", "/v1/models/{name_or_id}/evaluations"): "evaluation.submit",
    ("POST", "/v1/jobs/{job_id}/exports"): "export.submit",
    ("POST", "/v1/benchmarks"): "benchmark.submit",
    # Its parts are no actions; its end is `upload.complete`.
    ("PATCH", "/v1/uploads/{upload_id}"): None,
    # It changes nothing that stays.
    ("POST", "/v1/jobs/{job_id}/predict"): None,
    ("DELETE", "/v1/keys/{key_id}"): "key.revoke",
    ("POST", "/v1/storage/collections"): "storage.collect",
}
"""The actions whose names do not follow from method and address; None: no entry."""

_VERBS = {"POST": "create", "PATCH": "change", "PUT": "change", "DELETE": "delete"}
REFUSALS_AT_ONCE, REFUSAL_EVERY_S = 30, 20.0
"""So many refusals are written at once, and after that one in each such time; the others are counted in the next."""


def action_of(method: str, template: str) -> str | None:
    """Return the action of a route, such as `job.cancel` of POST /v1/jobs/{job_id}/cancel; None if it is none."""
    if (method, template) in ACTIONS:
        return ACTIONS[method, template]
    parts = template.removeprefix("/v1").strip("/").split("/")
    named = [part for part in parts if not part.startswith("{")]
    resource = named[0].removesuffix("s")
    verb = named[-1] if len(named) > 1 and parts[-1] == named[-1] and method == "POST" else _VERBS[method]
    return f"{resource}.{verb}"


class Auditor:
    """Writes the entries of one request."""

    def __init__(self, db: Database, scope: Scope) -> None:
        self._db, self._scope = db, scope

    def append(self, connection: Connection, action: str, resource: str | None, **details: Any) -> None:
        """Write an entry in the transaction of what it tells."""
        audit.append(connection, actor_of(self._scope), action, resource, **details)
        self._scope["distillery.audited"] = True

    async def write(
        self,
        action: str,
        resource: str | Callable[[T], str],
        function: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a store function and write its entry, in one transaction. `resource` may depend on the result."""

        def both(connection: Connection) -> T:
            result = function(connection, *args, **kwargs)
            self.append(connection, action, resource if isinstance(resource, str) else resource(result))
            return result

        return await self._db.write(both)


def actor_of(scope: Scope) -> Actor:
    """Return the sender of a request. Of an unknown key nothing is known but its prefix, which is no secret."""
    caller: Member | None = scope.get("distillery.member") or scope.get("distillery.caller")
    client = scope.get("client")
    address, request_id = client[0] if client else None, scope.get("request_id")
    if caller is None:
        return Actor(None, None, None, None, address, request_id)
    return Actor(caller.project, caller.key_id, caller.key_name, caller.role, address, request_id)


class AuditLog:
    """The middleware. It is outside all others, so that it sees each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._unknown, self._forbidden = _Bound(), _Bound()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer: Message = {"status": 500}

        async def send_and_see(message: Message) -> None:
            nonlocal answer
            if message["type"] == "http.response.start":
                answer = message
            await send(message)

        await self._app(scope, receive, send_and_see)
        status = answer["status"]
        if status in (401, 403) or (status < 400 and scope["method"] not in READS):
            await self._note(scope, answer)

    async def _note(self, scope: Scope, answer: Message) -> None:
        route = str(getattr(scope.get("route"), "path", ""))
        status, method = answer["status"], scope["method"]
        details: dict[str, Any] = {}
        resource: str | None = None
        if status == 401:
            action: str | None = "key.refused"
            bound: _Bound | None = self._unknown
            details = {"method": method, "path": scope["path"][:200], "prefix": _prefix(scope)}
        elif status == 403:
            if scope.get("distillery.problem") == "quota_exceeded":
                return
            action, bound = "request.refused", self._forbidden
            details = {"method": method, "path": scope["path"][:200]}
        else:
            headers = Headers(raw=answer["headers"])
            if scope.get("distillery.audited") or "idempotent-replayed" in headers or not route.startswith("/v1/"):
                return
            action, bound = action_of(method, route), None
            resource = _resource(scope, headers)
        if action is None or (bound is not None and not bound.admits()):
            return
        if bound is not None and (left_out := bound.taken()):
            details["left_out"] = left_out
        outcome: audit.Outcome = "done" if bound is None else "refused"
        database: Database = scope["app"].state.database
        try:
            await database.write(audit.append, actor_of(scope), action, resource, outcome, **details)
        except (DatabaseUnavailable, StorageFull) as error:
            log.warning("the audit log lacks %s of %s: %s", action, scope.get("request_id"), error)


class _Bound:
    """Lets through so many at once, and after that one in each time; counts the others."""

    def __init__(self) -> None:
        self._next, self._left_out = float("-inf"), 0

    def admits(self) -> bool:
        now = time.monotonic()
        paid = max(self._next, now) + REFUSAL_EVERY_S
        if paid > now + REFUSALS_AT_ONCE * REFUSAL_EVERY_S:
            self._left_out += 1
            return False
        self._next = paid
        return True

    def taken(self) -> int:
        """Return how many were not let through since the last call."""
        count, self._left_out = self._left_out, 0
        return count


def _prefix(scope: Scope) -> str | None:
    _, _, sent = Headers(scope=scope).get("authorization", "").partition(" ")
    return keys.prefix_of(sent.strip())


def _resource(scope: Scope, headers: Headers) -> str | None:
    """Return what a request has acted on: what its address names, or what it has made."""
    named = list(scope.get("path_params", {}).values())
    if named:
        return str(named[-1])
    made = re.fullmatch(r"/v1/\w+/([^/]+)", headers.get("location", ""))
    return made[1] if made else None
