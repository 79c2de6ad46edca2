"""Webhooks and their deliveries, on both databases: what an event writes, and how servers share the sending."""

from typing import Any

import pytest
from sqlalchemy import select, update

from store import events, jobs, lifecycle, webhooks
from store.database import Database
from store.errors import NotFound, QuotaExceeded, WebhookDisabled
from store.records import PageQuery, database_now
from store.tables import webhook_deliveries
from store.tables import webhooks as webhook_rows
from store.webhooks import Claimed, Delivery, DeliveryQuery, Outcome, Webhook
from tests.clock import SettableClock
from tests.store.helpers import ERROR, WARNING, claimed, run_concurrently, running, submitted

REFUSED = Outcome(500, "no", "the answer is 500")
ALL = ("job.queued", "job.started", "job.warning", "job.failed", "job.succeeded", "job.cancelled", "job.paused")


def made(database: Database, *events: str, project: str = "ours", enabled: bool = True) -> Webhook:
    with database.begin() as connection:
        url = "https://example.org/hook"
        webhook, secret = webhooks.create(connection, project, url, events or ALL, enabled)
    assert secret is not None and secret.startswith("whsec_") and len(secret) == 6 + 44
    return webhook


def sent(database: Database, webhook: Webhook) -> list[Delivery]:
    """All deliveries of a webhook, oldest first."""
    with database.connect() as connection:
        page, _ = webhooks.list_deliveries(connection, webhook.project, webhook.id, DeliveryQuery(limit=100))
    return page[::-1]


def claim(database: Database, most: int = 16, each: int = 16, **room: int) -> list[Claimed]:
    with database.begin() as connection:
        return webhooks.claim(connection, room, most, each)


def finish(database: Database, one: Claimed, outcome: Outcome) -> Delivery | None:
    with database.begin() as connection:
        return webhooks.finish(connection, one, outcome)


def make_due(database: Database) -> None:
    with database.begin() as connection:
        pending = update(webhook_deliveries).where(webhook_deliveries.c.status == "pending")
        connection.execute(pending.values(next_at=database_now() - 1))


def read(database: Database, webhook: Webhook) -> Webhook:
    with database.connect() as connection:
        return webhooks.get(connection, webhook.project, webhook.id)


def test_announce_writes_a_row_for_each_webhook_that_asks_for_the_event(database: Database):
    everything, ends = made(database), made(database, "job.failed")
    others = made(database, project="theirs"), made(database, enabled=False)
    claim = running(database)
    with database.begin() as connection:
        events.append_warning(connection, claim.job.id, claim.fence, WARNING)
        lifecycle.set_phase(connection, claim.job.id, claim.fence, "training")
        lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)
    told = sent(database, everything)
    assert [one.type for one in told] == ["job.queued", "job.started", "job.warning", "job.failed"]
    assert [one.data["status"] for one in told] == ["queued", "running", "running", "failed"]
    assert [one.data["seq"] for one in told] == [1, 2, 3, 5]
    here = f"/v1/jobs/{claim.job.id}"
    assert told[3].data == {
        "job_id": claim.job.id, "name": "a job", "kind": "distillation", "status": "failed", "event": "failed",
        "seq": 5, "error": "out_of_memory", "links": {"self": here, "events": f"{here}/events"},
    }  # fmt: skip
    assert told[1].data["attempt"] == 1
    assert told[2].data["warning"] == {"code": WARNING.code, "pointer": "", "message": WARNING.message}
    assert [one.type for one in sent(database, ends)] == ["job.failed"]
    assert [sent(database, one) for one in others] == [[], []]


def test_announce_is_undone_with_its_event(database: Database):
    webhook = made(database)
    job = submitted(database)
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        jobs.cancel(connection, job.id)
        _ = 1 / 0
    assert [one.type for one in sent(database, webhook)] == ["job.queued"]


def test_claim_gives_each_delivery_to_one_server(database: Database):
    webhook = made(database)
    for _ in range(10):
        submitted(database)
    taken = [one for each in run_concurrently([lambda: claim(database)] * 4) for one in each]  # type: ignore[union-attr]
    assert sorted(one.delivery.id for one in taken) == [one.id for one in sent(database, webhook)]
    assert claim(database) == []


