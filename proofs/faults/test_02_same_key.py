"""Row 2: a client that got no response sends the same key again: at once and in parallel, or long after the end.

There is one row, and its id is in every response. Another body with that key is refused, with the id of the job.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proofs.faults.workers import LONG_LEASE, Workers
from store import jobs, lifecycle
from tests.servers import Api, api_process
from tests.store.helpers import ERROR


def send(api: Api, key: str) -> tuple[int, str]:
    response = api.post(key)
    return response.status_code, response.json()["id"]


def test_idempotency_key_is_one_job_for_ever(tmp_path: Path, database_url: str):
    """Through two servers at once."""
    with (
        Workers(tmp_path, database_url, **LONG_LEASE) as workers,
        api_process(workers.settings, tmp_path / "one.log") as one,
        api_process(workers.settings, tmp_path / "two.log") as two,
        ThreadPoolExecutor(8) as clients,
    ):
        for end in (_succeed, _fail):
            key = end.__name__
            responses = list(clients.map(send, [one, two] * 4, [key] * 8))
            assert sorted(status for status, _ in responses) == [200] * 7 + [201]
            (job_id,) = {job_id for _, job_id in responses}
            end(workers, job_id)
            assert send(one, key) == send(two, key) == (200, job_id)
            other = two.post(key, name="another")
            assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")
            assert job_id in other.json()["detail"]
            assert workers.db.types(job_id)[0] == "queued"
        with workers.db.database.connect() as connection:
            assert jobs.count_by_status(connection) == {"succeeded": 1, "failed": 1}


def _succeed(workers: Workers, job_id: str) -> None:
    with workers.db.database.begin() as connection:
        claim = lifecycle.claim(connection, "worker", 60, takeover=False)
        assert claim is not None
        assert lifecycle.finish_succeeded(connection, job_id, claim.fence, {}, [])


def _fail(workers: Workers, job_id: str) -> None:
    with workers.db.database.begin() as connection:
        claim = lifecycle.claim(connection, "worker", 60, takeover=False)
        assert claim is not None
        assert lifecycle.finish_failed(connection, job_id, claim.fence, ERROR, None)
