"""Logs of all processes, on standard error: lines for people, or one JSON object a line for programs.

A line that is written while a request is answered has the request's id; a line that names a job has the job's.
"""

import json
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

REQUEST: ContextVar[Mapping[str, Any] | None] = ContextVar("request", default=None)
"""The ASGI scope of the request that is answered. Its `request_id` is set after this variable, so the scope is kept."""
ACCESS = "distillery.access"
"""The logger with one line for each request."""

_JOB = re.compile(r"\bjob_[0-9a-z]{24}\b")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def log_to_stderr(*quiet: str, form: Literal["text", "json"] = "text") -> None:
    """Set up logging of a process. `quiet`: loggers that write warnings and errors only."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


class Lines(logging.Formatter):
    """One line for each record, and below it the traceback, if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        # What a client has sent may be part of the message: it must not look like a line of its own, or like a command
        # to the terminal.
        record.message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """One JSON object for each record: at, level, logger, message; request_id, job_id and others where known."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **getattr(record, "fields", {}),
        }
        if (scope := REQUEST.get()) is not None and "request_id" in scope:
            line["request_id"] = scope["request_id"]
        if found := _JOB.search(message):
            line.setdefault("job_id", found[0])
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
