"""Evaluations of registered models: jobs of another kind."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from base.wire import JobView, MeasuredModel
from kdcore.spec import Dataset
from store import lifecycle
from tests.api.conftest import DATASET, MODEL, ONNX, Service, problem

pytestmark = pytest.mark.anyio

PATH = "/v1/models/big/evaluations"
FIGURES = {"accuracy": 0.75, "interval": [0.7, 0.8], "test_samples": 100}


async def model(service: Service, name: str = "big", **facts: Any) -> str:
    """Register a model that knows its normalisation. Returns the digest of its bytes."""
    blob = await service.upload(b"weights of big")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = MODEL.model_copy(update={"mean": [0.25], "std": [0.5], **facts})
    answer = await service.http.post("/v1/models", json={"name": name, "blob": blob, "architecture": "convnet32"})
    assert answer.status_code == 201, answer.text
    return digest


async def evaluation(service: Service, **changes: Any) -> dict[str, Any]:
    answer = await service.http.post(PATH, json={"dataset": "digits", **changes})
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


async def faults_of(service: Service, **body: Any) -> dict[str, dict[str, Any]]:
    answer = problem(await service.http.post(PATH, json={"dataset": "digits", **body}), 422, "spec_invalid")
    return {fault["pointer"]: fault for fault in answer["errors"]}


async def test_evaluation_is_a_job_of_its_own_kind(service: Service) -> None:
    digest = await model(service)
    job = await evaluation(service, name="how good", scheduling={"priority": 5, "max_attempts": 2})
    TypeAdapter(JobView).validate_python(job, strict=True)
    assert (job["kind"], job["method"], job["status"]) == ("evaluation", "evaluation", "queued")
    assert (job["name"], job["priority"], job["max_attempts"]) == ("how good", 5, 2)
    assert job["spec"] == {
        "model": "big", "dataset": "digits", "name": "how good", "scheduling": {"priority": 5, "max_attempts": 2},
    }  # fmt: skip
    resolved = job["resolved_spec"]
    assert resolved["kind"] == "evaluation" and resolved["dataset"] == Dataset(source="digits").resolved().model_dump(
        mode="json"
    )
    assert resolved["model"]["checkpoint"] == f"blob:sha256:{digest}"
    assert resolved["model"]["architecture"] == "convnet32"
    assert resolved["model"]["preprocessing"] == {"mean": [0.25], "std": [0.5]}
    assert len(service.wake_ups) == 1


async def test_evaluation_is_claimed_listed_and_finished_like_any_job(service: Service) -> None:
    await model(service)
    job = await evaluation(service)
    trained = await service.submit()
    fence = await service.claim(job["id"])
    assert await service.db.write(lifecycle.finish_succeeded, job["id"], fence, FIGURES, [])
    (listed,) = (await service.http.get(PATH)).json()["data"]
    assert (listed["id"], listed["figures"]["accuracy"], listed["model"]) == (job["id"], FIGURES["accuracy"], "big")
    by_kind = {
        kind: [one["id"] for one in (await service.http.get("/v1/jobs", params=params)).json()["data"]]
        for kind, params in (
            ("all", {}), ("evaluation", {"kind": "evaluation"}), ("distillation", {"kind": "distillation"})
        )
    }  # fmt: skip
    assert by_kind == {"all": [trained, job["id"]], "evaluation": [job["id"]], "distillation": [trained]}
    problem(await service.http.get("/v1/jobs", params={"kind": "sweep"}), 422, "invalid_request")


async def test_evaluations_of_a_model_are_those_of_its_bytes(service: Service) -> None:
    await model(service)
    job = await evaluation(service)
    assert (await service.http.delete("/v1/models/big")).status_code == 204
    problem(await service.http.get(PATH), 404, "not_found")
    problem(await service.http.post(PATH, json={"dataset": "digits"}), 404, "not_found")
    await model(service, "renamed")
    listed = (await service.http.get("/v1/models/renamed/evaluations")).json()
    assert [one["id"] for one in listed["data"]] == [job["id"]] and listed["next"] is None
    other = await service.upload(b"other weights")
    body = {"name": "other", "blob": other, "architecture": "convnet32"}
    assert (await service.http.post("/v1/models", json=body)).status_code == 201
    assert (await service.http.get("/v1/models/other/evaluations")).json()["data"] == []


async def test_a_model_shows_its_newest_accuracy_on_each_data_set(service: Service) -> None:
    await model(service)
    assert (await service.http.get("/v1/models/big")).json()["measured"] == []

    async def measured(dataset: str, accuracy: float) -> str:
        job = await evaluation(service, dataset=dataset)
        fence = await service.claim(job["id"])
        figures = {**FIGURES, "accuracy": accuracy}
        assert await service.db.write(lifecycle.finish_succeeded, job["id"], fence, figures, [])
        return str(job["id"])

    blob = await service.upload(b"other digits")
    service.inspector.answers[blob.removeprefix("sha256:")] = DATASET.model_copy(update={"num_classes": 10})
    assert (await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})).status_code == 201
    await measured("digits", 0.5)
    mine, newest = await measured("mine", 0.6), await measured("digits", 0.7)
    await evaluation(service)  # It has not ended.
    answer = (await service.http.get("/v1/models/big")).json()
    TypeAdapter(MeasuredModel).validate_python(answer)
    shown = [(one["dataset"], one["accuracy"], one["job"]) for one in answer["measured"]]
    assert shown == [("digits", 0.7, newest), ("mine", 0.6, mine)]
    assert all(one["finished_at"] and one["interval"] == [0.7, 0.8] for one in answer["measured"])
    assert "measured" not in (await service.http.get("/v1/models")).json()["data"][0]


async def test_evaluation_with_an_idempotency_key(service: Service) -> None:
    await model(service)
    key = {"Idempotency-Key": "k"}
    first = await service.http.post(PATH, json={"dataset": "digits"}, headers=key)
    again = await service.http.post(PATH, json={"dataset": "digits"}, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"] and again.headers["idempotent-replayed"] == "true"
    other = await service.http.post(PATH, json={"dataset": "digits", "image_size": 8}, headers=key)
    problem(other, 422, "idempotency_conflict")


async def test_evaluation_can_be_cancelled_retried_and_deleted(service: Service) -> None:
    await model(service)
    at = f"/v1/jobs/{(await evaluation(service))['id']}"
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        assert (await service.http.post(f"{at}/{action}")).json()["status"] == status
    await service.http.post(f"{at}/cancel")
    assert (await service.http.delete(at)).status_code == 204


async def test_evaluation_faults_name_the_field_of_the_request(service: Service) -> None:
    await model(service)
    assert (await faults_of(service, dataset="digitz"))["/dataset"]["allowed"] == ["digits"]
    assert (await faults_of(service, dataset="file:/etc/passwd"))["/dataset"]["code"] == "not_allowed"
    assert (await faults_of(service, image_size=32))["/image_size"]["allowed"] == 8
    wrong = await faults_of(service, preprocessing={"mean": [0.5] * 3, "std": [0.5]})
    assert wrong["/preprocessing/mean"]["allowed"] == 1
    blob = await service.upload(b"four classes")
    assert (await service.http.post("/v1/datasets", json={"name": "four", "blob": blob})).status_code == 201
    fault = (await faults_of(service, dataset="four"))["/dataset"]
    assert (fault["code"], fault["allowed"], fault["got"]) == ("teacher_mismatch", 4, 10)
    for body in (
        {},
        {"dataset": "digits", "epochs": 3},
        {"dataset": "digits", "preprocessing": {"mean": [0], "std": [0]}},
    ):
        problem(await service.http.post(PATH, json=body), 422, "invalid_request")


async def test_evaluation_on_a_registered_data_set_names_its_bytes(service: Service) -> None:
    await model(service, num_classes=4, architecture="convnet32", channels=1)
    blob = await service.upload(b"folders")
    facts = DATASET.model_copy(update={"kind": "folders"})
    service.inspector.answers[blob.removeprefix("sha256:")] = facts
    assert (await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})).status_code == 201
    job = await evaluation(service, dataset="mine")
    assert job["resolved_spec"]["dataset"] == Dataset(source=f"blob:{blob}", image_size=8).resolved().model_dump(
        mode="json"
    )


async def test_evaluation_warns_of_a_guessed_normalisation_and_strict_refuses_it(service: Service) -> None:
    await model(service, mean=None, std=None)
    (warning,) = (await evaluation(service))["warnings"]
    assert (warning["code"], warning["pointer"]) == ("normalization_guessed", "/preprocessing")
    refused = problem(await service.http.post(PATH, json={"dataset": "digits", "strict": True}), 422, "warning_refused")
    assert [fault["pointer"] for fault in refused["errors"]] == ["/preprocessing"]
    given = {"mean": [0.1], "std": [0.2]}
    job = await evaluation(service, strict=True, preprocessing=given)
    assert job["warnings"] == [] and job["resolved_spec"]["model"]["preprocessing"] == given


async def test_evaluation_has_no_student_that_can_teach(service: Service) -> None:
    await model(service)
    job_id = (await evaluation(service))["id"]
    spec = {"dataset": "digits", "student": "convnet8", "method": "kd", "teacher": {"checkpoint": f"job:{job_id}"}}
    answer = await service.http.post("/v1/jobs", json={**spec, "baseline": f"job:{job_id}"})
    faults = {fault["pointer"]: fault["message"] for fault in problem(answer, 422, "spec_invalid")["errors"]}
    text = f"job {job_id} is an evaluation: it trains no student"
    assert faults == {"/teacher/checkpoint": text, "/baseline": text}


async def test_evaluation_of_a_colour_model_reads_grey_images_with_three_channels(service: Service) -> None:
    await model(service, architecture="convnet32", channels=3)
    job = await evaluation(service, dataset="digits")
    assert job["resolved_spec"]["dataset"]["channels"] == 3
    assert "grey_as_colour" in [warning["code"] for warning in job["warnings"]]


async def test_evaluation_of_a_program_names_it_as_a_program_and_is_listed(service: Service) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX
    await service.http.post("/v1/models", json={"name": "big", "blob": blob})
    job = await evaluation(service)
    model = job["resolved_spec"]["model"]
    assert (model["program"], model["checkpoint"], model["architecture"]) == (f"blob:{blob}", None, None)
    assert [warning["code"] for warning in job["warnings"]] == ["normalization_guessed"]
    assert [one["id"] for one in (await service.http.get(PATH)).json()["data"]] == [job["id"]]


async def test_evaluation_takes_a_map_of_the_models_classes(service: Service) -> None:
    """Ten digits by a model of twelve outputs without names: refused without a map, and with one of a class too few."""
    await model(service, num_classes=12)
    assert "class_map says which of its outputs" in (await faults_of(service))["/dataset"]["message"]
    class_map: dict[str, Any] = {str(digit): digit + 1 for digit in range(10)}
    class_map["9"] = [10, 0]
    job = await evaluation(service, class_map=class_map)
    assert job["resolved_spec"]["model"]["class_map"] == {**{str(at): [at + 1] for at in range(9)}, "9": [10, 0]}
    del class_map["3"]
    fault = (await faults_of(service, class_map=class_map))["/class_map"]
    assert fault["message"].startswith("1 of 10 classes of the data set have no output, first '3'")
