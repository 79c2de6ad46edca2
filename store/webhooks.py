"""Webhooks: addresses that are notified of a project's jobs. A delivery is one message to one of them.

    announce ──▶ pending ──claim, finish──▶ delivered
                 ▲   │  ▲                      │
                 │   │  └── claim, finish ◀────┤ replay
                 │   └───── (a retry is due)   │
                 └──────────────────────────── failed

A delivery is written in the transaction of the event that it tells of, so none is lost and none is invented. Any server
may claim a delivery that is due. The claim moves `next_at` behind the longest time that sending takes: if the server
dies, the delivery is due again then. So a message may arrive twice, always under the same id, and the order of messages
is not kept.
"""

import base64
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, insert, literal, select, update

from base.clock import jittered
from base.jobs import WEBHOOK_EVENTS, WEBHOOK_TEST, DeliveryStatus
from store import idempotency, limits
from store.errors import NotFound, QuotaExceeded, WebhookDisabled
from store.idempotency import Once
from store.records import Job, PageQuery, as_record, columns, database_now, new_id, read_page
from store.tables import webhook_deliveries as deliveries
from store.tables import webhooks

MOST_WEBHOOKS = 20
"""Of a project: each event of a job may write a row for each."""
RETRIES_S = (5.0, 60.0, 300.0, 1800.0, 2 * 3600.0, 6 * 3600.0, 12 * 3600.0)
"""The times between the tries of a delivery. Each is shortened at random, so that many are not sent at once."""
LONGEST_RETRY_AFTER_S = 3600.0
"""The longest wait that a receiver can ask for."""
CLAIM_S = 60.0
"""The time after which a delivery whose server is silent is due again; far longer than sending takes."""
DISABLED_AFTER_S = 3 * 86_400.0
"""The time of failed tries, without one that succeeds, after which a webhook is disabled."""
EARLIER_SECRET_S = 86_400.0
"""The time for which messages are also signed with the secret before the last."""
KEEP_S = 7 * 86_400.0
"""The time for which deliveries that have ended are kept."""
GONE = 410
LOOKED_AT = 200
"""The due deliveries of which a claim chooses."""


@dataclass(frozen=True)
class Webhook:
    """One row of `webhooks`, without its secrets."""

    id: str
    project: str
    url: str
    events: list[str]
    enabled: bool
    note: str | None
    failing_since: float | None
    created_at: float


@dataclass(frozen=True)
class Delivery:
    """One row of `webhook_deliveries`."""

    id: str
    """The id of the message, which is the same in all tries."""
    webhook_id: str
    type: str
    data: dict[str, Any]
    status: DeliveryStatus
    attempts: int
    next_at: float | None
    attempted_at: float | None
    answer_status: int | None
    answer: str | None
    error: str | None
    created_at: float


@dataclass(frozen=True)
class Claimed:
    """A delivery that this process has to send now, and how."""

    delivery: Delivery
    url: str
    secrets: Sequence[str]
    """The newest first."""


@dataclass(frozen=True)
class Outcome:
    """What came of one try. It has succeeded if `error` is None."""

    status: int | None = None
    """Of the answer; None without one."""
    answer: str | None = None
    """The first characters of the answer's body."""
    error: str | None = None
    retry_after_s: float | None = None
    """The wait that the receiver has asked for."""


class DeliveryQuery(PageQuery):
    """The page and the filter of a list of deliveries, as query parameters."""

    status: DeliveryStatus | None = Field(default=None, description="Default: deliveries in all states.")


WEBHOOK_COLUMNS = columns(webhooks, Webhook)
DELIVERY_COLUMNS = columns(deliveries, Delivery)
_PENDING = deliveries.c.status == "pending"
_DUE = and_(_PENDING, deliveries.c.next_at <= database_now())


# ── what clients do ──


