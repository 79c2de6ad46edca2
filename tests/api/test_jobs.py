"""Submitting and reading jobs, and actions on them."""

from datetime import datetime
from typing import Any

import pytest
from pydantic import TypeAdapter

from api.schemas import Page
from base.errors import DatabaseUnavailable
from base.wire import JobFilters, JobSummary, JobView
from store import checkpoints, lifecycle, workers
from store.jobs import JobQuery
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


def test_job_query_has_the_filters_that_clients_send() -> None:
    assert JobQuery.model_fields.keys() - {"limit", "after", "view"} == JobFilters.__annotations__.keys()


async def test_submit_queues_the_job_and_wakes_workers(service: Service) -> None:
    answer = await service.http.post("/v1/jobs", json=SUPERVISED)
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    assert (job["status"], job["queue_position"], job["method"]) == ("queued", 1, "supervised")
    assert job["spec"] == SUPERVISED
    assert job["resolved_spec"]["training"]["optimizer"]["lr"] == 0.05
    assert job["created_at"].endswith("Z")
    assert len(service.wake_ups) == 1
    assert TypeAdapter(JobView).validate_python(job, strict=True)


async def test_submit_of_an_invalid_spec_changes_nothing(service: Service) -> None:
    problem(await service.http.post("/v1/jobs", json={}), 422, "spec_invalid")
    assert (await service.http.get("/v1/jobs")).json() == {"data": [], "next": None}
    assert service.wake_ups == []


