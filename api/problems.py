"""Whatever goes wrong is told in one form: RFC 9457 `application/problem+json`, with a code that never changes.

Problem
 ├─ MalformedBody       400  the body is no JSON
 ├─ Unauthorized        401  no key, or not a known one
 ├─ Forbidden           403  a web page of another origin, or a name that is not this machine's
 ├─ NotFound            404  no such job, model, data set, upload, artifact, method, route
 ├─ MethodNotAllowed    405
 ├─ ActionNotAllowed           409  the job's status forbids the move; `allowed_actions` names those that it allows
 ├─ NotReady            409  the job has not made this yet
 ├─ NameTaken           409
 ├─ OffsetConflict      409  the upload goes on elsewhere; `offset` says where
 ├─ UploadBusy          409  another request writes to the same upload
 ├─ TooLarge            413
 ├─ RangeUnsatisfiable  416
 ├─ Invalid             422  parameters or a body that break their schema, every fault at once
 │   ├─ SpecInvalid
 │   ├─ Unusable             an inspected file is not what it should be
 │   ├─ ChecksumMismatch
 │   └─ IdempotencyConflict
 ├─ ServerError         500
 ├─ Unavailable         503  the database is away, or takes no writes; `Retry-After` says when to come back
 └─ StorageFull         507
"""

import logging
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, ClassVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from base import errors
from base.errors import Fault
from base.errors import StorageFull as NoSpaceLeft
from store import errors as store_errors

log = logging.getLogger("distillery.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2


class FaultView(BaseModel):
    """One thing wrong with a request: where, what, and what would work."""

    pointer: str = Field(description='RFC 6901 pointer into the body; "" is the whole body; "?name" is a parameter.')
    message: str
    code: str
    allowed: Any = None
    got: Any = None


class ProblemView(BaseModel):
    """RFC 9457. `code` is stable; `errors` holds every fault that was found, not only the first."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FaultView] = []


class Problem(HTTPException):
    """Base of all. A subclass is a code; what it adds to the body goes into `extra`."""

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]

    def __init__(
        self,
        detail: str,
        faults: Iterable[Fault] = (),
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(self.status, detail, headers=headers)
        self.faults = list(faults)
        self.extra = extra

    def response(self, request_id: str) -> Response:
        body = {
            "type": f"urn:distillery:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
            "errors": [fault.as_dict() for fault in self.faults],
            **self.extra,
        }
        return Response(to_json(body), self.status, headers=self.headers, media_type=MEDIA_TYPE)


class MalformedBody(Problem):
    status, code, title = 400, "malformed_body", "The body cannot be read"


class Unauthorized(Problem):
    status, code, title = 401, "unauthorized", "A key is needed"


class Forbidden(Problem):
    status, code, title = 403, "forbidden", "Not from there"


class NotFound(Problem):
    status, code, title = 404, "not_found", "There is no such thing"


class MethodNotAllowed(Problem):
    status, code, title = 405, "method_not_allowed", "This address does not answer that verb"


class ActionNotAllowed(Problem):
    status, code, title = 409, "action_not_allowed", "The job's status forbids this"


class NotReady(Problem):
    status, code, title = 409, "not_ready", "The job has not made this yet"


class NameTaken(Problem):
    status, code, title = 409, "name_taken", "The name is taken"


class OffsetConflict(Problem):
    status, code, title = 409, "offset_conflict", "The upload goes on at another offset"


class UploadBusy(Problem):
    status, code, title = 409, "upload_busy", "Another request writes to this upload"


class TooLarge(Problem):
    status, code, title = 413, "too_large", "Too many bytes"


class RangeUnsatisfiable(Problem):
    status, code, title = 416, "range_unsatisfiable", "The file does not reach that far"


class Invalid(Problem):
    status, code, title = 422, "invalid_request", "The request breaks its schema"


class SpecInvalid(Invalid):
    code, title = "spec_invalid", "The job spec cannot work"


class Unusable(Invalid):
    code, title = "unusable", "The file is not what it should be"


class ChecksumMismatch(Invalid):
    code, title = "checksum_mismatch", "The bytes are not those that were announced"


class IdempotencyConflict(Invalid):
    code, title = "idempotency_conflict", "The key belongs to another request"


class ServerError(Problem):
    status, code, title = 500, "internal", "Our fault"


class Unavailable(Problem):
    status, code, title = 503, "unavailable", "Not now"


class StorageFull(Problem):
    status, code, title = 507, "storage_full", "The disk is full"


EVERYWHERE: tuple[type[Problem], ...] = (Unauthorized, Forbidden, Invalid, ServerError, Unavailable)
"""What any route may answer; declared once, where the routes are put together."""


def responses(*problems: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Declare problems on a route, so that the OpenAPI page tells what may go wrong."""
    declared: dict[int | str, dict[str, Any]] = {}
    for problem in problems:
        line = f"`{problem.code}`: {problem.title}"
        if problem.status in declared:
            declared[problem.status]["description"] += f"; {line}"
            continue
        schema = {"$ref": "#/components/schemas/Problem"}
        declared[problem.status] = {"description": line, "content": {MEDIA_TYPE: {"schema": schema}}}
    return declared


def install(app: FastAPI) -> None:
    """Turn every exception that can leave a route into a problem."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _schema_broken)
    for known in (store_errors.StoreError, NoSpaceLeft):
        app.add_exception_handler(known, _known_refusal)
    app.add_exception_handler(errors.DatabaseUnavailable, _database_away)


def request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))


async def _http_error(request: Request, error: Exception) -> Response:
    return _as_problem(request, cast(HTTPException, error)).response(request_id(request))


def _as_problem(request: Request, error: HTTPException) -> Problem:
    if isinstance(error, Problem):
        return error
    if error.status_code == HTTPStatus.NOT_FOUND:
        return NotFound(f"{request.url.path} is no address of this service; /docs lists them")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        verbs = ", ".join(_verbs(request.app.openapi(), request.url.path))
        return MethodNotAllowed(f"{request.url.path} answers {verbs or 'GET'}", headers={"Allow": verbs or "GET"})
    if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return MalformedBody(str(error.detail))
    return ServerError(str(error.detail))


def _verbs(document: Mapping[str, Any], path: str) -> list[str]:
    """Of all routes at this path: the framework's own list knows only the first."""
    found: set[str] = set()
    for template, operations in document["paths"].items():
        if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path):
            found.update(verb.upper() for verb in operations)
    return sorted(found)