def create(
    connection: Connection, project: str, url: str, events: Sequence[str], enabled: bool, once: Once | None = None
) -> tuple[Webhook, str | None]:
    """Add a webhook. Returns it and its secret, which is shown once: None if `once` has made the webhook before.

    Raises IdempotencyConflict, or QuotaExceeded if the project has as many as it may have.
    """
    webhook_id = new_id("wh")
    if (known := idempotency.reserve(connection, once, webhook_id)) is not None:
        return get(connection, project, known), None
    # After the key, as everywhere: two transactions that take both in another order could wait for each other.
    limits.lock(connection, project)
    count = select(func.count()).select_from(webhooks).where(webhooks.c.project == project)
    if (used := connection.execute(count).scalar_one()) >= MOST_WEBHOOKS:
        raise QuotaExceeded("webhooks", MOST_WEBHOOKS, used, 1)
    secret = _new_secret()
    row = {"id": webhook_id, "project": project, "url": url, "events": list(events), "enabled": enabled}
    added = insert(webhooks).values(**row, secret=secret, created_at=database_now()).returning(*WEBHOOK_COLUMNS)
    return as_record(Webhook, connection.execute(added).one()), secret


def find_once(connection: Connection, once: Once) -> Webhook | None:
    """Return the webhook that this request has made before, if any. Raises IdempotencyConflict."""
    known = idempotency.find(connection, once)
    return None if known is None else get(connection, once.project, known)


def get(connection: Connection, project: str, webhook_id: str) -> Webhook:
    row = connection.execute(select(*WEBHOOK_COLUMNS).where(_is(project, webhook_id))).one_or_none()
    if row is None:
        raise NotFound("webhook", webhook_id)
    return as_record(Webhook, row)


def list_webhooks(connection: Connection, project: str, query: PageQuery) -> tuple[list[Webhook], str | None]:
    """Return a page of webhooks, newest first, and the `after` of the next page, None at the end."""
    return read_page(connection, webhooks, Webhook, query, webhooks.c.project == project)


def change(connection: Connection, project: str, webhook_id: str, values: Mapping[str, Any]) -> Webhook:
    """Change `url`, `events` or `enabled`. What waits for a webhook that is disabled fails; a replay sends it later."""
    values = dict(values)
    if values.get("enabled"):
        values |= {"note": None, "failing_since": None}
    if not values:
        return get(connection, project, webhook_id)
    changed = update(webhooks).where(_is(project, webhook_id)).values(**values).returning(*WEBHOOK_COLUMNS)
    row = connection.execute(changed).one_or_none()
    if row is None:
        raise NotFound("webhook", webhook_id)
    webhook = as_record(Webhook, row)
    if not webhook.enabled:
        _fail_pending(connection, webhook_id)
    return webhook


def remove(connection: Connection, project: str, webhook_id: str) -> None:
    """Delete a webhook with its deliveries."""
    deleted = delete(webhooks).where(_is(project, webhook_id)).returning(webhooks.c.id)
    if connection.execute(deleted).one_or_none() is None:
        raise NotFound("webhook", webhook_id)


def rotate(connection: Connection, project: str, webhook_id: str) -> tuple[Webhook, str]:
    """Give a webhook another secret. For a day messages are signed with both, so that receivers have time to change."""
    secret = _new_secret()
    values = {"secret": secret, "earlier_secret": webhooks.c.secret, "earlier_until": database_now() + EARLIER_SECRET_S}
    changed = update(webhooks).where(_is(project, webhook_id)).values(**values).returning(*WEBHOOK_COLUMNS)
    row = connection.execute(changed).one_or_none()
    if row is None:
        raise NotFound("webhook", webhook_id)
    return as_record(Webhook, row), secret


def send_test(connection: Connection, project: str, webhook_id: str) -> Delivery:
    """Queue a message that tells of nothing. Raises WebhookDisabled."""
    _require_enabled(connection, project, webhook_id)
    return _enqueue(connection, webhook_id, WEBHOOK_TEST, {"webhook_id": webhook_id})


def list_deliveries(
    connection: Connection, project: str, webhook_id: str, query: DeliveryQuery
) -> tuple[list[Delivery], str | None]:
    """Return a page of a webhook's deliveries, newest first, and the `after` of the next page, None at the end."""
    get(connection, project, webhook_id)
    conditions = [deliveries.c.webhook_id == webhook_id]
    if query.status is not None:
        conditions.append(deliveries.c.status == query.status)
    return read_page(connection, deliveries, Delivery, query, *conditions)


