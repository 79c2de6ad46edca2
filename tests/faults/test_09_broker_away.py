"""Row 9: the broker is killed without having kept anything, frozen, or resets its connections again and again.

A submit is answered all the same, every job is found by looking, and once the broker is back its bell is heard again:
nothing needs a person.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from api.bell import WAITING_RINGS
from tests.faults.servers import STEPS, Server, api_process, own_valkey
from tests.faults.workers import PATIENT, Night
from tests.worker.processes import until

DEAF_FOR_S = 600
DEAF = {**PATIENT, "look_s": DEAF_FOR_S, "rering_s": DEAF_FOR_S, "lease_s": 4 * DEAF_FOR_S}
"""Only the bell makes such a worker look."""


@pytest.fixture(scope="module")
def broker() -> Iterator[Server]:
    with own_valkey() as server:
        yield server


def reset(server: Server) -> None:
    """Twenty times all connections but the one that asks for it."""
    with redis.Redis.from_url(server.url) as client:
        for _ in range(20):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def nothing(_: Server) -> None:
    """One that only resets its connections was never away."""


@pytest.mark.parametrize(
    ("away", "back"),
    [(Server.kill, Server.start), (Server.freeze, Server.wake), (reset, nothing)],
    ids=["killed", "frozen", "resetting"],
)
def test_jobs_are_found_by_looking_and_the_bell_is_heard_again(
    tmp_path: Path,
    sqlite_database_url: str,
    broker: Server,
    away: Callable[[Server], None],
    back: Callable[[Server], None],
):
    """The worker process hears the bell and looks hardly ever; the one in this process only looks."""
    with (
        Night(tmp_path, sqlite_database_url, **DEAF, broker_url=broker.url) as night,
        api_process(night.settings, tmp_path / "api.log") as api,
    ):
        night.process()
        until(lambda: "is at work" in night.log, "the worker to start")
        night.assert_ended_well(api.accept(), STEPS, ["succeeded"])
        away(broker)
        unrung = [api.accept() for _ in range(3)]
        looking = night.worker(look_s=PATIENT["look_s"])
        for job_id in unrung:
            night.assert_ended_well(job_id, STEPS, ["succeeded"])
        looking.stop()
        back(broker)
        sent: list[str] = []

        def heard() -> bool:
            # Not too many: the first ring after an outage may be lost, and no more than that.
            sent.append(api.accept())
            time.sleep(0.5)
            return any(night.db.job(job_id).status != "queued" for job_id in sent)

        until(heard, "the bell to be heard", timeout_s=90)  # Celery tries after 2, 4, 6 … s
        for job_id in sent:
            night.assert_ended_well(job_id, STEPS, ["succeeded"])
        night.assert_nothing_left()


def test_an_answer_never_waits_for_its_ring(tmp_path: Path, sqlite_database_url: str, broker: Server):
    """The thread that rings hangs at the first: more jobs are taken than rings may wait."""
    with (
        Night(tmp_path, sqlite_database_url, **PATIENT, broker_url=broker.url) as night,
        api_process(night.settings, tmp_path / "api.log", "ring.unsent=hang") as api,
        redis.Redis.from_url(broker.url) as queue,
    ):
        queue.delete("look")
        sent = {api.accept() for _ in range(WAITING_RINGS + 2)}
        assert len(sent) == WAITING_RINGS + 2
        assert queue.llen("look") == 0
        api.kill()
