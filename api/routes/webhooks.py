"""Webhooks: addresses that are notified of a project's jobs, and the messages that were sent to them."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import AdminCaller, AuditDep, Config, Db
from api.openapi import headers
from api.problems import (
    AddressRefused,
    IdempotencyConflict,
    Invalid,
    NotFound,
    QuotaExceeded,
    WebhookDisabled,
    responses,
)
from api.routes.jobs import Key
from api.schemas import ChangedWebhook, Id, Json, NewWebhook, Page, delivery_view, page, webhook_view
from api.webhooks import Refused, checked_url
from base.addresses import Allowed
from base.errors import Fault
from base.text import clipped
from base.wire import DeliveryView, SecretWebhookView, WebhookView
from store import webhooks
from store.idempotency import Once
from store.records import PageQuery
from store.settings import Settings
from store.webhooks import DeliveryQuery, Webhook

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.post(
    "",
    status_code=201,
    response_model=SecretWebhookView,
    responses={
        200: {
            "model": SecretWebhookView,
            "description": "A replay under an `Idempotency-Key`.",
            **headers("Location", "Cache-Control", "Idempotent-Replayed"),
        },
        201: headers("Location", "Cache-Control"),
        **responses(AddressRefused, QuotaExceeded, IdempotencyConflict),
    },
)
async def create(
    new: NewWebhook, caller: AdminCaller, db: Db, settings: Config, audit: AuditDep, idempotency_key: Key = None
) -> Response:
    """Tell an address of the project's jobs. The answer has the secret that all messages are signed with, once.

    A message is a POST of `{"type", "timestamp", "data"}` with the headers of Standard Webhooks. It is repeated, under
    the same `webhook-id`, until an answer is 2xx, at most 8 times in 21 hours. The order of messages is not kept.
    """
    url = _checked(new.url, settings)
    events = list(dict.fromkeys(new.events))
    once = Once.of(caller.project, idempotency_key, "webhooks", new.model_dump(mode="json", exclude_unset=True))
    if once is not None and (known := await db.read(webhooks.find_once, once)) is not None:
        return _with_secret(known, None, 200)
    webhook, secret = await audit.write(
        "webhook.create", lambda made: made[0].id, webhooks.create, caller.project, url, events, new.enabled, once
    )
    return _with_secret(webhook, secret, 201 if secret else 200)


@router.get("", response_model=Page[WebhookView])
async def listing(caller: AdminCaller, db: Db, query: Annotated[PageQuery, Query()]) -> Response:
    """All webhooks of the project, newest first."""
    found, following = await db.read(webhooks.list_webhooks, caller.project, query)
    return page([webhook_view(webhook) for webhook in found], following)


@router.get("/{webhook_id}", response_model=WebhookView, responses=responses(NotFound))
async def one(webhook_id: Id, caller: AdminCaller, db: Db) -> Response:
    """A webhook, without its secret."""
    return Json(webhook_view(await db.read(webhooks.get, caller.project, webhook_id)))


@router.patch("/{webhook_id}", response_model=WebhookView, responses=responses(NotFound, AddressRefused))
async def change(
    webhook_id: Id, changed: ChangedWebhook, caller: AdminCaller, settings: Config, audit: AuditDep
) -> Response:
    """Change the URL or the events of a webhook, disable it, or enable it again."""
    values = changed.model_dump(mode="json", exclude_none=True)
    if changed.url is not None:
        values["url"] = _checked(changed.url, settings)
    if changed.events is not None:
        values["events"] = list(dict.fromkeys(changed.events))
    webhook = await audit.write("webhook.change", webhook_id, webhooks.change, caller.project, webhook_id, values)
    return Json(webhook_view(webhook))


@router.delete("/{webhook_id}", status_code=204, responses=responses(NotFound))
async def delete(webhook_id: Id, caller: AdminCaller, audit: AuditDep) -> Response:
    """Delete a webhook, with its messages. What is being sent at this moment may still arrive."""
    await audit.write("webhook.delete", webhook_id, webhooks.remove, caller.project, webhook_id)
    return Response(status_code=204)


@router.post(
    "/{webhook_id}/test", status_code=202, response_model=DeliveryView, responses=responses(NotFound, WebhookDisabled)
)
async def test(webhook_id: Id, caller: AdminCaller, audit: AuditDep) -> Response:
    """Send a message of the type `webhook.test`. What comes of it is in the list of deliveries a moment later."""
    delivery = await audit.write("webhook.test", webhook_id, webhooks.send_test, caller.project, webhook_id)
    return Json(delivery_view(delivery), 202)


@router.post(
    "/{webhook_id}/rotate",
    response_model=SecretWebhookView,
    responses={200: headers("Location", "Cache-Control"), **responses(NotFound)},
)
async def rotate(webhook_id: Id, caller: AdminCaller, audit: AuditDep) -> Response:
    """Give a webhook another secret, which the answer has, once. For a day messages are signed with the earlier one,
    too."""
    webhook, secret = await audit.write("webhook.rotate", webhook_id, webhooks.rotate, caller.project, webhook_id)
    return _with_secret(webhook, secret, 200)


@router.get("/{webhook_id}/deliveries", response_model=Page[DeliveryView], responses=responses(NotFound))
async def deliveries(webhook_id: Id, caller: AdminCaller, db: Db, query: Annotated[DeliveryQuery, Query()]) -> Response:
    """What was sent, or will be, newest first, with the receiver's last answer. Kept for a week after its end."""
    found, following = await db.read(webhooks.list_deliveries, caller.project, webhook_id, query)
    return page([delivery_view(delivery) for delivery in found], following)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/replay",
    status_code=202,
    response_model=DeliveryView,
    responses=responses(NotFound, WebhookDisabled),
)
async def replay(webhook_id: Id, delivery_id: Id, caller: AdminCaller, audit: AuditDep) -> Response:
    """Send a message again, now, whatever came of it before. It keeps its id."""
    delivery = await audit.write(
        "webhook.replay", delivery_id, webhooks.replay, caller.project, webhook_id, delivery_id
    )
    return Json(delivery_view(delivery), 202)


def _with_secret(webhook: Webhook, secret: str | None, status: int) -> Response:
    headers_sent = {"Location": f"/v1/webhooks/{webhook.id}", "Cache-Control": "no-store"}
    if secret is None:
        headers_sent["Idempotent-Replayed"] = "true"
    return Json({**webhook_view(webhook), "secret": secret}, status, headers_sent)


def _checked(url: str, settings: Settings) -> str:
    try:
        return checked_url(url, Allowed.of(settings.webhook_allow))
    except Refused as refused:
        raise AddressRefused(
            str(refused), [Fault("/url", str(refused), AddressRefused.code, got=clipped(url))]
        ) from None
    except ValueError as error:
        raise Invalid(f"/url: {error}", [Fault("/url", str(error), "not_allowed", got=clipped(url))]) from None
