"""Teachers: inspected before they exist."""

import pytest

from api.inspector import Refused
from api.schemas import ModelView, Page
from tests.api.conftest import MODEL, Service, problem

pytestmark = pytest.mark.anyio


async def register(service: Service, name: str = "teacher", **changes: object) -> dict[str, object]:
    blob = await service.upload(b"weights of " + name.encode())
    answer = await service.http.post(
        "/v1/models", json={"name": name, "blob": blob, "architecture": "convnet32", **changes}
    )
    assert answer.status_code == 201, answer.text
    told: dict[str, object] = answer.json()
    assert answer.headers["location"] == f"/v1/models/{told['id']}"
    return told


async def test_a_model_is_known_by_name_and_id(service: Service) -> None:
    told = await register(service)
    assert told["facts"]["num_classes"] == MODEL.num_classes  # type: ignore[index]
    for name in ("teacher", told["id"]):
        assert (await service.http.get(f"/v1/models/{name}")).json() == told
    listed = (await service.http.get("/v1/models")).json()
    assert listed == {"data": [told], "next": None}
    assert Page[ModelView].model_validate(listed)


async def test_preprocessing_that_is_given_outweighs_what_the_file_says(service: Service) -> None:
    told = await register(service, preprocessing={"mean": [0.1], "std": [0.2]})
    assert (told["facts"]["mean"], told["facts"]["std"]) == ([0.1], [0.2])  # type: ignore[index]


async def test_a_file_that_fails_its_inspection_is_not_registered(service: Service) -> None:
    blob = await service.upload(b"junk")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("teacher_mismatch", "this is no checkpoint", "send a state dict")
    answer = await service.http.post("/v1/models", json={"name": "junk", "blob": blob})
    told = problem(answer, 422, "unusable")
    assert told["errors"] == [{"pointer": "/blob", "message": "this is no checkpoint", "code": "teacher_mismatch"}]
    assert told["hint"] == "send a state dict"
    assert (await service.http.get("/v1/models")).json()["data"] == []


async def test_preprocessing_must_fit_the_channels(service: Service) -> None:
    blob = await service.upload(b"weights")
    three = {"mean": [0.5, 0.5, 0.5], "std": [0.5]}
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob, "preprocessing": three})
    assert problem(answer, 422, "unusable")["errors"][0]["pointer"] == "/preprocessing/mean"


async def test_an_unknown_architecture_is_told_before_anything_is_opened(service: Service) -> None:
    blob = await service.upload(b"weights")
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob, "architecture": "resnet21"})
    assert problem(answer, 422, "unusable")["errors"][0]["pointer"] == "/architecture"
    assert service.inspector.asked == []


async def test_a_name_is_given_once(service: Service) -> None:
    await register(service)
    blob = await service.upload(b"others")
    problem(await service.http.post("/v1/models", json={"name": "teacher", "blob": blob}), 409, "name_taken")


async def test_every_fault_of_a_registration_at_once(service: Service) -> None:
    body = {"name": "no spaces please", "blob": "sha256:12", "architectur": "x"}
    told = problem(await service.http.post("/v1/models", json=body), 422, "invalid_request")
    assert {fault["pointer"] for fault in told["errors"]} == {"/name", "/blob", "/architectur"}


async def test_bytes_that_are_not_here(service: Service) -> None:
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": "sha256:" + "0" * 64})
    problem(answer, 404, "not_found")


async def test_a_forgotten_model_is_gone(service: Service) -> None:
    await register(service)
    assert (await service.http.delete("/v1/models/teacher")).status_code == 204
    problem(await service.http.get("/v1/models/teacher"), 404, "not_found")
    problem(await service.http.delete("/v1/models/teacher"), 404, "not_found")
