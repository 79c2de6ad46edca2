"""The middleware: body limit, request ids, security headers, and the answer to a bug."""

import pytest
from sqlalchemy import Connection

from store import jobs
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


async def test_middleware_limits_json_bodies(service: Service) -> None:
    problem(await service.http.post("/v1/models", json={"name": "x" * 1_000_001}), 413, "too_large")


async def test_middleware_hides_the_details_of_an_unexpected_error(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(connection: Connection, *arguments: object, **more: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(jobs, "get", broken)
    body = problem(await service.http.get("/v1/jobs/job_0"), 500, "internal")
    assert "secret" not in str(body)
    assert body["request_id"] in caplog.text
    assert "a secret path" in caplog.text


async def test_middleware_keeps_the_request_id(service: Service) -> None:
    answer = await service.http.get("/v1/nothing", headers={"X-Request-Id": "abc-1"})
    assert problem(answer, 404, "not_found")["request_id"] == "abc-1"
    odd = await service.http.get("/v1/nothing", headers={"X-Request-Id": "a b\tc" * 50})
    assert problem(odd, 404, "not_found")["request_id"].startswith("req_")


async def test_middleware_adds_security_headers(service: Service) -> None:
    answer = await service.http.post("/v1/jobs", json=SUPERVISED)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
