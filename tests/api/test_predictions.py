"""An image sent to a job: what the API checks, stores and answers. The worker is a stand-in that writes the rows."""

import asyncio
import hashlib
from typing import Any

import pytest

from api.routes import predictions as route
from base.errors import DatasetUnreadable, OutOfMemory
from store import predictions
from store.predictions import Claimed
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio

ANSWER: dict[str, Any] = {
    "teacher": {"architecture": "convnet8", "top": [{"class": "3", "number": 3, "probability": 0.9}]},
    "student": {"architecture": "convnet4", "top": [{"class": "3", "number": 3, "probability": 0.8}]},
    "alone": None,
    "agree": True,
    "image": {"width": 8, "height": 8, "kinds": ["grey"], "shown": "as it is, 8 x 8 pixels, grey"},
    "notes": [],
    "seconds": 0.1,
}


async def finished(service: Service) -> str:
    job = await service.submit()
    await service.succeed(job)
    return job


async def answering(service: Service, **result: Any) -> Claimed:
    """Claim the next prediction, as a worker does, and finish it."""
    while (claimed := await service.db.write(predictions.claim, "worker")) is None:  # noqa: ASYNC110 - a row has no event
        await asyncio.sleep(0.01)
    await service.db.write(lambda connection: predictions.finish(connection, claimed.id, "worker", **result))
    return claimed


def pictures(service: Service) -> list[bytes]:
    return [path.read_bytes() for path in (service.files.folder / "predictions").glob("*")]


async def test_predict_waits_for_the_answer_of_a_worker(service: Service) -> None:
    job = await finished(service)
    service.wake_ups.clear()
    asked = service.http.post(f"/v1/jobs/{job}/predict", content=b"picture")
    answer, claimed = await asyncio.gather(asked, answering(service, answer=ANSWER))
    body = answer.json()
    assert answer.status_code == 200 and body["answer"] == ANSWER and body["state"] == "answered"
    assert (body["job"], body["message"], body["error"]) == (job, None, None)
    assert claimed.sha256 == hashlib.sha256(b"picture").hexdigest() and claimed.job_id == job
    assert service.wake_ups == [True] and pictures(service) == [b"picture"]
    again = await service.http.get(answer.headers["location"])
    assert again.json() == body and again.headers["cache-control"] == "no-store"
    audited = (await service.http.get("/v1/audit")).json()["data"]
    assert all("predict" not in entry["action"] for entry in audited)
    assert [one["id"] for one in (await service.http.get("/v1/jobs")).json()["data"]] == [job]


async def test_predict_says_where_to_look_if_there_is_no_answer_in_time(service: Service) -> None:
    job = await finished(service)
    answer = await service.http.post(f"/v1/jobs/{job}/predict?wait=0", content=b"picture")
    assert answer.status_code == 202 and answer.headers["retry-after"] == "2"
    body = answer.json()
    assert answer.headers["location"] == f"/v1/predictions/{body['id']}"
    assert body["state"] == "waiting" and body["message"].startswith("no worker runs now")
    await answering(service, answer=ANSWER)
    assert (await service.http.get(answer.headers["location"])).json()["answer"] == ANSWER


async def test_predict_waits_for_few_requests_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "WAITING", 0)
    job = await finished(service)
    assert (await service.http.post(f"/v1/jobs/{job}/predict", content=b"picture")).status_code == 202


async def test_predict_of_what_is_no_image_names_the_fault(service: Service) -> None:
    job = await finished(service)
    error = DatasetUnreadable("the image is broken.", "send another").as_dict()
    asked = service.http.post(f"/v1/jobs/{job}/predict", content=b"no picture")
    answer, _ = await asyncio.gather(asked, answering(service, error=error))
    body = problem(answer, 422, "image_unreadable")
    assert body["detail"] == "the image is broken." and body["hint"] == "send another"


async def test_predict_that_fails_says_why(service: Service) -> None:
    job = await finished(service)
    error = OutOfMemory("too little memory", "a smaller image").as_dict()
    asked = service.http.post(f"/v1/jobs/{job}/predict", content=b"picture")
    answer, _ = await asyncio.gather(asked, answering(service, error=error))
    assert answer.status_code == 200 and answer.json()["state"] == "failed" and answer.json()["error"] == error


async def test_predict_needs_a_job_with_a_student(service: Service) -> None:
    job = await service.submit()
    body = problem(await service.http.post(f"/v1/jobs/{job}/predict", content=b"picture"), 409, "not_ready")
    assert body["job_status"] == "queued"
    problem(await service.http.post("/v1/jobs/job_none/predict", content=b"picture"), 404, "not_found")
    problem(await service.http.get("/v1/predictions/pred_none"), 404, "not_found")
    assert pictures(service) == []


async def test_predict_bounds_the_image(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "PICTURE_BYTES", 10)
    job = await finished(service)
    where = f"/v1/jobs/{job}/predict?wait=0"
    body = problem(await service.http.post(where, content=b"0123456789a"), 413, "too_large")
    assert body["limit_bytes"] == 10

    async def pieces() -> Any:
        for _ in range(4):
            yield b"0123"

    problem(await service.http.post(where, content=pieces()), 413, "too_large")
    problem(await service.http.post(where), 400, "malformed_body")
    body = problem(await service.http.post(where, files={"file": b"0"}), 400, "malformed_body")
    assert "--data-binary" in body["detail"]
    assert pictures(service) == []
    assert (await service.http.post(where, content=b"0123456789")).status_code == 202


async def test_predict_takes_images_above_the_bound_of_json_bodies(service: Service) -> None:
    job = await finished(service)
    large = bytes(1_500_000)
    form = {"content-type": "application/json"}
    answer = await service.http.post(f"/v1/jobs/{job}/predict?wait=0", content=large, headers=form)
    assert answer.status_code == 202 and pictures(service) == [large]


async def test_predict_gives_a_picture_its_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "PICTURE_S", 0.05)
    job = await finished(service)

    async def slowly() -> Any:
        yield b"0"
        await asyncio.sleep(5)

    problem(await service.http.post(f"/v1/jobs/{job}/predict", content=slowly()), 408, "request_timeout")
    assert pictures(service) == []


async def test_predict_refuses_more_than_may_wait(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MOST_WAITING", 1)
    job = await finished(service)
    where = f"/v1/jobs/{job}/predict?wait=0"
    assert (await service.http.post(where, content=b"one")).status_code == 202
    answer = await service.http.post(where, content=b"two")
    body = problem(answer, 429, "limit_reached")
    assert body["limit"] == "predictions_waiting" and answer.headers["retry-after"] == "2"
    assert pictures(service) == [b"one"]


async def test_a_reader_may_see_an_answer_but_ask_nothing(service: Service) -> None:
    job = await finished(service)
    asked = (await service.http.post(f"/v1/jobs/{job}/predict?wait=0", content=b"picture")).json()
    async with service.holder(await service.key("reader")) as reader:
        assert (await reader.http.get(f"/v1/predictions/{asked['id']}")).status_code == 200
        problem(await reader.http.post(f"/v1/jobs/{job}/predict", content=b"picture"), 403, "role_forbidden")
