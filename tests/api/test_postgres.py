"""The same server around PostgreSQL: coroutines all the way, and the same answers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
async def service(postgres_database_url: str, tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(Settings(home=tmp_path, database_url=postgres_database_url, min_free_bytes=0)) as running:
        yield running


async def test_postgres_job_from_submit_to_delete(service: Service) -> None:
    job_id = await service.submit()
    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["queue_position"] == 1
    made = await service.succeed(job_id)
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    assert (job["status"], job["allowed_actions"]) == ("succeeded", ["delete"])
    assert (await service.http.get(f"/v1/jobs/{job_id}/checkpoint")).headers[
        "etag"
    ] == f'"{made["student.safetensors"]}"'
    stream = await service.http.get(f"/v1/jobs/{job_id}/events/stream", headers={"Last-Event-ID": "2"})
    assert "event: succeeded" in stream.text
    assert "event: queued" not in stream.text
    assert (await service.http.delete(f"/v1/jobs/{job_id}")).status_code == 204


async def test_postgres_submit_of_racing_senders_makes_one_job(service: Service) -> None:
    headers = {"Idempotency-Key": "k1"}
    send = (service.http.post("/v1/jobs", json=SUPERVISED, headers=headers) for _ in range(8))
    answers = await asyncio.gather(*send)
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_postgres_problems_are_the_same(service: Service) -> None:
    job_id = await service.submit()
    problem(await service.http.post(f"/v1/jobs/{job_id}/resume"), 409, "action_not_allowed")
    problem(await service.http.get("/v1/jobs/job_0"), 404, "not_found")
    problem(await service.http.post("/v1/jobs", json={"dataset": "x"}), 422, "spec_invalid")


async def test_postgres_answers_text_that_it_cannot_store_as_sqlite_does(service: Service) -> None:
    job_id = await service.submit()
    for address in ("jobs/%00", "models/%00", "datasets/%00", "uploads/%00", f"jobs/{job_id}/artifacts/%00"):
        problem(await service.http.get(f"/v1/{address}"), 422, "invalid_request")
    for address in ("jobs?after=%00", "jobs?method=%00", f"jobs/{job_id}/metrics?keys=%00"):
        problem(await service.http.get(f"/v1/{address}"), 422, "invalid_request")
    problem(await service.http.post("/v1/uploads?filename=%00", content=b"x"), 422, "invalid_request")
    for changes in (
        {"name": "a\0b"},
        {"dataset": "a\0b"},
        {"student": {"architecture": "convnet8", "checkpoint": "model:a\0b"}},
        {"student": "timm/a\0b"},
        {"dataset": {"source": "digits", "class_names": ["a\0", "b"]}},
        {"a\0b": 1},
    ):
        answer = await service.http.post("/v1/jobs", json={**SUPERVISED, **changes})
        problem(answer, 422, "spec_invalid")
    largest = 2**63 - 1
    for address in (f"events?after={largest}", f"metrics?after_step={largest}", f"logs?offset={largest}"):
        assert (await service.http.get(f"/v1/jobs/{job_id}/{address}")).status_code == 200
    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["status"] == "queued"


async def test_postgres_uploads_models_and_health(service: Service) -> None:
    blob = await service.upload(b"weights")
    body = {"name": "teacher", "blob": blob, "architecture": "convnet32"}
    assert (await service.http.post("/v1/models", json=body)).status_code == 201
    problem(await service.http.post("/v1/models", json=body), 409, "name_taken")
    assert (await service.http.get("/readyz")).status_code == 200
    assert (await service.http.get("/metrics")).status_code == 200


async def test_postgres_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    away = Settings(home=tmp_path, database_url="postgresql://nobody@127.0.0.1:9/none")
    async with serving(away) as service:
        answer = await service.http.get("/v1/jobs")
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"]
