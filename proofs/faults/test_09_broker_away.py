"""Row 9: the broker is killed and loses its data, is frozen, or resets its connections again and again.

Submits are answered, every job is found by polling, and wake-up messages arrive again when the broker is back. No
operator is needed.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from api.wakeup_sender import MAX_PENDING
from proofs.faults.workers import LONG_LEASE, Workers
from tests.servers import STEPS, Server, api_process, own_valkey
from tests.worker.processes import until

RARELY_S = 600
RARE_POLLS = {**LONG_LEASE, "look_s": RARELY_S, "rering_s": RARELY_S, "lease_s": 4 * RARELY_S}
"""Such a worker polls only when it gets a wake-up message."""


@pytest.fixture(scope="module")
def broker() -> Iterator[Server]:
    with own_valkey() as server:
        yield server


def reset(server: Server) -> None:
    """Close all connections except this one, twenty times."""
    with redis.Redis.from_url(server.url) as client:
        for _ in range(20):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def already_back(_: Server) -> None:
    """A broker that only reset its connections was never away."""


@pytest.mark.parametrize(
    ("away", "back"),
    [(Server.kill, Server.start), (Server.freeze, Server.wake), (reset, already_back)],
    ids=["killed", "frozen", "resetting"],
)
def test_broker_away_jobs_are_found_by_polling_and_messages_arrive_again(
    tmp_path: Path,
    sqlite_database_url: str,
    broker: Server,
    away: Callable[[Server], None],
    back: Callable[[Server], None],
):
    """The worker process gets messages and polls rarely; the one in this process only polls."""
    with (
        Workers(tmp_path, sqlite_database_url, **RARE_POLLS, broker_url=broker.url) as workers,
        api_process(workers.settings, tmp_path / "api.log") as api,
    ):
        workers.start_process()
        workers.until_at_work()
        workers.assert_succeeded(api.submit(), STEPS, ["succeeded"])
        away(broker)
        without_message = [api.submit() for _ in range(3)]
        polling = workers.start(look_s=LONG_LEASE["look_s"])
        for job_id in without_message:
            workers.assert_succeeded(job_id, STEPS, ["succeeded"])
        polling.stop()
        back(broker)
        sent: list[str] = []

        def message_received() -> bool:
            # Not too many: only the first message after an outage may be lost.
            sent.append(api.submit())
            time.sleep(0.5)
            return any(workers.db.job(job_id).status != "queued" for job_id in sent)

        until(message_received, "a message to be received", timeout_s=90)  # Celery tries after 2, 4, 6 … s
        for job_id in sent:
            workers.assert_succeeded(job_id, STEPS, ["succeeded"])
        workers.assert_nothing_left()


def test_submit_never_waits_for_its_wake_up_message(tmp_path: Path, sqlite_database_url: str, broker: Server):
    """The thread that sends messages hangs at the first one; more jobs are accepted than messages may wait."""
    with (
        Workers(tmp_path, sqlite_database_url, **LONG_LEASE, broker_url=broker.url) as workers,
        api_process(workers.settings, tmp_path / "api.log", "wakeup.unsent=hang") as api,
        redis.Redis.from_url(broker.url) as queue,
    ):
        queue.delete("look")
        sent = {api.submit() for _ in range(MAX_PENDING + 2)}
        assert len(sent) == MAX_PENDING + 2
        assert queue.llen("look") == 0
        api.kill()
