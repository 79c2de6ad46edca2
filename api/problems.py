"""Every error has one form: RFC 9457 `application/problem+json`, with a code that never changes.

Problem
 ├─ MalformedRequest    400  the bytes are no HTTP request
 ├─ MalformedBody       400  the body is not JSON
 ├─ Unauthorized        401  no key, or an unknown one
 ├─ Forbidden           403  a page of another origin, or a host name of another machine
 ├─ RoleForbidden       403  the key's role does not allow this; `needs` is the role that does
 ├─ QuotaExceeded       403  a limit of the project; something must be deleted first
 ├─ AddressRefused      403  a webhook's URL is that of a private network, or not https, and the operator allows neither
 ├─ NotFound            404  no such job, model, data set, upload, artifact, method, key, project, webhook, route
 ├─ MethodNotAllowed    405
 ├─ RequestTimeout      408  the body did not arrive in time
 ├─ ActionNotAllowed    409  the job's status does not allow the action; `allowed_actions` lists those that it allows
 ├─ TeacherUnavailable  409  the job whose student should teach has ended without one
 ├─ NotReady            409  the job has not made this yet, or the file is not inspected yet
 ├─ NameTaken           409
 ├─ ProjectNotEmpty     409  the project has rows, `holds` says where
 ├─ KeyEnded            409  the key was revoked or has expired
 ├─ OperatorKeyNeeded   409  the first key must be the operator's
 ├─ OffsetConflict      409  the upload continues at another byte, `offset`
 ├─ UploadBusy          409  another request writes to the same upload
 ├─ WebhookDisabled     409  nothing is sent to it
 ├─ TooLarge            413
 ├─ AddressTooLong      414
 ├─ UnsupportedEncoding 415  the body is compressed
 ├─ RangeUnsatisfiable  416
 ├─ Invalid             422  parameters or a body that do not match their schema, every fault at once
 │   ├─ SpecInvalid
 │   ├─ WarningRefused       `strict`, and something is guessed or looks wrong
 │   ├─ Unusable             an inspection refused the file
 │   ├─ ChecksumMismatch
 │   ├─ ImageUnreadable      the bytes that a job's models were to see are no image
 │   └─ IdempotencyConflict
 ├─ LimitReached        429  a limit of the project; waiting helps: `Retry-After` is in seconds
 ├─ TooManyInspections  429  too many inspections of the caller wait already
 ├─ HeadersTooLarge     431
 ├─ ServerError         500
 ├─ Unavailable         503  the database cannot be reached or written to; `Retry-After` is in seconds
 ├─ InspectionsBusy     503  too many inspections wait already
 └─ StorageFull         507

Exceptions of other packages become problems here too: each class names the exception that it `stands_for`.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Self, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api import places
from api.inspections import Refused
from base import errors, figures
from base.errors import MESSAGE_CHARACTERS, Fault
from base.text import clipped
from kdcore.spec.reading import MAX_FAULTS, TYPES, more_faults, nearest, wrong_type
from store import errors as store_errors

log = logging.getLogger("distillery.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2


class FaultView(BaseModel):
    """One fault of a request: its place, a message, and what would work."""

    pointer: str = Field(description='RFC 6901 pointer into the body; "" is the whole body; "?name" is a parameter.')
    message: str
    code: str
    allowed: Any = None
    got: Any = None


class ProblemView(BaseModel):
    """RFC 9457. `code` is stable; `errors` lists every fault, not only the first."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FaultView] = []


class Problem(HTTPException):
    """Base of all problems. Each subclass has one code; `extra` are further members of the body."""

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    stands_for: ClassVar[type[Exception] | None] = None
    sends: ClassVar[tuple[str, ...]] = ()
    """The headers of the answer, for the OpenAPI document."""

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

    @classmethod
    def of(cls, error: Any) -> Self:
        """Return the problem for an exception of the type that the class stands for."""
        return cls(str(error))

    def response(self, request_id: str) -> Response:
        body = {
            "type": f"urn:distillery:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": clipped(self.detail, 4 * MESSAGE_CHARACTERS),
            "code": self.code,
            "request_id": request_id,
            "errors": [fault.as_dict() for fault in self.faults],
            **self.extra,
        }
        return Response(to_json(body, inf_nan_mode="null"), self.status, headers=self.headers, media_type=MEDIA_TYPE)


class MalformedRequest(Problem):
    status, code, title = 400, "malformed_request", "The request cannot be read"


class MalformedBody(Problem):
    status, code, title = 400, "malformed_body", "The body cannot be read"


class Unauthorized(Problem):
    status, code, title = 401, "unauthorized", "A key is needed"
    sends = ("WWW-Authenticate",)


