"""Every fault of a spec in one answer: of its fields, of what it names, of what does not fit together."""

from typing import Any

import pytest

from api.inspector import Refused
from tests.api.conftest import DATASET, MODEL, SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


async def faults(service: Service, spec: Any) -> dict[str, dict[str, Any]]:
    told = problem(await service.http.post("/v1/jobs", json=spec), 422, "spec_invalid")
    return {fault["pointer"]: fault for fault in told["errors"]}


async def teacher(service: Service, name: str = "big", **facts: Any) -> str:
    blob = await service.upload(b"weights of " + name.encode())
    service.inspector.answers[blob.removeprefix("sha256:")] = MODEL.model_copy(update=facts)
    answer = await service.http.post("/v1/models", json={"name": name, "architecture": "convnet32", "blob": blob})
    assert answer.status_code == 201, answer.text
    return blob


def kd(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": "digits",
        "teacher": {"checkpoint": "model:big"},
        "student": "convnet8",
        "method": "kd",
        **changes,
    }


async def test_five_mistakes_of_different_kinds_come_back_together(service: Service) -> None:
    spec = kd(
        dataset="digitz",
        student={"architecture": "convnet9"},
        temprature=4,
        alpha=-1,
        training={"epochs": "many"},
    )
    await teacher(service)
    found = await faults(service, spec)
    assert set(found) == {"/dataset", "/student/architecture", "/temprature", "/alpha", "/training/epochs"}
    assert found["/dataset"]["allowed"] == ["digits"]
    assert "did you mean 'digits'" in found["/dataset"]["message"]
    assert found["/temprature"]["code"] == "unknown_field"
    assert found["/alpha"]["allowed"] == "≥ 0"
    assert found["/training/epochs"]["got"] == "many"


async def test_a_teacher_of_other_classes_is_told_beside_the_other_mistakes(service: Service) -> None:
    await teacher(service, num_classes=100)
    found = await faults(service, kd(temprature=4, student="convnet9"))
    assert set(found) == {"/temprature", "/student", "/teacher/checkpoint"}
    assert found["/teacher/checkpoint"]["code"] == "teacher_mismatch"
    assert (found["/teacher/checkpoint"]["allowed"], found["/teacher/checkpoint"]["got"]) == (10, 100)


async def test_a_job_with_a_registered_teacher_holds_its_bytes(service: Service) -> None:
    blob = await teacher(service, mean=[0.3], std=[0.4])
    job = (await service.http.post("/v1/jobs", json=kd(baseline="train"))).json()
    resolved = job["resolved_spec"]
    assert resolved["teacher"]["checkpoint"] == f"blob:{blob}"
    assert resolved["teacher"]["architecture"] == "convnet32"
    assert resolved["teacher"]["preprocessing"] == {"mean": [0.3], "std": [0.4]}
    assert (resolved["temperature"], resolved["alpha"], resolved["beta"]) == (4, 0.1, 0.9)
    assert resolved["dataset"]["source"] == "digits"


async def test_an_estimate_counts_a_baseline_and_the_compression(service: Service) -> None:
    await teacher(service, parameters=30_000)
    told = (await service.http.post("/v1/jobs/validate", json=kd(baseline="train", training={"epochs": 2}))).json()
    student = told["estimate"]["parameters"]["student"]
    assert told["estimate"]["steps"] == 2 * 2 * 20
    assert told["estimate"]["parameters"]["teacher"] == 30_000
    assert told["estimate"]["compression"] == round(30_000 / student, 2)


async def test_a_registered_data_set_becomes_its_bytes(service: Service) -> None:
    blob = await service.upload(b"pictures")
    dataset = (await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})).json()
    for source in ("mine", dataset["id"], f"blob:{blob}"):
        job = (await service.http.post("/v1/jobs", json={**SUPERVISED, "dataset": source})).json()
        assert job["resolved_spec"]["dataset"] == {"source": f"blob:{blob}", "image_size": None}


async def test_folders_of_pictures_keep_the_size_that_they_were_inspected_at(service: Service) -> None:
    blob = await service.upload(b"folders")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = DATASET.model_copy(update={"kind": "folders", "image_size": (16, 16)})
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, "image_size": 16})
    job = (await service.http.post("/v1/jobs", json={**SUPERVISED, "dataset": "mine"})).json()
    assert job["resolved_spec"]["dataset"]["image_size"] == 16


async def test_an_unknown_blob_is_inspected_once(service: Service) -> None:
    blob = await service.upload(b"weights")
    spec = kd(teacher={"architecture": "convnet32", "checkpoint": f"blob:{blob}"})
    for _ in range(2):
        assert (await service.http.post("/v1/jobs", json=spec)).status_code == 201
    assert service.inspector.asked == [("model", blob.removeprefix("sha256:"), "convnet32")]


