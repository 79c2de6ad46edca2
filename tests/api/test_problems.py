"""One form for all that goes wrong, and the document says so."""

from typing import Any

import pytest
from sqlalchemy import Connection

from store import jobs
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


async def test_no_such_address(service: Service) -> None:
    assert "/v1/nothing" in problem(await service.http.get("/v1/nothing"), 404, "not_found")["detail"]
    problem(await service.http.get("/static/nothing.js"), 404, "not_found")


async def test_no_such_verb(service: Service) -> None:
    answer = await service.http.put("/v1/jobs")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, POST"


async def test_a_body_that_is_no_json(service: Service) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await service.http.post("/v1/models", content=b'{"name": ', headers=headers)
    told = problem(answer, 400, "malformed_body")
    assert told["errors"][0]["code"] == "malformed_json"


async def test_a_body_without_its_type(service: Service) -> None:
    answer = await service.http.post("/v1/models", content=b"name=x")
    problem(answer, 422, "invalid_request")


async def test_a_body_beyond_bounds_where_no_file_is_expected(service: Service) -> None:
    problem(await service.http.post("/v1/models", json={"name": "x" * 1_000_001}), 413, "too_large")


async def test_an_unforeseen_error_tells_nothing_of_our_insides(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(connection: Connection, *arguments: object, **more: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(jobs, "get", broken)
    told = problem(await service.http.get("/v1/jobs/job_0"), 500, "internal")
    assert "secret" not in str(told)
    assert told["request_id"] in caplog.text
    assert "a secret path" in caplog.text


async def test_a_request_keeps_the_id_that_it_came_with(service: Service) -> None:
    answer = await service.http.get("/v1/nothing", headers={"X-Request-Id": "abc-1"})
    assert problem(answer, 404, "not_found")["request_id"] == "abc-1"
    odd = await service.http.get("/v1/nothing", headers={"X-Request-Id": "a b\tc" * 50})
    assert problem(odd, 404, "not_found")["request_id"].startswith("req_")


async def test_every_answer_forbids_a_browser_to_guess(service: Service) -> None:
    answer = await service.http.post("/v1/jobs", json=SUPERVISED)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{verb.upper()} {path}": operation
        for path, verbs in document["paths"].items()
        for verb, operation in verbs.items()
    }


async def test_the_document_declares_problems_and_nothing_of_the_frameworks_own(service: Service) -> None:
    document = (await service.http.get("/openapi.json")).json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert {"Problem", "JobSpec", "JobView"} <= set(document["components"]["schemas"])
    for name, operation in operations(document).items():
        if "/v1/" not in name:
            continue
        assert {"401", "422", "500", "503"} <= set(operation["responses"]), name
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"], (name, status)
        assert operation.get("description"), name


@pytest.mark.parametrize(
    ("operation", "statuses"),
    [
        ("POST /v1/jobs", {"201", "400", "413"}),
        ("GET /v1/jobs/{job_id}", {"200", "404"}),
        ("POST /v1/jobs/{job_id}/cancel", {"200", "404", "409"}),
        ("DELETE /v1/jobs/{job_id}", {"204", "404", "409"}),
        ("GET /v1/jobs/{job_id}/checkpoint", {"200", "206", "304", "404", "409", "416"}),
        ("PATCH /v1/uploads/{upload_id}", {"200", "404", "409", "413", "507"}),
    ],
)
async def test_what_may_go_wrong_is_declared(service: Service, operation: str, statuses: set[str]) -> None:
    document = (await service.http.get("/openapi.json")).json()
    assert statuses <= set(operations(document)[operation]["responses"])


async def test_the_document_holds_together(service: Service) -> None:
    """Every reference leads somewhere."""
    document = (await service.http.get("/openapi.json")).json()

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    names = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert names <= set(document["components"]["schemas"])
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JobSpec"}
