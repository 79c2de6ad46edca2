"""Webhooks: the check of an address, and the sender, which posts what is due (`store/webhooks.py`).

A client chooses where this server sends a request to. So the name is resolved once, every address that it has is looked
at, and the connection goes to one of these addresses: a second look-up could give another one. The certificate is
checked for the name. No redirect is followed, no proxy of the environment is used, and of an answer only a bounded part
is read.
"""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any

import httpx
from pydantic_core import to_json
from standardwebhooks import Webhook

from api.schemas import iso
from base import figures
from base.addresses import HOST_NAME, Address, Allowed, is_public, literal
from base.clock import boottime, jittered
from base.errors import DatabaseUnavailable, StorageFull
from base.text import shown
from store import webhooks
from store.database import Database
from store.webhooks import Claimed, Outcome

log = logging.getLogger("distillery.webhooks")

POLL_S = 1.0
ANSWER_S = 10.0
"""The time limit of a try: look-up, connection and answer together."""
AT_ONCE = 16
"""The deliveries that a server sends at once."""
AT_ONCE_EACH = 4
"""To one webhook: a receiver that hangs must not delay the others."""
ADDRESSES = 3
"""The addresses of a name that are tried one after the other, if it has several."""
ANSWER_BYTES = 65_536
"""More of an answer is not read."""
KEPT_CHARACTERS = 2_000
CLEAR_EVERY_S = 3600.0
ONLY_HTTPS = "only https is called; an operator can allow http to a host with DISTILLERY_WEBHOOK_ALLOW"


class Refused(Exception):
    """An address that is not called."""


def checked_url(text: str, allowed: Allowed) -> str:
    """Return the URL of a webhook in its normal form. Raises ValueError if it is none, and Refused if it is not called.

    The addresses of a name are looked at when something is sent.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"this is no URL: {error}") from None
    if url.scheme not in ("https", "http") or not url.raw_host:
        raise ValueError("https://host/path belongs here")
    if url.userinfo:
        raise ValueError("a user and password in the URL are not sent; each message is signed instead")
    if url.fragment:
        raise ValueError(f"the part behind #, {url.fragment[:50]!r}, would never be sent; leave it out")
    if url.port is not None and not 0 < url.port < 65_536:
        raise ValueError(f"there is no port {url.port}")
    host = url.raw_host.decode()
    if literal(host) is None and not HOST_NAME.fullmatch(host):
        raise ValueError(f"{host[:100]!r} is no name of a host")
    address = literal(host)
    addresses = [] if address is None else [address]
    if f".{host.lower().rstrip('.')}".endswith(".localhost"):
        addresses = [ip_address("127.0.0.1"), ip_address("::1")]
    _refuse_private(host, addresses, allowed)
    if url.scheme == "http" and not (allowed.allows_name(host) or allowed.networks):
        raise Refused(ONLY_HTTPS)
    return str(url)


def _refuse_private(host: str, addresses: Sequence[Address], allowed: Allowed) -> None:
    """Raise Refused if one of the host's addresses is neither public nor allowed."""
    if allowed.allows_name(host):
        return
    for address in addresses:
        if not (is_public(address) or allowed.allows_address(address)):
            where = "" if literal(host) is not None else f" ({address})"
            raise Refused(
                f"{host}{where} is an address of a private network, which is not called; an operator can allow it with "
                "DISTILLERY_WEBHOOK_ALLOW"
            )


@dataclass(frozen=True)
class Target:
    """Where a message goes: the URL, and the addresses that were found for it and may be called."""

    url: httpx.URL
    addresses: Sequence[Address]


