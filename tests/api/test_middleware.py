"""The middleware: what it refuses before a route is asked, HEAD, request ids, security headers, and bugs."""

import asyncio
import json
import re

import httpx
import pytest
from sqlalchemy import Connection
from starlette.types import Message

from api import middleware
from store import jobs
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving

pytestmark = pytest.mark.anyio


async def test_middleware_limits_json_bodies(service: Service) -> None:
    problem(await service.http.post("/v1/models", json={"name": "x" * 1_000_001}), 413, "too_large")


async def test_middleware_hides_the_details_of_an_unexpected_error(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(connection: Connection, *arguments: object, **more: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(jobs, "get", broken)
    body = problem(await service.http.get("/v1/jobs/job_0"), 500, "internal")
    assert "secret" not in str(body)
    assert body["request_id"] in caplog.text
    assert "a secret path" in caplog.text


async def test_middleware_keeps_the_request_id(service: Service) -> None:
    answer = await service.http.get("/v1/nothing", headers={"X-Request-Id": "abc-1"})
    assert problem(answer, 404, "not_found")["request_id"] == "abc-1"
    odd = await service.http.get("/v1/nothing", headers={"X-Request-Id": "a b\tc" * 50})
    assert problem(odd, 404, "not_found")["request_id"].startswith("req_")


async def test_middleware_adds_security_headers(service: Service) -> None:
    answer = await service.http.post("/v1/jobs", json=SUPERVISED)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


async def call(service: Service, method: str, path: str, headers: dict[str, str], *messages: Message) -> httpx.Response:
    """Send a request whose body arrives in these messages; a further one never comes."""
    sent: list[Message] = []
    remaining = list(messages)

    async def receive() -> Message:
        if not remaining:
            await asyncio.Event().wait()
        return remaining.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    async with asyncio.timeout(10):
        await service.app(scope, receive, send)
    return httpx.Response(
        sent[0]["status"],
        headers=sent[0]["headers"],
        content=b"".join(message.get("body", b"") for message in sent[1:]),
    )


async def test_middleware_looks_at_the_key_before_any_body_on_every_route(settings: Settings) -> None:
    """No message of the body is needed for the answer."""
    open_to_all = {"/healthz", "/readyz"}
    async with serving(settings.model_copy(update={"admin_key_hash": "0" * 64})) as service:
        routes = [
            (method.upper(), re.sub(r"\{\w+\}", "x", path))
            for path, methods in service.app.openapi()["paths"].items()
            for method in methods
            if path not in open_to_all
        ]
        assert len(routes) > 30
        for method, path in routes:
            answer = await call(service, method, path, {"Host": "x", "Content-Length": "990000"})
            problem(answer, 401, "unauthorized")
            assert answer.headers["connection"] == "close"


LOCAL = {"Host": "127.0.0.1"}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/validate", "/v1/models", "/v1/datasets", "/v1/uploads"])
async def test_middleware_refuses_a_compressed_body(service: Service, path: str) -> None:
    answer = await call(service, "POST", path, {**LOCAL, "Content-Encoding": "gzip", "Content-Length": "9"})
    problem(answer, 415, "unsupported_encoding")


async def test_middleware_refuses_a_body_by_its_length_or_its_bytes(service: Service) -> None:
    announced = await call(service, "POST", "/v1/jobs", {**LOCAL, "Content-Length": "1000001"})
    problem(announced, 413, "too_large")
    part: Message = {"type": "http.request", "body": b" " * 400_000, "more_body": True}
    chunked = await call(service, "POST", "/v1/jobs", {**LOCAL, "Transfer-Encoding": "chunked"}, part, part, part)
    problem(chunked, 413, "too_large")


async def test_middleware_waits_for_a_body_for_a_limited_time(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "JSON_BODY_S", 0.01)
    for path in ("/v1/jobs", "/v1/models", "/v1/jobs/x/cancel"):
        part: Message = {"type": "http.request", "body": b"{", "more_body": True}
        answer = await call(service, "POST", path, {**LOCAL, "Content-Length": "9"}, part)
        problem(answer, 408, "request_timeout")


async def test_middleware_holds_a_limited_number_of_bytes_of_all_bodies(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    part: Message = {"type": "http.request", "body": b" " * 11, "more_body": True}
    with monkeypatch.context() as small:
        small.setattr(middleware, "BODIES_BYTES", 10)
        answer = await call(service, "POST", "/v1/jobs", {**LOCAL, "Content-Length": "99"}, part)
    problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"]
    monkeypatch.setattr(middleware, "BODIES_BYTES", 500)
    whole: Message = {"type": "http.request", "body": json.dumps(SUPERVISED).encode(), "more_body": True}
    end: Message = {"type": "http.request", "body": b"", "more_body": False}
    accepted = await call(service, "POST", "/v1/jobs", {**LOCAL, "Content-Length": "99"}, whole, end)
    assert accepted.status_code == 201, "nothing of the first is counted any more"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"name": "a", "name": "b"}', "the key 'name' is there twice"),
        ('{"name": "a", "training": {"epochs": 1, "epochs": 2}}', "the key 'epochs' is there twice"),
        ('{"name": "a", "alpha": NaN}', "NaN is no finite number"),
        ('{"name": "a", "alpha": 1e999}', "1e999 is no finite number"),
        ("[" * 100_000, "nested too deeply"),
        ("{" + '"a":{' * 1000, ""),
        ('{"a": ' + "9" * 5000 + "}", ""),
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models", "/v1/jobs/validate"])
async def test_middleware_refuses_what_is_no_strict_json(service: Service, path: str, body: str, said: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = problem(await service.http.post(path, content=body, headers=headers), 400, "malformed_body")
    assert said in answer["detail"]


async def test_middleware_refuses_json_in_another_encoding(service: Service) -> None:
    content = '{"name": "a"}'.encode("utf-16")
    answer = await service.http.post("/v1/models", content=content, headers={"Content-Type": "application/json"})
    problem(answer, 400, "malformed_body")


@pytest.mark.parametrize("header", [{"Host": "["}, {"Origin": "http://["}, {"Host": ""}])
async def test_middleware_refuses_a_malformed_host_or_origin(service: Service, header: dict[str, str]) -> None:
    problem(await service.http.get("/v1/jobs", headers=header), 403, "forbidden")
    problem(await service.http.get("/elsewhere", headers=header), 404, "not_found")


async def test_middleware_keeps_the_connection_after_a_body_that_was_read(service: Service) -> None:
    twice = await service.http.post("/v1/jobs", content='{"a": 1, "a": 2}')
    assert "connection" not in twice.headers
    encodings = [("Content-Encoding", "gzip"), ("Content-Encoding", "identity")]
    unread = await service.http.post("/v1/jobs", content="{}", headers=encodings)
    problem(unread, 415, "unsupported_encoding")
    assert unread.headers["connection"] == "close"


async def test_middleware_ends_the_connection_if_a_route_leaves_a_part_of_the_body(service: Service) -> None:
    """Else the client would send its next request into the connection that is being closed."""
    header = {"Host": "127.0.0.1", "Content-Length": "6"}
    half, rest = ({"type": "http.request", "body": b"abc", "more_body": more} for more in (True, False))
    refused = await call(service, "PATCH", "/v1/uploads/up_0", {**header, "Upload-Offset": "-1"}, half, rest)
    assert (refused.status_code, refused.headers["connection"]) == (422, "close")
    read = await call(service, "POST", "/v1/uploads", header, half, rest)
    assert read.status_code == 201 and "connection" not in read.headers


async def test_middleware_refuses_two_hosts(service: Service) -> None:
    answer = await service.http.get("/healthz", headers=[("Host", "127.0.0.1"), ("Host", "evil.example")])
    problem(answer, 400, "malformed_request")


async def test_middleware_answers_head_wherever_get_is_answered(service: Service) -> None:
    """With the same header and no body. The stream of a job that never ends ends for HEAD."""
    job_id = await service.submit()
    stream = f"/v1/jobs/{job_id}/events/stream"
    paths = [path.replace("{job_id}", job_id) for path in service.app.openapi()["paths"]]
    gets = ["/", "/docs", "/static/app.js", "/openapi.json", *(path for path in paths if "{" not in path)]
    for path in gets:
        if path != stream:
            got = await service.http.get(path)
            head = await service.http.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            if path != "/metrics":  # It counts the requests.
                assert head.headers.get("content-length") == got.headers.get("content-length"), path
            assert head.headers["content-type"] == got.headers["content-type"], path
    head = await service.http.head(stream)
    assert head.headers["content-type"].startswith("text/event-stream")


async def test_middleware_answers_an_address_with_a_slash_too_many_with_the_right_one(service: Service) -> None:
    answer = problem(await service.http.post("/v1/jobs/", json=SUPERVISED), 404, "not_found")
    assert answer["detail"] == "/v1/jobs/ is not an address of this service; did you mean /v1/jobs?"


async def test_middleware_repeats_little_of_what_was_sent(service: Service) -> None:
    long = "x" * 900_000
    for path, body in (
        ("/v1/jobs", {**SUPERVISED, long: 1}),
        ("/v1/jobs/validate", {**SUPERVISED, "method": long, "name": long, "dataset": long, "baseline": long}),
        ("/v1/jobs/validate", {**SUPERVISED, "student": [long]}),
        ("/v1/models", {"name": long, "blob": "x"}),
        ("/v1/datasets", {"name": "a", long: 1}),
    ):
        answer = await service.http.post(path, json=body)
        assert len(answer.content) < 20_000, path


async def test_middleware_answers_a_body_of_faults_with_the_first_and_their_number(service: Service) -> None:
    unknown = {f"k{number}": 0 for number in range(20_000)}
    answer = (await service.http.post("/v1/jobs/validate", json={**SUPERVISED, **unknown})).json()
    assert len(answer["errors"]) == 51 and not answer["valid"]
    assert answer["errors"][-1]["message"] == "and 19950 more faults; the first 50 are described"
    for path in ("/v1/jobs", "/v1/models", "/v1/datasets"):
        body = problem(
            await service.http.post(path, json=unknown), 422, "spec_invalid" if "jobs" in path else "invalid_request"
        )
        assert len(body["errors"]) == 51
