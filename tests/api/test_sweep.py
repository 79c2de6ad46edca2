"""What holds without any worker: deadlines, wishes whose owners are dead, and rings that nobody heard."""

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


async def until(look: Callable[[], Coroutine[Any, Any, object]], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await look():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain for {what}"
        await asyncio.sleep(0.01)


async def until_status(service: Service, job_id: str, status: str) -> dict[str, Any]:
    job: dict[str, Any] = {}

    async def look() -> bool:
        job.update((await service.http.get(f"/v1/jobs/{job_id}")).json())
        return bool(job["status"] == status)

    await until(look, f"{job_id} to be {status}")
    return job


async def test_a_job_that_waits_past_its_deadline_fails(service: Service) -> None:
    job_id = await service.submit(scheduling={"deadline_s": 0.05})
    job = await until_status(service, job_id, "failed")
    assert job["error"]["code"] == "deadline_exceeded"
    assert job["waiting"] is None


async def test_a_job_that_was_to_be_cancelled_is_when_its_owner_is_dead(service: Service) -> None:
    job_id = await service.submit()
    await service.claim(job_id)
    assert (await service.http.post(f"/v1/jobs/{job_id}/cancel")).json()["status"] == "running"
    await lapse(service)
    await until_status(service, job_id, "cancelled")
    (tried,) = (await service.http.get(f"/v1/jobs/{job_id}/attempts")).json()["data"]
    assert tried["how"] == "lost"


async def test_a_job_that_waits_for_long_is_rung_for_again(service: Service) -> None:
    job_id = await service.submit()
    rung = len(service.rings)

    async def look() -> bool:
        return len(service.rings) > rung

    await until(look, "another ring")
    await service.claim(job_id)


async def lapse(service: Service) -> None:
    lapsed = update(tables.jobs).values(lease_until=database_now() - 1)
    await service.db.write(lambda connection: connection.execute(lapsed))


async def left_behind(service: Service) -> str:
    """A job that was to be cancelled, and whose owner is dead."""
    job_id = await service.submit()
    await service.claim(job_id)
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    await lapse(service)
    return job_id


@pytest.mark.parametrize(("hindrance", "patient_until"), [("nothing", 30), ("away", 60), ("a wait", 50)])
async def test_a_silent_owner_is_given_up_only_after_a_lease_of_unbroken_contact(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, hindrance: str, patient_until: int
) -> None:
    """A lease of 30 s, a round every 10 s. At 20 s the database is away; or a write has to wait for its turn, and so
    may that of the silent owner: contact then counts from 20 s on."""
    clock = Clock()
    monkeypatch.setattr(clock_module, "boottime", clock)
    monkeypatch.setattr(sweep, "boottime", clock)
    async with serving(settings) as service:
        job_id = await left_behind(service)
        rounds = Sweep(service.db, settings, ring=lambda: None)
        given_up_at = None
        for second in range(0, 70, 10):
            clock.now = 1000.0 + second
            with monkeypatch.context() as moment:
                if second == 20 and hindrance == "away":
                    moment.setattr(sweep.lifecycle, "sweep", away)
                if second == 20 and hindrance == "a wait":
                    asked_at = clock.now - settings.heartbeat_s - 1
                    moment.setattr(sweep, "boottime", iter([asked_at, clock.now]).__next__)
                await rounds.once()
            status = (await service.http.get(f"/v1/jobs/{job_id}")).json()["status"]
            if status == "cancelled" and given_up_at is None:
                given_up_at = second
    assert given_up_at == patient_until


def away(*_: object, **__: object) -> list[str]:
    raise DatabaseUnavailable("gone for a moment")


async def test_it_outlives_whatever_a_round_meets(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Exception] = [DatabaseUnavailable("away"), ZeroDivisionError("unforeseen")]
    honest = lifecycle.sweep

    def meet(*given: Any, **more: Any) -> list[str]:
        if met:
            raise met.pop()
        return honest(*given, **more)

    monkeypatch.setattr(sweep.lifecycle, "sweep", meet)
    async with serving(settings.model_copy(update=QUICK)) as service:
        job_id = await service.submit(scheduling={"deadline_s": 0.01})
        await until_status(service, job_id, "failed")
    assert met == []
