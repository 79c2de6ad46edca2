"""Row 10: bells that are doubled, stale, or ring for jobs that have ended cost a look at the database, and change nothing.

A bell that is dropped: row 1 has one that never rang, row 9 a broker that forgot them all.
"""

from pathlib import Path

import redis

from base import wakeup
from base.wakeup import QUEUE
from tests.faults.workers import PATIENT, Night
from tests.worker.processes import until
from worker.celery_app import make_app


def ring(broker_url: str, times: int, expires_s: int) -> None:
    app = make_app(broker_url, lambda: None)
    with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
        for _ in range(times):
            app.send_task(wakeup.TASK, queue=QUEUE, expires=expires_s, ignore_result=True, producer=producer)
    app.close()


def test_a_thousand_bells_for_a_job_that_has_ended_change_nothing(
    tmp_path: Path, sqlite_database_url: str, valkey_url: str
):
    with (
        Night(tmp_path, sqlite_database_url, **PATIENT, broker_url=valkey_url) as night,
        redis.Redis.from_url(valkey_url) as broker,
    ):
        job_id = night.db.submit(steps=2)
        night.process()
        night.assert_ended_well(job_id, 2, ["succeeded"])
        ended = night.all_about(job_id)
        ring(valkey_url, 500, expires_s=-1)
        ring(valkey_url, 500, expires_s=60)
        until(lambda: not broker.llen(QUEUE), "the bells to be heard")
        assert night.all_about(job_id) == ended
        both = [night.db.submit(steps=3) for _ in range(2)]
        ring(valkey_url, 2, expires_s=60)
        for another in both:
            night.assert_ended_well(another, 3, ["succeeded"])
        assert night.all_about(job_id) == ended
        night.assert_nothing_left()
