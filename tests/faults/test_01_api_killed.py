"""Row 1: the REST server is killed with -9 around the commit of a job.

Before it the job was never there, and the sender's second try makes it. After it, with the answer lost, the second try
finds it. With the answer given and the bell unrung, a worker finds it by looking.
"""

from pathlib import Path

import httpx
import pytest
import redis

from store import jobs
from tests.faults.servers import STEPS, Api, api_process
from tests.faults.workers import PATIENT, Night
from tests.worker.processes import until

KEY = "tonight"


def stored(night: Night) -> list[str]:
    with night.db.database.connect() as connection:
        return [job.id for job in jobs.list_page(connection, project="default", limit=100)[0]]


def killed_in_a_post(api: Api) -> None:
    with pytest.raises(httpx.TransportError):
        api.post(KEY)
    assert api.process.wait(30) == -9


@pytest.mark.parametrize(("moment", "left", "then"), [("submit.before_commit", 0, 201), ("submit.committed", 1, 200)])
def test_a_second_try_gets_the_one_job(tmp_path: Path, database_url: str, moment: str, left: int, then: int):
    with Night(tmp_path, database_url, **PATIENT) as night:
        with api_process(night.settings, tmp_path / "first.log", f"{moment}=kill") as first:
            killed_in_a_post(first)
        before = stored(night)
        assert len(before) == left
        with api_process(night.settings, tmp_path / "second.log") as second:
            answer = second.post(KEY)
        assert answer.status_code == then, answer.text
        assert stored(night) == (before or [answer.json()["id"]]) == [answer.json()["id"]]
        night.worker()
        night.assert_ended_well(answer.json()["id"], STEPS, ["succeeded"])


def test_a_job_that_nobody_was_rung_for_is_found_by_looking(tmp_path: Path, sqlite_database_url: str, valkey_url: str):
    """The thread that rings hangs; so the answer, which comes all the same, does not wait for it."""
    with (
        Night(tmp_path, sqlite_database_url, **PATIENT, broker_url=valkey_url) as night,
        redis.Redis.from_url(valkey_url) as broker,
    ):
        worker = night.worker()
        until(lambda: worker.has_polled, "its first look")
        with api_process(night.settings, tmp_path / "api.log", "ring.unsent=hang") as api:
            job_id = api.accept()
            api.kill()
        assert broker.llen("look") == 0
        night.assert_ended_well(job_id, STEPS, ["succeeded"])