class Forbidden(Problem):
    status, code, title = 403, "forbidden", "This origin or host is not allowed"


class RoleForbidden(Problem):
    status, code, title = 403, "role_forbidden", "The key's role does not allow this"


class NotFound(Problem):
    status, code, title = 404, "not_found", "Not found"
    stands_for = store_errors.NotFound


class MethodNotAllowed(Problem):
    status, code, title = 405, "method_not_allowed", "The address does not support this HTTP method"


class RequestTimeout(Problem):
    status, code, title = 408, "request_timeout", "The body did not arrive in time"


class ActionNotAllowed(Problem):
    status, code, title = 409, "action_not_allowed", "The job's status does not allow this action"
    stands_for = store_errors.ActionNotAllowed

    @classmethod
    def of(cls, error: store_errors.ActionNotAllowed) -> Self:
        return cls(str(error), job_status=error.status, allowed_actions=error.allowed_actions)


class TeacherUnavailable(Problem):
    status, code, title = 409, "teacher_unavailable", "The job whose student should teach has none"
    stands_for = store_errors.TeacherUnavailable

    @classmethod
    def of(cls, error: store_errors.TeacherUnavailable) -> Self:
        return cls(str(error), teacher_job=error.job_id)


class NotExportable(Problem):
    status, code, title = 409, "not_exportable", "The job does not have these weights of its student"
    stands_for = store_errors.NotExportable

    @classmethod
    def of(cls, error: store_errors.NotExportable) -> Self:
        return cls(str(error), allowed_checkpoints=error.allowed)


class NotReady(Problem):
    status, code, title = 409, "not_ready", "Not ready yet"


class NameTaken(Problem):
    status, code, title = 409, "name_taken", "The name is taken"
    stands_for = store_errors.NameTaken


class ProjectNotEmpty(Problem):
    status, code, title = 409, "project_not_empty", "The project is not empty"
    stands_for = store_errors.ProjectNotEmpty

    @classmethod
    def of(cls, error: store_errors.ProjectNotEmpty) -> Self:
        return cls(str(error), holds=error.holds)


class KeyEnded(Problem):
    status, code, title = 409, "key_ended", "The key cannot be used any more"
    stands_for = store_errors.KeyEnded


class OperatorKeyNeeded(Problem):
    status, code, title = 409, "operator_key_needed", "The first key must be the operator's"


class OffsetConflict(Problem):
    status, code, title = 409, "offset_conflict", "The upload continues at another offset"
    stands_for = store_errors.OffsetConflict

    @classmethod
    def of(cls, error: store_errors.OffsetConflict) -> Self:
        return cls(str(error), offset=error.offset)


class UploadBusy(Problem):
    status, code, title = 409, "upload_busy", "Another request writes to this upload"
    stands_for = store_errors.UploadBusy


class AddressRefused(Problem):
    status, code, title = 403, "address_refused", "The address is not called"


class WebhookDisabled(Problem):
    status, code, title = 409, "webhook_disabled", "The webhook is disabled"
    stands_for = store_errors.WebhookDisabled


class TooLarge(Problem):
    status, code, title = 413, "too_large", "Too many bytes"


class AddressTooLong(Problem):
    status, code, title = 414, "address_too_long", "The URL is too long"


class UnsupportedEncoding(Problem):
    status, code, title = 415, "unsupported_encoding", "The body's encoding is not supported"


class RangeUnsatisfiable(Problem):
    status, code, title = 416, "range_unsatisfiable", "The range is outside the file"
    sends = ("Content-Range",)


class Invalid(Problem):
    status, code, title = 422, "invalid_request", "The request does not match its schema"


class SpecInvalid(Invalid):
    code, title = "spec_invalid", "The job spec cannot work"


class WarningRefused(Invalid):
    code, title = "warning_refused", "Something is guessed or looks wrong"


class Unusable(Invalid):
    code, title = "unusable", "The file cannot be used"
    stands_for = Refused

    @classmethod
    def of(cls, error: Refused) -> Self:
        return cls(error.message, [Fault(f"/{error.option or 'blob'}", error.message, error.code)], hint=error.hint)


class ChecksumMismatch(Invalid):
    code, title = "checksum_mismatch", "The bytes are not the announced ones"
    stands_for = store_errors.BlobMismatch


class ImageUnreadable(Invalid):
    code, title = "image_unreadable", "The image cannot be read"


class IdempotencyConflict(Invalid):
    code, title = "idempotency_conflict", "The key was used for another request"
    stands_for = store_errors.IdempotencyConflict


