"""Row 1: the REST server is killed with -9 around the commit of a job.

Before the commit there is no job, and the client's second try makes it. After the commit, with the response lost, the
second try finds it. With the response sent and no wake-up message, a worker finds it by polling.
"""

from pathlib import Path

import httpx
import pytest
import redis

from api.app import create_app
from proofs.faults.workers import LONG_LEASE, Workers
from store import jobs
from tests.servers import SPEC, STEPS, Api, api_process, served
from tests.worker.processes import until

KEY = "key"


def stored(workers: Workers) -> list[str]:
    with workers.db.database.connect() as connection:
        return [job.id for job in jobs.list_jobs(connection, "default", jobs.JobQuery(limit=100))[0]]


def post_until_killed(api: Api) -> None:
    with pytest.raises(httpx.TransportError):
        api.post(KEY)
    assert api.process.wait(30) == -9


@pytest.mark.parametrize(("moment", "left", "then"), [("submit.before_commit", 0, 201), ("submit.committed", 1, 200)])
def test_submit_again_after_a_kill_returns_the_one_job(
    tmp_path: Path, database_url: str, moment: str, left: int, then: int
):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        with api_process(workers.settings, tmp_path / "first.log", f"{moment}=kill") as first:
            post_until_killed(first)
        before = stored(workers)
        assert len(before) == left
        with served(create_app(workers.settings, wake_workers=lambda: None)) as second:
            response = httpx.post(f"{second}/v1/jobs", json=SPEC, headers={"Idempotency-Key": KEY})
        assert response.status_code == then, response.text
        assert stored(workers) == (before or [response.json()["id"]]) == [response.json()["id"]]
        workers.start()
        workers.assert_succeeded(response.json()["id"], STEPS, ["succeeded"])


def test_job_without_a_wake_up_message_is_found_by_polling(tmp_path: Path, sqlite_database_url: str, valkey_url: str):
    """The thread that sends messages hangs; the response does not wait for it."""
    with (
        Workers(tmp_path, sqlite_database_url, **LONG_LEASE, broker_url=valkey_url) as workers,
        redis.Redis.from_url(valkey_url) as broker,
    ):
        worker = workers.start()
        until(lambda: worker.has_polled, "its first poll")
        with api_process(workers.settings, tmp_path / "api.log", "wakeup.unsent=hang") as api:
            job_id = api.submit()
            api.kill()
        assert broker.llen("look") == 0
        workers.assert_succeeded(job_id, STEPS, ["succeeded"])
