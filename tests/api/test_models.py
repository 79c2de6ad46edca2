"""Teachers: inspected before they exist."""

import asyncio
from typing import Any

import pytest

from api.inspections import Refused
from api.schemas import ListedModelView, ModelView, Page
from kdcore.catalog.facts import Loading, ProgramFacts
from store import lists
from tests.api.conftest import MODEL, ONNX, PROGRAM, Service, problem

pytestmark = pytest.mark.anyio


async def register(service: Service, name: str = "teacher", **changes: object) -> dict[str, object]:
    blob = await service.upload(b"weights of " + name.encode())
    answer = await service.http.post(
        "/v1/models", json={"name": name, "blob": blob, "architecture": "convnet32", **changes}
    )
    assert answer.status_code == 201, answer.text
    body: dict[str, object] = answer.json()
    assert answer.headers["location"] == f"/v1/models/{body['id']}"
    return body


async def test_model_is_found_by_name_and_id(service: Service) -> None:
    body = await register(service)
    assert body["facts"]["num_classes"] == MODEL.num_classes  # type: ignore[index]
    for name in ("teacher", body["id"]):
        assert (await service.http.get(f"/v1/models/{name}")).json() == {**body, "measured": []}
    listed = (await service.http.get("/v1/models?view=full")).json()
    assert listed == {"data": [body], "next": None}
    assert Page[ModelView].model_validate(listed)


async def test_register_model_prefers_the_preprocessing_of_the_request(service: Service) -> None:
    body = await register(service, preprocessing={"mean": [0.1], "std": [0.2]})
    assert (body["facts"]["mean"], body["facts"]["std"]) == ([0.1], [0.2])  # type: ignore[index]


async def test_register_model_refuses_what_its_inspection_refused(service: Service) -> None:
    blob = await service.upload(b"junk")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("teacher_mismatch", "this is no checkpoint", "send a state dict")
    answer = await service.http.post("/v1/models", json={"name": "junk", "blob": blob})
    body = problem(answer, 422, "unusable")
    assert body["errors"] == [{"pointer": "/blob", "message": "this is no checkpoint", "code": "teacher_mismatch"}]
    assert body["hint"] == "send a state dict"
    assert (await service.http.get("/v1/models")).json()["data"] == []


async def test_register_model_refuses_preprocessing_for_other_channels(service: Service) -> None:
    blob = await service.upload(b"weights")
    three = {"mean": [0.5, 0.5, 0.5], "std": [0.5]}
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob, "preprocessing": three})
    assert problem(answer, 422, "unusable")["errors"][0]["pointer"] == "/preprocessing/mean"


@pytest.mark.parametrize(
    ("mean", "std", "pointer", "said"),
    [
        ("[0.5]", "[0]", "/preprocessing/std/0", "greater than 0"),
        ("[0.5]", "[-0.2]", "/preprocessing/std/0", "greater than 0"),
        ("[0.5]", "[1e-300]", "/preprocessing/std/0", "greater than or equal to 0.001"),
        ("[123.675]", "[0.2]", "/preprocessing/mean", "[123.675] are not of pixels in 0..1: divide by 255"),
        ("[0.485]", "[58.395]", "/preprocessing/std", "[58.395] are not of pixels in 0..1: divide by 255"),
        ("[33.3]", "[78.6]", "/preprocessing/mean", "divide by 255"),
    ],
)
async def test_register_model_refuses_a_normalization_as_a_job_spec_does(
    service: Service, mean: str, std: str, pointer: str, said: str
) -> None:
    blob = await service.upload(b"weights")
    content = f'{{"name": "x", "blob": "{blob}", "preprocessing": {{"mean": {mean}, "std": {std}}}}}'
    answer = await service.http.post("/v1/models", content=content, headers={"content-type": "application/json"})
    fault = problem(answer, 422, "invalid_request")["errors"][0]
    assert fault["pointer"] == pointer and said in fault["message"]
    teacher = f'{{"checkpoint": "blob:{blob}", "preprocessing": {{"mean": {mean}, "std": {std}}}}}'
    body = f'{{"dataset": "digits", "teacher": {teacher}, "student": "convnet8", "method": "kd"}}'
    answer = await service.http.post("/v1/jobs/validate", content=body, headers={"content-type": "application/json"})
    pointers = [one["pointer"] for one in answer.json()["errors"] if said in one["message"]]
    assert f"/teacher{pointer}" in pointers


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
async def test_register_model_takes_no_number_that_is_not_finite(service: Service, number: str) -> None:
    content = f'{{"name": "x", "blob": "sha256:{"0" * 64}", "preprocessing": {{"mean": [{number}], "std": [1]}}}}'
    answer = await service.http.post("/v1/models", content=content, headers={"content-type": "application/json"})
    problem(answer, 400, "malformed_body")


