"""Every fault of a spec in one answer: of its fields, of what it names, of what does not fit together."""

from typing import Any

import pytest

from api.inspector import Refused
from kdcore.spec import parse
from tests.api.conftest import DATASET, MODEL, PROGRAM, SUPERVISED, Service, problem

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


async def accepted(service: Service, spec: Any) -> dict[str, Any]:
    """The resolved spec."""
    answer = await service.http.post("/v1/jobs", json=spec)
    assert answer.status_code == 201, answer.text
    resolved: dict[str, Any] = answer.json()["resolved_spec"]
    return resolved


async def unlabelled(service: Service, name: str = "more", **facts: Any) -> str:
    blob = await service.upload(b"pictures of " + name.encode())
    bare = {"labelled": False, "num_classes": 0, "class_names": [], "train": 640, "test": 0, **facts}
    service.inspector.answers[blob.removeprefix("sha256:")] = DATASET.model_copy(update=bare)
    answer = await service.http.post("/v1/datasets", json={"name": name, "blob": blob})
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


async def test_mistakes_inside_of_lists_are_told_where_they_stand(service: Service) -> None:
    await teacher(service)
    found = await faults(
        service,
        kd(
            teacher=[{"checkpoint": "model:big"}, {"checkpoint": "model:bug"}],
            student=["convnet8", {"architecture": "convnet9"}],
            method=["kd", {"name": "attention", "p": 99}, "attentive"],
            assistants=["convnet17"],
            unlabelled="nowhere",
        ),
    )
    assert {pointer: fault["code"] for pointer, fault in found.items()} == {
        "/teacher/1/checkpoint": "not_found",
        "/student/1/architecture": "not_allowed",
        "/method/1/p": "less_than_equal",
        "/method/2": "not_allowed",
        "/assistants/0": "not_allowed",
        "/unlabelled": "not_found",
    }


async def test_several_teachers_become_their_bytes_and_count_together(service: Service) -> None:
    one, other = await teacher(service, "one", parameters=1000), await teacher(service, "other", parameters=2000)
    spec = kd(teacher=[{"checkpoint": "model:one"}, {"checkpoint": "model:other", "weight": 2}])
    resolved = await accepted(service, spec)
    assert [(teacher["checkpoint"], teacher["weight"]) for teacher in resolved["teacher"]] == [
        (f"blob:{one}", 1),
        (f"blob:{other}", 2),
    ]
    told = (await service.http.post("/v1/jobs/validate", json=spec)).json()
    assert told["estimate"]["parameters"]["teacher"] == 3000


async def test_a_program_teaches_by_its_logits(service: Service) -> None:
    blob = await service.upload(b"a graph")
    resolved = await accepted(service, kd(teacher={"program": f"blob:{blob}"}))
    assert resolved["teacher"]["program"] == f"blob:{blob}"
    assert (resolved["teacher"]["architecture"], resolved["teacher"]["checkpoint"]) == (None, None)
    assert resolved["teacher"]["preprocessing"] is not None
    told = (await service.http.post("/v1/jobs/validate", json=kd(teacher={"program": f"blob:{blob}"}))).json()
    assert told["estimate"]["parameters"]["teacher"] == PROGRAM.parameters
    assert service.inspector.asked == [("program", blob.removeprefix("sha256:"), None)]


async def test_a_program_has_no_activations_and_no_gradient(service: Service) -> None:
    blob = await service.upload(b"a graph")
    methods = ["attention", {"name": "fitnet", "tap": "layer2"}, {"name": "attention", "mapping": "gradient"}]
    for method in methods:
        found = await faults(service, kd(teacher={"program": f"blob:{blob}"}, method=["kd", method]))
        assert list(found) == ["/teacher/program"]
        assert "a program gives only logits" in found["/teacher/program"]["message"]


async def test_a_program_of_other_images_or_of_none_is_refused(service: Service) -> None:
    blob = await service.upload(b"a graph")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = PROGRAM.model_copy(update={"image_size": (32, 32), "num_classes": 5})
    answer = await service.http.post("/v1/jobs", json=kd(teacher={"program": f"blob:{blob}"}))
    told = problem(answer, 422, "spec_invalid")["errors"]
    assert [(fault["pointer"], fault["code"]) for fault in told] == [("/teacher/program", "teacher_mismatch")] * 2
    broken = await service.upload(b"no graph")
    refused = Refused("teacher_mismatch", "this is no torch.export program", "save it with torch.export.save")
    service.inspector.answers[broken.removeprefix("sha256:")] = refused
    found = await faults(service, kd(teacher={"program": f"blob:{broken}"}))
    assert "no torch.export program" in found["/teacher/program"]["message"]
    found = await faults(service, kd(teacher={"program": "file:/etc/passwd"}))
    assert found["/teacher/program"]["code"] == "not_allowed"


