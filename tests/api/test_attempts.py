"""A job's attempts, each with a history of its own."""

import pytest

from api.schemas import AttemptView, Page
from store import checkpoints, lifecycle
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def test_attempts_listing_has_every_attempt(service: Service) -> None:
    """Handed back at once, failed at step 10, then running from there."""
    job_id = await service.submit()
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    path = job["links"]["attempts"]
    assert (await service.http.get(path)).json() == {"data": [], "next": None}
    await service.db.write(lifecycle.release, job_id, await service.claim(job_id), "drain")
    fence = await service.claim(job_id)
    await service.db.write(checkpoints.record, job_id, fence, step=10, sha256="5" * 64, bytes=1, path="x")
    error = {"code": "out_of_memory", "message": "the device is full", "retryable": True, "hint": None}
    await service.db.write(lifecycle.finish_failed, job_id, fence, error, 0)
    await service.claim(job_id)
    body = (await service.http.get(path)).json()
    assert Page[AttemptView].model_validate(body, strict=True)
    assert [(tried["attempt"], tried["attempts_without_progress"], tried["how"]) for tried in body["data"]] == [
        (1, 1, "released"),
        (2, 1, "failed"),
        (3, 1, None),
    ]
    assert [(tried["first_step"], tried["last_step"]) for tried in body["data"]] == [
        (None, None),
        (None, 10),
        (10, None),
    ]
    assert {tried["worker"] for tried in body["data"]} == {"worker-1"}
    assert [tried["ended_at"] is None for tried in body["data"]] == [False, False, True]


async def test_attempts_of_an_unknown_job_are_not_found(service: Service) -> None:
    problem(await service.http.get("/v1/jobs/job_0/attempts"), 404, "not_found")
