"""The events that all streams of a process share."""

import pytest

from api import feed
from api.feed import Feed
from base.errors import DatabaseUnavailable
from tests.api.conftest import Service

pytestmark = pytest.mark.anyio


def numbers(messages: list[tuple[int, bytes]] | None) -> list[int] | None:
    return None if messages is None else [seq for seq, _ in messages]


async def test_feed_reads_the_events_of_followed_jobs(service: Service) -> None:
    shared = Feed(service.db)
    first, other = await service.submit(), await service.submit()
    with shared.following(first) as job, shared.following(first) as same, shared.following(other) as another:
        assert same is job is not another
        assert job.since(0) is None, "before the first look"
        await shared.look()
        assert (numbers(job.since(0)), numbers(job.since(1)), numbers(another.since(0))) == ([1], [], [1])
        await service.http.post(f"/v1/jobs/{first}/pause")
        await service.http.post(f"/v1/jobs/{first}/cancel")
        await shared.look()
        assert numbers(job.since(1)) == [2, 3]
        assert b"event: cancelled" in (job.since(2) or [])[0][1]
        assert numbers(another.since(1)) == []
    assert shared._followed == {}


async def test_feed_sends_those_behind_to_the_rows(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "KEPT", 2)
    shared = Feed(service.db)
    job_id = await service.submit()
    for _ in range(2):
        for verb in ("pause", "resume"):
            await service.http.post(f"/v1/jobs/{job_id}/{verb}")
    with shared.following(job_id) as job:
        await shared.look()
        assert job.seq == 5
        assert (numbers(job.since(3)), job.since(2)) == ([4, 5], None)
        for verb in ("pause", "resume", "pause"):
            await service.http.post(f"/v1/jobs/{job_id}/{verb}")
        await shared.look()
        assert job.since(5) is not None
        assert job.since(7) is None, "more events than are read at once"


async def test_feed_forgets_a_job_that_is_deleted(service: Service) -> None:
    shared = Feed(service.db)
    job_id = await service.submit()
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    with shared.following(job_id) as job:
        await shared.look()
        await service.http.delete(f"/v1/jobs/{job_id}")
        await shared.look()
        assert job.since(2) is None


async def test_change_returns_at_once_for_what_is_there(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*given: object) -> None:
        raise DatabaseUnavailable("the server went away")

    shared = Feed(service.db)
    job_id = await service.submit()
    with shared.following(job_id) as job:
        await shared.look()
        await job.change(0, 1000)
        await job.change(1, 0.001)
        monkeypatch.setattr(service.db, "scan", away)
        with pytest.raises(DatabaseUnavailable):
            await shared.look()
        job.forget()
        assert job.since(1) is None
