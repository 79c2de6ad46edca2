"""The events of a job as they happen: server-sent events with reconnection, or polling if streams do not work."""

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import httpx

from base.jobs import TERMINAL
from base.wire import EventView
from client.connection import Connection
from client.errors import ApiError, DistilleryError, Unreachable

READ_TIMEOUT_S = 45.0
"""The server sends data at least every 15 seconds; after three times that, the connection counts as broken."""
MAX_EMPTY_STREAMS = 3
"""The number of streams in a row without an event after which the client polls."""
STREAMS_UNSUPPORTED = (405, 406, 501)


@dataclass
class ServerSentEvent:
    id: str | None
    event: str
    data: str


def parse_events(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """Parse the event-stream format of the HTML standard: one field per line; an empty line ends an event."""
    name, data, identity = "message", list[str](), None
    for line in lines:
        if not line:
            if data:
                yield ServerSentEvent(identity, name, "\n".join(data))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            identity = value


class EventStream:
    """An iterator over a job's events until the job has ended: each event once, in order, also after reconnections.

    `last_seq` is the number of the last event. An outage of more than `max_outage_s` raises Unreachable.
    """

    def __init__(self, connection: Connection, job_id: str, after: int = 0, max_outage_s: float = 120) -> None:
        self.connection, self.path, self.last_seq = connection, f"/v1/jobs/{job_id}", after
        self.max_outage_s = max_outage_s
        self.streaming = True

    def __iter__(self) -> Iterator[EventView]:
        ended, empty = False, 0
        answered_at = time.monotonic()
        while not ended:
            before = self.last_seq
            try:
                ended = yield from self._stream() if self.streaming else self._poll()
                answered_at = time.monotonic()
            except (httpx.TransportError, DistilleryError) as error:
                if isinstance(error, DistilleryError) and not error.transient:
                    raise
                if time.monotonic() - answered_at > self.max_outage_s:
                    raise Unreachable(self.connection.base_url, error) from error
            empty = 0 if self.last_seq > before else empty + 1
            self.streaming = self.streaming and empty < MAX_EMPTY_STREAMS
            if not ended and empty:
                self.connection.pause(min(empty, 3))

    def _stream(self) -> Generator[EventView, None, bool]:
        """Yield events until the stream ends or breaks. Returns True if the job has ended and no event is left."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self.last_seq)}
        try:
            with self.connection.stream(f"{self.path}/events/stream", headers=headers, read_s=READ_TIMEOUT_S) as answer:
                if answer.status_code == httpx.codes.NO_CONTENT:
                    return True
                if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                    self.streaming = False
                    return False
                for event in parse_events(answer.iter_lines()):
                    yield from self._new([json.loads(event.data)])
        except ApiError as error:
            if error.status not in STREAMS_UNSUPPORTED:
                raise
            self.streaming = False
        return False

    def _poll(self) -> Generator[EventView, None, bool]:
        """Yield the new events. Returns True if the job has ended."""
        # Read the status first: then the events of an ended job are complete.
        ended = self.connection.json("GET", self.path)["status"] in TERMINAL
        more = True
        while more:
            page = self.connection.json("GET", f"{self.path}/events", params={"after": self.last_seq})
            yield from self._new(page["data"])
            more = page["next"] is not None
        return ended

    def _new(self, events: list[EventView]) -> Iterator[EventView]:
        for event in events:
            if event["seq"] > self.last_seq:
                self.last_seq = event["seq"]
                yield event