async def test_register_model_keeps_its_class_names(service: Service) -> None:
    names = [f"class {number}" for number in range(MODEL.num_classes)]
    body = await register(service, class_names=names)
    assert body["facts"]["class_names"] == names  # type: ignore[index]


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (["a", "b"], "unusable", "one name for each of the model's"),
        (["a"] * MODEL.num_classes, "invalid_request", "each class has one name; 'a' is there twice"),
        ([], "invalid_request", "at least 2 entries"),
    ],
)
async def test_register_model_refuses_class_names_that_cannot_be_its_own(
    service: Service, names: list[str], code: str, said: str
) -> None:
    blob = await service.upload(b"weights")
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob, "class_names": names})
    fault = problem(answer, 422, code)["errors"][0]
    assert fault["pointer"] == "/class_names" and said in fault["message"]


async def test_register_model_refuses_an_unknown_architecture_without_inspection(service: Service) -> None:
    blob = await service.upload(b"weights")
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob, "architecture": "resnet21"})
    assert problem(answer, 422, "unusable")["errors"][0]["pointer"] == "/architecture"
    assert service.inspector.requests == []


async def test_register_model_refuses_a_name_that_is_taken(service: Service) -> None:
    await register(service)
    blob = await service.upload(b"others")
    problem(await service.http.post("/v1/models", json={"name": "teacher", "blob": blob}), 409, "name_taken")


async def test_register_model_answers_every_fault_at_once(service: Service) -> None:
    body = {"name": "no spaces please", "blob": "sha256:12", "architectur": "x"}
    body = problem(await service.http.post("/v1/models", json=body), 422, "invalid_request")
    assert {fault["pointer"] for fault in body["errors"]} == {"/name", "/blob", "/architectur"}


async def test_register_model_refuses_bytes_that_were_not_uploaded(service: Service) -> None:
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": "sha256:" + "0" * 64})
    problem(answer, 404, "not_found")


async def test_delete_model(service: Service) -> None:
    await register(service)
    assert (await service.http.delete("/v1/models/teacher")).status_code == 204
    problem(await service.http.get("/v1/models/teacher"), 404, "not_found")
    problem(await service.http.delete("/v1/models/teacher"), 404, "not_found")


async def test_register_model_without_preprocessing_warns_and_strict_refuses_it(service: Service) -> None:
    body = await register(service)
    assert [(one["code"], one["pointer"]) for one in body["warnings"]] == [("normalization_guessed", "/preprocessing")]  # type: ignore[attr-defined]
    stated = await register(service, "stated", preprocessing={"mean": [0.1], "std": [0.2]}, strict=True)
    assert stated["warnings"] == []
    blob = await service.upload(b"weights of strict")
    answer = await service.http.post("/v1/models", json={"name": "strict", "blob": blob, "strict": True})
    (fault,) = problem(answer, 422, "warning_refused")["errors"]
    assert (fault["pointer"], fault["code"]) == ("/preprocessing", "warning_refused")
    assert "register it with the preprocessing" in fault["message"]
    problem(await service.http.get("/v1/models/strict"), 404, "not_found")


@pytest.mark.parametrize("facts", [ONNX, PROGRAM], ids=["onnx", "pt2"])
async def test_register_model_accepts_a_program_with_what_the_client_states(
    service: Service, facts: ProgramFacts
) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = facts
    names = [f"class {number}" for number in range(10)]
    stated = {"class_names": names, "preprocessing": {"mean": [0.25], "std": [0.5]}}
    answer = await service.http.post("/v1/models", json={"name": "graph", "blob": blob, **stated})
    assert answer.status_code == 201, answer.text
    found = answer.json()["facts"]
    assert (found["architecture"], found["format"], found["batch"]) == ("program", facts.format, facts.batch)
    assert (found["class_names"], found["mean"], found["image_size"]) == (names, [0.25], [8, 8])
    assert Page[ModelView].model_validate((await service.http.get("/v1/models?view=full")).json()).data[0].facts == (
        facts.model_copy(update={"class_names": names, "mean": [0.25], "std": [0.5]})
    )


