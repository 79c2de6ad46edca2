"""What a project may have and do at once, as requests meet it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from api.auth import LOCAL, OPERATOR, Member
from api.limits import COUNTED_S, FRESH_S, Limiter
from api.problems import LimitReached
from base import figures
from base.wire import LimitsView
from store import limits as stored
from store.limits import Limits
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving

pytestmark = pytest.mark.anyio

ANN = Member("default", "member", "key_1", "ann")


@pytest.fixture
def limiter(service: Service) -> Limiter:
    made: Limiter = service.app.state.limiter
    return made


async def bound(service: Service, project: str = "default", **limits: int | None) -> dict[str, Any]:
    answer = await service.http.patch(f"/v1/projects/{project}", json={"limits": limits})
    assert answer.status_code == 200, answer.text
    view: dict[str, Any] = TypeAdapter(LimitsView).validate_python(answer.json())
    return view


# ── requests in a second ──


async def admitted(limiter: Limiter, caller: Member, times: int) -> list[int]:
    """Return the seconds after which to come again, 0 for a request that is admitted."""
    waits = []
    for _ in range(times):
        try:
            await limiter.admit(caller)
            waits.append(0)
        except LimitReached as refused:
            assert refused.headers is not None
            waits.append(int(refused.headers["Retry-After"]))
    return waits


async def test_admit_lets_a_second_of_requests_come_at_once(
    service: Service, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 a second: 5 at once, and then one every 0.2 s."""
    await bound(service, requests_per_s=5)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert await admitted(limiter, ANN, 7) == [0, 0, 0, 0, 0, 1, 1]
    now += 0.41
    assert await admitted(limiter, ANN, 4) == [0, 0, 1, 1]
    now += 60
    await limiter.of("default")
    assert await admitted(limiter, ANN, 6) == [0, 0, 0, 0, 0, 1]


async def test_admit_counts_by_project_and_never_refuses_the_operator(service: Service, limiter: Limiter) -> None:
    await bound(service, requests_per_s=1)
    other = Member("other", "member", "key_2", "eve")
    assert await admitted(limiter, ANN, 2) == [0, 1]
    assert await admitted(limiter, other, 3) == [0, 0, 0]
    assert await admitted(limiter, LOCAL, 3) == await admitted(limiter, OPERATOR, 3) == [0, 0, 0]


async def test_request_beyond_the_rate_is_answered_with_the_time_to_come_again(service: Service) -> None:
    await bound(service, requests_per_s=2)
    before = figures.refusals("requests_per_s")
    async with service.holder(await service.key("member")) as ann:
        answers = [await ann.http.get("/v1/methods") for _ in range(4)]
    assert {answer.status_code for answer in answers[:2]} == {200}
    body = problem(answers[3], 429, "limit_reached")
    assert (body["limit"], body["value"]) == ("requests_per_s", 2)
    assert int(answers[3].headers["retry-after"]) == 1
    assert figures.refusals("requests_per_s") > before


async def test_rate_is_checked_before_the_body_is_read(service: Service) -> None:
    await bound(service, requests_per_s=1)
    async with service.holder(await service.key("member")) as ann:
        answers = [await ann.http.post("/v1/jobs", content=b"no JSON") for _ in range(2)]
    problem(answers[0], 400, "malformed_body")
    problem(answers[1], 429, "limit_reached")


async def test_limits_of_another_process_hold_after_some_seconds(
    service: Service, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await limiter.of("default")).jobs_queued == service.settings.limit_jobs_queued
    await service.db.write(stored.set_own, "default", {"jobs_queued": 7})
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert (await limiter.of("default")).jobs_queued == service.settings.limit_jobs_queued
    now += FRESH_S + 0.1
    assert (await limiter.of("default")).jobs_queued == 7


# ── event streams ──


async def test_event_streams_beyond_the_limit_are_refused_until_one_ends(service: Service, limiter: Limiter) -> None:
    job_id = await service.submit()
    await bound(service, event_streams=1)
    await limiter.open_stream("default")
    answer = await service.http.get(f"/v1/jobs/{job_id}/events/stream")
    assert problem(answer, 429, "limit_reached")["limit"] == "event_streams"
    assert answer.headers["retry-after"] == "5"
    limiter.close_stream("default")
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    for _ in range(2):
        assert "event: cancelled" in (await service.http.get(f"/v1/jobs/{job_id}/events/stream")).text
    assert (await limiter.usage("default"))["event_streams"]["used"] == 0


# ── rows ──


