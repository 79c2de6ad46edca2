"""Exports of a job's student: which weights are taken in each status, and that these are kept."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from api.routes.exports import require_data
from base.files import sha256_of
from base.wire import JobView
from kdcore.spec import ExportSpec
from store import checkpoints, collector, jobs, lifecycle
from store.collector import Collector, Retention
from store.errors import NotExportable
from store.file_store import FileStore
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio

FILES = [{"name": "student.onnx", "format": "onnx", "bytes": 10, "accuracy": 0.5, "refused": None}]


async def train(service: Service, *steps: int, **changes: Any) -> tuple[str, int]:
    """Submit and claim a job that has written checkpoints at these steps. Returns its id and fence."""
    job = await service.submit(**changes)
    fence = await service.claim(job)
    for step in steps:
        await save(service, job, fence, step)
    return job, fence


async def save(service: Service, job: str, fence: int, step: int) -> str:
    """Write a checkpoint as a worker does; of the ones before, the newest stays. Returns its digest."""
    source = service.settings.home / "made.pt"
    source.write_bytes(f"state of {job} at {step}".encode())
    blob = service.files.put_checkpoint(job, fence, step, source)
    path = service.files.relative(service.files.checkpoint_path(job, fence, step))
    row = {"step": step, "sha256": blob.sha256, "bytes": blob.bytes, "path": path}
    await service.db.write(checkpoints.record, job, fence, **row)
    for old in await service.db.write(checkpoints.delete_superseded, job, 2):
        (service.files.folder / old.path).unlink()
    return blob.sha256


async def export(service: Service, job: str, **body: Any) -> dict[str, Any]:
    answer = await service.http.post(f"/v1/jobs/{job}/exports", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{made['id']}"
    return made


def weights(made: dict[str, Any]) -> str:
    return str(made["resolved_spec"]["weights"]).removeprefix("blob:sha256:")


def collect(service: Service) -> None:
    """Delete what no row names, at once."""
    retention = Retention(after_s=0, checkpoints_s=1e9, uploads_s=1e9, open_uploads_s=1e9)
    Collector(service.db, service.files, retention, on_demand=True).run()
    Collector(service.db, service.files, retention, on_demand=True).run()


async def test_export_of_a_job_that_has_succeeded_takes_its_file(service: Service) -> None:
    parent = await service.submit()
    digests = await service.succeed(parent)
    made = await export(
        service, parent, export=["onnx", "onnx_int8"], export_options={"tolerance": 0.1}, name="ship", strict=True
    )
    TypeAdapter(JobView).validate_python(made, strict=True)
    assert (made["kind"], made["method"], made["status"], made["name"]) == ("export", "export", "queued", "ship")
    assert made["spec"] == {
        "job": parent, "export": ["onnx", "onnx_int8"], "export_options": {"tolerance": 0.1}, "name": "ship",
        "strict": True,
    }  # fmt: skip
    spec = ExportSpec.parse(made["resolved_spec"], stored=True)
    assert weights(made) == digests["student.safetensors"] and spec.weights_format == "safetensors"
    assert (spec.job, spec.checkpoint, spec.step, spec.strict) == (parent, "best", None, True)
    assert spec.export_options.tolerance == 0.1 and spec.export_options.calibration_images == 512
    assert spec.distillation == (await service.http.get(f"/v1/jobs/{parent}")).json()["resolved_spec"]
    assert service.wake_ups


async def test_export_takes_a_checkpoint_of_a_job_in_any_other_status(service: Service) -> None:
    parent, fence = await train(service, 3)
    for status, after in (("running", None), ("paused", "pause"), ("queued", "resume"), ("cancelled", "cancel")):
        if after is not None:
            await service.http.post(f"/v1/jobs/{parent}/{after}")
        if status == "paused":
            assert await service.db.write(lifecycle.release, parent, fence, reason="pause", to="paused")
        assert (await service.http.get(f"/v1/jobs/{parent}")).json()["status"] == status
        made = await export(service, parent, checkpoint="last")
        spec = made["resolved_spec"]
        assert (spec["weights_format"], spec["checkpoint"], spec["step"]) == ("checkpoint", "last", 3), status
        assert sha256_of(service.files.path(weights(made))) == weights(made)


async def test_export_of_a_failed_job_takes_its_newest_undamaged_checkpoint(service: Service) -> None:
    parent, fence = await train(service, 3, 7)
    newest = service.files.checkpoint_path(parent, fence, 7)
    newest.write_bytes(b"not what it was")
    await service.db.write(lifecycle.finish_failed, parent, fence, error_of("loss_diverged"), None)
    made = await export(service, parent)
    assert made["resolved_spec"]["step"] == 3
    await service.http.post(f"/v1/jobs/{made['id']}/cancel")
    other, fence = await train(service, 4)
    service.files.checkpoint_path(other, fence, 4).unlink()
    answer = await service.http.post(f"/v1/jobs/{other}/exports", json={})
    assert "they are gone" in problem(answer, 409, "not_exportable")["detail"]


def error_of(code: str) -> dict[str, Any]:
    return {"code": code, "message": "it failed", "retryable": False, "hint": None}


async def test_export_keeps_the_checkpoint_of_a_job_that_goes_on_until_it_has_succeeded(service: Service) -> None:
    """The bytes are one file with two names; only the one among the blobs is left when the job saves later ones."""
    parent, fence = await train(service, 1)
    first = service.files.checkpoint_path(parent, fence, 1)
    made = await export(service, parent)
    blob = service.files.path(weights(made))
    assert first.samefile(blob)
    for step in (2, 3):
        await save(service, parent, fence, step)
    assert not first.exists() and blob.read_bytes() == f"state of {parent} at 1".encode()
    await service.db.write(lifecycle.finish_cancelled, parent, fence)
    collect(service)
    assert blob.exists()
    assert (await service.http.post(f"/v1/jobs/{parent}/retry")).status_code == 200
    await service.http.post(f"/v1/jobs/{parent}/pause")
    own = await service.claim(made["id"])
    assert await service.db.write(lifecycle.finish_succeeded, made["id"], own, {"files": FILES}, [])
    collect(service)
    assert not blob.exists()
    shown = (await service.http.get(f"/v1/jobs/{made['id']}")).json()
    assert shown["status"] == "succeeded" and weights(shown) == weights(made)


async def test_export_whose_blob_was_taken_by_a_collection_on_request_has_it_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection runs after the file has got its second name, and before a row says so."""
    parent, _ = await train(service, 1)
    share, calls = FileStore.share, []

    def shared(files: FileStore, *given: Any) -> None:
        share(files, *given)
        calls.append(given)
        if len(calls) == 1:
            files.move_to_trash(given[1], float("inf"))
            files.trash_path(given[1]).unlink()

    monkeypatch.setattr(FileStore, "share", shared)
    made = await export(service, parent)
    assert len(calls) == 2 and service.files.path(weights(made)).exists()
    assert weights(made) in collector.named_digests(service.db)