async def test_submit_with_the_same_idempotency_key_returns_the_same_job(service: Service) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await service.http.post("/v1/jobs", json=SUPERVISED, headers=headers)
    again = await service.http.post("/v1/jobs", json=SUPERVISED, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len((await service.http.get("/v1/jobs")).json()["data"]) == 1


async def test_submit_replays_although_the_data_set_was_deleted(service: Service) -> None:
    """The answer of the first request was lost; meanwhile its data set was deleted."""
    headers = {"Idempotency-Key": "k1"}
    body = {**SUPERVISED, "dataset": "passing"}
    new = {"name": "passing", "blob": await service.upload(b"arrays")}
    assert (await service.http.post("/v1/datasets", json=new)).status_code == 201
    first = await service.http.post("/v1/jobs", json=body, headers=headers)
    assert (await service.http.delete("/v1/datasets/passing")).status_code == 204
    again = await service.http.post("/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


async def test_actions_are_answered_although_the_database_goes_away_after_them(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads fail after the write, so that only the transaction of the action can answer."""

    async def away(*args: object, **kwargs: object) -> None:
        raise DatabaseUnavailable("the server went away")

    async def write_then_lose_reads(*args: Any, **kwargs: Any) -> Any:
        result = await write(*args, **kwargs)
        monkeypatch.setattr(service.db, "read", away)
        return result

    write = service.db.write
    monkeypatch.setattr(service.db, "write", write_then_lose_reads)
    sent = await service.http.post("/v1/jobs", json=SUPERVISED)
    assert (sent.status_code, sent.json()["queue_position"]) == (201, 1)
    job = f"/v1/jobs/{sent.json()['id']}"
    answers = [await service.http.post(f"{job}/{verb}") for verb in ("pause", "resume", "cancel", "retry")]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200]
    assert [answer.json()["status"] for answer in answers] == ["paused", "queued", "cancelled", "queued"]
    assert [answer.json()["queue_position"] for answer in answers] == [None, 1, None, 1]


async def test_submit_refuses_another_body_under_the_same_key(service: Service) -> None:
    headers = {"Idempotency-Key": "k1"}
    await service.http.post("/v1/jobs", json=SUPERVISED, headers=headers)
    other = await service.http.post("/v1/jobs", json={**SUPERVISED, "name": "other"}, headers=headers)
    problem(other, 422, "idempotency_conflict")


async def test_validate_answers_as_submit_and_changes_nothing(service: Service) -> None:
    """Digests: 1,437 to train on, a tenth (144) held out, 1,293 left: 20 whole batches of 64, 3 epochs, 60 steps."""
    answer = await service.http.post("/v1/jobs/validate", json=SUPERVISED)
    body = answer.json()
    assert answer.status_code == 200
    assert (body["valid"], body["errors"]) == (True, [])
    assert body["estimate"]["steps"] == 60
    assert body["estimate"]["parameters"]["teacher"] is None
    assert body["estimate"]["parameters"]["student"] > 0
    assert body["estimate"]["compression"] is None
    assert (await service.http.get("/v1/jobs")).json()["data"] == []


async def test_validate_lists_faults(service: Service) -> None:
    body = (await service.http.post("/v1/jobs/validate", json={**SUPERVISED, "student": "resnet21"})).json()
    assert body["valid"] is False
    assert [fault["pointer"] for fault in body["errors"]] == ["/student"]
    assert body["resolved_spec"] is None


async def test_jobs_listing_is_paged_from_newest_to_oldest(service: Service) -> None:
    ids = [await service.submit(name=f"job {n}") for n in range(5)]
    first = (await service.http.get("/v1/jobs", params={"limit": 2, "view": "full"})).json()
    second = (await service.http.get("/v1/jobs", params={"limit": 2, "after": first["next"]})).json()
    third = (await service.http.get("/v1/jobs", params={"limit": 2, "after": second["next"]})).json()
    assert [job["id"] for page in (first, second, third) for job in page["data"]] == ids[::-1]
    assert third["next"] is None
    assert Page[JobView].model_validate(first, strict=True)
    assert Page[JobSummary].model_validate(second, strict=True)


async def test_jobs_listing_filters_by_status_and_method(service: Service) -> None:
    done, waiting = await service.submit(), await service.submit()
    await service.succeed(done)
    queued = (await service.http.get("/v1/jobs", params={"status": "queued"})).json()["data"]
    assert [job["id"] for job in queued] == [waiting]
    assert (await service.http.get("/v1/jobs", params={"method": "kd"})).json()["data"] == []


async def test_jobs_listing_finds_a_sum_by_all_its_methods(service: Service) -> None:
    job_id = await service.submit(student=["convnet8", "convnet8"], method=["dml", "sp"])
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    assert job["method"] == "dml+sp"
    assert [method["name"] for method in job["resolved_spec"]["method"]] == ["dml", "sp"]
    assert TypeAdapter(JobView).validate_python(job, strict=True)
    for method, ids in (("dml+sp", [job_id]), ("dml", [])):
        listed = (await service.http.get("/v1/jobs", params={"method": method})).json()["data"]
        assert [job["id"] for job in listed] == ids


async def test_job_view_counts_the_queue_position(service: Service) -> None:
    await service.submit()
    second = await service.submit()
    assert (await service.http.get(f"/v1/jobs/{second}")).json()["queue_position"] == 2


async def test_job_view_of_a_running_job_has_phase_and_progress(service: Service) -> None:
    job_id = await service.submit()
    fence = await service.claim(job_id)
    await service.db.write(lifecycle.set_phase, job_id, fence, "training")
    await service.db.write(lifecycle.set_progress, job_id, fence, {"percent": 25.0, "epoch": 1})
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    assert (job["status"], job["phase"], job["progress"]["percent"]) == ("running", "training", 25.0)
    assert job["allowed_actions"] == ["cancel", "pause"]
    assert job["queue_position"] is None
    assert TypeAdapter(JobView).validate_python(job, strict=True)


async def test_job_view_of_a_failed_job_has_its_error(service: Service) -> None:
    job_id = await service.submit()
    await service.fail(job_id)
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    assert job["error"] == {"code": "loss_diverged", "message": "the loss became nan", "retryable": False, "hint": None}
    assert TypeAdapter(JobView).validate_python(job, strict=True)


async def test_cancel_of_a_queued_job_is_immediate_and_idempotent(service: Service) -> None:
    job_id = await service.submit()
    first, again = [await service.http.post(f"/v1/jobs/{job_id}/cancel") for _ in range(2)]
    assert (first.json()["status"], first.json()["allowed_actions"]) == ("cancelled", ["retry", "delete"])
    assert (again.status_code, again.json()) == (200, first.json())


async def test_pause_is_not_allowed_after_cancel(service: Service) -> None:
    job_id = await service.submit()
    await service.claim(job_id)
    job = (await service.http.post(f"/v1/jobs/{job_id}/cancel")).json()
    assert job["allowed_actions"] == ["cancel"]
    body = problem(await service.http.post(f"/v1/jobs/{job_id}/pause"), 409, "action_not_allowed")
    assert body["allowed_actions"] == ["cancel"]


async def test_cancel_of_a_running_job_is_requested_and_idempotent(service: Service) -> None:
    job_id = await service.submit()
    await service.claim(job_id)
    for _ in range(2):
        job = (await service.http.post(f"/v1/jobs/{job_id}/cancel")).json()
        assert (job["status"], job["requested"]) == ("running", "cancel")


async def test_pause_and_resume(service: Service) -> None:
    job_id = await service.submit()
    assert (await service.http.post(f"/v1/jobs/{job_id}/pause")).json()["status"] == "paused"
    service.wake_ups.clear()
    resumed = (await service.http.post(f"/v1/jobs/{job_id}/resume")).json()
    assert (resumed["status"], resumed["queue_position"]) == ("queued", 1)
    assert len(service.wake_ups) == 1


async def test_retry_is_for_failed_jobs(service: Service) -> None:
    job_id = await service.submit()
    body = problem(await service.http.post(f"/v1/jobs/{job_id}/retry"), 409, "action_not_allowed")
    assert body["allowed_actions"] == ["cancel", "pause"]
    await service.fail(job_id)
    service.wake_ups.clear()
    job = (await service.http.post(f"/v1/jobs/{job_id}/retry")).json()
    assert (job["status"], job["error"], job["attempts_without_progress"]) == ("queued", None, 0)
    assert len(service.wake_ups) == 1


async def test_job_view_of_a_queued_job_has_the_reason_why_it_waits(service: Service) -> None:
    job_id = await service.submit(scheduling={"priority": 7, "deadline_s": 3600})
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    assert (job["waiting"]["reason"], job["waiting"]["until"]) == ("no_worker", None)
    assert (job["priority"], job["not_before"], job["checkpoint_step"]) == (7, None, None)
    lasts = datetime.fromisoformat(job["deadline_at"]) - datetime.fromisoformat(job["created_at"])
    assert abs(lasts.total_seconds() - 3600) < 0.01
    await service.db.write(
        workers.record_heartbeat, "w", "host", [{"name": "cpu", "job": None, "state": "idle", "seen_s": 0}], None
    )
    listed = (await service.http.get("/v1/jobs")).json()
    assert [one["waiting"]["reason"] for one in listed["data"]] == ["starting"]
    assert Page[JobSummary].model_validate(listed, strict=True)
    fence = await service.claim(job_id)
    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["waiting"] is None
    full = {"code": "storage_full", "message": "the disk is full", "retryable": True, "hint": None}
    await service.db.write(lifecycle.postpone, job_id, fence, full, 60)
    job = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    assert (job["waiting"]["reason"], job["queue_position"]) == ("backing_off", None)
    assert job["waiting"]["until"] == job["not_before"] > job["created_at"]


async def test_retry_starts_from_checkpoint_or_from_scratch(service: Service) -> None:
    job_id = await service.submit()
    for body, start in (({}, "checkpoint"), ({"from": "checkpoint"}, "checkpoint"), ({"from": "scratch"}, "scratch")):
        fence = await service.claim(job_id)
        step = {"step": 5 * fence, "sha256": "5" * 64, "bytes": 1, "path": "x"}
        await service.db.write(checkpoints.record, job_id, fence, **step)
        await service.db.write(lifecycle.finish_cancelled, job_id, fence)
        job = (await service.http.post(f"/v1/jobs/{job_id}/retry", json=body)).json()
        assert job["checkpoint_step"] == (None if start == "scratch" else step["step"])
        events = (await service.http.get(f"/v1/jobs/{job_id}/events")).json()["data"]
        assert (events[-1]["type"], events[-1]["data"]) == ("retried", {"from": start})


@pytest.mark.parametrize(("body", "pointer"), [({"from": "start"}, "/from"), ({"form": "scratch"}, "/form"), ([], "")])
async def test_retry_refuses_an_invalid_body(service: Service, body: Any, pointer: str) -> None:
    job_id = await service.submit()
    await service.fail(job_id)
    body = problem(await service.http.post(f"/v1/jobs/{job_id}/retry", json=body), 422, "invalid_request")
    assert [fault["pointer"] for fault in body["errors"]] == [pointer]
    typo = await service.http.post(
        f"/v1/jobs/{job_id}/retry", content=b"{", headers={"Content-Type": "application/json"}
    )
    problem(typo, 400, "malformed_body")
    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["status"] == "failed"


async def test_delete_is_for_jobs_that_have_ended(service: Service) -> None:
    job_id = await service.submit()
    problem(await service.http.delete(f"/v1/jobs/{job_id}"), 409, "action_not_allowed")
    fence = await service.claim(job_id)
    log = service.files.log_path(job_id, fence)
    log.parent.mkdir(parents=True)
    log.write_text("hello")
    await service.db.write(lifecycle.finish_cancelled, job_id, fence)
    assert (await service.http.delete(f"/v1/jobs/{job_id}")).status_code == 204
    problem(await service.http.get(f"/v1/jobs/{job_id}"), 404, "not_found")
    assert not log.parent.exists()


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
async def test_actions_on_an_unknown_job_are_not_found(service: Service, verb: str) -> None:
    problem(await service.http.post(f"/v1/jobs/job_0/{verb}"), 404, "not_found")


@pytest.mark.parametrize(
    ("query", "pointer"), [("limit=0", "?limit"), ("limit=101", "?limit"), ("status=done", "?status")]
)
async def test_jobs_listing_refuses_invalid_parameters(service: Service, query: str, pointer: str) -> None:
    body = problem(await service.http.get(f"/v1/jobs?{query}"), 422, "invalid_request")
    assert [fault["pointer"] for fault in body["errors"]] == [pointer]


async def test_jobs_listing_has_summaries_and_whole_jobs_on_demand(service: Service) -> None:
    job_id = await service.submit(labels={"team": "vision"}, training={"epochs": 3})
    await service.succeed(job_id)
    (listed,) = (await service.http.get("/v1/jobs?labels=team:vision&status=succeeded,failed&student=convnet8")).json()[
        "data"
    ]
    assert not {"spec", "resolved_spec", "result", "warnings"} & listed.keys()
    assert (listed["dataset"], listed["students"], listed["labels"]) == ("digits", ["convnet8"], {"team": "vision"})
    assert (listed["figures"]["accuracy"], listed["figures"]["parameters"]) == (0.9, 3_000)
    (whole,) = (await service.http.get("/v1/jobs?view=full")).json()["data"]
    assert whole == (await service.http.get(f"/v1/jobs/{job_id}")).json()


async def test_jobs_listing_shortens_the_message_of_an_error(service: Service) -> None:
    job_id = await service.submit()
    fence = await service.claim(job_id)
    error = {"code": "internal", "message": "x" * 100_000, "retryable": False, "hint": None}
    await service.db.write(lifecycle.finish_failed, job_id, fence, error, None)
    (listed,) = (await service.http.get("/v1/jobs")).json()["data"]
    assert listed["error"] == {**error, "message": "x" * 1000 + "…"}


async def test_relabel_replaces_the_labels_of_a_job(service: Service) -> None:
    job_id = await service.submit(labels={"team": "vision"})
    answer = await service.http.patch(f"/v1/jobs/{job_id}", json={"labels": {"owner": "ü"}})
    assert (answer.status_code, answer.json()["labels"]) == (200, {"owner": "ü"})
    assert answer.json()["spec"]["labels"] == {"team": "vision"}
    assert (await service.http.get("/v1/jobs?labels=team")).json()["data"] == []
    problem(await service.http.patch(f"/v1/jobs/{'job_' + '0' * 24}", json={"labels": {}}), 404, "not_found")
    refused = await service.http.patch(f"/v1/jobs/{job_id}", json={"labels": {"a b": "\n"}})
    assert problem(refused, 422, "invalid_request")["errors"]


async def test_jobs_listing_refuses_a_cursor_of_another_order(service: Service) -> None:
    for _ in range(2):
        await service.submit()
    after = (await service.http.get("/v1/jobs?limit=1&sort=name")).json()["next"]
    body = problem(await service.http.get("/v1/jobs", params={"after": after}), 422, "invalid_request")
    assert [fault["pointer"] for fault in body["errors"]] == ["?after"]
    assert "sort=name" in body["errors"][0]["message"]