async def test_submit_beyond_the_queue_is_answered_with_429(service: Service) -> None:
    await bound(service, jobs_queued=1)
    headers = {"Idempotency-Key": "k"}
    first = await service.http.post("/v1/jobs", json=SUPERVISED, headers=headers)
    answer = await service.http.post("/v1/jobs", json=SUPERVISED)
    body = problem(answer, 429, "limit_reached")
    assert (body["limit"], body["value"], body["used"]) == ("jobs_queued", 1, 1)
    assert answer.headers["retry-after"] == "30"
    again = await service.http.post("/v1/jobs", json=SUPERVISED, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    await service.http.post(f"/v1/jobs/{first.json()['id']}/cancel")
    await service.submit()
    problem(await service.http.post(f"/v1/jobs/{first.json()['id']}/retry"), 429, "limit_reached")


async def test_registrations_beyond_the_limit_are_answered_with_429(service: Service) -> None:
    await bound(service, inspections=1)
    service.app.state.registrations.wait_s = 0.01
    service.inspector.gate = asyncio.Event()
    blob = await service.upload(b"weights")
    assert (await service.http.post("/v1/models", json={"name": "one", "blob": blob})).status_code == 202
    answer = await service.http.post("/v1/datasets", json={"name": "two", "blob": blob})
    assert problem(answer, 429, "limit_reached")["limit"] == "inspections"
    service.inspector.gate.set()


# ── GET /v1/limits, PATCH /v1/projects ──


async def test_limits_show_values_and_what_is_used(service: Service) -> None:
    await bound(service, jobs_running=3)
    await service.submit()
    await service.upload(b"12345")
    view = (await service.http.get("/v1/limits")).json()
    TypeAdapter(LimitsView).validate_python(view, strict=True)
    limits = view["limits"]
    assert set(limits) == set(Limits.model_fields)
    assert limits["jobs_queued"] == {
        "value": 10_000, "used": 1, "is_default": True, "counts_in": "project",
    }  # fmt: skip
    assert limits["jobs_running"] == {"value": 3, "used": 0, "is_default": False, "counts_in": "project"}
    assert (limits["bytes_stored"]["used"], limits["upload_bytes"]["used"]) == (5, None)
    assert limits["requests_per_s"]["counts_in"] == "process"


async def test_bytes_of_jobs_are_counted_again_after_a_while(
    service: Service, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await limiter.bytes_beside_uploads("default") == 0
    job_id = await service.submit()
    await service.succeed(job_id)
    assert await limiter.bytes_beside_uploads("default") == 0
    now = time.monotonic() + COUNTED_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    expected = len(b"weights of " + job_id.encode()) + len(b"{}")
    assert await limiter.bytes_beside_uploads("default") == expected


async def test_change_of_limits_is_for_the_operator(service: Service) -> None:
    async with service.holder(await service.key("admin")) as ann:
        problem(await ann.http.patch("/v1/projects/default", json={"limits": {}}), 403, "role_forbidden")
        assert (await ann.http.get("/v1/limits")).json()["project"] == "default"
        problem(await ann.http.get("/v1/limits", params={"project": "other"}), 404, "not_found")


async def test_change_of_limits_removes_one_with_null(service: Service) -> None:
    assert (await bound(service, jobs_queued=5, event_streams=2))["limits"]["jobs_queued"]["value"] == 5
    view = (await bound(service, jobs_queued=None))["limits"]
    assert view["jobs_queued"] == {"value": 10_000, "used": 0, "is_default": True, "counts_in": "project"}
    assert view["event_streams"]["value"] == 2


@pytest.mark.parametrize(
    "body",
    [{}, {"limits": {"jobs": 1}}, {"limits": {"jobs_queued": -1}}, {"limits": {"jobs_queued": "x"}}, {"limit": {}}],
)
async def test_change_of_limits_refuses_what_is_none(service: Service, body: dict[str, Any]) -> None:
    problem(await service.http.patch("/v1/projects/default", json=body), 422, "invalid_request")


async def test_change_of_limits_of_no_project_is_not_found(service: Service) -> None:
    problem(await service.http.patch("/v1/projects/none", json={"limits": {}}), 404, "not_found")
    problem(await service.http.get("/v1/limits", params={"project": "none"}), 404, "not_found")


@pytest.fixture
async def on_postgres(postgres_database_url: str, tmp_path: Any) -> AsyncIterator[Service]:
    async with serving(Settings(home=tmp_path, database_url=postgres_database_url, min_free_bytes=0)) as running:
        yield running


async def test_postgres_submits_at_once_keep_within_the_queue(on_postgres: Service) -> None:
    await on_postgres.http.post("/v1/projects", json={"name": "default"})
    await bound(on_postgres, jobs_queued=2)
    answers = await asyncio.gather(*(on_postgres.http.post("/v1/jobs", json=SUPERVISED) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201, 201, 429, 429, 429, 429]
