"""Data sets: built in, or inspected before they exist."""

import pytest

from api.inspections import Refused
from api.schemas import DatasetView, ListedDatasetView, Page
from kdcore.catalog import DATASETS
from kdcore.catalog.facts import DATASET_READING, LeftOut
from store import registry
from tests.api.conftest import DATASET, Service, problem

pytestmark = pytest.mark.anyio


async def test_register_dataset_stores_the_facts_of_its_inspection(service: Service) -> None:
    blob = await service.upload(b"pictures")
    answer = await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, "image_size": 8})
    body = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/datasets/{body['id']}"
    assert body["facts"] == {**DATASET.model_dump(mode="json"), "options": {"image_size": 8}}
    assert service.inspector.requests == [("dataset", blob.removeprefix("sha256:"), {"image_size": 8})]
    for name in ("mine", body["id"]):
        assert (await service.http.get(f"/v1/datasets/{name}")).json() == body


async def test_datasets_listing_ends_with_the_built_in_ones(service: Service) -> None:
    blob = await service.upload(b"pictures")
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    listed = (await service.http.get("/v1/datasets?view=full")).json()
    assert [dataset["name"] for dataset in listed["data"]] == ["mine", *sorted(DATASETS)]
    assert Page[DatasetView].model_validate(listed)
    assert (await service.http.get("/v1/datasets/digits")).json()["facts"]["num_classes"] == 10


async def test_register_dataset_refuses_what_its_inspection_refused(service: Service) -> None:
    blob = await service.upload(b"junk")
    refused = Refused("dataset_unreadable", "train/cat/3.png is cut short")
    service.inspector.answers[blob.removeprefix("sha256:")] = refused
    answer = await service.http.post("/v1/datasets", json={"name": "junk", "blob": blob})
    assert problem(answer, 422, "unusable")["errors"][0]["message"] == "train/cat/3.png is cut short"
    problem(await service.http.get("/v1/datasets/junk"), 404, "not_found")


async def test_register_dataset_names_the_field_that_does_not_fit_the_file(service: Service) -> None:
    blob = await service.upload(b"junk")
    refused = Refused("dataset_unreadable", "limit is 2, and there are 3 classes", option="limit")
    service.inspector.answers[blob.removeprefix("sha256:")] = refused
    for _ in "a new inspection", "a stored one":
        answer = await service.http.post("/v1/datasets", json={"name": "junk", "blob": blob, "limit": 2})
        assert [one["pointer"] for one in problem(answer, 422, "unusable")["errors"]] == ["/limit"]
    body = {"dataset": {"source": f"blob:{blob}", "limit": 2}, "student": "convnet4", "method": "supervised"}
    faults = (await service.http.post("/v1/jobs/validate", json=body)).json()["errors"]
    assert [one["pointer"] for one in faults] == ["/dataset/limit"]


async def test_register_dataset_refuses_a_name_that_is_taken(service: Service) -> None:
    blob = await service.upload(b"pictures")
    assert (await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})).status_code == 201
    problem(await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob}), 409, "name_taken")


async def test_registered_dataset_hides_the_built_in_one_of_its_name(service: Service) -> None:
    """Deleting the registered one makes the built-in one visible again."""
    blob = await service.upload(b"pictures")
    await service.http.post("/v1/datasets", json={"name": "cifar100", "blob": blob})
    assert (await service.http.get("/v1/datasets/cifar100")).json()["blob"] == blob
    body = {"dataset": "cifar100", "student": "convnet4", "method": "supervised"}
    body = (await service.http.post("/v1/jobs/validate", json=body)).json()
    assert body["resolved_spec"]["dataset"]["source"] == f"blob:{blob}"
    await service.http.delete("/v1/datasets/cifar100")
    assert (await service.http.get("/v1/datasets/cifar100")).json()["blob"] is None


async def test_delete_dataset(service: Service) -> None:
    blob = await service.upload(b"pictures")
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    assert (await service.http.delete("/v1/datasets/mine")).status_code == 204
    problem(await service.http.delete("/v1/datasets/mine"), 404, "not_found")


async def test_register_dataset_refuses_bytes_that_were_not_uploaded(service: Service) -> None:
    answer = await service.http.post("/v1/datasets", json={"name": "x", "blob": "sha256:" + "0" * 64})
    problem(answer, 404, "not_found")


async def test_get_dataset_shows_what_was_found_and_what_was_left_out(service: Service) -> None:
    blob = await service.upload(b"pictures")
    left = {"what": "extra", "count": 7, "why": "it is beside the splits and named like none"}
    found = {"layout": "<split>/<class>/<image>", "splits": {"Training": 400, "dev": 20, "Testing": 100}}
    counts = {"train": [100] * 4, "val": [5] * 4, "test": [25] * 4}
    update = {**found, "validation": 20, "class_counts": counts, "left_out": [LeftOut(**left)]}
    service.inspector.answers[blob.removeprefix("sha256:")] = DATASET.model_copy(update=update)
    body = (await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})).json()
    assert body == (await service.http.get("/v1/datasets/mine")).json()
    assert {name: body["facts"][name] for name in found} == found
    assert (body["facts"]["validation"], body["facts"]["class_counts"], body["facts"]["left_out"]) == (
        20,
        counts,
        [left],
    )
    assert [(one["code"], one["pointer"]) for one in body["warnings"]] == [("files_left_out", "/blob")]


