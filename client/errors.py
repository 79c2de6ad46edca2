"""The client's errors. `lines()` is the message for a person, one line for each fault.

DistilleryError
 ├─ ApiError           the service refused the request: its code, and every fault with its place in the body
 ├─ Unreachable        there is no answer from the address
 ├─ UnexpectedAnswer   the answer is not in Distillery's format
 ├─ Damaged            the SHA-256 of transferred bytes differs from the expected one
 ├─ NotEnded           the job has not ended within the time limit of `wait`; the job continues
 └─ InvalidInput       a local file, flag or value cannot be used
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx

from base.wire import FaultView

TRANSIENT_STATUSES = (429, 502, 503, 504)
"""Statuses of a server, or of a proxy before it, that is busy or temporarily unavailable."""


class DistilleryError(Exception):
    """Base of all errors. `transient`: the same request may succeed later."""

    transient = False

    def lines(self) -> list[str]:
        return [str(self)]


class ApiError(DistilleryError):
    """An RFC 9457 problem. `code` is stable; fields beyond the standard ones are in `extra`."""

    def __init__(self, problem: Mapping[str, Any], status: int) -> None:
        body = dict(problem)
        self.status, self.transient = status, status in TRANSIENT_STATUSES
        self.code = str(body.pop("code", "unknown"))
        self.title = str(body.pop("title", f"HTTP {status}"))
        self.detail = str(body.pop("detail", ""))
        self.request_id = body.pop("request_id", None)
        self.faults: list[FaultView] = body.pop("errors", [])
        self.extra = {name: value for name, value in body.items() if name not in ("type", "status")}
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)

    @classmethod
    def of(cls, answer: httpx.Response) -> DistilleryError:
        """Return the problem of an answer, or UnexpectedAnswer if it contains none."""
        try:
            problem = answer.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict) or "code" not in problem:
            return UnexpectedAnswer(answer)
        return cls(problem, answer.status_code)

    def lines(self) -> list[str]:
        if self.faults:
            return [self.title, *("  " + fault_line(fault) for fault in self.faults), *self._hints()]
        request = f" (request {self.request_id})" if self.status >= 500 and self.request_id else ""
        return [str(self) + request, *self._hints()]

    def _hints(self) -> list[str]:
        hints = []
        if self.extra.get("hint"):
            hints.append(f"  hint: {self.extra['hint']}")
        if self.code == "action_not_allowed" and "allowed_actions" in self.extra:
            hints.append(f"  allowed actions: {', '.join(self.extra['allowed_actions']) or 'none'}")
        if self.extra.get("allowed") and _short(self.extra["allowed"]) not in str(self):
            hints.append(f"  allowed: {_short(self.extra['allowed'])}")
        if self.code == "unauthorized":
            hints.append("  set DISTILLERY_API_KEY or --key")
        return hints


class Unreachable(DistilleryError):
    transient = True

    def __init__(self, base_url: str, cause: object) -> None:
        self.base_url = base_url
        super().__init__(f"no answer from {base_url}: {cause or 'the connection broke'}")

    def lines(self) -> list[str]:
        start = "  start a server with `./run up` (or `distillery up`), or set the address with DISTILLERY_URL or --url"
        return [str(self), start]


class UnexpectedAnswer(DistilleryError):
    def __init__(self, answer: httpx.Response) -> None:
        self.transient = answer.status_code in TRANSIENT_STATUSES
        kind = answer.headers.get("content-type", "no content type")
        super().__init__(
            f"{answer.request.url} answered {answer.status_code} ({kind}), not in Distillery's format; "
            "is the URL right?"
        )


class Damaged(DistilleryError):
    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(f"{what} is damaged: its SHA-256 is {actual}, expected {expected}; nothing was saved")


class NotEnded(DistilleryError, TimeoutError):
    def __init__(self, job_id: str, status: str, timeout_s: float) -> None:
        super().__init__(f"{job_id} is still {status} after {timeout_s:g} s; it continues")


class InvalidInput(DistilleryError):
    """A local file, flag or value that cannot be used."""


def fault_line(fault: FaultView) -> str:
    """Return `/student/architecture: what is wrong (given: …; allowed: …)`."""
    line = f"{fault.get('pointer') or 'the whole body'}: {fault.get('message', '')}"
    values = {"given": fault.get("got"), "allowed": fault.get("allowed")}
    # What the message names already is not repeated.
    extra = [f"{word}: {_short(value)}" for word, value in values.items() if value is not None and not _in(line, value)]
    return f"{line} ({'; '.join(extra)})" if extra else line


def _in(line: str, value: Any) -> bool:
    """Return True if the line contains the value, or each value of a list of words."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        words = set(re.findall(r"[^\s,;:?'\"()]+", line))
        return _short(value) in line or words.issuperset(value)
    return _short(value) in line


def _short(value: Any, longest: int = 200) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        text = ", ".join(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