def test_claim_is_bounded_for_a_server_and_for_each_webhook(database: Database):
    busy, other = made(database), made(database)
    for _ in range(3):
        submitted(database)
    assert len(claim(database, most=1)) == 1
    taken = claim(database, each=2, **{busy.id: 0})
    assert [one.delivery.webhook_id for one in taken] == [other.id] * 2
    with database.connect() as connection:
        assert webhooks.has_due(connection, [busy.id])
        assert not webhooks.has_due(connection, [busy.id, other.id])


def test_claim_of_a_server_that_died_is_due_again(database: Database, clock: SettableClock):
    webhook = made(database)
    submitted(database)
    (first,) = claim(database)
    clock.advance(webhooks.CLAIM_S + 1)
    (second,) = claim(database)
    assert (second.delivery.id, second.delivery.attempts) == (first.delivery.id, 2)
    assert finish(database, first, Outcome(200)) is None, "the first try is not the newest"
    assert finish(database, second, Outcome(204, "")) is not None
    assert [(one.status, one.answer_status, one.next_at) for one in sent(database, webhook)] == [
        ("delivered", 204, None)
    ]


def test_finish_tries_again_with_growing_waits_and_then_fails(database: Database):
    webhook = made(database)
    submitted(database)
    waits = []
    for attempt in range(1, len(webhooks.RETRIES_S) + 2):
        make_due(database)
        (one,) = claim(database)
        assert one.delivery.attempts == attempt
        after = finish(database, one, REFUSED)
        assert after is not None and (after.answer_status, after.answer, after.error) == (
            500,
            "no",
            "the answer is 500",
        )
        if after.status == "pending":
            waits.append(after.next_at - after.attempted_at)  # type: ignore[operator]
    assert after.status == "failed" and after.next_at is None
    for wait_s, most_s in zip(waits, webhooks.RETRIES_S, strict=True):
        assert 0.5 * most_s < wait_s < most_s + 2
    since = read(database, webhook).failing_since
    assert since is not None
    submitted(database)
    (one,) = claim(database)
    finish(database, one, Outcome(200))
    assert read(database, webhook).failing_since is None


def test_finish_waits_as_the_receiver_asks_but_not_for_ever(database: Database):
    made(database)
    submitted(database)
    for asked_s, least_s in ((100.0, 100), (1e9, webhooks.LONGEST_RETRY_AFTER_S)):
        make_due(database)
        (one,) = claim(database)
        after = finish(database, one, Outcome(429, "", "the answer is 429", asked_s))
        assert after is not None and least_s - 1 < after.next_at - after.attempted_at < least_s + 60  # type: ignore


@pytest.mark.parametrize("gone", [True, False])
def test_finish_disables_a_webhook_that_is_gone_or_fails_for_days(database: Database, clock: SettableClock, gone: bool):
    webhook = made(database)
    submitted(database)
    submitted(database)
    first, second = claim(database)
    finish(database, first, REFUSED)
    if not gone:
        clock.advance(webhooks.DISABLED_AFTER_S + 60)
        make_due(database)
        second, _ = claim(database)
    finish(database, second, Outcome(webhooks.GONE, "", "the answer is 410") if gone else REFUSED)
    disabled = read(database, webhook)
    assert not disabled.enabled and ("410" if gone else "for 3 days") in str(disabled.note)
    assert {(one.status, one.next_at) for one in sent(database, webhook)} == {("failed", None)}
    submitted(database)
    assert len(sent(database, webhook)) == 2, "what happens meanwhile is not told"
    with database.begin() as connection:
        with pytest.raises(WebhookDisabled):
            webhooks.send_test(connection, "ours", webhook.id)
        again = webhooks.change(connection, "ours", webhook.id, {"enabled": True})
        assert again.enabled and again.note is again.failing_since is None
        webhooks.replay(connection, "ours", webhook.id, first.delivery.id)
    (one,) = claim(database)
    assert (one.delivery.id, one.delivery.attempts) == (first.delivery.id, 1)


