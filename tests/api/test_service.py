"""Workers, health and numbers: what an operator looks at."""

from pathlib import Path

import pytest

from api.schemas import Page, WorkerView
from store import workers
from store.settings import Settings
from tests.api.conftest import Service, problem, serving

pytestmark = pytest.mark.anyio


async def test_workers_are_listed_while_they_are_heard(service: Service) -> None:
    assert (await service.http.get("/v1/workers")).json()["data"] == []
    await service.db.write(workers.beat, "gpu-0:1", "gpu-0", [{"name": "cuda:0"}], None)
    told = (await service.http.get("/v1/workers")).json()
    assert [(worker["id"], worker["current_job"]) for worker in told["data"]] == [("gpu-0:1", None)]
    assert Page[WorkerView].model_validate(told, strict=True)


async def test_alive_and_ready(service: Service) -> None:
    assert (await service.http.get("/healthz")).json() == {"status": "ok"}
    assert (await service.http.get("/readyz")).json() == {"status": "ready"}


async def test_not_ready_without_room(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"min_free_bytes": 10**18})) as service:
        problem(await service.http.get("/readyz"), 507, "storage_full")
        assert (await service.http.get("/healthz")).status_code == 200


async def test_without_a_database_the_process_lives_and_says_when_to_come_back(tmp_path: Path) -> None:
    missing = Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path}/nowhere/distillery.db")
    async with serving(missing) as service:
        assert (await service.http.get("/healthz")).status_code == 200
        for path in ("/readyz", "/v1/jobs", "/metrics"):
            answer = await service.http.get(path)
            problem(answer, 503, "unavailable")
            assert int(answer.headers["retry-after"]) > 0


async def test_numbers_for_prometheus(service: Service) -> None:
    await service.submit()
    answer = await service.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'distillery_jobs{status="queued"} 1' in answer.text.splitlines()
    assert "distillery_workers 0" in answer.text.splitlines()
