"""Webhooks by real connections to receivers of this process: what is sent, what is refused, and what a hostile receiver
can do."""

import asyncio
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from sqlalchemy import update
from standardwebhooks import Webhook, WebhookVerificationError

from api import webhooks as sending
from api.schemas import Page
from api.webhooks import WebhookSender, checked_url
from base.addresses import Allowed
from base.wire import DeliveryView, SecretWebhookView, WebhookView
from store import tables
from store.records import database_now
from store.settings import Settings
from tests.api.conftest import Service, problem, serving

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 204 No Content\r\n\r\n"
LOCAL = "127.0.0.0/8"
URL = "https://example.org/hook"


@dataclass
class Receiver:
    """A server on a free port of 127.0.0.1, which answers every request alike."""

    url: str
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    """Headers in lower case, with the first line as "", and the body."""


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def bytes_of(answer: bytes) -> Answer:
    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return write


@asynccontextmanager
async def receiving(answer: bytes | Answer = OK, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    respond = bytes_of(answer) if isinstance(answer, bytes) else answer

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {"": first, **{line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}}
            receiver.requests.append((headers, await reader.readexactly(int(headers["content-length"]))))
            await respond(writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # The sender has hung up, which some tests are about.
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    receiver = Receiver(f"http{'s' if tls else ''}://127.0.0.1:{port}/hook?a=b")
    async with server:
        yield receiver


@pytest.fixture
async def local(settings: Settings) -> AsyncIterator[Service]:
    """A service that may call receivers of this machine."""
    async with serving(settings.model_copy(update={"webhook_allow": LOCAL})) as running:
        yield running


@pytest.fixture(autouse=True)
def only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own loop sends nothing meanwhile."""
    monkeypatch.setattr(sending, "POLL_S", 3600.0)


async def made(service: Service, url: str = URL, **changes: Any) -> dict[str, Any]:
    answer = await service.http.post("/v1/webhooks", json={"url": url, **changes})
    assert answer.status_code == 201, answer.text
    webhook: dict[str, Any] = answer.json()
    return webhook


async def deliver(service: Service) -> None:
    """Send everything that is due."""
    sender: WebhookSender = service.app.state.webhooks
    await sender.settled()
    while await sender.once():
        await sender.settled()


async def deliveries(service: Service, webhook: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    answer = await service.http.get(f"/v1/webhooks/{webhook['id']}/deliveries", params=query)
    assert answer.status_code == 200, answer.text
    Page[DeliveryView].model_validate(answer.json(), strict=True)
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def tried(service: Service, url: str) -> dict[str, Any]:
    """Send a test message to this URL, once, and return the delivery."""
    webhook = await made(service, url)
    assert (await service.http.post(f"/v1/webhooks/{webhook['id']}/test")).status_code == 202
    await deliver(service)
    (delivery,) = await deliveries(service, webhook)
    return delivery


async def test_a_webhook_from_its_making_to_its_end(service: Service) -> None:
    answer = await service.http.post("/v1/webhooks", json={"url": "https://Example.org/hook"})
    created = answer.json()
    TypeAdapter(SecretWebhookView).validate_python(created, strict=True)
    assert created["url"] == URL and created["secret"].startswith("whsec_")
    assert created["events"] == ["job.succeeded", "job.failed", "job.cancelled", "job.alert"]
    path = answer.headers["location"]
    assert path == f"/v1/webhooks/{created['id']}"
    shown = (await service.http.get(path)).json()
    assert shown == {name: value for name, value in created.items() if name != "secret"}
    Page[WebhookView].model_validate((await service.http.get("/v1/webhooks")).json(), strict=True)
    assert (await service.http.get("/v1/webhooks")).json() == {"data": [shown], "next": None}
    changed = await service.http.patch(path, json={"events": ["job.failed", "job.failed"], "enabled": False})
    assert changed.json() == {**shown, "events": ["job.failed"], "enabled": False}
    problem(await service.http.post(f"{path}/test"), 409, "webhook_disabled")
    rotated = (await service.http.post(f"{path}/rotate")).json()
    assert rotated["secret"] != created["secret"]
    for address in (path, "/v1/webhooks", f"{path}/deliveries"):
        assert (await service.http.head(address)).status_code == 200
    assert (await service.http.delete(path)).status_code == 204
    problem(await service.http.get(path), 404, "not_found")


async def test_only_admins_see_webhooks(service: Service) -> None:
    """`test_fence.py` tries the ids of other projects."""
    admin, member = [await service.key(role, "ours", role) for role in ("admin", "member")]
    async with service.holder(admin) as ours, service.holder(member) as others:
        webhook = await made(ours)
        path = f"/v1/webhooks/{webhook['id']}"
        for method, address in (
            ("GET", path),
            ("GET", "/v1/webhooks"),
            ("POST", "/v1/webhooks"),
            ("PATCH", path),
            ("POST", f"{path}/test"),
            ("POST", f"{path}/rotate"),
            ("GET", f"{path}/deliveries"),
            ("POST", f"{path}/deliveries/msg_0/replay"),
            ("DELETE", path),
        ):
            body = {"json": {"url": URL}} if method == "PATCH" or address == "/v1/webhooks" else {}
            problem(await others.http.request(method, address, **body), 403, "role_forbidden")
        assert (await ours.http.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": URL, "events": []}, "/events"),
        ({"url": URL, "events": ["job.done"]}, "/events/0"),
        ({"url": URL, "events": ["job.done"] * 21}, "/events"),
        ({"url": URL, "secret": "mine"}, "/secret"),
        ({"url": URL, "enabled": 1}, "/enabled"),
        ({"url": "https://" + "a" * 2000}, "/url"),
    ],
    ids=str,
)
async def test_create_refuses_bad_bodies(service: Service, body: dict[str, Any], pointer: str) -> None:
    errors = problem(await service.http.post("/v1/webhooks", json=body), 422, "invalid_request")["errors"]
    assert errors[0]["pointer"] == pointer


async def test_create_and_change_refuse_urls_that_are_never_called(service: Service) -> None:
    webhook = await made(service)
    created = await service.http.post("/v1/webhooks", json={"url": "http://169.254.169.254/latest"})
    changed = await service.http.patch(f"/v1/webhooks/{webhook['id']}", json={"url": "http://127.0.0.1:8000/"})
    for answer in (created, changed):
        (fault,) = problem(answer, 403, "address_refused")["errors"]
        assert fault["pointer"] == "/url" and "private network" in fault["message"]
    (fault,) = problem(await service.http.post("/v1/webhooks", json={"url": "ftp://a/"}), 422, "invalid_request")[
        "errors"
    ]
    assert fault["pointer"] == "/url" and "https://host/path" in fault["message"]


async def test_create_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.webhooks.MOST_WEBHOOKS", 1)
    await made(service)
    refused = problem(await service.http.post("/v1/webhooks", json={"url": URL}), 403, "quota_exceeded")
    assert (refused["limit"], refused["value"], refused["used"]) == ("webhooks", 1, 1)


async def test_create_with_an_idempotency_key_makes_one_webhook_and_shows_its_secret_once(service: Service) -> None:
    key = {"Idempotency-Key": "one"}
    first, again, other = [
        await service.http.post("/v1/webhooks", json={"url": url}, headers=key) for url in (URL, URL, f"{URL}/other")
    ]
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == {**first.json(), "secret": None} and first.json()["secret"]
    assert again.headers["idempotent-replayed"] == "true"
    problem(other, 422, "idempotency_conflict")
    assert len((await service.http.get("/v1/webhooks")).json()["data"]) == 1


async def test_changes_are_in_the_audit_log_and_secrets_are_not(service: Service) -> None:
    webhook = await made(service)
    path = f"/v1/webhooks/{webhook['id']}"
    test = (await service.http.post(f"{path}/test")).json()["id"]
    await service.http.post(f"{path}/deliveries/{test}/replay")
    secret = (await service.http.post(f"{path}/rotate")).json()["secret"]
    await service.http.patch(path, json={"enabled": False})
    await service.http.delete(path)
    log = await service.http.get("/v1/audit")
    entries = [(one["action"], one["resource"]) for one in log.json()["data"]]
    verbs = ["create", "test", "replay", "rotate", "change", "delete"]
    assert entries[::-1] == [(f"webhook.{verb}", test if verb == "replay" else webhook["id"]) for verb in verbs]
    assert webhook["secret"] not in log.text and secret not in log.text


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://example.org/", "https://host/path"),
        ("example.org/hook", "https://host/path"),
        ("https:///hook", "https://host/path"),
        ("https://", "https://host/path"),
        ("https://user:pass@example.org/", "user and password"),
        ("https://example.org/#part", "never be sent"),
        ("https://example.org:0/", "no port 0"),
        ("https://example.org:99999/", "no port 99999"),
        ("https://exa mple.org/", "no name of a host"),
        ("https://example.org/\x00", "no URL"),
    ],
)
def test_checked_url_refuses(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checked_url(url, Allowed())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/hook", "only https"),
        ("https://127.0.0.1/", "private network"),
        ("https://[::1]/", "private network"),
        ("https://[::ffff:10.0.0.1]/", "private network"),
        ("https://localhost/", "private network"),
        ("https://a.LOCALHOST./", "private network"),
    ],
)
def test_checked_url_refuses_what_is_not_called(url: str, words: str) -> None:
    with pytest.raises(sending.Refused, match=words):
        checked_url(url, Allowed())


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        (URL, ""),
        ("https://mylocalhost.org:8443/x", ""),
        ("https://1.1.1.1/", ""),
        ("http://10.1.2.3/hook", "10.0.0.0/8"),
        ("http://hooks.internal:8000/", "hooks.internal"),
    ],
)
def test_checked_url_accepts(url: str, allow: str) -> None:
    assert checked_url(url, Allowed.of(allow)) == url


async def test_a_jobs_end_arrives_signed(local: Service) -> None:
    async with receiving() as receiver:
        webhook = await made(local, receiver.url, events=["job.succeeded"])
        job_id = await local.submit()
        await local.succeed(job_id)
        await deliver(local)
    ((headers, body),) = receiver.requests
    assert headers[""] == "POST /hook?a=b HTTP/1.1"
    assert headers["content-type"] == "application/json"
    verified = Webhook(webhook["secret"]).verify(body, headers)
    assert verified == json.loads(body)
    assert list(verified) == ["type", "timestamp", "data"]
    assert verified["type"] == "job.succeeded"
    assert (verified["data"]["job_id"], verified["data"]["status"]) == (job_id, "succeeded")
    assert (await local.http.get(verified["data"]["links"]["self"])).json()["status"] == "succeeded"
    (delivery,) = await deliveries(local, webhook)
    assert headers["webhook-id"] == delivery["id"]
    assert verified["timestamp"] == delivery["created_at"] and verified["data"] == delivery["data"]
    assert (delivery["status"], delivery["answer_status"], delivery["error"]) == ("delivered", 204, None)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 44).verify(body, headers)


async def test_a_refused_message_is_repeated_with_the_same_id_and_body(local: Service) -> None:
    answers = [b"HTTP/1.1 503 Wait\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nbusy", OK]

    async def respond(writer: asyncio.StreamWriter) -> None:
        writer.write(answers[len(receiver.requests) - 1])

    async with receiving(respond) as receiver:
        webhook = await made(local, receiver.url)
        await local.http.post(f"/v1/webhooks/{webhook['id']}/test")
        await deliver(local)
        (first,) = await deliveries(local, webhook, status="pending")
        assert (first["attempts"], first["answer_status"], first["answer"]) == (1, 503, "busy")
        assert first["error"] == "the answer is 503" and first["next_at"] > first["attempted_at"]
        rows = tables.webhook_deliveries
        await local.db.write(lambda connection: connection.execute(update(rows).values(next_at=database_now())))
        await deliver(local)
        (second,) = await deliveries(local, webhook)
        assert (second["status"], second["attempts"]) == ("delivered", 2)
        answers[-1:] = [OK, OK]
        again = await local.http.post(f"/v1/webhooks/{webhook['id']}/deliveries/{second['id']}/replay")
        assert again.status_code == 202 and again.json()["status"] == "pending"
        await deliver(local)
    assert len(receiver.requests) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len({body for _, body in receiver.requests}) == 1
    for headers, body in receiver.requests:
        Webhook(webhook["secret"]).verify(body, headers)


async def test_a_redirect_is_not_followed(local: Service) -> None:
    async with receiving() as other:
        answer = f"HTTP/1.1 307 Elsewhere\r\nLocation: {other.url}\r\nContent-Length: 0\r\n\r\n".encode()
        async with receiving(answer) as receiver:
            delivery = await tried(local, receiver.url)
    assert other.requests == [] and len(receiver.requests) == 1
    assert "redirect (307), which is not followed" in delivery["error"]


async def test_a_receiver_that_hangs_delays_no_other(local: Service) -> None:
    hung = asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        await hung.wait()
        writer.write(OK)

    async with receiving(hang) as slow, receiving() as quick:
        webhooks = [await made(local, one.url) for one in (slow, quick)]
        for webhook in webhooks:
            for _ in range(6):
                await local.http.post(f"/v1/webhooks/{webhook['id']}/test")
        sender = WebhookSender(local.db, LOCAL)
        assert await sender.once() == 2 * sending.AT_ONCE_EACH
        while any(one["status"] == "pending" for one in await deliveries(local, webhooks[1])):
            await sender.once()
            await asyncio.sleep(0.01)
        assert {one["status"] for one in await deliveries(local, webhooks[0])} == {"pending"}
        assert sum(one["attempts"] for one in await deliveries(local, webhooks[0])) == sending.AT_ONCE_EACH
        hung.set()
        await sender.settled()
        await sender.stop()


async def test_a_receiver_that_hangs_ends_the_try(local: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "ANSWER_S", 0.1)

    async def hang(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with receiving(hang) as receiver:
        delivery = await tried(local, receiver.url)
    assert (delivery["status"], delivery["attempts"]) == ("pending", 1)
    assert delivery["error"] == "there was no answer within 0.1 s"


async def test_a_server_that_ends_in_the_middle_of_a_try_leaves_it_to_another_one(local: Service) -> None:
    reached = asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        reached.set()
        await asyncio.sleep(0 if len(receiver.requests) > 1 else 60)
        writer.write(OK)

    async with receiving(hang) as receiver:
        webhook = await made(local, receiver.url)
        await local.http.post(f"/v1/webhooks/{webhook['id']}/test")
        dying, other = (WebhookSender(local.db, LOCAL) for _ in range(2))
        await dying.once()
        await reached.wait()
        await dying.stop()
        assert await other.once() == 0, "the claim of the first one counts for a while"
        rows = tables.webhook_deliveries
        await local.db.write(lambda connection: connection.execute(update(rows).values(next_at=database_now())))
        await other.once()
        await other.settled()
        await other.stop()
    (delivery,) = await deliveries(local, webhook)
    assert (delivery["status"], delivery["attempts"]) == ("delivered", 2)
    assert {headers["webhook-id"] for headers, _ in receiver.requests} == {delivery["id"]}


async def test_a_huge_answer_is_read_to_its_bound_and_kept_clipped(local: Service) -> None:
    written = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"\x1b[2J\x00" + b"x" * 65_530)
            written += 65_536
            await writer.drain()

    async with receiving(flood) as receiver:
        delivery = await tried(local, receiver.url)
    assert delivery["status"] == "delivered"
    assert len(delivery["answer"]) == sending.KEPT_CHARACTERS
    assert delivery["answer"].startswith(r"\x1b[2J\x00x")
    assert written < 50_000_000, "only what the sockets hold"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 2",
        b"not http at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 500 Oh\r\n\r\n",
    ],
    ids=["none", "cut", "other", "endless", "error"],
)
async def test_a_broken_answer_is_a_failed_try(local: Service, answer: bytes) -> None:
    async with receiving(answer) as receiver:
        delivery = await tried(local, receiver.url)
    assert delivery["status"] == "pending" and delivery["error"]


async def test_an_answer_that_stops_in_its_body_counts_by_its_status(local: Service) -> None:
    async with receiving(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nthanks") as receiver:
        delivery = await tried(local, receiver.url)
    assert (delivery["status"], delivery["answer"]) == ("delivered", "thanks")


async def test_a_closed_port_is_a_failed_try(local: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    delivery = await tried(local, f"http://127.0.0.1:{port}/")
    assert "ConnectError" in delivery["error"] and delivery["answer_status"] is None


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name have these addresses. Returns the names that are looked up, as they are."""
    looked_up: list[str] = []

    def resolve(host: str, port: int) -> list[Any]:
        looked_up.append(host)
        return [one for address in addresses for one in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(sending, "_resolve", resolve)
    return looked_up


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["1.1.1.1", "10.0.0.1"], ["::1"], ["169.254.169.254"]], ids=str)
async def test_a_name_with_a_private_address_is_not_called(
    service: Service, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    resolving(monkeypatch, *addresses)
    delivery = await tried(service, "https://rebound.example.org/")
    assert "private network" in delivery["error"] and delivery["answer_status"] is None


@pytest.mark.parametrize("form", ["2130706433", "0x7f.1", "127.1"])
async def test_other_forms_of_a_private_address_are_not_called(service: Service, form: str) -> None:
    """They are names to a URL, and addresses to the system's look-up."""
    delivery = await tried(service, f"https://{form}/")
    assert "private network" in delivery["error"] or "looked up" in delivery["error"]


async def test_http_to_a_name_is_called_only_if_the_operator_allows_it(
    local: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "1.1.1.1")
    delivery = await tried(local, "http://example.org/")
    assert "only https" in delivery["error"]


async def test_a_name_that_is_unknown_is_a_failed_try(service: Service) -> None:
    delivery = await tried(service, "https://no-such-host.invalid/")
    assert "cannot be looked up" in delivery["error"]


async def test_tls_is_checked_for_the_name_and_the_connection_goes_to_the_address_that_was_looked_at(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made_by = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/CN=hooks.test", "-addext", "subjectAltName=DNS:hooks.test", "-days", "2"]
    subprocess.run([*made_by, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)  # noqa: ASYNC221
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    looked_up = resolving(monkeypatch, "127.0.0.1")
    async with (
        serving(settings.model_copy(update={"webhook_allow": "hooks.test, 127.0.0.1"})) as service,
        receiving(tls=tls) as receiver,
    ):
        port = int(receiver.url.rpartition(":")[2].partition("/")[0])
        untrusted = await tried(service, f"https://hooks.test:{port}/")
        assert "certificate" in untrusted["error"].lower()
        service.app.state.webhooks._tls = ssl.create_default_context(cafile=certificate)
        looked_up.clear()
        delivery = await tried(service, f"https://hooks.test:{port}/")
        assert delivery["status"] == "delivered" and looked_up == ["hooks.test"]
        other = await tried(service, f"https://other.test:{port}/")
        assert "certificate" in other["error"].lower()
    (headers, _), *_ = receiver.requests
    assert headers["host"] == f"hooks.test:{port}"
    assert len(receiver.requests) == 1


async def test_run_sends_by_itself_and_goes_on_after_an_error(
    local: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sending, "POLL_S", 0.01)
    once, sender = WebhookSender.once, WebhookSender(local.db, LOCAL)
    broken = [RuntimeError("a fault")]

    async def first_broken(self: WebhookSender) -> int:
        if self is sender and broken:
            raise broken.pop()
        return await once(self)

    monkeypatch.setattr(WebhookSender, "once", first_broken)
    async with receiving() as receiver:
        webhook = await made(local, receiver.url)
        await local.http.post(f"/v1/webhooks/{webhook['id']}/test")
        running = asyncio.create_task(sender.run())
        for _ in range(500):
            if receiver.requests:
                break
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])
        await sender.stop()
    assert len(receiver.requests) == 1 and not broken
    assert "webhooks cannot be sent" in caplog.text


async def test_secrets_and_urls_are_in_no_log(local: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "distillery")
    async with receiving(b"HTTP/1.1 500 Oh\r\n\r\n") as receiver:
        webhook = await made(local, receiver.url.replace("/hook", "/secret-path"))
        await local.http.post(f"/v1/webhooks/{webhook['id']}/test")
        await deliver(local)
    assert webhook["id"] in caplog.text
    assert "secret-path" not in caplog.text and webhook["secret"] not in caplog.text


def test_message_has_a_signature_for_each_secret() -> None:
    delivery = sending.webhooks.Delivery(
        "msg_1", "wh_1", "webhook.test", {"webhook_id": "wh_1"}, "pending", 1, 0.0, 0.0, None, None, None, 1.5
    )
    secrets = ["whsec_" + letter * 44 for letter in "AB"]
    headers, body = sending.message(sending.Claimed(delivery, URL, secrets), datetime.now(UTC))
    assert body == b'{"type":"webhook.test","timestamp":"1970-01-01T00:00:01.500Z","data":{"webhook_id":"wh_1"}}'
    for secret in secrets:
        Webhook(secret).verify(body, headers)
