"""Row 10: wake-up messages that are doubled, stale, or for jobs that have ended cost a poll, and change nothing.

Lost messages: row 1 has one that was never sent, row 9 a broker that loses all of them.
"""

from pathlib import Path

import redis

from base import wakeup
from base.wakeup import QUEUE
from proofs.faults.workers import LONG_LEASE, Workers
from tests.worker.processes import until
from worker.celery_app import make_app


def send_messages(broker_url: str, times: int, expires_s: int) -> None:
    app = make_app(broker_url, lambda: None)
    with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
        for _ in range(times):
            app.send_task(wakeup.TASK, queue=QUEUE, expires=expires_s, ignore_result=True, producer=producer)
    app.close()


def test_thousand_wake_up_messages_for_a_job_that_has_ended_change_nothing(
    tmp_path: Path, sqlite_database_url: str, valkey_url: str
):
    with (
        Workers(tmp_path, sqlite_database_url, **LONG_LEASE, broker_url=valkey_url) as workers,
        redis.Redis.from_url(valkey_url) as broker,
    ):
        job_id = workers.db.submit(steps=2)
        workers.start_process()
        workers.assert_succeeded(job_id, 2, ["succeeded"])
        ended = workers.snapshot(job_id)
        send_messages(valkey_url, 500, expires_s=-1)
        send_messages(valkey_url, 500, expires_s=60)
        until(lambda: not broker.llen(QUEUE), "the messages to be received")
        assert workers.snapshot(job_id) == ended
        both = [workers.db.submit(steps=3) for _ in range(2)]
        send_messages(valkey_url, 2, expires_s=60)
        for another in both:
            workers.assert_succeeded(another, 3, ["succeeded"])
        assert workers.snapshot(job_id) == ended
        workers.assert_nothing_left()
