"""The OpenAPI document: FastAPI's own, completed by what FastAPI cannot know of an answer.

A route declares the headers of its answers by `headers(...)`, and a problem its own by `Problem.sends`. What holds
for every route is added here: the request's id, the answers to a body that cannot be read, and the key.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api import problems
from kdcore.spec import JobSpec

_NUMBER = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Accept-Ranges": ("`bytes`: parts of the file can be requested with `Range`.", {"const": "bytes"}),
    "Allow": ("The methods of this address.", _TEXT),
    "Cache-Control": ("How the answer may be kept.", _TEXT),
    "Content-Disposition": ("The name under which the file is saved.", _TEXT),
    "Content-Range": ("The bytes that are sent, and the size of the file.", _TEXT),
    "ETag": ("Stands for this content, in quotation marks: of a file its SHA-256. `If-None-Match` takes it.", _TEXT),
    "Idempotent-Replayed": (
        "`true`: the key is known, and this is what the first request has made.",
        {"const": "true"},
    ),
    "Last-Modified": ("When the file was stored.", _TEXT),
    "Location": ("The address of what was made.", {"type": "string", "format": "uri-reference"}),
    "Repr-Digest": ("The SHA-256 of the whole file (RFC 9530).", _TEXT),
    "Retry-After": ("Seconds after which the request may be sent again.", _NUMBER),
    "Upload-Length": ("The size of the whole file; not sent before it is known.", _NUMBER),
    "Upload-Offset": ("The number of bytes that are stored; the next ones begin there.", _NUMBER),
    "WWW-Authenticate": ("The way to send a key.", _TEXT),
    "X-Checksum-SHA256": (
        "The SHA-256 of the whole file, hexadecimal.",
        {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    ),
    "X-Log-Attempt": ("The attempt whose log this is; 0 if there is no log yet.", _NUMBER),
    "X-Log-Newest-Attempt": ("The newest attempt of the job.", _NUMBER),
    "X-Log-Next-Offset": ("Where this part ends: the `offset` of the next request.", _NUMBER),
    "X-Log-Offset": ("Where this part begins.", _NUMBER),
    "X-Request-Id": ("The id of the request, which the server's log has as well.", _TEXT),
}
"""Every header of an answer that a client may read, with its meaning and schema."""
SOMETIMES = {"Idempotent-Replayed", "Last-Modified", "Retry-After", "Upload-Length", "X-Request-Id"}
"""Headers that not every answer of their kind has."""


def headers(*names: str) -> dict[str, Any]:
    """Return the declaration of an answer's headers, for `responses` of a route."""
    return {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}}


def made_once(view: Any, *more: str) -> dict[int | str, dict[str, Any]]:
    """Return the declaration of the answers of a route that makes something: 201, and 200 for a key that is known."""
    replayed = headers("Location", "Idempotent-Replayed", *more)
    known = {"model": view, "description": "The key is known: what the first request has made.", **replayed}
    return {200: known, 201: headers("Location", *more)}


def document(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """Return the document of an application. `needs_key`: every request needs one."""
    made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    components = made.setdefault("components", {})
    components["headers"] = {name: _header(name) for name in HEADERS}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schemas = components.setdefault("schemas", {})
    for name, model in (("JobSpec", JobSpec), ("Problem", problems.ProblemView)):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
    made["security"] = [{"key": []}] if needs_key else [{"key": []}, {}]
    for path, method, operation in _operations(made):
        _complete(path, method, operation)
    return made


def _header(name: str) -> dict[str, Any]:
    meaning, schema = HEADERS[name]
    return {"description": meaning, "required": name not in SOMETIMES, "schema": schema}


def _operations(made: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in made["paths"].items():
        yield from ((path, method, operation) for method, operation in methods.items())


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    """Add what holds for every operation, or for all whose body is looked at, although most take none."""
    answers = operation["responses"]
    general = problems.TO_EVERYBODY if method == "get" else (*problems.TO_EVERYBODY, *problems.OF_BODIES)
    for status, declared in problems.responses(*general).items():
        answers.setdefault(str(status), declared)
    if not path.startswith("/v1/") and path != "/metrics":
        operation["security"] = []
    for parameter in operation.get("parameters", ()):
        _without_null(parameter["schema"])
    for answer in answers.values():
        answer["headers"] = {**headers("X-Request-Id")["headers"], **answer.get("headers", {})}


def _without_null(schema: dict[str, Any]) -> None:
    """Take null out of a parameter's schema: what is left out is not sent, and the text `null` is no number."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])
