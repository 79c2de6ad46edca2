"""The OpenAPI document is true: hand-made requests at the edge of every parameter, and random ones by schemathesis."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.openapi import HEADERS, SOMETIMES
from store.settings import Settings
from tests.api.conftest import SUPERVISED, FakeInspector, Service, problem, serving
from tests.servers import served

pytestmark = pytest.mark.anyio

METHODS = ("get", "post", "patch", "put", "delete")
TOO_LONG = "x" * 5000
NUMBERS = ("-1", str(2**63), str(10**20), "9" * 300, "9" * 5000, "1e3", "nan", "null")


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        yield from ((method, path, operation) for method, operation in methods.items() if method in METHODS)


def parameters(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each parameter with its operation."""
    for method, path, operation in operations(document):
        yield from ((method, path, parameter) for parameter in operation.get("parameters", ()))


async def of(service: Service) -> dict[str, Any]:
    document: dict[str, Any] = (await service.http.get("/openapi.json")).json()
    return document


def strict(answer: httpx.Response) -> Any:
    """The JSON of an answer, without NaN, which is none."""
    return json.loads(answer.content, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


async def ask(service: Service, method: str, path: str, parameter: dict[str, Any], value: str) -> httpx.Response:
    """Send a request whose only unusual parameter has this value."""
    where, name = parameter["in"], parameter["name"]
    named = {"path": {name: httpx.QueryParams({"v": value}).__str__().removeprefix("v=").replace("+", "%20")}}
    address = path
    for step in ("job_id", "upload_id", "name_or_id", "name"):
        address = address.replace(f"{{{step}}}", named["path"].get(step, "nothing") if where == "path" else "nothing")
    for left in [part for part in address.split("/") if part.startswith("{")]:
        own = named["path"].get(left.strip("{}"), "nothing") if where == "path" else "nothing"
        address = address.replace(left, own)
    return await service.http.request(
        method.upper(),
        address,
        params={name: value} if where == "query" else None,
        headers={name: value.encode("latin-1", "replace")} if where == "header" else None,
        json={} if method in ("post", "patch") and "uploads" not in path else None,
    )


def kind(parameter: dict[str, Any]) -> str:
    return str(parameter["schema"].get("type", "any"))


async def test_openapi_bounds_every_text_and_number(service: Service) -> None:
    for method, path, parameter in parameters(await of(service)):
        schema, name = parameter["schema"], f"{method} {path} {parameter['name']}"
        assert "anyOf" not in schema, name
        if kind(parameter) == "string" and "enum" not in schema:
            assert {"pattern", "format"} & set(schema), name
            assert schema.get("maxLength", 0) <= 2000, name
        if kind(parameter) == "integer":
            assert "minimum" in schema, name
            assert schema.get("maximum", schema.get("exclusiveMaximum", 2**64)) <= 2**63, name


async def test_openapi_bounds_every_part_of_a_body(service: Service) -> None:
    document = await of(service)
    schemas, seen, loose = document["components"]["schemas"], set(), []

    def look(node: Any, at: str) -> None:
        if isinstance(node, list):
            for part in node:
                look(part, at)
        if not isinstance(node, dict):
            return
        if (name := str(node.get("$ref", "")).rpartition("/")[2]) and name not in seen:
            seen.add(name)
            look(schemas[name], name)
        needed = {
            "string": {"pattern", "format", "enum", "const"},
            "array": {"maxItems", "prefixItems"},
            "integer": {"maximum", "exclusiveMaximum", "enum", "const"},
            "number": {"maximum", "exclusiveMaximum", "enum", "const"},
        }.get(str(node.get("type")))
        if needed is not None and not needed & set(node):
            loose.append(f"{at}: {node}")
        for key, part in node.items():
            look(part, f"{at}/{key}")

    for method, path, operation in operations(document):
        sent = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        look(sent.get("schema"), f"{method} {path}")
    assert {"JobSpec", "NewModel", "NewDataset"} <= seen
    assert not loose, "\n".join(loose)


@pytest.mark.parametrize("value", ["\0", "a\0b", "\x1b[2J", "a\nb", "\x9b", "\u202e", TOO_LONG])
async def test_text_parameters_refuse_what_a_column_cannot_hold(service: Service, value: str) -> None:
    for method, path, parameter in parameters(await of(service)):
        if kind(parameter) != "string" or (parameter["in"] == "header" and not value.isprintable()):
            continue
        answer = await ask(service, method, path, parameter, value)
        assert answer.status_code in (403, 404, 422), (method, path, parameter["name"], answer.text)
        strict(answer)


async def test_number_parameters_are_bounded_to_what_a_column_holds(service: Service) -> None:
    for method, path, parameter in parameters(await of(service)):
        if kind(parameter) == "integer":
            for value in NUMBERS:
                answer = await ask(service, method, path, parameter, value)
                problem(answer, 422, "invalid_request")
                assert len(answer.content) < 2000


async def test_number_parameters_take_their_largest_value(service: Service) -> None:
    job_id = await service.submit()
    largest = str(2**63 - 1)
    for address in ("events?after=", "metrics?after_step=", "logs?offset=", "logs?attempt="):
        answer = await service.http.get(f"/v1/jobs/{job_id}/{address}{largest}")
        assert answer.status_code == 200, answer.text
    service.files.log_path(job_id, 1).parent.mkdir(parents=True)
    service.files.log_path(job_id, 1).write_text("a line\n")
    answer = await service.http.get(f"/v1/jobs/{job_id}/logs?attempt=1&offset={largest}")
    assert (answer.status_code, answer.text, answer.headers["X-Log-Next-Offset"]) == (200, "", largest)
    answer = await service.http.get(f"/v1/jobs/{job_id}/logs?attempt=1&offset=2")
    assert (answer.text, answer.headers["X-Log-Next-Offset"]) == ("line\n", "7")


BODIES = (
    '{"name": "\\ud800", "blob": "x"}',
    '{"\\ud800": 1}',
    '{"name": "a\\u0000", "part": "\\u0000", "dataset": "\\u0000", "student": "\\u0000"}',
    '{"class_names": ["\\ud800", "b\\u001b"], "preprocessing": {"mean": [NaN], "std": [-Infinity]}}',
    '{"preprocessing": {"mean": [0.5], "std": [0]}, "image_size": NaN, "name": {"a": [NaN]}, "limit": 1e400}',
    '{"image_size": ' + "9" * 5000 + "}",
    '{"name": "' + "x" * 100_000 + '", "' + "k" * 100_000 + '": 1}',
    "[" * 100_000,
    "[]",
    "null",
    "NaN",
    "",
)


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_answers_to_any_body_are_short_and_strict_json(service: Service, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    for method, path, operation in operations(await of(service)):
        if "application/json" not in operation.get("requestBody", {}).get("content", {}):
            continue
        address = path.replace("{name_or_id}", "nothing").replace("{job_id}", "nothing")
        answer = await service.http.request(method.upper(), address, content=body, headers=headers)
        assert answer.status_code in (200, 400, 403, 404, 413, 422), (path, answer.text)
        assert len(answer.content) < 20_000
        strict(answer)


async def test_every_answer_to_a_body_is_declared(service: Service) -> None:
    for _, path, operation in operations(await of(service)):
        if "requestBody" in operation:
            assert {"400", "413"} <= set(operation["responses"]), path


async def test_headers_are_declared_where_they_are_sent(service: Service) -> None:
    document = await of(service)
    assert set(document["components"]["headers"]) == set(HEADERS)
    job_id = await service.submit()
    await service.succeed(job_id)
    blob = (await service.http.post("/v1/uploads", content=b"weights")).json()["blob"]
    key = {"Idempotency-Key": "k"}
    sent = {
        "POST /v1/jobs": [
            await service.http.post("/v1/jobs", json=SUPERVISED, headers=key),
            await service.http.post("/v1/jobs", json=SUPERVISED, headers=key),
        ],
        "POST /v1/models": [await service.http.post("/v1/models", json={"name": "m", "blob": blob})],
        "POST /v1/uploads": [await service.http.post("/v1/uploads", headers={"Upload-Length": "9"})],
        "GET /v1/jobs/{job_id}/logs": [await service.http.get(f"/v1/jobs/{job_id}/logs")],
        "GET /v1/jobs/{job_id}/artifacts/{name}": [
            await service.http.get(f"/v1/jobs/{job_id}/artifacts/report.json", headers=headers)
            for headers in ({}, {"Range": "bytes=0-0"}, {"Range": "bytes=9-"}, {"If-None-Match": "*"})
        ],
        "GET /v1/jobs/{job_id}": [await service.http.get(f"/v1/jobs/{job_id}")],
    }
    named = {f"{method.upper()} {path}": operation for method, path, operation in operations(document)}
    for operation, answers in sent.items():
        for answer in answers:
            declared = named[operation]["responses"][str(answer.status_code)].get("headers", {})
            missing = {name for name in declared if name not in answer.headers} - SOMETIMES
            assert not missing, (operation, answer.status_code, missing)
            told = {name for name in HEADERS if name in answer.headers} - {"Cache-Control"}
            assert told <= set(declared), (operation, answer.status_code, told - set(declared))
    assert "Location" in sent["POST /v1/jobs"][1].headers
    assert sent["POST /v1/jobs"][1].headers["Idempotent-Replayed"] == "true"


async def test_openapi_says_whether_a_key_is_needed(settings: Settings) -> None:
    for key_hash, security in ((None, [{"key": []}, {}]), ("0" * 64, [{"key": []}])):
        async with serving(settings.model_copy(update={"admin_key_hash": key_hash})) as service:
            document = service.app.openapi()
            assert document["security"] == security
            assert document["paths"]["/healthz"]["get"]["security"] == []
            assert "security" not in document["paths"]["/v1/jobs"]["get"]


async def test_allow_has_the_methods_of_the_address_itself(service: Service) -> None:
    answer = await service.http.put("/v1/jobs/validate")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert {"GET", "DELETE"} <= set((await service.http.put("/v1/jobs/job_1")).headers["allow"].split(", "))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # hypothesis' about schemathesis' own strategies
def test_random_requests_are_answered_as_the_document_says(settings: Settings, tmp_path: Path) -> None:
    """A short form of `python -m bench.fuzz`: three random requests for each operation, made from the document."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install .[dev]")
    from hypothesis import HealthCheck, Phase, given
    from hypothesis import settings as tried
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # what fits a schema may still not exist

    app = create_app(settings, wake_workers=lambda: None, inspector=FakeInspector())
    with served(app) as url, httpx.Client(base_url=url) as http:
        http.post("/v1/jobs", json=SUPERVISED)
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        findings: list[str] = []
        for operation in (result.ok() for result in schema.get_all_operations()):
            if operation.path.endswith("/stream"):
                continue

            @tried(
                max_examples=3, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def requested(case: Any) -> None:
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            try:
                requested()
            except BaseExceptionGroup as found:
                findings.append(f"{operation.label}: {found.exceptions}")
    assert not findings, "\n\n".join(findings)