def replay(connection: Connection, project: str, webhook_id: str, delivery_id: str) -> Delivery:
    """Send a delivery again, now and with all its tries, whatever came of it. The message keeps its id.

    Raises WebhookDisabled.
    """
    _require_enabled(connection, project, webhook_id)
    its = and_(deliveries.c.id == delivery_id, deliveries.c.webhook_id == webhook_id)
    values = {"status": "pending", "attempts": 0, "next_at": database_now(), "error": None}
    again = update(deliveries).where(its).values(**values).returning(*DELIVERY_COLUMNS)
    row = connection.execute(again).one_or_none()
    if row is None:
        raise NotFound("delivery", delivery_id)
    return as_record(Delivery, row)


# ── what a job's events do ──


def announce(connection: Connection, job: Job, type: str, data: Mapping[str, Any]) -> None:
    """Write a delivery of a job's event for every webhook of its project that asks for it."""
    event = WEBHOOK_EVENTS.get(type)
    if event is None:
        return
    # Locked, so that none is deleted before the rows that name it are written.
    found = select(webhooks.c.id, webhooks.c.events).where(webhooks.c.project == job.project, webhooks.c.enabled)
    asking = connection.execute(found.order_by(webhooks.c.id).with_for_update(read=True, key_share=True)).all()
    for webhook in asking:
        if event in webhook.events:
            _enqueue(connection, webhook.id, event, dict(_told(job, type, data)))


