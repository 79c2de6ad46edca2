"""The access log and the figures of requests: by route, with the key's id, and without any secret."""

import json
import logging

import pytest

from base.logs import ACCESS, JsonLines
from store.settings import Settings
from tests.api.conftest import Service, serving

pytestmark = pytest.mark.anyio

KEY = "distillery_a-secret"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, ACCESS)
    return caplog


def fields(lines: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(JsonLines().format(line)) for line in lines.records if line.name == ACCESS]


async def test_access_log_has_route_latency_and_ids(service: Service, lines: pytest.LogCaptureFixture) -> None:
    job_id = await service.submit()
    answer = await service.http.get(f"/v1/jobs/{job_id}/events?after=0", headers={"X-Request-Id": "mine"})
    await service.http.get("/v1/no-such-route%0A")
    await service.http.get("/healthz")
    submitted, read, unknown = fields(lines)
    assert (submitted["method"], submitted["route"], submitted["status"]) == ("POST", "/v1/jobs", 201)
    assert read["route"] == "/v1/jobs/{job_id}/events" and read["job_id"] == job_id
    assert read["request_id"] == answer.headers["x-request-id"] == "mine"
    assert isinstance(read["ms"], float) and read["ms"] > 0
    assert (read["project"], read["key"]) == ("default", "local")
    assert (unknown["route"], unknown["status"]) == ("unknown", 404)
    assert "\n" not in str(unknown["path"])


async def test_access_log_has_no_secret(settings: Settings, lines: pytest.LogCaptureFixture) -> None:
    guarded = settings.model_copy(update={"admin_key_hash": "a" * 64})
    async with serving(guarded, Authorization=f"Bearer {KEY}") as service:
        assert (await service.http.get(f"/v1/jobs?key={KEY}")).status_code == 401
    (line,) = fields(lines)
    assert (line["status"], line["key"]) == (401, None)
    assert KEY not in json.dumps(line)


async def test_access_log_can_be_turned_off(settings: Settings, lines: pytest.LogCaptureFixture) -> None:
    async with serving(settings.model_copy(update={"access_log": False})) as service:
        await service.http.get("/v1/jobs")
    assert fields(lines) == []


async def test_requests_are_counted_by_route(service: Service) -> None:
    for path in ("/v1/jobs/job_1", "/v1/jobs/job_2", "/static/nothing.js", "/nowhere"):
        await service.http.get(path)
    text = (await service.http.get("/metrics")).text
    counted = [line for line in text.splitlines() if line.startswith("distillery_http_request_seconds_count")]
    routes = {line.split('route="')[1].split('"')[0] for line in counted}
    assert {"/v1/jobs/{job_id}", "unknown"} <= routes
    assert not any("job_1" in route for route in routes)
