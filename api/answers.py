"""Answers written straight to JSON. A view that we made ourselves need not be validated once more to be sent."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response


class Json(Response):
    """JSON from plain dicts and lists; the route's `response_model` documents it, and a test holds it to that."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(content), status, headers)


def page(data: Sequence[Any], following: str | None = None) -> Json:
    return Json({"data": data, "next": following})


def iso(seconds: float | None) -> str | None:
    """Seconds since the epoch, as the database counts, to ISO-8601 in UTC with milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
