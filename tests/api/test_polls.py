"""GET of a job: its tag, its kept answer, and that the shortcut answers as the route does."""

import asyncio

import pytest

from api import polls
from api.polls import matches
from base import figures
from base.errors import DatabaseUnavailable
from store import checkpoints, lifecycle
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("known", "is_same"),
    [('"a"', True), ('W/"a"', True), ('"b", "a"', True), ("*", True), ('"b"', False), ("a", False), ("", False)],
)
def test_matches_compares_weakly(known: str, is_same: bool) -> None:
    assert matches(known, '"a"') is is_same


async def test_poll_of_a_known_job_is_304_until_it_changes(service: Service) -> None:
    job_id = await service.submit()
    fence = await service.claim(job_id)
    path = f"/v1/jobs/{job_id}"
    tags = []
    for step in range(3):
        first = await service.http.get(path)
        again = await service.http.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert "x-request-id" in again.headers
        tags.append(first.headers["etag"])
        if step == 0:
            await service.db.write(lifecycle.set_progress, job_id, fence, {"percent": 1.0})
        else:
            kept = {"step": 5, "sha256": "5" * 64, "bytes": 1, "path": "x"}
            await service.db.write(checkpoints.record, job_id, fence, **kept)
    assert len(set(tags)) == 3
    changed = (await service.http.get(path)).json()
    assert (changed["progress"], changed["checkpoint_step"]) == ({"percent": 1.0}, 5)


async def test_poll_reads_the_job_once_for_each_revision(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await service.submit()
    fence = await service.claim(job_id)
    reads: list[str] = []
    read = polls.Polls._read
    monkeypatch.setattr(polls.Polls, "_read", lambda *given: reads.append("read") or read(*given))
    for _ in range(3):
        await service.http.get(f"/v1/jobs/{job_id}")
    assert len(reads) == 1
    await service.db.write(lifecycle.heartbeat, job_id, fence, 30)
    await service.http.get(f"/v1/jobs/{job_id}")
    assert len(reads) == 2


async def test_polls_at_the_moment_of_a_change_share_one_read(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await service.submit()
    fence = await service.claim(job_id)
    reads: list[str] = []
    read = polls.Polls._read
    monkeypatch.setattr(polls.Polls, "_read", lambda *given: reads.append("read") or read(*given))
    for percent in (1.0, 2.0):
        await service.db.write(lifecycle.set_progress, job_id, fence, {"percent": percent})
        answers = await asyncio.gather(*(service.http.get(f"/v1/jobs/{job_id}") for _ in range(5)))
        assert {answer.json()["progress"]["percent"] for answer in answers} == {percent}
    assert len(reads) <= 4
    assert service.app.state.polls._making == {}


async def test_polls_of_a_job_that_is_deleted_are_all_not_found(service: Service) -> None:
    job_id = await service.submit()
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    await service.http.get(f"/v1/jobs/{job_id}")
    await service.http.delete(f"/v1/jobs/{job_id}")
    for answer in await asyncio.gather(*(service.http.get(f"/v1/jobs/{job_id}") for _ in range(3))):
        problem(answer, 404, "not_found")


async def test_poll_of_a_queued_job_sees_the_queue_move(service: Service) -> None:
    first, second = await service.submit(), await service.submit()
    positions = [(await service.http.get(f"/v1/jobs/{second}")).json()["queue_position"]]
    await service.http.post(f"/v1/jobs/{first}/cancel")
    positions.append((await service.http.get(f"/v1/jobs/{second}")).json()["queue_position"])
    assert positions == [2, 1]


OTHER_TAG = f'"{"x" * 200}"'
BY_THE_ROUTE = {"If-None-Match": OTHER_TAG}
"""A long tag keeps the shortcut out."""


async def test_poll_by_the_route_is_the_same_answer(service: Service) -> None:
    job_id = await service.submit()
    await service.claim(job_id)
    short, long = [await service.http.get(f"/v1/jobs/{job_id}", headers=sent) for sent in ({}, BY_THE_ROUTE)]
    assert short.json() == long.json()
    names = ("etag", "cache-control", "content-type", "content-length")
    assert [short.headers[name] for name in names] == [long.headers[name] for name in names]
    known = {"If-None-Match": f"{OTHER_TAG}, {short.headers['etag']}"}
    assert (await service.http.get(f"/v1/jobs/{job_id}", headers=known)).status_code == 304


async def test_polls_are_counted_under_their_route(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await service.submit()
    counted: list[str] = []
    monkeypatch.setattr(figures, "answered", lambda method, route, status, seconds: counted.append(route))
    for sent in ({}, BY_THE_ROUTE):
        assert (await service.http.get(f"/v1/jobs/{job_id}", headers=sent)).status_code == 200
    assert counted == ["/v1/jobs/{job_id}"] * 2


async def test_poll_by_head_has_no_body(service: Service) -> None:
    job_id = await service.submit()
    got, head = await service.http.get(f"/v1/jobs/{job_id}"), await service.http.head(f"/v1/jobs/{job_id}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_poll_of_an_unknown_job_is_the_routes_problem(service: Service) -> None:
    problem(await service.http.get("/v1/jobs/job_" + "0" * 24), 404, "not_found")


async def test_poll_without_a_database_is_a_problem(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await service.submit()
    await service.claim(job_id)
    await service.http.get(f"/v1/jobs/{job_id}")

    async def none(*given: object) -> None:
        return None

    async def away(*given: object, **more: object) -> None:
        raise DatabaseUnavailable("the server went away")

    monkeypatch.setattr(service.db, "fetch", none)
    monkeypatch.setattr(service.db, "read", away)
    monkeypatch.setattr(service.db, "scan", away)
    problem(await service.http.get(f"/v1/jobs/{job_id}"), 503, "unavailable")


async def test_kept_answers_are_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polls, "KEPT_BYTES", 3000)
    for _ in range(3):
        job_id = await service.submit()
        await service.claim(job_id)
        await service.http.get(f"/v1/jobs/{job_id}")
    kept = service.app.state.polls
    assert list(kept._kept) == [job_id]
    assert kept._bytes == len(kept._kept[job_id].body) <= 3000