async def test_a_blob_that_an_inspection_refuses_is_the_teachers_fault_and_is_remembered(service: Service) -> None:
    blob = await service.upload(b"no weights")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("teacher_mismatch", "no tensor 'fc.weight'", "is it a convnet32?")
    spec = kd(teacher={"architecture": "convnet32", "checkpoint": f"blob:{blob}"})
    for _ in range(2):
        found = await faults(service, spec)
        assert found["/teacher/checkpoint"]["code"] == "teacher_mismatch"
        assert "is it a convnet32?" in found["/teacher/checkpoint"]["message"]
    assert len(service.inspector.asked) == 1


async def test_a_failure_of_the_inspection_itself_is_asked_again(service: Service) -> None:
    blob = await service.upload(b"weights")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("timeout", "too long", final=False)
    spec = kd(teacher={"architecture": "convnet32", "checkpoint": f"blob:{blob}"})
    await faults(service, spec)
    service.inspector.answers[digest] = MODEL
    assert (await service.http.post("/v1/jobs", json=spec)).status_code == 201


async def test_bytes_that_were_never_uploaded_are_named(service: Service) -> None:
    nowhere = "blob:sha256:" + "0" * 64
    found = await faults(service, kd(dataset=nowhere, teacher={"architecture": "convnet32", "checkpoint": nowhere}))
    assert {pointer: fault["code"] for pointer, fault in found.items()} == {
        "/dataset": "not_found",
        "/teacher/checkpoint": "not_found",
    }


async def test_another_jobs_student_can_teach(service: Service) -> None:
    job_id = await service.submit(student="convnet32")
    early = await faults(service, kd(teacher={"checkpoint": f"job:{job_id}"}))
    assert early["/teacher/checkpoint"]["code"] == "not_ready"
    made = await service.succeed(job_id)
    job = (await service.http.post("/v1/jobs", json=kd(teacher={"checkpoint": f"job:{job_id}"}))).json()
    assert job["resolved_spec"]["teacher"]["checkpoint"] == f"blob:sha256:{made['student.safetensors']}"
    assert job["resolved_spec"]["teacher"]["architecture"] == "convnet32"


async def test_a_baseline_must_be_the_same_student_on_the_same_data(service: Service) -> None:
    await teacher(service)
    right, wrong = await service.submit(student="convnet8"), await service.submit(student="convnet16")
    await service.succeed(right)
    await service.succeed(wrong)
    assert (await service.http.post("/v1/jobs", json=kd(baseline=f"job:{right}"))).status_code == 201
    found = await faults(service, kd(baseline=f"job:{wrong}"))
    assert found["/baseline"]["got"] == "convnet16"
    assert (await faults(service, kd(baseline="job:job_0")))["/baseline"]["code"] == "not_found"


async def test_the_service_opens_no_file_by_its_path(service: Service) -> None:
    found = await faults(
        service, kd(dataset="file:/etc/passwd", teacher={"checkpoint": "file:/etc/passwd", "architecture": "convnet32"})
    )
    assert {fault["code"] for fault in found.values()} == {"not_allowed"}
    assert set(found) == {"/dataset", "/teacher/checkpoint"}
    assert service.inspector.asked == []


async def test_a_set_of_one_size_cannot_be_asked_for_in_another(service: Service) -> None:
    found = await faults(service, {**SUPERVISED, "dataset": {"source": "digits", "image_size": 32}})
    assert found["/dataset/image_size"]["allowed"] == 8


async def test_an_unknown_model_is_named_with_its_neighbours(service: Service) -> None:
    await teacher(service, "big-convnet")
    found = await faults(service, kd(teacher={"checkpoint": "model:big-convmet"}))
    assert found["/teacher/checkpoint"]["allowed"] == ["big-convnet"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_body"),
        (b"", 400, "malformed_body"),
        (b'{"alpha": NaN}', 400, "malformed_body"),
        (b"\xff", 400, "malformed_body"),
        (b"[" * 100_000, 400, "malformed_body"),
        (b"[]", 422, "spec_invalid"),
        (b"null", 422, "spec_invalid"),
        (b'"' + b"x" * 1_000_001 + b'"', 413, "too_large"),
    ],
    ids=["cut", "empty", "nan", "no utf-8", "too deep", "list", "null", "too large"],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/validate"])
async def test_what_is_no_spec_at_all(service: Service, path: str, body: bytes, status: int, code: str) -> None:
    answer = await service.http.post(path, content=body)
    if path.endswith("validate") and status == 422:
        assert answer.json()["errors"][0]["pointer"] == ""
    else:
        problem(answer, status, code)


async def test_a_network_of_timms_is_built_before_a_job_is_accepted(service: Service) -> None:
    body = {"dataset": "digits", "student": "timm/resnet18", "method": "supervised"}
    for _ in range(2):
        assert (await service.http.post("/v1/jobs", json=body)).status_code == 201
    assert service.inspector.asked == [("architecture", "timm/resnet18", (10, 1, (8, 8)))]
    found = await faults(service, {**body, "student": "timm/resnet_18000"})
    assert "timm has no" in found["/student"]["message"]