async def test_a_pool_becomes_its_bytes_and_lengthens_the_epochs(service: Service) -> None:
    """1,293 labelled images and 640 others are 1,933: 30 batches of 64; the baseline has its 20."""
    await teacher(service)
    blob = await unlabelled(service)
    spec = kd(unlabelled="more", baseline="train", training={"epochs": 2})
    assert (await accepted(service, spec))["unlabelled"] == {
        "source": f"blob:{blob}",
        "labels": "teacher",
        "labelled_too": True,
    }
    told = (await service.http.post("/v1/jobs/validate", json=spec)).json()
    assert told["estimate"]["steps"] == 2 * (30 + 20)


async def test_a_pool_that_is_the_data_set_by_another_name_is_refused(service: Service) -> None:
    await teacher(service, "ours", num_classes=4)
    blob = await service.upload(b"pictures")
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    spec = kd(dataset="mine", teacher={"checkpoint": "model:ours"})
    for source in ("mine", f"blob:{blob}"):
        found = await faults(service, {**spec, "unlabelled": source})
        assert list(found) == ["/unlabelled"] and "own training images" in found["/unlabelled"]["message"]
        assert found["/unlabelled"]["got"] == source


async def test_images_without_labels_are_no_data_set(service: Service) -> None:
    await teacher(service)
    await unlabelled(service)
    found = await faults(service, kd(dataset="more", unlabelled="digits"))
    assert list(found) == ["/dataset"] and "no labels" in found["/dataset"]["message"]


async def test_a_pool_has_the_images_of_the_data_set(service: Service) -> None:
    await teacher(service)
    await unlabelled(service, image_size=(16, 16))
    found = await faults(service, kd(unlabelled={"source": "more"}))
    text = "the data set's images have height and width [8, 8], these have [16, 16]"
    assert found["/unlabelled/source"]["message"] == text


async def test_a_pool_of_folders_gives_the_size_that_its_pictures_were_inspected_at(service: Service) -> None:
    await teacher(service)
    await unlabelled(service, kind="folders")
    resolved = await accepted(service, kd(unlabelled="more"))
    assert resolved["dataset"] == {"source": "digits", "image_size": 8}


async def test_pictures_that_are_not_square_keep_their_own_size(service: Service) -> None:
    blob = await service.upload(b"folders")
    facts = DATASET.model_copy(update={"kind": "folders", "image_size": (16, 24)})
    service.inspector.answers[blob.removeprefix("sha256:")] = facts
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    resolved = await accepted(service, {**SUPERVISED, "dataset": "mine"})
    assert resolved["dataset"] == {"source": f"blob:{blob}", "image_size": None}


async def test_a_pool_of_one_size_cannot_be_asked_for_in_another(service: Service) -> None:
    blob = await service.upload(b"arrays")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = DATASET.model_copy(update={"image_size": (16, 16), "num_classes": 10})
    await teacher(service)
    found = await faults(service, kd(dataset={"source": f"blob:{blob}", "image_size": 16}, unlabelled="digits"))
    assert found["/unlabelled"]["message"] == "the images of digits have one size, 8 x 8"


async def test_taps_are_chosen_and_shown(service: Service) -> None:
    await teacher(service)
    (method,) = (await accepted(service, kd(method=["attention"])))["method"]
    assert method["taps"] == [{"student": layer, "teacher": layer} for layer in ("layer1", "layer2", "layer3")]
    assert [asked for asked in service.inspector.asked if asked[0] == "taps"] == [], "the catalogue knows them"


async def test_taps_that_are_named_are_looked_at(service: Service) -> None:
    await teacher(service)
    taps = {"name": "attention", "taps": ["layer1", {"student": "layer2.0", "teacher": "layer3"}]}
    (_, method) = (await accepted(service, kd(method=["kd", taps])))["method"]
    assert method["taps"][1] == {"student": "layer2.0", "teacher": "layer3"}
    assert [asked[1:] for asked in service.inspector.asked if asked[0] == "taps"] == [
        ("convnet8", ("layer1", "layer2.0")),
        ("convnet32", ("layer1", "layer3")),
    ]


