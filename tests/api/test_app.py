"""Requests do not wait for each other, workers are woken after the commit, and the OpenAPI document is complete."""

import asyncio
import sqlite3
from typing import Any

import pytest

from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


async def test_app_answers_readers_while_a_writer_waits(service: Service, settings: Settings) -> None:
    """A POST waits for the lock; GETs that come after it are answered before it."""
    job_id = await service.submit()
    holder = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(service.http.post("/v1/jobs", json=SUPERVISED))
    await asyncio.sleep(0.05)
    for path in (f"/v1/jobs/{job_id}", "/v1/jobs", f"/v1/jobs/{job_id}/events", "/healthz"):
        assert (await service.http.get(path)).status_code == 200
    assert not waiting.done()
    holder.execute("ROLLBACK")
    holder.close()
    assert (await waiting).status_code == 201


async def test_app_wakes_workers_after_the_commit(service: Service) -> None:
    """At that moment another connection reads the job."""
    counts: list[int] = []

    def count_jobs() -> None:
        with service.db.connect() as connection:
            counts.append(connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar_one())

    service.app.state.wake_workers = count_jobs
    await service.submit()
    assert counts == [1]


async def test_app_hides_jobs_of_other_projects(service: Service) -> None:
    job_id = await service.submit()
    with service.db.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET project = 'theirs'")
    assert (await service.http.get("/v1/jobs")).json()["data"] == []
    for path in ("", "/events", "/metrics", "/logs", "/artifacts", "/checkpoint", "/events/stream"):
        problem(await service.http.get(f"/v1/jobs/{job_id}{path}"), 404, "not_found")
    problem(await service.http.post(f"/v1/jobs/{job_id}/cancel"), 404, "not_found")


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{verb.upper()} {path}": operation
        for path, verbs in document["paths"].items()
        for verb, operation in verbs.items()
    }


async def test_openapi_declares_problems_and_nothing_of_the_framework(service: Service) -> None:
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
async def test_openapi_declares_the_problems_of_a_route(service: Service, operation: str, statuses: set[str]) -> None:
    document = (await service.http.get("/openapi.json")).json()
    assert statuses <= set(operations(document)[operation]["responses"])


async def test_openapi_references_exist(service: Service) -> None:
    document = (await service.http.get("/openapi.json")).json()

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    for reference in references(document):
        _, _, kind, name = reference.split("/")
        assert name in document["components"][kind], reference
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JobSpec"}