async def test_submit_reads_again_what_was_registered_by_an_earlier_version(service: Service) -> None:
    """Its facts say 2 classes, Testing and Training; the file has 4. Both are stored by their own version."""
    blob = await service.upload(b"pictures")
    digest = blob.removeprefix("sha256:")
    before = {"reading": 1, "kind": "folders", "num_classes": 2, "class_names": ["Testing", "Training"]}
    service.inspector.answers[digest] = DATASET.model_copy(update=before)
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, "image_size": 8})
    now = DATASET.model_copy(update={"kind": "folders"})
    service.inspector.answers[digest] = now
    await service.db.write(registry.put_inspection, digest, "dataset", "8", {"refused": {}})  # As earlier versions did.
    await service.db.write(
        registry.put_inspection, digest, "dataset", f"8 reading={DATASET_READING}", now.model_dump(mode="json")
    )
    body = {"dataset": "mine", "student": "convnet4", "method": "supervised"}
    answer = (await service.http.post("/v1/jobs/validate", json=body)).json()
    assert answer["resolved_spec"]["dataset"].items() >= {"source": f"blob:{blob}", "image_size": 8}.items()
    assert answer["estimate"] is not None


async def test_register_dataset_without_labels(service: Service) -> None:
    blob = await service.upload(b"pool")
    pool = DATASET.model_copy(update={"labelled": False, "num_classes": 0, "class_names": [], "test": 0})
    service.inspector.answers[blob.removeprefix("sha256:")] = pool
    answer = await service.http.post("/v1/datasets", json={"name": "pool", "blob": blob})
    assert answer.status_code == 201
    assert answer.json()["facts"]["labelled"] is False and answer.json()["facts"]["num_classes"] == 0
    listed = (await service.http.get("/v1/datasets?view=full")).json()
    assert Page[DatasetView].model_validate(listed)
    assert {dataset["name"]: dataset["facts"]["labelled"] for dataset in listed["data"]}["digits"] is True


async def test_register_dataset_reads_it_with_its_options_and_stores_them(service: Service) -> None:
    blob = await service.upload(b"pictures")
    options = {"image_size": 8, "resize": "pad", "channels": 3, "skip_unreadable": True, "orientation": "ignore"}
    answer = await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, **options})
    assert answer.status_code == 201 and answer.json()["facts"]["options"] == options
    (request,) = service.inspector.requests
    given = {"image_size": 8, "options": '{"channels": 3, "resize": "pad", "skip_unreadable": true}'}
    assert request == ("dataset", blob.removeprefix("sha256:"), given), "defaults that are written out are left out"
    assert DatasetView.model_validate(answer.json())


async def test_register_dataset_inspects_again_only_for_other_options(service: Service) -> None:
    blob = await service.upload(b"pictures")
    for number, options in enumerate([{}, {"resize": "crop"}, {"limit": 5}, {"limit": 5, "limit_seed": 0}]):
        await service.http.post("/v1/datasets", json={"name": f"d{number}", "blob": blob, **options})
    assert [given for *_, given in service.inspector.requests] == [{}, {"options": '{"limit": 5}'}]


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"resize_to": 256}, "/resize_to"),
        ({"channels": 4}, "/channels"),
        ({"encoding": "klingon"}, "/encoding"),
        ({"sise": 8}, "/sise"),
    ],
)
async def test_register_dataset_names_an_option_that_cannot_work(service: Service, options, pointer) -> None:
    body = {"name": "mine", "blob": await service.upload(b"pictures"), **options}
    answer = await service.http.post("/v1/datasets", json=body)
    assert answer.status_code == 422 and [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]


async def test_register_dataset_warns_of_what_was_not_chosen(service: Service) -> None:
    blob = await service.upload(b"pictures")
    facts = DATASET.model_copy(update={"pictures": {"colour": 10, "oriented": 5, "alpha": 1}, "pixels_cut": 0.5})
    service.inspector.answers[blob.removeprefix("sha256:")] = facts
    answer = await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    codes = ["pictures_cut", "alpha_over_white", "orientation_ignored"]
    assert [warning["code"] for warning in answer.json()["warnings"]] == codes
    chosen = {"resize": "crop", "orientation": "ignore"}
    answer = await service.http.post("/v1/datasets", json={"name": "other", "blob": blob, **chosen})
    assert [warning["code"] for warning in answer.json()["warnings"]] == ["alpha_over_white"]
    body = {"name": "third", "blob": blob, **chosen, "strict": True}
    problem(await service.http.post("/v1/datasets", json=body), 422, "warning_refused")


async def test_datasets_listing_filters_the_built_in_ones_too(service: Service) -> None:
    new = {"name": "digital", "blob": await service.upload(b"arrays"), "labels": {"team": "vision"}}
    assert (await service.http.post("/v1/datasets", json=new)).status_code == 201

    async def found(query: str) -> list[str]:
        return [one["name"] for one in (await service.http.get(f"/v1/datasets?{query}")).json()["data"]]

    assert await found("name=digit") == ["digital", "digits"]
    assert await found("labels=team:vision") == ["digital"]
    assert await found("state=refused") == []
    listed = (await service.http.get("/v1/datasets")).json()
    assert Page[ListedDatasetView].model_validate(listed)
    assert not any("class_names" in one["facts"] for one in listed["data"])
    changed = await service.http.patch("/v1/datasets/digital", json={"labels": {}})
    assert changed.json()["labels"] == {} and await found("labels=team") == []
    problem(await service.http.patch("/v1/datasets/digits", json={"labels": {}}), 404, "not_found")