class LimitReached(Problem):
    """The header `Retry-After` has the seconds after which it is worth to come again."""

    status, code, title = 429, "limit_reached", "A limit of the project is reached"
    sends = ("Retry-After",)
    stands_for = store_errors.LimitReached

    @classmethod
    def of(cls, error: store_errors.LimitReached) -> Self:
        figures.refused(error.limit)
        return cls(str(error), headers={"Retry-After": str(error.retry_after_s)}, **error.details)


class QuotaExceeded(Problem):
    status, code, title = 403, "quota_exceeded", "A limit of the project would be exceeded"
    stands_for = store_errors.QuotaExceeded

    @classmethod
    def of(cls, error: store_errors.QuotaExceeded) -> Self:
        figures.refused(error.limit)
        return cls(str(error), **error.details)


class HeadersTooLarge(Problem):
    status, code, title = 431, "headers_too_large", "The headers are too large"


class ServerError(Problem):
    status, code, title = 500, "internal", "An error of the service"


class Unavailable(Problem):
    status, code, title = 503, "unavailable", "Not available now"
    sends = ("Retry-After",)
    stands_for = errors.DatabaseUnavailable

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": str(RETRY_AFTER_S)})

    @classmethod
    def of(cls, error: errors.DatabaseUnavailable) -> Self:
        log.warning("database unavailable: %s", error)
        return cls("the database cannot be reached, or takes no writes; try again")


class TooManyInspections(Problem):
    status, code, title = 429, "too_many_inspections", "Too many inspections of yours wait"
    sends = ("Retry-After",)
    stands_for = places.AskerBusy

    @classmethod
    def of(cls, error: places.Busy) -> Self:
        return cls(str(error), headers={"Retry-After": str(error.retry_after_s)})


class InspectionsBusy(Problem):
    status, code, title = 503, "inspections_busy", "Too many inspections wait"
    sends = ("Retry-After",)
    stands_for = places.Busy

    @classmethod
    def of(cls, error: places.Busy) -> Self:
        return cls(str(error), headers={"Retry-After": str(error.retry_after_s)})


class StorageFull(Problem):
    status, code, title = 507, "storage_full", "The disk takes no more files"
    stands_for = errors.StorageFull


EVERYWHERE: tuple[type[Problem], ...] = (
    Unauthorized,
    Forbidden,
    RoleForbidden,
    Invalid,
    LimitReached,
    ServerError,
    Unavailable,
)
"""The problems that any route may return; declared once, on the router of all routes."""
TO_EVERYBODY: tuple[type[Problem], ...] = (MalformedRequest, AddressTooLong, HeadersTooLarge)
"""Those of `api/http_server.py` and `api/middleware.py`, before it matters what is asked for."""
OF_BODIES: tuple[type[Problem], ...] = (MalformedBody, RequestTimeout, TooLarge, UnsupportedEncoding)
"""Those of the middleware for a body."""


def responses(*problems: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Declare the problems of a route for the OpenAPI document.

    Those of every route that have the same status are declared with them: FastAPI would show the route's own alone.
    """
    declared: dict[int | str, dict[str, Any]] = {}
    statuses = {problem.status for problem in problems}
    for problem in dict.fromkeys((*(one for one in EVERYWHERE if one.status in statuses), *problems)):
        line = f"`{problem.code}`: {problem.title}"
        if problem.status in declared:
            declared[problem.status]["description"] += f"; {line}"
            continue
        schema = {"$ref": "#/components/schemas/Problem"}
        declared[problem.status] = {"description": line, "content": {MEDIA_TYPE: {"schema": schema}}}
        if problem.sends:
            references = {name: {"$ref": f"#/components/headers/{name}"} for name in problem.sends}
            declared[problem.status]["headers"] = references
    return declared


def install(app: FastAPI) -> None:
    """Turn every exception that can leave a route into a problem."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _schema_error)
    for problem in (*Problem.__subclasses__(), *Invalid.__subclasses__()):
        if problem.stands_for is not None:
            app.add_exception_handler(problem.stands_for, _handler(problem))


def problem_of(error: Exception) -> Problem | None:
    """Return the problem for an exception that was raised outside of a route; None for a bug."""
    if isinstance(error, Problem):
        return error
    for problem in (*Problem.__subclasses__(), *Invalid.__subclasses__()):
        if problem.stands_for is not None and isinstance(error, problem.stands_for):
            return problem.of(error)
    return None


def _handler(problem: type[Problem]) -> Any:
    async def handle(request: Request, error: Exception) -> Response:
        request.scope["distillery.problem"] = problem.code
        return problem.of(error).response(request_id(request))

    return handle


def request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))