async def test_register_model_refuses_a_choice_between_weights_and_another_size_for_a_program(
    service: Service,
) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX
    body = {"name": "graph", "blob": blob}
    answer = await service.http.post("/v1/models", json={**body, "part": "ema", "averaged": False})
    assert [(one["pointer"], one["code"], one["got"]) for one in problem(answer, 422, "unusable")["errors"]] == [
        ("/part", "unused", "ema"), ("/averaged", "unused", False),
    ]  # fmt: skip
    answer = await service.http.post("/v1/models", json={**body, "image_size": 16})
    (fault,) = problem(answer, 422, "unusable")["errors"]
    assert (fault["pointer"], fault["allowed"], fault["got"]) == ("/image_size", [8, 8], 16)
    assert (await service.http.post("/v1/models", json={**body, "image_size": 8})).status_code == 201


async def test_register_model_refuses_an_architecture_for_a_program(service: Service) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX
    body = {"name": "graph", "blob": blob, "architecture": "convnet32"}
    answer = problem(await service.http.post("/v1/models", json=body), 422, "unusable")
    assert answer["errors"] == [
        {
            "pointer": "/architecture", "message": "the file is an ONNX model, which holds its own network",
            "code": "unused", "allowed": "leave it out", "got": "convnet32",
        }
    ]  # fmt: skip


async def test_register_model_warns_of_probabilities(service: Service) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX.model_copy(update={"outputs": "probabilities"})
    body = {"name": "graph", "blob": blob, "preprocessing": {"mean": [0.25], "std": [0.5]}}
    answer = (await service.http.post("/v1/models", json=body)).json()
    assert [(one["code"], one["pointer"]) for one in answer["warnings"]] == [("outputs_are_probabilities", "/blob")]
    strict = await service.http.post("/v1/models", json={**body, "name": "other", "strict": True})
    problem(strict, 422, "warning_refused")


async def test_register_model_says_which_weights_are_meant_and_tells_which_were_taken(service: Service) -> None:
    blob = await service.upload(b"averaged and raw")
    loading = Loading(tensors=20, removed=["state_dict_ema."], part="state_dict_ema", averaged=True)
    service.inspector.answers[blob.removeprefix("sha256:")] = MODEL.model_copy(update={"loading": loading})
    sent = {"name": "x", "blob": blob, "averaged": True, "part": "state_dict_ema", "image_size": 32}
    body = (await service.http.post("/v1/models", json=sent)).json()
    assert service.inspector.requests[-1][2] == {"part": "state_dict_ema", "averaged": True}
    assert body["facts"]["loading"].items() >= {"part": "state_dict_ema", "averaged": True, "tensors": 20}.items()
    assert body["facts"]["image_size"] == [32, 32]
    assert (await service.http.get("/v1/models/x")).json()["facts"]["loading"] == body["facts"]["loading"]


async def test_register_model_warns_of_everything_that_was_guessed(service: Service) -> None:
    blob = await service.upload(b"guesses")
    loading = Loading(
        tensors=20, averaged=True, averaged_by_default=True, part="ema", by_order=True, ignored=1,
        ignored_names=["criterion.weight"], architecture_found=True, activation_guessed="relu",
    )  # fmt: skip
    service.inspector.answers[blob.removeprefix("sha256:")] = MODEL.model_copy(update={"loading": loading})
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob})
    assert [(one["code"], one["pointer"]) for one in answer.json()["warnings"]] == [
        ("architecture_found", "/architecture"),
        ("averaged_weights_taken", "/averaged"),
        ("weights_matched_by_order", "/blob"),
        ("tensors_left_out", "/blob"),
        ("head_activation_guessed", "/architecture"),
        ("normalization_guessed", "/preprocessing"),
    ]
    strict = await service.http.post("/v1/models", json={"name": "y", "blob": blob, "strict": True})
    assert len(problem(strict, 422, "warning_refused")["errors"]) == 6


@pytest.mark.parametrize(
    ("field", "value"), [("part", ""), ("averaged", "perhaps"), ("image_size", 3), ("image_size", 4096)]
)
async def test_register_model_refuses_values_that_choose_nothing(service: Service, field: str, value: object) -> None:
    blob = await service.upload(b"weights")
    answer = await service.http.post("/v1/models", json={"name": "x", "blob": blob, field: value})
    assert problem(answer, 422, "invalid_request")["errors"][0]["pointer"] == f"/{field}"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"classes": ["a"]}, "/classes: there is no field 'classes' here"),
        ({"class_names": "names.txt"}, "/class_names: a list belongs here"),
        ({"preprocessing": "imagenet"}, "/preprocessing: an object belongs here"),
        ({"preprocessing": {"mean": [0.5]}}, "/preprocessing/std: this field is required"),
    ],
)
async def test_register_model_names_a_mistake_in_plain_words(
    service: Service, body: dict[str, Any], words: str
) -> None:
    blob = await service.upload(b"weights")
    answer = await service.http.post("/v1/models", json={"name": "plain", "blob": blob, **body})
    assert words in problem(answer, 422, "invalid_request")["detail"]


