"""A slot is told sick by jobs that fail on it one after the other, and well by one that does not."""

import pytest

from worker.health import LONGEST_PAUSE_S, Health


def test_the_pause_begins_with_the_second_job_and_doubles():
    health = Health("cpu", 5)
    pauses = []
    for job_id in ("job_1", "job_2", "job_3", "job_3"):
        health.note(job_id, "sick")
        pauses.append(health.pause_s)
    assert pauses == [0, 5, 10, 20]


def test_it_has_a_longest():
    health = Health("cpu", 5)
    for number in range(2000):
        health.note(f"job_{number}", "sick")
    assert health.pause_s == LONGEST_PAUSE_S == 600


def test_one_job_alone_may_be_to_blame():
    health = Health("cpu", 5)
    for _ in range(10):
        health.note("job_1", "sick")
    assert health.pause_s == 0


def test_progress_ends_it_and_nothing_else_does(caplog: pytest.LogCaptureFixture):
    health = Health("cpu", 5)
    for job_id in ("job_1", "job_2", "job_3"):
        health.note(job_id, "sick")
    health.note("job_4", "none")
    assert health.pause_s == 10
    health.note("job_5", "sound")
    health.note("job_6", "sick")
    assert health.pause_s == 0
    assert caplog.text.count("jobs fail here") == caplog.text.count("jobs make progress here again") == 1