async def _http_error(request: Request, error: Exception) -> Response:
    problem = _as_problem(request, cast(HTTPException, error))
    request.scope["distillery.problem"] = problem.code
    return problem.response(request_id(request))


def _as_problem(request: Request, error: HTTPException) -> Problem:
    if isinstance(error, Problem):
        return error
    path = request.scope["path"]  # Not `request.url`, which cannot be made of a malformed Host.
    if error.status_code == HTTPStatus.NOT_FOUND:
        hint = f"; did you mean {path.rstrip('/')}?" if path.endswith("/") and path.strip("/") else "; /docs lists them"
        return NotFound(f"{path} is not an address of this service{hint}")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_http_methods(request.app.openapi(), path)) or "GET"
        return MethodNotAllowed(f"{path} supports {allowed}", headers={"Allow": allowed})
    if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return MalformedBody(str(error.detail))
    return ServerError(str(error.detail))


def _http_methods(document: Mapping[str, Any], path: str) -> list[str]:
    """Return the methods of all routes at this path; the framework's own list has only those of the first route."""
    paths: Mapping[str, Mapping[str, Any]] = document["paths"]
    if path in paths:  # No template: `/v1/jobs/validate` is no job's address.
        fitting = [paths[path]]
    else:
        fitting = [
            own for template, own in paths.items() if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path)
        ]
    methods = {method.upper() for operations in fitting for method in operations}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


async def _schema_error(request: Request, error: Exception) -> Response:
    details = cast(RequestValidationError, error).errors()
    if any(detail["type"] == "json_invalid" for detail in details):
        return malformed_json(str(details[0].get("ctx", {}).get("error", ""))).response(request_id(request))
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    # An entry that is wrong is left out of its list, which then seems to be too short.
    parents = {tuple(detail["loc"][:-1]) for detail in details}
    details = [one for one in details if one["type"] != "too_short" or tuple(one["loc"]) not in parents]
    faults = [_fault(detail, model) for detail in details[:MAX_FAULTS]]
    if len(details) > MAX_FAULTS:
        # Of an object with very many unknown fields, most were left out.
        faults.append(more_faults(len(details) - MAX_FAULTS, "at least "))
    return Invalid(summary(faults), faults).response(request_id(request))


def malformed_json(reason: str) -> MalformedBody:
    return MalformedBody(f"the body is not JSON: {reason}", [Fault("", reason, "malformed_json")])


_WORDS = {
    "missing": "this field is required",
    "tuple_type": "a list belongs here",
    "list_type": "a list belongs here",
    "dict_type": "an object belongs here",
    "model_type": "an object belongs here",
    "model_attributes_type": "an object belongs here",
    "string_type": "a string belongs here",
}
"""In the place of pydantic's words, which are those of Python."""


def _fault(detail: Mapping[str, Any], model: Any = None) -> Fault:
    """Return one of pydantic's errors as a fault, with a pointer into the body or `?name` for a parameter. `model` is
    that of the body."""
    place, *path = detail["loc"]
    steps = "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
    context = detail.get("ctx", {})
    # A parameter that may be sent several times has a step for each value, which is no part of its name. A fault of
    # several together names the one that is wrong.
    pointer = steps if place == "body" else f"?{path[0] if path else context.get('parameter', '')}"
    bounds = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "expected": "{}"}
    allowed = next((text.format(context[key]) for key, text in bounds.items() if key in context), None)
    value = detail.get("input")
    got = value if isinstance(value, int | float | str | bool) and detail["type"] != "missing" else None
    message = str(context["error"]) if detail["type"] == "value_error" else _WORDS.get(detail["type"], detail["msg"])
    if detail["type"] in TYPES:
        message, allowed = wrong_type(detail["type"], clipped(value)), allowed or TYPES[detail["type"]]
    if detail["type"] in ("too_short", "too_long"):
        limit = f"at least {context['min_length']}" if "min_length" in context else f"at most {context['max_length']}"
        noun = "entry belongs" if limit.endswith(" 1") else "entries belong"
        message = f"{limit} {noun} here, got {context['actual_length']}"
    if detail["type"] == "extra_forbidden":
        message = f"there is no field {str(path[-1])[:200]!r} here"
        if place == "body" and len(path) == 1 and isinstance(model, type) and issubclass(model, BaseModel):
            message += nearest(str(path[-1]), list(model.model_fields))
    return Fault(pointer, message, str(detail["type"]), allowed, got)


def summary(faults: list[Fault]) -> str:
    """Return the first three faults in one line, and the number of the others."""
    return "; ".join(f"{fault.pointer or 'body'}: {fault.message}" for fault in faults[:3]) + (
        f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    )
