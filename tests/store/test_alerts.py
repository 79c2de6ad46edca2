from typing import Any

import pytest

from store import alerts, events, jobs, lifecycle
from store.database import Database
from store.errors import LeaseLost
from store.lifecycle import Claim
from tests.clock import SettableClock
from tests.store.helpers import ERROR, claimed, event_types, run_concurrently, running, submitted

NOTHING = {"metric": None, "below": None, "above": None, "from_epoch": None, "no_progress_s": None}
LOW = {**NOTHING, "metric": "validation/accuracy", "below": 0.5, "from_epoch": 3}
HIGH = {**NOTHING, "metric": "train/loss", "above": 2.0}
STILL = {**NOTHING, "no_progress_s": 60.0}


def spec_of(*asked: dict[str, Any]) -> dict[str, Any]:
    return {"method": {"name": "kd"}, "scheduling": {"alerts": list(asked)}}


def with_alerts(database: Database, *asked: dict[str, Any]) -> Claim:
    return running(database, resolved_spec=spec_of(*asked))


def see(database: Database, claim: Claim, step: int, epoch: float | None, **values: float | None) -> None:
    named = {name.replace("_", "/"): value for name, value in values.items()}
    with database.begin() as connection:
        asked = alerts.asked(claim.job.resolved_spec)
        alerts.see_metrics(connection, claim.job.id, claim.fence, asked, step=step, epoch=epoch, values=named)


def sweep(database: Database) -> None:
    with database.begin() as connection:
        lifecycle.sweep(connection, takeover=False)


def raised(database: Database, job_id: str) -> list[dict[str, Any]]:
    """The data of a job's alerts, after a check of the numbers of its events."""
    event_types(database, job_id)
    with database.connect() as connection:
        return [one.data for one in events.list_events(connection, job_id, 0, 1000) if one.type == "alert"]


def test_asked_of_a_spec_of_an_earlier_version_is_empty():
    assert alerts.asked({"scheduling": {"priority": 0}}) == alerts.asked({}) == []


def test_see_metrics_raises_each_alert_once(database: Database):
    claim = with_alerts(database, LOW, HIGH, STILL)
    see(database, claim, 10, 2, validation_accuracy=0.1, train_loss=2.0)
    assert raised(database, claim.job.id) == [], "the epoch is too early, and 2 is not above 2"
    see(database, claim, 20, 3, validation_accuracy=0.5)
    see(database, claim, 20, 3, validation_accuracy=None, train_loss=float("nan"))
    assert raised(database, claim.job.id) == []
    see(database, claim, 30, 4, validation_accuracy=0.49, train_loss=3.5)
    see(database, claim, 40, 5, validation_accuracy=0.1, train_loss=9)
    assert raised(database, claim.job.id) == [
        {"number": 0, "metric": "validation/accuracy", "below": 0.5, "value": 0.49, "epoch": 4, "step": 30},
        {"number": 1, "metric": "train/loss", "above": 2.0, "value": 3.5, "epoch": 4, "step": 30},
    ]


def test_see_metrics_of_a_later_attempt_and_of_a_stale_one(database: Database):
    claim = with_alerts(database, HIGH)
    see(database, claim, 1, 1, train_loss=3)
    with database.begin() as connection:
        lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    again = claimed(database)
    see(database, again, 1, 1, train_loss=3)
    assert len(raised(database, claim.job.id)) == 1
    with pytest.raises(LeaseLost):
        see(database, claim, 1, 1, train_loss=3)


def test_retry_from_scratch_lets_an_alert_be_raised_again(database: Database):
    claim = with_alerts(database, HIGH)
    for from_scratch, expected in ((False, 1), (True, 2)):
        see(database, claim, 1, 1, train_loss=3)
        with database.begin() as connection:
            lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)
            jobs.retry(connection, claim.job.id, from_scratch=from_scratch)
        claim = claimed(database)
        see(database, claim, 1, 1, train_loss=3)
        assert len(raised(database, claim.job.id)) == expected


def test_sweep_raises_an_alert_of_a_job_without_progress_once(database: Database, clock: SettableClock):
    claim = with_alerts(database, STILL, {**STILL, "no_progress_s": 600.0})
    submitted(database, resolved_spec=spec_of(STILL))
    clock.advance(59)
    sweep(database)
    with database.begin() as connection:
        lifecycle.set_progress(connection, claim.job.id, 1, {"percent": 1})
    clock.advance(59)
    sweep(database)
    with database.begin() as connection:
        lifecycle.set_progress(connection, claim.job.id, 1, {"percent": 1}, has_grown=False)
    clock.advance(59)
    run_concurrently([lambda: sweep(database)] * 3)
    sweep(database)
    (alert,) = raised(database, claim.job.id)
    assert (alert["number"], alert["no_progress_s"]) == (0, 60.0) and 117 < alert["seconds"] < 130
    assert event_types(database, claim.job.id) == ["queued", "claimed", "alert"]


@pytest.mark.parametrize("sign", ["phase", "work"])
def test_sweep_counts_other_signs_of_work(database: Database, clock: SettableClock, sign: str):
    claim = with_alerts(database, STILL)
    for _ in range(2):
        clock.advance(50)
        with database.begin() as connection:
            if sign == "phase":
                lifecycle.set_phase(connection, claim.job.id, 1, "training")
            else:
                lifecycle.set_progress(connection, claim.job.id, 1, None)
        sweep(database)
    assert raised(database, claim.job.id) == []


def test_sweep_does_not_count_the_time_between_attempts(database: Database, clock: SettableClock):
    claim = with_alerts(database, STILL)
    with database.begin() as connection:
        lifecycle.release(connection, claim.job.id, 1, "drain")
    clock.advance(1000)
    sweep(database)
    claimed(database)
    sweep(database)
    assert raised(database, claim.job.id) == []
