"""A job's events, polled and streamed."""

import json
from collections.abc import AsyncIterator

import pytest

from api import feed
from api.routes import events
from api.schemas import Page
from base.wire import EventView
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


def following(service: Service, job_id: str, last: int) -> AsyncIterator[bytes]:
    async def check() -> None:
        """The caller's key is valid."""

    return events._messages(service.db, job_id, "default", last, check, service.app.state.feed)


def messages(text: str) -> list[dict[str, str]]:
    """Server-sent events, field by field; comments and `retry` left out."""
    blocks = [block for block in text.split("\n\n") if block.startswith("id:")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


async def test_events_listing_is_numbered_and_paged(service: Service) -> None:
    job_id = await service.submit()
    await service.fail(job_id)
    whole = (await service.http.get(f"/v1/jobs/{job_id}/events")).json()
    assert [(event["seq"], event["type"]) for event in whole["data"]] == [(1, "queued"), (2, "claimed"), (3, "failed")]
    assert Page[EventView].model_validate(whole, strict=True)
    first = (await service.http.get(f"/v1/jobs/{job_id}/events", params={"limit": 2})).json()
    rest = (await service.http.get(f"/v1/jobs/{job_id}/events", params={"after": first["next"]})).json()
    assert first["data"] + rest["data"] == whole["data"]
    assert rest["next"] is None


async def test_stream_of_an_ended_job_sends_all_events_and_ends(service: Service) -> None:
    job_id = await service.submit()
    await service.fail(job_id)
    answer = await service.http.get(f"/v1/jobs/{job_id}/events/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    sent = messages(answer.text)
    assert [(message["id"], message["event"]) for message in sent] == [
        ("1", "queued"),
        ("2", "claimed"),
        ("3", "failed"),
    ]
    assert json.loads(sent[2]["data"])["data"]["error"]["code"] == "loss_diverged"


async def test_stream_resumes_after_the_last_event(service: Service) -> None:
    job_id = await service.submit()
    await service.fail(job_id)
    stream = f"/v1/jobs/{job_id}/events/stream"
    again = await service.http.get(stream, headers={"Last-Event-ID": "1"})
    assert [message["id"] for message in messages(again.text)] == ["2", "3"]
    after = await service.http.get(stream, params={"after": 2})
    assert [message["id"] for message in messages(after.text)] == ["3"]
    assert (await service.http.get(stream, headers={"Last-Event-ID": "3"})).status_code == 204


async def test_stream_of_a_retried_job_does_not_end_at_its_first_end(service: Service) -> None:
    job_id = await service.submit()
    await service.fail(job_id)
    await service.http.post(f"/v1/jobs/{job_id}/retry")
    await service.fail(job_id)
    answer = await service.http.get(f"/v1/jobs/{job_id}/events/stream")
    assert [message["event"] for message in messages(answer.text)] == [
        "queued", "claimed", "failed", "retried", "claimed", "failed",
    ]  # fmt: skip


async def test_messages_sends_events_as_they_happen(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the generator: the in-process client returns a stream only when it has ended."""
    monkeypatch.setattr(feed, "POLL_S", 0.01)
    monkeypatch.setattr(events, "PING_S", 0.03)
    job_id = await service.submit()
    stream = following(service, job_id, 1)
    assert await anext(stream) == b"retry: 2000\n\n"
    assert await anext(stream) == b": still here\n\n"
    await service.http.post(f"/v1/jobs/{job_id}/pause")
    message = await anext(stream)
    while message.startswith(b":"):
        message = await anext(stream)
    assert messages(message.decode())[0]["event"] == "paused"
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    rest = b"".join([message async for message in stream])
    assert [message["event"] for message in messages(rest.decode())] == ["cancelled"]


async def test_messages_ends_when_the_job_is_deleted(service: Service) -> None:
    job_id = await service.submit()
    await service.http.post(f"/v1/jobs/{job_id}/cancel")
    stream = following(service, job_id, 0)
    await anext(stream)
    await service.http.delete(f"/v1/jobs/{job_id}")
    assert [message async for message in stream] == []


async def test_messages_ends_when_the_database_is_away(service: Service) -> None:
    """The file is replaced by a folder, which cannot be opened, and then restored."""
    job_id = await service.submit()
    stream = following(service, job_id, 0)
    assert [await anext(stream) for _ in range(2)][1].startswith(b"id: 1")
    path = service.settings.home / "distillery.db"
    service.db.dispose()
    path.rename(path.with_name("away"))
    path.mkdir()
    assert [message async for message in stream] == []
    problem(await service.http.get(f"/v1/jobs/{job_id}/events/stream"), 503, "unavailable")
    path.rmdir()
    path.with_name("away").rename(path)
    stream = following(service, job_id, 0)
    assert [await anext(stream) for _ in range(2)][1].startswith(b"id: 1")


@pytest.mark.parametrize("path", ["events", "events/stream"])
async def test_events_of_an_unknown_job_are_not_found(service: Service, path: str) -> None:
    problem(await service.http.get(f"/v1/jobs/job_0/{path}"), 404, "not_found")
