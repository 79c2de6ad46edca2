"""What may go wrong on the client's side, in words for the person who can mend it.

    DistilleryError
     ├─ ApiError           the service refused: its code, and every fault with the place where it is
     ├─ Unreachable        nothing answers at the address
     ├─ UnexpectedAnswer   something answers there, but it does not speak as Distillery does
     ├─ Damaged            bytes that came or went are not those that were meant
     ├─ NotEnded           waiting took longer than it was allowed to; the job goes on
     └─ Unusable           a file, flag or value on this side that cannot be used

`lines()` is the whole message, one line a fault.
"""

import json
from collections.abc import Mapping
from typing import Any

import httpx

from client.answers import Fault

PASSING = (429, 502, 503, 504)
"""The server, or a proxy before it, says that it is busy or away for a while."""


class DistilleryError(Exception):
    """Base of all. `passes`: asking again later may be answered, and nothing is wrong with what was asked."""

    passes = False

    def lines(self) -> list[str]:
        return [str(self)]


class ApiError(DistilleryError):
    """An RFC 9457 problem. `code` is stable; what a problem adds to the standard fields is in `extra`."""

    def __init__(self, problem: Mapping[str, Any], status: int) -> None:
        body = dict(problem)
        self.status, self.passes = status, status in PASSING
        self.code = str(body.pop("code", "unknown"))
        self.title = str(body.pop("title", f"HTTP {status}"))
        self.detail = str(body.pop("detail", ""))
        self.request_id = body.pop("request_id", None)
        self.faults: list[Fault] = body.pop("errors", [])
        self.extra = {name: value for name, value in body.items() if name not in ("type", "status")}
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)

    @classmethod
    def of(cls, answer: httpx.Response) -> DistilleryError:
        """The problem in an answer, or UnexpectedAnswer where the answer holds none."""
        try:
            problem = answer.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict) or "code" not in problem:
            return UnexpectedAnswer(answer)
        return cls(problem, answer.status_code)

    def lines(self) -> list[str]:
        if not self.faults:
            ours = f" (request {self.request_id})" if self.status >= 500 and self.request_id else ""
            return [str(self) + ours, *self._hints()]
        return [self.title, *("  " + fault_line(fault) for fault in self.faults), *self._hints()]

    def _hints(self) -> list[str]:
        hints = []
        if self.extra.get("hint"):
            hints.append(f"  hint: {self.extra['hint']}")
        if self.code == "action_not_allowed" and "allowed_actions" in self.extra:
            hints.append(f"  possible now: {', '.join(self.extra['allowed_actions']) or 'nothing'}")
        if self.extra.get("allowed") and _short(self.extra["allowed"]) not in str(self):
            hints.append(f"  there are: {_short(self.extra['allowed'])}")
        if self.code == "unauthorized":
            hints.append("  give the key as DISTILLERY_API_KEY or --key")
        return hints


class Unreachable(DistilleryError):
    """Nothing answers. Whatever was asked may be asked again."""

    passes = True

    def __init__(self, base_url: str, why: object) -> None:
        self.base_url = base_url
        super().__init__(f"no answer from {base_url}: {why or 'the connection broke'}")

    def lines(self) -> list[str]:
        return [
            str(self),
            "  start a server with `./run up` (or `distillery up`), or name another by DISTILLERY_URL or --url",
        ]


class UnexpectedAnswer(DistilleryError):
    def __init__(self, answer: httpx.Response) -> None:
        self.passes = answer.status_code in PASSING
        kind = answer.headers.get("content-type", "no content type")
        super().__init__(
            f"{answer.request.url} answered {answer.status_code} ({kind}) and not as Distillery does; is the URL right?"
        )


class Damaged(DistilleryError):
    def __init__(self, what: str, expected: str, found: str) -> None:
        super().__init__(f"{what} is damaged: its SHA-256 should be {expected} and is {found}; nothing was kept")


class NotEnded(DistilleryError, TimeoutError):
    def __init__(self, job_id: str, status: str, timeout_s: float) -> None:
        super().__init__(f"{job_id} is still {status} after {timeout_s:g} s; it goes on")


class Unusable(DistilleryError):
    """A mistake on this side of the wire."""


def fault_line(fault: Fault) -> str:
    """`/student/architecture: what is wrong (given: …; allowed: …)`."""
    line = f"{fault.get('pointer') or 'the whole body'}: {fault.get('message', '')}"
    known = (("given", fault.get("got")), ("allowed", fault.get("allowed")))
    told = [f"{word}: {_short(value)}" for word, value in known if value is not None and _short(value) not in line]
    return f"{line} ({'; '.join(told)})" if told else line


def _short(value: Any, longest: int = 200) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        text = ", ".join(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