async def _schema_broken(request: Request, error: Exception) -> Response:
    details = cast(RequestValidationError, error).errors()
    if any(detail["type"] == "json_invalid" for detail in details):
        return not_json(str(details[0].get("ctx", {}).get("error", ""))).response(request_id(request))
    faults = [fault_of(detail) for detail in details]
    return Invalid(count(faults), faults).response(request_id(request))


def not_json(why: str) -> MalformedBody:
    return MalformedBody(f"the body is not JSON: {why}", [Fault("", why, "malformed_json")])


def fault_of(detail: Mapping[str, Any]) -> Fault:
    """One of pydantic's errors, with a pointer into the body or `?name` for a parameter."""
    place, *path = detail["loc"]
    steps = "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
    pointer = steps if place == "body" else "?" + steps.removeprefix("/")
    context = detail.get("ctx", {})
    bounds = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "expected": "{}"}
    allowed = next((text.format(context[key]) for key, text in bounds.items() if key in context), None)
    given = detail.get("input")
    got = given if isinstance(given, int | float | str | bool) and detail["type"] != "missing" else None
    return Fault(pointer, str(detail["msg"]), str(detail["type"]), allowed, got)


def count(faults: list[Fault]) -> str:
    return "; ".join(f"{fault.pointer or 'body'}: {fault.message}" for fault in faults[:3]) + (
        f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    )


async def _known_refusal(request: Request, error: Exception) -> Response:
    return _refusal(error).response(request_id(request))


_REFUSALS: dict[type[Exception], type[Problem]] = {
    store_errors.NotFound: NotFound,
    store_errors.IdempotencyConflict: IdempotencyConflict,
    store_errors.NameTaken: NameTaken,
    store_errors.BlobMismatch: ChecksumMismatch,
    store_errors.UploadBusy: UploadBusy,
    NoSpaceLeft: StorageFull,
}


def _refusal(error: Exception) -> Problem:
    if isinstance(error, store_errors.OffsetConflict):
        return OffsetConflict(str(error), offset=error.offset)
    if isinstance(error, store_errors.ActionNotAllowed):
        return ActionNotAllowed(str(error), job_status=error.status, allowed_actions=error.allowed_actions)
    for known, problem in _REFUSALS.items():
        if isinstance(error, known):
            return problem(str(error))
    log.error("a refusal of the store that no problem stands for", exc_info=error)
    return ServerError("the store refused for a reason that the service does not know")


def not_now(detail: str) -> Unavailable:
    return Unavailable(detail, headers={"Retry-After": str(RETRY_AFTER_S)})


async def _database_away(request: Request, error: Exception) -> Response:
    log.warning("database away: %s", error)
    told = not_now("the database is away, or takes no writes; try again")
    return told.response(request_id(request))
