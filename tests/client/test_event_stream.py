import json

import httpx
import pytest

from client.errors import ApiError, Unreachable
from client.event_stream import ServerSentEvent, parse_events
from tests.client.fake_service import Broken, FakeService, event, job, page, problem

STREAM = "GET /v1/jobs/job_1/events/stream"


def sent(*events: dict[str, object]) -> bytes:
    return b"retry: 2000\n\n" + b"".join(
        f"id: {one['seq']}\nevent: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in events
    )


def streamed(*events: dict[str, object], broken: bool = False) -> httpx.Response:
    kind = {"content-type": "text/event-stream; charset=utf-8"}
    if broken:
        return httpx.Response(200, headers=kind, stream=Broken(sent(*events)))
    return httpx.Response(200, headers=kind, content=sent(*events))


def test_parse_events():
    lines = [": ping", "", "id: 7", "event: phase", "data: one", "data:two", "", "retry: 5", "", "data: last", ""]
    assert list(parse_events(lines)) == [
        ServerSentEvent("7", "phase", "one\ntwo"),
        ServerSentEvent("7", "message", "last"),
    ]


def test_parse_events_drops_an_incomplete_event():
    assert list(parse_events(["id: 1", "data: half"])) == []


def test_watch_yields_events_once_and_in_order_over_breaks():
    fake = FakeService(
        {
            STREAM: [
                streamed(event(1), event(2), broken=True),
                httpx.ConnectError("restarting"),
                problem(503, "unavailable"),
                streamed(event(2), event(3), broken=True),
                streamed(event(4)),
                httpx.Response(204),
            ]
        }
    )
    assert [one["seq"] for one in fake.client().watch("job_1")] == [1, 2, 3, 4]
    assert [one.headers["last-event-id"] for one in fake.requests_to(STREAM)] == ["0", "2", "2", "2", "3", "4"]


def test_watch_starts_after_a_number():
    fake = FakeService({STREAM: [streamed(event(6)), httpx.Response(204)]})
    assert [one["seq"] for one in fake.client().watch("job_1", after=5)] == [6]
    assert fake.requests[0].headers["last-event-id"] == "5"


@pytest.mark.parametrize(
    "stream",
    [problem(501, "no_streams"), httpx.Response(200, text="{}"), httpx.ReadTimeout("buffered by a proxy")],
    ids=["refused", "another type", "silent"],
)
def test_watch_polls_where_streams_fail(stream: object):
    fake = FakeService(
        {
            STREAM: stream,
            "GET /v1/jobs/job_1": [job(status="running"), job(status="succeeded")],
            "GET /v1/jobs/job_1/events": [page([event(1)], "1"), page([event(2)]), page([event(3, "succeeded")])],
        }
    )
    assert [one["seq"] for one in fake.client().watch("job_1")] == [1, 2, 3]


def test_watch_of_an_unknown_job():
    with pytest.raises(ApiError, match="not found"):
        list(FakeService().client().watch("job_1"))


def test_watch_raises_unreachable_after_a_long_outage():
    fake = FakeService({STREAM: httpx.ConnectError("refused")})
    with pytest.raises(Unreachable):
        list(fake.client().watch("job_1", max_outage_s=0))