class WebhookSender:
    """The sender of this server. `run` continues until it is cancelled; no exception ends it."""

    def __init__(self, database: Database, allow: str) -> None:
        self._database, self._allowed = database, Allowed.of(allow)
        self._tasks: dict[asyncio.Task[None], str] = {}
        # Of its own: a name that is looked up without an answer holds its thread for long.
        self._resolver = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="webhook-resolver")
        self._tls: ssl.SSLContext | None = None
        self._clear_at = boottime() + jittered(CLEAR_EVERY_S)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(jittered(POLL_S))
            try:
                await self.once()
            except (DatabaseUnavailable, StorageFull):
                pass  # Not logged: every request logs it.
            except Exception:
                log.exception("webhooks cannot be sent")

    async def once(self) -> int:
        """Begin to send what is due, as much as is sent at once. Returns the number of deliveries begun."""
        if boottime() > self._clear_at:
            self._clear_at = boottime() + jittered(CLEAR_EVERY_S)
            await self._database.write(webhooks.clear)
        busy = Counter(self._tasks.values())
        room = {webhook_id: AT_ONCE_EACH - count for webhook_id, count in busy.items()}
        free = AT_ONCE - len(self._tasks)
        full = [webhook_id for webhook_id, left in room.items() if left <= 0]
        if free <= 0 or not await self._database.read(webhooks.has_due, full):
            return 0
        claimed = await self._database.write(webhooks.claim, room, free, AT_ONCE_EACH)
        for one in claimed:
            task = asyncio.create_task(self._deliver(one))
            self._tasks[task] = one.delivery.webhook_id
            task.add_done_callback(self._tasks.pop)
        return len(claimed)

    async def settled(self) -> None:
        """Wait until everything that was begun is sent, and written."""
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    async def stop(self) -> None:
        """Stop sending. What was begun is due again after a while, for any server."""
        for task in self._tasks:
            task.cancel()
        await self.settled()
        self._resolver.shutdown(wait=False, cancel_futures=True)

    async def _deliver(self, claimed: Claimed) -> None:
        tried = claimed.delivery
        try:
            outcome = await self.send(claimed)
            delivery = await self._database.write(webhooks.finish, claimed, outcome)
        except (DatabaseUnavailable, StorageFull) as error:
            log.warning("webhook %s: message %s will be sent again: %s", tried.webhook_id, tried.id, error)
            return
        except Exception:
            log.exception("webhook %s: message %s cannot be sent", tried.webhook_id, tried.id)
            return
        if delivery is not None:
            figures.delivered("repeated" if delivery.status == "pending" else delivery.status)
        if outcome.error is not None and delivery is not None:
            # Without the URL: its path is a secret of many receivers.
            values = (tried.webhook_id, tried.id, delivery.attempts, outcome.error, delivery.status)
            log.info("webhook %s: message %s, try %d: %s; %s", *values)

    async def send(self, claimed: Claimed) -> Outcome:
        """Send one message, once. Returns what came of it; raises nothing that the receiver can cause."""
        deadline = asyncio.get_running_loop().time() + ANSWER_S
        try:
            async with asyncio.timeout_at(deadline):
                target = await self._find(claimed.url)
            return await self._post(target, claimed, deadline)
        except TimeoutError:
            return Outcome(error=f"there was no answer within {ANSWER_S:g} s")
        except Refused as refused:
            return Outcome(error=str(refused))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Outcome(error=shown(f"{type(error).__name__}: {error}")[:KEPT_CHARACTERS])

    async def _find(self, text: str) -> Target:
        """Look up the addresses of a URL, once. Raises Refused if it, or one of them, is not called."""
        try:
            url = httpx.URL(checked_url(text, self._allowed))
        except ValueError as error:
            raise Refused(str(error)) from None
        host = url.raw_host.decode()
        address = literal(host)
        addresses = [address] if address is not None else await self._look_up(host, url.port or 443)
        _refuse_private(host, addresses, self._allowed)
        plain_allowed = self._allowed.allows_name(host) or all(map(self._allowed.allows_address, addresses))
        if url.scheme == "http" and not plain_allowed:
            raise Refused(ONLY_HTTPS)
        return Target(url, addresses)

    async def _look_up(self, host: str, port: int) -> list[Address]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._resolver, _resolve, host, port)
        except (OSError, UnicodeError) as error:
            raise Refused(f"{host} cannot be looked up: {getattr(error, 'strerror', None) or error}") from None
        return list(dict.fromkeys(ip_address(one[4][0]) for one in found))

    async def _post(self, target: Target, claimed: Claimed, deadline: float) -> Outcome:
        headers, content = message(claimed, datetime.now(UTC))
        headers |= {"Host": target.url.netloc.decode(), "Accept-Encoding": "identity", "Connection": "close"}
        headers["User-Agent"] = f"Distillery/{version('distillery')}"
        addresses = target.addresses[:ADDRESSES]
        for number, address in enumerate(addresses, 1):
            url = target.url.copy_with(host=str(address))
            # A connection for each message: one that is kept was checked for another name, perhaps.
            transport = httpx.AsyncHTTPTransport(verify=await self._context(target.url.scheme), trust_env=False)
            async with httpx.AsyncClient(transport=transport, timeout=ANSWER_S, trust_env=False) as http:
                request = http.build_request("POST", url, headers=headers, content=content)
                request.extensions["sni_hostname"] = target.url.raw_host.decode()
                try:
                    async with asyncio.timeout_at(deadline):
                        response = await http.send(request, stream=True, follow_redirects=False)
                except httpx.ConnectError:
                    if number == len(addresses):
                        raise
                    continue
                return await _outcome(response, deadline)
        raise Refused("the name has no address")

    async def _context(self, scheme: str) -> ssl.SSLContext | bool:
        """Return the settings of TLS; reading the certificates takes a moment, so once, and only if needed."""
        if scheme != "https":
            return False
        if self._tls is None:
            self._tls = await asyncio.get_running_loop().run_in_executor(self._resolver, httpx.create_ssl_context)
        return self._tls


def _resolve(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def message(claimed: Claimed, now: datetime) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body of a message, by Standard Webhooks 1.0.0.

    The body is the same in every try; the signature counts from the time of the try, so that an old one cannot be sent
    again by others.
    """
    delivery = claimed.delivery
    body: dict[str, Any] = {"type": delivery.type, "timestamp": iso(delivery.created_at), "data": delivery.data}
    content = to_json(body)
    signatures = [Webhook(secret).sign(delivery.id, now, content.decode()) for secret in claimed.secrets]
    headers = {
        "Content-Type": "application/json",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
    return headers, content


async def _outcome(response: httpx.Response, deadline: float) -> Outcome:
    """Return what an answer means. Its status decides; its body is kept, clipped, as far as it arrives in time."""
    received = bytearray()
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout_at(deadline):
            async for part in response.aiter_raw():
                received += part
                if len(received) >= ANSWER_BYTES:
                    break
    await response.aclose()
    answer = shown(received[:ANSWER_BYTES].decode("utf-8", "replace"))[:KEPT_CHARACTERS]
    error = None
    if response.is_redirect:
        error = f"the answer is a redirect ({response.status_code}), which is not followed: change the URL"
    elif not response.is_success:
        error = f"the answer is {response.status_code}"
    return Outcome(response.status_code, answer, error, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
