"""A job's events as they happen: server-sent events, taken up again after a break, or polled where streams fail."""

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import httpx

from base.jobs import TERMINAL
from client.answers import Event
from client.connection import Connection
from client.errors import ApiError, DistilleryError, Unreachable

SILENCE_S = 45.0
"""The server speaks every 15 seconds at least; after three times that, the line is dead."""
TRIES = 3
"""Streams in a row that may bring nothing before we poll."""
NO_STREAMS = (405, 406, 501)


@dataclass
class Message:
    """One server-sent event."""

    id: str | None
    event: str
    data: str


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """Read the event-stream format of the HTML standard: fields by line, a blank line ends a message."""
    name, data, identity = "message", list[str](), None
    for line in lines:
        if not line:
            if data:
                yield Message(identity, name, "\n".join(data))
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


class Feed:
    """Iterate over a job's events until it has ended: each once, in order, whatever breaks in between.

    `seen` is the number of the last one. A server that stays away longer than `patience_s` is Unreachable.
    """

    def __init__(self, connection: Connection, job_id: str, after: int = 0, patience_s: float = 120) -> None:
        self.connection, self.path, self.seen = connection, f"/v1/jobs/{job_id}", after
        self.patience_s = patience_s
        self.streaming = True

    def __iter__(self) -> Iterator[Event]:
        ended, idle = False, 0
        heard = time.monotonic()
        while not ended:
            before = self.seen
            try:
                ended = yield from self._stream() if self.streaming else self._poll()
                heard = time.monotonic()
            except (httpx.TransportError, DistilleryError) as error:
                if isinstance(error, DistilleryError) and not error.passes:
                    raise
                if time.monotonic() - heard > self.patience_s:
                    raise Unreachable(self.connection.base_url, error) from error
            idle = 0 if self.seen > before else idle + 1
            self.streaming = self.streaming and idle < TRIES
            if not ended and idle:
                self.connection.pause(min(idle, 3))

    def _stream(self) -> Generator[Event, None, bool]:
        """Events until the stream ends or breaks. Says whether the job has ended and all of it is told."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self.seen)}
        try:
            with self.connection.stream(f"{self.path}/events/stream", headers=headers, read_s=SILENCE_S) as answer:
                if answer.status_code == httpx.codes.NO_CONTENT:
                    return True
                if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                    self.streaming = False
                    return False
                for message in messages(answer.iter_lines()):
                    yield from self._new([json.loads(message.data)])
        except ApiError as refused:
            if refused.status not in NO_STREAMS:
                raise
            self.streaming = False
        return False

    def _poll(self) -> Generator[Event, None, bool]:
        """The status is read before the events: its end is then among them."""
        ended = self.connection.json("GET", self.path)["status"] in TERMINAL
        more = True
        while more:
            page = self.connection.json("GET", f"{self.path}/events", params={"after": self.seen})
            yield from self._new(page["data"])
            more = page["next"] is not None
        return ended

    def _new(self, events: list[Event]) -> Iterator[Event]:
        for event in events:
            if event["seq"] > self.seen:
                self.seen = event["seq"]
                yield event
