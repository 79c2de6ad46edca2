"""HTTP requests to one server. Failed requests are sent again if that is safe; refusals are raised as errors."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import httpx

from base.defaults import is_loopback
from client.errors import ApiError, UnexpectedAnswer, Unreachable

NOT_EXECUTED = 429
"""The status that guarantees that the request changed nothing."""
MAYBE_EXECUTED = (502, 503, 504)
"""The request may have been executed: a proxy lost the answer, or the database lost the answer to the commit."""
IDEMPOTENT_VERBS = ("GET", "HEAD", "DELETE")
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
MAX_PAUSE_S = 10.0


class Connection:
    """An HTTP client that raises the server's problems as ApiError. Threads may share it."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 30,
        retries: int = 2,
        pause_s: float = 0.25,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.retries, self.pause_s = retries, pause_s
        headers = {"User-Agent": f"distillery-python/{_version()}", "Accept-Encoding": "identity"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self.http = httpx.Client(
                base_url=self.base_url,
                headers=headers,
                timeout=httpx.Timeout(timeout_s, connect=5),
                transport=transport,
                # A proxy named in the environment cannot reach the loopback address of this machine.
                trust_env=not is_loopback(httpx.URL(self.base_url).host),
            )
        except httpx.InvalidURL as error:
            raise Unreachable(base_url, error) from error

    def request(self, verb: str, path: str, *, idempotent: bool | None = None, **options: Any) -> httpx.Response:
        """Return a successful answer, or raise the error.

        An idempotent request is also sent again after a failure that leaves open whether it was executed. Default:
        GET, HEAD and DELETE are idempotent.
        """
        repeat = verb in IDEMPOTENT_VERBS if idempotent is None else idempotent
        for retry in range(self.retries + 1):
            last = retry == self.retries
            try:
                answer = self.http.request(verb, path, **options)
            except httpx.TransportError as error:
                if last or not (repeat or isinstance(error, NEVER_SENT)):
                    raise Unreachable(self.base_url, error) from error
                self.pause(retry)
                continue
            if answer.is_success or (retry and _already_deleted(answer)):
                return answer
            if last or not (answer.status_code == NOT_EXECUTED or (repeat and answer.status_code in MAYBE_EXECUTED)):
                raise ApiError.of(answer)
            self.pause(retry, answer.headers.get("retry-after", ""))
        raise AssertionError("the last retry either returns or raises")

    def json(self, verb: str, path: str, **options: Any) -> Any:
        answer = self.request(verb, path, **options)
        try:
            return answer.json()
        except ValueError as error:
            raise UnexpectedAnswer(answer) from error

    @contextmanager
    def stream(self, path: str, *, headers: dict[str, str], read_s: float) -> Iterator[httpx.Response]:
        """Yield an answer whose body is read in pieces. A broken connection raises httpx's own error."""
        timeout = httpx.Timeout(read_s, connect=5)
        with self.http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                answer.read()
                raise ApiError.of(answer)
            yield answer

    def pause(self, retry: int, retry_after: str = "") -> None:
        """Sleep before a retry: twice as long each time, and at least as long as the server requested."""
        requested_s = float(retry_after) if retry_after.isdigit() and self.pause_s else 0.0
        time.sleep(min(max(requested_s, self.pause_s * 2**retry), MAX_PAUSE_S))


def _already_deleted(answer: httpx.Response) -> bool:
    """Return True for the 404 of a repeated DELETE: the first one was executed, but its answer was lost."""
    return answer.request.method == "DELETE" and answer.status_code == httpx.codes.NOT_FOUND


def _version() -> str:
    try:
        return version("distillery")
    except PackageNotFoundError:
        return "0"
