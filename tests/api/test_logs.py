"""Logs: the end of them, and what comes after an offset."""

import pytest

from store import lifecycle
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def logged(service: Service, *texts: bytes) -> str:
    """A job with one attempt for each text, in a log of its own."""
    job_id = await service.submit()
    for text in texts:
        fence = await service.claim(job_id)
        path = service.files.log_path(job_id, fence)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        await service.http.post(f"/v1/jobs/{job_id}/pause")
        assert await service.db.write(lifecycle.release, job_id, fence, "pause", to="paused")
        await service.http.post(f"/v1/jobs/{job_id}/resume")
    return job_id


async def test_logs_tail_has_the_last_lines(service: Service) -> None:
    job_id = await logged(service, b"one\ntwo\nthree\n")
    answer = await service.http.get(f"/v1/jobs/{job_id}/logs", params={"tail": 2})
    assert answer.text == "two\nthree\n"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert (answer.headers["x-log-offset"], answer.headers["x-log-next-offset"]) == ("4", "14")


async def test_logs_are_followed_by_offset(service: Service) -> None:
    job_id = await logged(service, b"one\n")
    path = service.files.log_path(job_id, 1)
    first = await service.http.get(f"/v1/jobs/{job_id}/logs")
    path.write_bytes(path.read_bytes() + b"two\n")
    query = {"offset": first.headers["x-log-next-offset"], "attempt": first.headers["x-log-attempt"]}
    more = await service.http.get(f"/v1/jobs/{job_id}/logs", params=query)
    assert more.text == "two\n"
    query["offset"] = more.headers["x-log-next-offset"]
    nothing = await service.http.get(f"/v1/jobs/{job_id}/logs", params=query)
    assert (nothing.text, nothing.headers["x-log-next-offset"]) == ("", "8")


async def test_logs_default_to_the_newest_attempt(service: Service) -> None:
    job_id = await logged(service, b"first\n", b"second\n")
    newest = await service.http.get(f"/v1/jobs/{job_id}/logs")
    assert (newest.text, newest.headers["x-log-attempt"]) == ("second\n", "2")
    assert (await service.http.get(f"/v1/jobs/{job_id}/logs", params={"attempt": 1})).text == "first\n"


async def test_logs_default_to_the_newest_attempt_that_has_a_log(service: Service) -> None:
    job_id = await logged(service, b"first\n")
    await service.claim(job_id)
    answer = await service.http.get(f"/v1/jobs/{job_id}/logs")
    assert (answer.text, answer.headers["x-log-attempt"], answer.headers["x-log-newest-attempt"]) == (
        "first\n",
        "1",
        "2",
    )


async def test_logs_of_a_queued_job_are_empty(service: Service) -> None:
    job_id = await service.submit()
    answer = await service.http.get(f"/v1/jobs/{job_id}/logs")
    assert (answer.status_code, answer.text, answer.headers["x-log-next-offset"]) == (200, "", "0")
    problem(await service.http.get("/v1/jobs/job_0/logs"), 404, "not_found")


async def test_logs_that_are_not_utf8_are_sent_unchanged(service: Service) -> None:
    job_id = await logged(service, b"\xff\xfe\n")
    assert (await service.http.get(f"/v1/jobs/{job_id}/logs")).content == b"\xff\xfe\n"