def _told(job: Job, type: str, data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a message tells: enough to know if the job is of interest, and where to read the rest."""
    here = f"/v1/jobs/{job.id}"
    yield from {"job_id": job.id, "name": job.name, "kind": job.kind, "status": job.status}.items()
    yield from {"event": type, "seq": job.event_seq}.items()
    if type == "claimed":
        yield "attempt", job.fence
    if isinstance(error := data.get("error"), dict):
        yield "error", error.get("code")
    if type == "warning":
        yield "warning", {name: data.get(name) for name in ("code", "pointer", "message")}
    if type == "alert":
        yield "alert", dict(data)
    yield "links", {"self": here, "events": f"{here}/events"}


# ── what servers do ──


def has_due(connection: Connection, but_not: Collection[str] = ()) -> bool:
    """Return whether a delivery is due, to another webhook than these."""
    due = select(literal(1)).where(_DUE, deliveries.c.webhook_id.not_in(but_not)).limit(1)
    return connection.execute(due).first() is not None


def claim(connection: Connection, room: Mapping[str, int], most: int, most_each: int) -> list[Claimed]:
    """Take deliveries that are due, the oldest first: at most `most`, and `most_each` of a webhook, or what `room` says
    of it. Each must be sent, and `finish`ed, within `CLAIM_S`.
    """
    full = [webhook_id for webhook_id, left in room.items() if left <= 0]
    due = select(deliveries.c.id, deliveries.c.webhook_id).where(_DUE, deliveries.c.webhook_id.not_in(full))
    left = dict(room)
    claimed: list[Claimed] = []
    for row in connection.execute(due.order_by(deliveries.c.next_at).limit(LOOKED_AT)).all():
        if len(claimed) == most:
            break
        if left.setdefault(row.webhook_id, most_each) <= 0:
            continue
        if (one := _claim(connection, row.id)) is not None:
            left[row.webhook_id] -= 1
            claimed.append(one)
    return claimed


def _claim(connection: Connection, delivery_id: str) -> Claimed | None:
    """Take one delivery. Returns None if another server was faster, or its webhook is disabled."""
    # The condition is checked again by the UPDATE itself.
    values = {"next_at": database_now() + CLAIM_S, "attempts": deliveries.c.attempts + 1}
    taken = update(deliveries).where(deliveries.c.id == delivery_id, _DUE)
    row = connection.execute(taken.values(**values, attempted_at=database_now()).returning(*DELIVERY_COLUMNS)).first()
    if row is None:
        return None
    delivery = as_record(Delivery, row)
    earlier = case((webhooks.c.earlier_until > database_now(), webhooks.c.earlier_secret))
    how = select(webhooks.c.url, webhooks.c.enabled, webhooks.c.secret, earlier)
    url, enabled, secret, earlier_secret = connection.execute(how.where(webhooks.c.id == delivery.webhook_id)).one()
    if not enabled:
        _fail_pending(connection, delivery.webhook_id)
        return None
    return Claimed(delivery, url, [secret] if earlier_secret is None else [secret, earlier_secret])


def finish(connection: Connection, claimed: Claimed, outcome: Outcome) -> Delivery | None:
    """Write what came of a try: it is delivered, is tried again later, or has failed. A webhook that fails for days, or
    answers 410, is disabled. Returns None if the delivery is not this try's any more.
    """
    tried = claimed.delivery
    # The webhook's row is locked first, as by its deletion.
    locked = select(webhooks.c.failing_since, database_now()).where(webhooks.c.id == tried.webhook_id).with_for_update()
    webhook = connection.execute(locked).one_or_none()
    if webhook is None:
        return None
    failing_since, now = webhook
    values = {"answer_status": outcome.status, "answer": outcome.answer, "error": outcome.error}
    if outcome.error is None:
        values |= {"status": "delivered", "next_at": None}
    elif tried.attempts > len(RETRIES_S):
        values |= {"status": "failed", "next_at": None}
    else:
        wait_s = jittered(RETRIES_S[tried.attempts - 1])
        values["next_at"] = now + max(wait_s, min(outcome.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S))
    mine = and_(deliveries.c.id == tried.id, _PENDING, deliveries.c.attempts == tried.attempts)
    row = connection.execute(update(deliveries).where(mine).values(**values).returning(*DELIVERY_COLUMNS)).first()
    if row is None:
        return None
    _count_failure(connection, tried.webhook_id, outcome, failing_since, now)
    return as_record(Delivery, row)


def _count_failure(
    connection: Connection, webhook_id: str, outcome: Outcome, failing_since: float | None, now: float
) -> None:
    """Keep since when a webhook fails, and disable it where that has no end."""
    note = None
    if outcome.error is None:
        since = None
    else:
        since = now if failing_since is None else failing_since
        if outcome.status == GONE:
            note = "it was disabled because it answered 410 (gone)"
        elif now - since > DISABLED_AFTER_S:
            days = round(DISABLED_AFTER_S / 86_400)
            note = f"it was disabled because every delivery failed for {days} days; the last: {outcome.error}"
    if since == failing_since and note is None:
        return
    values: dict[str, Any] = {"failing_since": since}
    if note is not None:
        values |= {"enabled": False, "note": note}
    connection.execute(update(webhooks).where(webhooks.c.id == webhook_id).values(**values))
    if note is not None:
        _fail_pending(connection, webhook_id)


def clear(connection: Connection) -> int:
    """Delete deliveries that are old and have ended. Returns their number."""
    old = and_(deliveries.c.created_at < database_now() - KEEP_S, ~_PENDING)
    some = select(deliveries.c.id).where(old).limit(1000)
    return connection.execute(delete(deliveries).where(deliveries.c.id.in_(some))).rowcount


def _enqueue(connection: Connection, webhook_id: str, type: str, data: dict[str, Any]) -> Delivery:
    row = {"id": new_id("msg"), "webhook_id": webhook_id, "type": type, "data": data}
    times = {"created_at": database_now(), "next_at": database_now()}
    added = insert(deliveries).values(**row, **times).returning(*DELIVERY_COLUMNS)
    return as_record(Delivery, connection.execute(added).one())


def _fail_pending(connection: Connection, webhook_id: str) -> None:
    failed = {"status": "failed", "next_at": None, "error": "the webhook was disabled"}
    connection.execute(update(deliveries).where(deliveries.c.webhook_id == webhook_id, _PENDING).values(**failed))


def _require_enabled(connection: Connection, project: str, webhook_id: str) -> None:
    # Locked, so that it is not deleted or disabled before the caller's row is written.
    locked = select(webhooks.c.enabled).where(_is(project, webhook_id)).with_for_update()
    enabled = connection.execute(locked).scalar_one_or_none()
    if enabled is None:
        raise NotFound("webhook", webhook_id)
    if not enabled:
        raise WebhookDisabled(webhook_id)


def _is(project: str, webhook_id: str) -> ColumnElement[bool]:
    return and_(webhooks.c.id == webhook_id, webhooks.c.project == project)


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
