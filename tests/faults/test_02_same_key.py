"""Row 2: a sender that got no answer tries again with the same key: at once and in parallel, or long after the end.

One row, and its id in every answer; another body under that key is refused with the job that the key became.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from store import jobs, lifecycle
from tests.faults.servers import Api, api_process
from tests.faults.workers import PATIENT, Night
from tests.store.scene import ERROR


def send(api: Api, key: str) -> tuple[int, str]:
    answer = api.post(key)
    return answer.status_code, answer.json()["id"]


def test_one_key_is_one_job_for_ever(tmp_path: Path, database_url: str):
    """Through two servers at once, each with its own connections."""
    with (
        Night(tmp_path, database_url, **PATIENT) as night,
        api_process(night.settings, tmp_path / "one.log") as one,
        api_process(night.settings, tmp_path / "two.log") as two,
        ThreadPoolExecutor(8) as senders,
    ):
        for end in (_succeed, _fail):
            key = end.__name__
            answers = list(senders.map(send, [one, two] * 4, [key] * 8))
            assert sorted(status for status, _ in answers) == [200] * 7 + [201]
            (job_id,) = {job_id for _, job_id in answers}
            end(night, job_id)
            assert send(one, key) == send(two, key) == (200, job_id)
            other = two.post(key, name="another")
            assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")
            assert job_id in other.json()["detail"]
            assert night.db.types(job_id)[0] == "queued"
        with night.db.database.connect() as connection:
            assert jobs.by_status(connection) == {"succeeded": 1, "failed": 1}


def _succeed(night: Night, job_id: str) -> None:
    with night.db.database.begin() as connection:
        claim = lifecycle.claim(connection, "worker", 60, rescue=False)
        assert claim is not None
        assert lifecycle.finish_succeeded(connection, job_id, claim.fence, {}, [])


def _fail(night: Night, job_id: str) -> None:
    with night.db.database.begin() as connection:
        claim = lifecycle.claim(connection, "worker", 60, rescue=False)
        assert claim is not None
        assert lifecycle.finish_failed(connection, job_id, claim.fence, ERROR, None)
