"""Benchmarks: what is asked for, what is kept, and when it is measured again."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from base.wire import BenchmarkView, JobView
from kdcore.spec import BenchmarkSpec
from store import lifecycle, registry, speeds
from tests.api.conftest import MODEL, ONNX, Service, problem

pytestmark = pytest.mark.anyio

PATH = "/v1/benchmarks"
BODY = {"architecture": "convnet8", "image_size": 8, "channels": 1, "num_classes": 3}
ROW = {
    "format": "safetensors", "runtime": "torch 2.12", "bytes": 10, "latency": [{"batch": 1, "p50_ms": 1, "p95_ms": 2}],
    "threads": 1, "cpu": "fast", "device": {"kind": "cpu", "name": "fast"}, "refused": None,
}  # fmt: skip
FIGURES = {
    "architecture": "convnet8", "parameters": 3, "bytes": 12, "macs": 7, "num_classes": 3, "channels": 1,
    "image_size": [8, 8], "batch_size": 32, "device": {"kind": "cpu", "name": "fast"}, "threads": 1, "files": [ROW],
    "seconds": 1.5, "warnings": [],
}  # fmt: skip


async def ask(service: Service, status: int = 201, **changes: Any) -> dict[str, Any]:
    answer = await service.http.post(PATH, json={**BODY, **changes})
    assert answer.status_code == status, answer.text
    view: dict[str, Any] = answer.json()
    TypeAdapter(BenchmarkView).validate_python(view, strict=True)
    assert answer.headers["location"] == f"{PATH}/{view['key']}"
    return view


async def job_of(service: Service, view: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = (await service.http.get(f"/v1/jobs/{view['job']}")).json()
    TypeAdapter(JobView).validate_python(job, strict=True)
    return job


async def measure(service: Service, view: dict[str, Any], **changes: Any) -> None:
    """End the job as its worker does."""
    fence = await service.claim(view["job"])
    figures = {**FIGURES, **changes}
    assert await service.db.write(lifecycle.finish_succeeded, view["job"], fence, figures, [])
    kept = {"job": view["job"], **figures}
    await service.db.write(registry.put_measurement, "default", "benchmark", view["key"], kept)


async def faults_of(service: Service, **body: Any) -> dict[str, dict[str, Any]]:
    answer = problem(await service.http.post(PATH, json=body), 422, "spec_invalid")
    return {fault["pointer"]: fault for fault in answer["errors"]}


async def test_benchmark_is_a_job_of_its_own_kind(service: Service) -> None:
    view = await ask(service, export=["safetensors", "onnx"], threads=2, name="how fast")
    assert (view["status"], view["figures"], view["measured_at"], view["error"]) == ("queued", None, None, None)
    job = await job_of(service, view)
    assert (job["kind"], job["method"], job["name"]) == ("benchmark", "benchmark", "how fast")
    spec = BenchmarkSpec.parse(job["resolved_spec"], stored=True)
    assert (spec.architecture, spec.image_size, spec.channels, spec.num_classes) == ("convnet8", (8, 8), 1, 3)
    assert (spec.threads, spec.export, spec.weights, spec.key) == (2, ("safetensors", "onnx"), None, view["key"])
    assert len(service.wake_ups) == 1
    entries = (await service.http.get("/v1/audit", params={"action": "benchmark.submit"})).json()["data"]
    assert [entry["resource"] for entry in entries] == [view["job"]]


async def test_a_second_request_is_answered_from_what_is_kept_unless_it_asks_anew(service: Service) -> None:
    first = await ask(service)
    waiting = await ask(service, 200)
    assert (waiting["job"], waiting["status"]) == (first["job"], "queued")
    await measure(service, first)
    kept = await ask(service, 200)
    assert kept["figures"] == FIGURES and kept["status"] == "succeeded" and kept["measured_at"]
    anew = await ask(service, anew=True)
    assert anew["job"] != first["job"] and (anew["key"], anew["figures"]) == (first["key"], FIGURES)
    assert (await ask(service, 200, anew=True))["job"] == anew["job"]
    await measure(service, anew, macs=8)
    shown = (await service.http.get(f"{PATH}/{first['key']}")).json()
    assert (shown["figures"]["macs"], shown["job"]) == (8, anew["job"])


async def test_what_is_kept_outlives_its_job(service: Service) -> None:
    view = await ask(service)
    await measure(service, view)
    assert (await service.http.delete(f"/v1/jobs/{view['job']}")).status_code == 204
    shown = (await service.http.get(f"{PATH}/{view['key']}")).json()
    assert (shown["figures"], shown["status"], shown["job"]) == (FIGURES, "succeeded", view["job"])
    problem(await service.http.get(f"{PATH}/{'0' * 64}"), 404, "not_found")
    problem(await service.http.get(f"{PATH}/nothing"), 422, "invalid_request")


async def test_a_benchmark_that_failed_says_why_and_is_measured_by_the_next_request(service: Service) -> None:
    view = await ask(service)
    fence = await service.claim(view["job"])
    error = {"code": "out_of_memory", "message": "no memory", "retryable": False, "hint": None}
    await service.db.write(lifecycle.finish_failed, view["job"], fence, error, None)
    shown = (await service.http.get(f"{PATH}/{view['key']}")).json()
    assert (shown["status"], shown["error"]["code"], shown["figures"]) == ("failed", "out_of_memory", None)
    assert (await ask(service))["job"] != view["job"]


async def test_benchmarks_are_listed_newest_first(service: Service) -> None:
    views = []
    for name in ("convnet4", "convnet8", "convnet16"):
        views.append(await ask(service, architecture=name))
        await measure(service, views[-1], architecture=name)
    first = (await service.http.get(PATH, params={"limit": 2})).json()
    assert [one["figures"]["architecture"] for one in first["data"]] == ["convnet16", "convnet8"]
    rest = (await service.http.get(PATH, params={"limit": 2, "after": first["next"]})).json()
    assert [one["key"] for one in rest["data"]] == [views[0]["key"]] and rest["next"] is None


async def test_benchmark_with_an_idempotency_key(service: Service) -> None:
    key = {"Idempotency-Key": "fast"}
    first = await service.http.post(PATH, json={**BODY, "anew": True}, headers=key)
    await measure(service, first.json())
    again = await service.http.post(PATH, json={**BODY, "anew": True}, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["job"] == first.json()["job"] and again.headers["idempotent-replayed"] == "true"
    other = await service.http.post(PATH, json={**BODY, "threads": 3}, headers=key)
    problem(other, 422, "idempotency_conflict")


async def test_benchmark_of_a_registered_model_or_a_students_file_has_their_shape(service: Service) -> None:
    blob = await service.upload(b"weights of big")
    service.inspector.answers[blob.removeprefix("sha256:")] = MODEL.model_copy(update={"image_size": (8, 8)})
    body = {"name": "big", "blob": blob, "architecture": "convnet32"}
    assert (await service.http.post("/v1/models", json=body)).status_code == 201
    view = (await service.http.post(PATH, json={"model": "big"})).json()
    spec = (await job_of(service, view))["resolved_spec"]
    assert (spec["weights"], spec["architecture"], spec["image_size"]) == (f"blob:{blob}", "convnet32", [8, 8])
    assert (spec["channels"], spec["num_classes"], spec["model"]) == (1, 10, "big")
    wrong = await faults_of(service, model="big", channels=3, num_classes=10)
    assert (wrong["/channels"]["allowed"], wrong["/channels"]["got"]) == (1, 3) and len(wrong) == 1
    parent = await service.submit()
    assert (await faults_of(service, job=parent))["/job"]["code"] == "not_ready"
    await service.http.post(f"/v1/jobs/{view['job']}/cancel")
    digests = await service.succeed(parent)
    view = (await service.http.post(PATH, json={"job": parent})).json()
    spec = (await job_of(service, view))["resolved_spec"]
    assert spec["weights"] == f"blob:sha256:{digests['student.safetensors']}" and spec["job"] == parent
    assert spec["image_size"] == [8, 8] and spec["architecture"] == "convnet8"


async def test_benchmark_of_a_program_has_no_architecture(service: Service) -> None:
    blob = await service.upload(b"a program")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX
    answer = await service.http.post("/v1/models", json={"name": "net", "blob": blob})
    assert answer.status_code == 201, answer.text
    spec = (await job_of(service, (await service.http.post(PATH, json={"model": "net"})).json()))["resolved_spec"]
    assert spec["architecture"] is None and spec["weights"] == f"blob:{blob}" and spec["image_size"] == [8, 8]


async def test_benchmark_faults_name_the_field(service: Service) -> None:
    assert "name one network" in (await faults_of(service))[""]["message"]
    assert "/model" in await faults_of(service, architecture="convnet8", model="big", image_size=8)
    assert (await faults_of(service, architecture="convnet8"))["/image_size"]["code"] == "missing"
    assert (await faults_of(service, model="none"))["/model"]["code"] == "not_found"
    small = await faults_of(service, architecture="torchvision/vgg16", image_size=8)
    assert small["/image_size"]["allowed"] == 32 and small["/image_size"]["got"] == 8
    grey = await faults_of(service, architecture="torchvision/vit_b_16", image_size=224, channels=1)
    assert grey["/channels"]["allowed"] == 3
    answer = problem(await service.http.post(PATH, json={"architecture": "convnet9"}), 422, "invalid_request")
    assert answer["errors"][0]["pointer"] == "/architecture" and "convnet8" in str(answer["errors"][0])


async def test_benchmarks_are_those_of_the_own_project(service: Service) -> None:
    ann, bob = await service.key("member", "one", "ann"), await service.key("member", "two", "bob")
    async with service.holder(ann) as ours, service.holder(bob) as theirs:
        view = await ask(ours)
        assert (await theirs.http.get(PATH)).json()["data"] == []
        problem(await theirs.http.get(f"{PATH}/{view['key']}"), 404, "not_found")
        assert (await ask(theirs))["job"] != view["job"]
    assert await service.db.read(speeds.get, "one", view["key"]) is None