@pytest.mark.parametrize(
    ("method", "pointer"),
    [
        ({"name": "attention", "taps": ["layer9"]}, "/method/taps"),
        ({"name": "crd", "tap": {"student": "layer9", "teacher": "fc@in"}}, "/method/tap"),
        ({"name": "ofd", "taps": ["layer1"], "margins": ["layer9.bn"]}, "/method/margins"),
    ],
    ids=["taps", "tap", "margins"],
)
async def test_a_path_that_leads_nowhere_is_told_with_its_siblings(service: Service, method: Any, pointer: str) -> None:
    await teacher(service)
    found = await faults(service, kd(method=method))
    assert list(found) == [pointer]
    assert found[pointer]["message"].endswith("(near it: layer1, layer2, layer3)")
    assert "layer9" in found[pointer]["got"]


async def test_an_exit_that_leads_nowhere_is_told_too(service: Service) -> None:
    spec = {"dataset": "digits", "student": "convnet8", "method": {"name": "byot", "exits": ["layer1", "layer9"]}}
    assert list(await faults(service, spec)) == ["/method/exits"]
    spec = {"dataset": "digits", "student": "convnet8", "method": {"name": "byot", "exits": ["layer1"]}}
    assert (await accepted(service, spec))["method"]["exits"] == ["layer1"]


async def test_a_tap_of_another_shape_than_a_method_needs_is_refused(service: Service) -> None:
    await teacher(service)
    service.inspector.shapes = {"fc@in": [16]}
    found = await faults(service, kd(method={"name": "nst", "taps": ["layer1", "fc@in"]}))
    assert list(found) == ["/method/taps/1"]
    assert "'nst' needs a map" in found["/method/taps/1"]["message"]
    resolved = await accepted(service, kd(method={"name": "feature", "tap": "fc@in"}))
    assert resolved["method"]["tap"] == {"student": "fc@in", "teacher": "fc@in"}


async def test_every_network_of_timms_is_built_once(service: Service) -> None:
    await teacher(service, architecture="timm/resnet18")
    assert (await service.http.post("/v1/jobs", json=kd(assistants=["timm/resnet18"]))).status_code == 201
    assert [asked[1] for asked in service.inspector.asked if asked[0] == "architecture"] == ["timm/resnet18"]
    await teacher(service, "lost", architecture="timm/gone")
    found = await faults(service, kd(teacher={"checkpoint": "model:lost"}))
    assert "timm has no timm/gone" in found["/teacher/checkpoint"]["message"]


async def test_students_that_teach_each_other_have_no_teacher(service: Service) -> None:
    resolved = await accepted(
        service, {"dataset": "digits", "student": ["convnet8", "convnet16"], "method": "dml", "baseline": "train"}
    )
    assert [student["architecture"] for student in resolved["student"]] == ["convnet8", "convnet16"]
    assert all(student["preprocessing"] for student in resolved["student"])
    assert (resolved["alpha"], resolved["beta"], resolved["temperature"]) == (1, 1, 1)


async def test_a_chain_and_generations_are_counted_to_their_end(service: Service) -> None:
    """20 batches of 64 an epoch."""
    await teacher(service)
    for changes, trials in (
        ({"assistants": ["convnet16", "convnet16"], "baseline": "train"}, 4),
        ({"method": "born_again"}, 3),
        ({"method": {"name": "born_again", "generations": 2}, "teacher": None, "baseline": "train"}, 3),
    ):
        told = (await service.http.post("/v1/jobs/validate", json=kd(**changes, training={"epochs": 2}))).json()
        assert told["errors"] == [] and told["estimate"]["steps"] == trials * 2 * 20


async def test_the_first_of_several_students_can_teach_but_an_ensemble_cannot(service: Service) -> None:
    peers = await service.submit(student=["convnet32", "convnet16"], method="dml")
    await service.succeed(peers)
    told = (await service.http.post("/v1/jobs/validate", json=kd(teacher={"checkpoint": f"job:{peers}"}))).json()
    assert told["resolved_spec"]["teacher"]["architecture"] == "convnet32"
    together = await service.submit(method={"name": "born_again", "answer": "ensemble"})
    await service.succeed(together)
    found = await faults(service, kd(teacher={"checkpoint": f"job:{together}"}))
    assert "delivered an ensemble of 3 networks" in found["/teacher/checkpoint"]["message"]


async def test_what_is_resolved_is_what_the_engine_can_read(service: Service) -> None:
    await teacher(service)
    await unlabelled(service)
    for changes in (
        {"method": ["kd", "attention", "crd"]},
        {"method": "ofd", "unlabelled": "more"},
        {"method": [{"name": "kd", "weight": 0.5}]},
        {"method": ["born_again", "fsp"], "teacher": None},
        {"teacher": [{"checkpoint": "model:big"}], "assistants": ["convnet16"]},
    ):
        resolved = await accepted(service, kd(**changes))
        assert parse(resolved).as_json() == resolved
