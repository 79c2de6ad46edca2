"""Workers and numbers: what an operator looks at."""

import pytest

from api.schemas import Page, WorkerView
from store import workers
from tests.api.conftest import Service

pytestmark = pytest.mark.anyio


BUSY = {"name": "cuda:0", "job": "job_1", "state": "busy", "seen_s": 2.5}
STUCK = {"name": "cuda:1", "job": None, "state": "stuck", "seen_s": 40.0}


async def test_workers_are_alive_while_a_slot_of_theirs_consumes(service: Service) -> None:
    assert (await service.http.get("/v1/workers")).json()["data"] == []
    await service.db.write(workers.record_heartbeat, "well", "gpu-0", [BUSY, STUCK], "job_1")
    await service.db.write(workers.record_heartbeat, "unwell", "gpu-1", [STUCK], None)
    told = (await service.http.get("/v1/workers")).json()
    assert [(worker["id"], worker["current_job"], worker["alive"]) for worker in told["data"]] == [
        ("well", "job_1", True),
        ("unwell", None, False),
    ]
    assert told["data"][0]["devices"] == [BUSY, STUCK]
    assert Page[WorkerView].model_validate(told, strict=True)
    assert "distillery_workers 1" in (await service.http.get("/metrics")).text.splitlines()


async def test_numbers_for_prometheus(service: Service) -> None:
    await service.submit()
    answer = await service.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'distillery_jobs{status="queued"} 1' in answer.text.splitlines()
    assert "distillery_workers 0" in answer.text.splitlines()
