"""The server's sweep does without any worker: deadlines, requests after a lease has expired, repeated wake-ups."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from api import sweep
from api.sweep import Sweep
from base import clock as clock_module
from base.errors import DatabaseUnavailable
from store import lifecycle, tables
from store.records import database_now
from store.settings import Settings
from tests.api.conftest import Service, serving
from tests.clock import Clock
from tests.worker.processes import PATIENCE_S

pytestmark = pytest.mark.anyio

QUICK: dict[str, float] = {"lease_s": 0.4, "heartbeat_s": 0.1, "look_s": 0.05, "rering_s": 0.1}


@pytest.fixture(params=["sqlite", "postgres"])
async def service(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Service]:
    url = request.getfixturevalue(f"{request.param}_database_url")
    async with serving(Settings(home=tmp_path, database_url=url, min_free_bytes=0, **QUICK)) as running:
        yield running


async def until(reached: Callable[[], Coroutine[Any, Any, object]], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await reached():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain for {what}"
        await asyncio.sleep(0.01)


async def until_status(service: Service, job_id: str, status: str) -> dict[str, Any]:
    job: dict[str, Any] = {}

    async def reached() -> bool:
        job.update((await service.http.get(f"/v1/jobs/{job_id}")).json())
        return bool(job["status"] == status)

    await until(reached, f"{job_id} to be {status}")
    return job


async def test_sweep_fails_a_job_past_its_deadline(service: Service) -> None:
    job_id = await service.submit(scheduling={"deadline_s": 0.05})
    job = await until_status(service, job_id, "failed")
    assert job["error"]["code"] == "deadline_exceeded"
    assert job["waiting"] is None


async def test_sweep_cancels_a_job_whose_lease_expired(service: Service) -> None:
    job_id = await service.submit()
    await service.claim(job_id)
    assert (await service.http.post(f"/v1/jobs/{job_id}/cancel")).json()["status"] == "running"
    await expire_lease(service)
    await until_status(service, job_id, "cancelled")
    (attempt,) = (await service.http.get(f"/v1/jobs/{job_id}/attempts")).json()["data"]
    assert attempt["how"] == "lost"


async def test_sweep_wakes_workers_again(service: Service) -> None:
    job_id = await service.submit()
    before = len(service.wake_ups)

    async def woken() -> bool:
        return len(service.wake_ups) > before

    await until(woken, "another wake-up")
    await service.claim(job_id)


async def expire_lease(service: Service) -> None:
    expired = update(tables.jobs).values(lease_until=database_now() - 1)
    await service.db.write(lambda connection: connection.execute(expired))


async def left_behind(service: Service) -> str:
    """A job with a request to cancel, whose lease has expired."""
    job_id = await service.submit()
    await service.claim(job_id)
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    await expire_lease(service)
    return job_id


@pytest.mark.parametrize(("hindrance", "expected"), [("nothing", 30), ("away", 60), ("a wait", 50)])
async def test_sweep_takes_over_only_after_a_lease_of_unbroken_contact(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, hindrance: str, expected: int
) -> None:
    """The lease is 30 s, a sweep runs every 10 s. At 20 s the database is away; or the sweep waits for its turn to
    write, and heartbeats may wait too: contact then counts from 20 s on."""
    clock = Clock()
    monkeypatch.setattr(clock_module, "boottime", clock)
    monkeypatch.setattr(sweep, "boottime", clock)
    async with serving(settings) as service:
        job_id = await left_behind(service)
        sweeps = Sweep(service.db, settings, wake_workers=lambda: None)
        cancelled_at = None
        for second in range(0, 70, 10):
            clock.now = 1000.0 + second
            with monkeypatch.context() as moment:
                if second == 20 and hindrance == "away":
                    moment.setattr(sweep.lifecycle, "sweep", away)
                if second == 20 and hindrance == "a wait":
                    requested_at = clock.now - settings.heartbeat_s - 1
                    moment.setattr(sweep, "boottime", lambda requested_at=requested_at: requested_at)
                await sweeps.once()
            status = (await service.http.get(f"/v1/jobs/{job_id}")).json()["status"]
            if status == "cancelled" and cancelled_at is None:
                cancelled_at = second
    assert cancelled_at == expected


def away(*_: object, **__: object) -> list[str]:
    raise DatabaseUnavailable("gone for a moment")


async def test_sweep_continues_after_any_exception(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception] = [DatabaseUnavailable("away"), ZeroDivisionError("unforeseen")]
    real_sweep = lifecycle.sweep

    def failing_sweep(*args: Any, **kwargs: Any) -> list[str]:
        if raised:
            raise raised.pop()
        return real_sweep(*args, **kwargs)

    monkeypatch.setattr(sweep.lifecycle, "sweep", failing_sweep)
    async with serving(settings.model_copy(update=QUICK)) as service:
        job_id = await service.submit(scheduling={"deadline_s": 0.01})
        await until_status(service, job_id, "failed")
    assert raised == []