async def test_register_under_an_idempotency_key_makes_one_model(service: Service) -> None:
    blob, key = await service.upload(b"weights"), {"Idempotency-Key": "k"}
    body = {"name": "big", "blob": blob, "strict": False}
    send = (service.http.post("/v1/models", json=body, headers=key) for _ in range(20))
    answers = await asyncio.gather(*send)
    assert {answer.status_code for answer in answers} <= {200, 201, 202}
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    (model_id,) = {answer.json()["id"] for answer in answers}
    again = await service.http.post("/v1/models", json=dict(reversed(body.items())), headers=key)
    assert (again.status_code, again.json()["id"], again.headers["idempotent-replayed"]) == (200, model_id, "true")
    assert again.headers["location"] == f"/v1/models/{model_id}"
    other = await service.http.post("/v1/models", json={**body, "name": "small"}, headers=key)
    problem(other, 422, "idempotency_conflict")
    problem(await service.http.post("/v1/datasets", json=body, headers=key), 422, "idempotency_conflict")


async def test_register_again_under_the_key_of_a_refused_file_inspects_it_again(service: Service) -> None:
    blob, key = await service.upload(b"weights"), {"Idempotency-Key": "k"}
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("unusable", "it has no classifier", final=False)
    body = {"name": "big", "blob": blob}
    problem(await service.http.post("/v1/models", json=body, headers=key), 422, "unusable")
    del service.inspector.answers[digest]
    answer = await service.http.post("/v1/models", json=body, headers=key)
    assert (answer.status_code, "idempotent-replayed" in answer.headers) == (201, False)


async def test_models_listing_filters_and_shows_no_class_names(service: Service) -> None:
    """A model of 2,000 classes with long names: they are in the model, and not in a list."""
    names = [f"{number} {'x' * 200}" for number in range(2000)]
    blob = await service.upload(b"many classes")
    facts = MODEL.model_copy(update={"num_classes": 2000, "class_names": names})
    service.inspector.answers[blob.removeprefix("sha256:")] = facts
    new = {"name": "big", "blob": blob, "architecture": "convnet32", "labels": {"team": "vision"}}
    made = (await service.http.post("/v1/models", json=new)).json()
    assert made["labels"] == {"team": "vision"} and len(made["facts"]["class_names"]) == 2000
    other = {"name": "small", "blob": await service.upload(b"other"), "architecture": "convnet32"}
    assert (await service.http.post("/v1/models", json=other)).status_code == 201

    async def found(query: str) -> list[str]:
        answer = await service.http.get(f"/v1/models?{query}")
        assert Page[ListedModelView].model_validate(answer.json())
        return [one["name"] for one in answer.json()["data"]]

    whole = await service.http.get("/v1/models")
    assert len(whole.content) < 5_000
    (big,) = [one for one in whole.json()["data"] if one["name"] == "big"]
    assert (big["facts"]["num_classes"], big["facts"]["architecture"]) == (2000, "convnet32")
    assert await found("labels=team:vision") == await found("name=b") == ["big"]
    assert await found("labels=team:speech") == await found("state=refused") == await found("name=B") == []
    assert await found("view=full") == ["small", "big"]
    changed = await service.http.patch("/v1/models/small", json={"labels": {"team": "speech"}})
    assert changed.json()["labels"] == {"team": "speech"}
    assert await found("labels=team") == ["small", "big"]
    problem(await service.http.patch("/v1/models/none", json={"labels": {}}), 404, "not_found")


async def test_models_listing_in_full_ends_after_some_bytes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PAGE_BYTES", 10)
    for name in ("a", "b"):
        blob = await service.upload(name.encode())
        new = {"name": name, "blob": blob, "architecture": "convnet32"}
        assert (await service.http.post("/v1/models", json=new)).status_code == 201
    first = (await service.http.get("/v1/models?view=full")).json()
    rest = (await service.http.get("/v1/models", params={"view": "full", "after": first["next"]})).json()
    assert [[one["name"] for one in page["data"]] for page in (first, rest)] == [["b"], ["a"]]
    assert rest["next"] is None