def test_change_to_disabled_fails_what_waits_and_claims_nothing(database: Database):
    webhook = made(database)
    submitted(database)
    with database.begin() as connection:
        assert webhooks.change(connection, "ours", webhook.id, {}).enabled
        webhooks.change(connection, "ours", webhook.id, {"enabled": False})
    assert [(one.status, one.error) for one in sent(database, webhook)] == [("failed", "the webhook was disabled")]
    assert claim(database) == []


def test_claim_fails_what_was_written_while_its_webhook_was_disabled(database: Database):
    webhook = made(database)
    submitted(database)
    with database.begin() as connection:
        connection.execute(update(webhook_rows).values(enabled=False))
    assert claim(database) == []
    assert [one.status for one in sent(database, webhook)] == ["failed"]


def test_rotate_signs_with_both_secrets_for_a_day(database: Database, clock: SettableClock):
    webhook = made(database)
    with database.begin() as connection:
        _, secret = webhooks.rotate(connection, "ours", webhook.id)
    submitted(database)
    (one,) = claim(database)
    assert one.secrets[0] == secret and len(set(one.secrets)) == 2
    clock.advance(webhooks.EARLIER_SECRET_S + 1)
    (later,) = claim(database)
    assert later.secrets == [secret]


def test_webhooks_of_another_project_are_not_found(database: Database):
    webhook = made(database)
    submitted(database)
    (delivery,) = sent(database, webhook)
    with database.begin() as connection:
        for act in (
            lambda: webhooks.get(connection, "theirs", webhook.id),
            lambda: webhooks.change(connection, "theirs", webhook.id, {"enabled": False}),
            lambda: webhooks.remove(connection, "theirs", webhook.id),
            lambda: webhooks.rotate(connection, "theirs", webhook.id),
            lambda: webhooks.send_test(connection, "theirs", webhook.id),
            lambda: webhooks.list_deliveries(connection, "theirs", webhook.id, DeliveryQuery()),
            lambda: webhooks.replay(connection, "theirs", webhook.id, delivery.id),
            lambda: webhooks.replay(connection, "ours", webhook.id, "msg_0"),
        ):
            with pytest.raises(NotFound):
                act()
        assert webhooks.list_webhooks(connection, "theirs", PageQuery()) == ([], None)
    assert read(database, webhook) == webhook


def test_remove_deletes_the_deliveries_and_a_try_that_ends_later_changes_nothing(database: Database):
    webhook = made(database)
    submitted(database)
    (one,) = claim(database)
    with database.begin() as connection:
        webhooks.remove(connection, "ours", webhook.id)
        assert connection.execute(select(webhook_deliveries)).all() == []
    assert finish(database, one, REFUSED) is None


def test_create_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "MOST_WEBHOOKS", 2)
    made(database), made(database), made(database, project="theirs")
    with pytest.raises(QuotaExceeded):
        made(database)


def test_clear_deletes_old_deliveries_that_have_ended(database: Database, clock: SettableClock):
    webhook = made(database)
    submitted(database), submitted(database)
    finish(database, claim(database, most=1)[0], Outcome(200))
    with database.begin() as connection:
        assert webhooks.clear(connection) == 0
        clock.advance(webhooks.KEEP_S + 1)
        assert webhooks.clear(connection) == 1
    assert [one.status for one in sent(database, webhook)] == ["pending"]


def test_announce_of_a_teachers_end_reaches_the_jobs_that_wait(database: Database):
    """What a job's end does to others has events, and so messages, too."""
    webhook = made(database, "job.failed")
    teacher = submitted(database)
    spec: dict[str, Any] = {"teacher": {"checkpoint": f"job:{teacher.id}"}}
    student = submitted(database, resolved_spec=spec)
    assert claimed(database).job.id == teacher.id
    with database.begin() as connection:
        lifecycle.finish_failed(connection, teacher.id, 1, ERROR, None)
    assert {(one.data["job_id"], one.data["error"]) for one in sent(database, webhook)} == {
        (teacher.id, "out_of_memory"), (student.id, "teacher_unavailable"),
    }  # fmt: skip