async def test_export_says_what_can_be_exported_instead(service: Service) -> None:
    async def refused(job: str, **body: Any) -> tuple[str, list[str]]:
        answer = problem(await service.http.post(f"/v1/jobs/{job}/exports", json=body), 409, "not_exportable")
        return answer["detail"], answer["allowed_checkpoints"]

    waiting = await service.submit()
    text, allowed = await refused(waiting)
    assert "is queued and has no checkpoint" in text and allowed == []
    await service.succeed(waiting)
    text, allowed = await refused(waiting, checkpoint="last")
    assert "only its best epoch is left" in text and allowed == ["best"]
    made = await export(service, waiting)
    text, allowed = await refused(made["id"])
    assert "kind export has no student" in text and allowed == []
    problem(await service.http.post("/v1/jobs/job_0/exports", json={}), 404, "not_found")


async def test_export_of_the_last_epoch_of_a_job_that_has_succeeded_takes_the_furthest_checkpoint(
    service: Service,
) -> None:
    parent, fence = await train(service, 5, 6)
    assert await service.db.write(lifecycle.finish_succeeded, parent, fence, {}, [])
    assert (await export(service, parent, checkpoint="last"))["resolved_spec"]["step"] == 6
    answer = await service.http.post(f"/v1/jobs/{parent}/exports", json={"checkpoint": "best"})
    assert "no student.safetensors" in problem(answer, 409, "not_exportable")["detail"]


