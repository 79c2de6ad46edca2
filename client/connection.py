"""Requests to one server: what failed on the way is tried again where that is safe, what it refused is raised."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import httpx

from client.errors import ApiError, UnexpectedAnswer, Unreachable

BUSY = 429
"""The answer that promises that nothing was changed."""
LEFT_OPEN = (502, 503, 504)
"""Answers that leave open what was done: behind a proxy, or by a commit whose own answer was lost."""
SAFE_VERBS = ("GET", "HEAD", "DELETE")
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
LONGEST_PAUSE_S = 10.0


class Connection:
    """An HTTP client that knows the server's errors. Threads may share it."""

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
                # A proxy of the environment cannot reach this machine's own loopback.
                trust_env=httpx.URL(self.base_url).host not in ("127.0.0.1", "localhost", "::1"),
            )
        except httpx.InvalidURL as error:
            raise Unreachable(base_url, error) from error

    def ask(self, verb: str, path: str, *, repeatable: bool | None = None, **request: Any) -> httpx.Response:
        """A good answer, or the error. `repeatable`: asking twice is asking once, whatever became of the first."""
        again = verb in SAFE_VERBS if repeatable is None else repeatable
        for tried in range(self.retries + 1):
            last = tried == self.retries
            try:
                answer = self.http.request(verb, path, **request)
            except httpx.TransportError as error:
                if last or not (again or isinstance(error, NEVER_SENT)):
                    raise Unreachable(self.base_url, error) from error
                self.pause(tried)
                continue
            if answer.is_success or (tried and _gone(answer)):
                return answer
            if last or not (answer.status_code == BUSY or (again and answer.status_code in LEFT_OPEN)):
                raise ApiError.of(answer)
            self.pause(tried, answer.headers.get("retry-after", ""))
        raise AssertionError("the last try either returns or raises")

    def json(self, verb: str, path: str, **request: Any) -> Any:
        answer = self.ask(verb, path, **request)
        try:
            return answer.json()
        except ValueError as error:
            raise UnexpectedAnswer(answer) from error

    @contextmanager
    def stream(self, path: str, *, headers: dict[str, str], read_s: float) -> Iterator[httpx.Response]:
        """An answer that is still coming. What breaks on the way is httpx's own error: the caller goes on."""
        timeout = httpx.Timeout(read_s, connect=5)
        with self.http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                answer.read()
                raise ApiError.of(answer)
            yield answer

    def pause(self, tried: int, retry_after: str = "") -> None:
        """Longer each time, or as long as the server asks for."""
        asked = float(retry_after) if retry_after.isdigit() and self.pause_s else 0.0
        time.sleep(min(max(asked, self.pause_s * 2**tried), LONGEST_PAUSE_S))


def _gone(answer: httpx.Response) -> bool:
    """What a repeated DELETE finds where the answer to the first was lost."""
    return answer.request.method == "DELETE" and answer.status_code == httpx.codes.NOT_FOUND


def _version() -> str:
    try:
        return version("distillery")
    except PackageNotFoundError:
        return "0"