async def test_export_refuses_what_it_cannot_read(service: Service) -> None:
    parent = await service.submit()
    await service.succeed(parent)
    path = f"/v1/jobs/{parent}/exports"
    for body, pointer in (
        ({"export": ["tflite"]}, "/export/0"),
        ({"export": []}, "/export"),
        ({"export": ["onnx", "onnx"]}, "/export"),
        ({"checkpoint": "first"}, "/checkpoint"),
        ({"export_options": {"tolerance": 2}}, "/export_options/tolerance"),
        ({"epochs": 3}, "/epochs"),
    ):
        answer = problem(await service.http.post(path, json=body), 422, "invalid_request")
        assert [fault["pointer"] for fault in answer["errors"]] == [pointer], body
    alerts = {"scheduling": {"alerts": [{"metric": "validation/loss", "above": 2}]}}
    answer = problem(await service.http.post(path, json=alerts), 422, "spec_invalid")
    assert answer["errors"][0]["pointer"] == "/scheduling/alerts/0/metric"


async def test_export_with_an_idempotency_key_is_one_job(service: Service) -> None:
    parent = await service.submit()
    await service.succeed(parent)
    key = {"Idempotency-Key": "ship"}
    path = f"/v1/jobs/{parent}/exports"
    first = await service.http.post(path, json={"export": "onnx"}, headers=key)
    again = await service.http.post(path, json={"export": "onnx"}, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"] and again.headers["idempotent-replayed"] == "true"
    other = await service.http.post(path, json={"export": "safetensors"}, headers=key)
    problem(other, 422, "idempotency_conflict")
    entries = (await service.http.get("/v1/audit", params={"action": "export.submit"})).json()["data"]
    assert [entry["resource"] for entry in entries] == [first.json()["id"]]


async def test_exports_of_a_job_are_listed_with_their_files_and_found_among_all_jobs(service: Service) -> None:
    parent, other = await service.submit(), await service.submit(name="other")
    await service.succeed(parent)
    await service.succeed(other)
    made, elsewhere = await export(service, parent), await export(service, other)
    fence = await service.claim(made["id"])
    assert await service.db.write(lifecycle.finish_succeeded, made["id"], fence, {"files": FILES}, [])
    page = (await service.http.get(f"/v1/jobs/{parent}/exports")).json()
    assert [one["id"] for one in page["data"]] == [made["id"]] and page["next"] is None
    assert page["data"][0]["result"]["files"] == FILES
    problem(await service.http.get("/v1/jobs/job_0/exports"), 404, "not_found")

    async def ids(**params: str) -> list[str]:
        return [one["id"] for one in (await service.http.get("/v1/jobs", params=params)).json()["data"]]

    assert await ids(kind="export") == [elsewhere["id"], made["id"]]
    assert await ids(job=parent) == [made["id"]]
    assert await ids(kind="distillation", dataset="digits") == [other, parent]
    assert await ids(dataset="digits") == [other, parent]
    listed = (await service.http.get("/v1/jobs", params={"kind": "export", "job": parent})).json()["data"][0]
    assert listed["dataset"] == SUPERVISED["dataset"] and listed["students"] == [SUPERVISED["student"]]
    assert listed["figures"]["accuracy"] is None


async def test_deleting_a_job_deletes_its_exports_and_waits_for_those_that_have_not_ended(service: Service) -> None:
    parent = await service.submit()
    await service.succeed(parent)
    made = await export(service, parent)
    answer = problem(await service.http.delete(f"/v1/jobs/{parent}"), 409, "action_not_allowed")
    assert made["id"] in answer["detail"] and answer["job_status"] == "succeeded"
    await service.http.post(f"/v1/jobs/{made['id']}/cancel")
    log = service.files.log_path(made["id"], 1)
    log.parent.mkdir(parents=True)
    log.write_text("line")
    assert (await service.http.delete(f"/v1/jobs/{parent}")).status_code == 204
    problem(await service.http.get(f"/v1/jobs/{made['id']}"), 404, "not_found")
    assert not log.exists() and (await service.http.get("/v1/jobs")).json()["data"] == []


async def test_export_of_a_job_whose_data_is_gone_is_refused_before_it_is_a_job(service: Service) -> None:
    parent = await service.db.read(jobs.get, await service.submit())
    digest = service.files.put_stream([b"data"]).sha256
    named = replace(parent, resolved_spec={**parent.resolved_spec, "dataset": {"source": f"blob:sha256:{digest}"}})
    require_data(service.files, named)
    service.files.path(digest).unlink()
    with pytest.raises(NotExportable, match=f"upload the file of blob:sha256:{digest} again"):
        require_data(service.files, named)
    require_data(service.files, parent)  # Data that has a name is no blob.
