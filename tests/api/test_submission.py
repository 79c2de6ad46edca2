"""Every fault of a spec in one answer: of its fields, of the references, and of combinations that do not fit."""

from typing import Any

import pytest
from sqlalchemy import update

from api import references
from api.inspections import Refused
from base.warning import WarningItem
from kdcore.catalog import ModelFacts, NamedStartFacts, StartFacts
from kdcore.catalog.facts import Loading
from kdcore.spec import Dataset, parse
from store import tables
from tests.api.conftest import DATASET, LOGITS, MODEL, ONNX, PROGRAM, START, SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


async def faults_of(service: Service, spec: Any) -> dict[str, dict[str, Any]]:
    body = problem(await service.http.post("/v1/jobs", json=spec), 422, "spec_invalid")
    return {fault["pointer"]: fault for fault in body["errors"]}


async def teacher(service: Service, name: str = "big", registered_as: ModelFacts = MODEL, /, **facts: Any) -> str:
    blob = await service.upload(b"weights of " + name.encode())
    service.inspector.answers[blob.removeprefix("sha256:")] = registered_as.model_copy(update=facts)
    answer = await service.http.post("/v1/models", json={"name": name, "blob": blob})
    assert answer.status_code == 201, answer.text
    return blob


async def accepted(service: Service, spec: Any) -> dict[str, Any]:
    """The resolved spec."""
    answer = await service.http.post("/v1/jobs", json=spec)
    assert answer.status_code == 201, answer.text
    resolved: dict[str, Any] = answer.json()["resolved_spec"]
    return resolved


def start(**facts: Any) -> StartFacts:
    return StartFacts(**{**START, **facts})


async def test_student_from_a_registered_model_the_answer_says_what_is_taken(service: Service) -> None:
    blob = await teacher(service, mean=[0.2], std=[0.4])
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[f"start {digest}"] = start(channels=1)
    student = {"architecture": "convnet8", "checkpoint": "model:big", "freeze": ["layer1"], "head_lr": 10}
    spec = {**SUPERVISED, "student": student}
    body = (await service.http.post("/v1/jobs/validate?probe=false", json=spec)).json()
    assert body["errors"] == body["warnings"] == []
    taken = body["estimate"]["starts"]["/student"]
    assert (taken["taken"], taken["parameters"], taken["fresh"], taken["classifier"]) == (
        900, 1000, ["fc.weight", "fc.bias"], "fresh",
    )  # fmt: skip
    resolved = body["resolved_spec"]
    assert resolved["student"]["checkpoint"] == f"blob:{blob}" and resolved["student"]["preprocessing"]["mean"] == [0.2]
    assert resolved["training"]["optimizer"]["lr"] == 0.01
    network = {"architecture": "convnet8", "classes": 10, "channels": 1, "freeze": ("layer1",)}
    assert service.inspector.requests[-1] == ("start", digest, network)


async def test_student_from_weights_frozen_parameters_need_less_memory(service: Service) -> None:
    blob = await service.upload(b"weights")
    digest = blob.removeprefix("sha256:")
    student = {"architecture": "convnet8", "checkpoint": f"blob:{blob}"}
    needed = {}
    for frozen in (0, 400):
        service.inspector.answers[f"start {digest}"] = start(parameters=3778, frozen=frozen)
        spec = {**SUPERVISED, "student": {**student, "freeze": ["layer1"] * bool(frozen)}}
        estimate = (await service.http.post("/v1/jobs/validate?probe=false", json=spec)).json()["estimate"]
        assert estimate["parameters"]["trained"] == estimate["parameters"]["student"] - frozen
        needed[frozen] = estimate["memory_bytes"]
    assert needed[0] - needed[400] == 4 * 2 * 400


async def test_student_from_weights_faults_are_answered_at_their_fields(service: Service) -> None:
    blob = await service.upload(b"weights")
    service.inspector.answers[f"start {blob.removeprefix('sha256:')}"] = start(
        channels=3, unknown_modules={"layer7": ["layer1"]}, frozen_fresh=["fc.weight"]
    )
    student = {"architecture": "convnet8", "checkpoint": f"blob:{blob}", "freeze": ["layer1", "layer7"]}
    faults = await faults_of(service, {**SUPERVISED, "student": student})
    assert "dataset.channels: 3 reads grey images as colour" in faults["/student/checkpoint"]["message"]
    assert faults["/student/freeze/1"]["allowed"] == ["layer1"]
    other = {"architecture": "convnet8", "checkpoint": "blob:sha256:" + "0" * 64}
    assert "not been uploaded" in (await faults_of(service, kd(student=other)))["/student/checkpoint"]["message"]
    local = {"architecture": "convnet8", "checkpoint": "file:/etc/passwd"}
    assert (await faults_of(service, {**SUPERVISED, "student": local}))["/student/checkpoint"]["code"] == "not_allowed"


async def test_student_from_a_registered_program_is_refused(service: Service) -> None:
    await teacher(service, "graph.onnx", ONNX)
    student = {"architecture": "convnet8", "checkpoint": "model:graph.onnx"}
    fault = (await faults_of(service, {**SUPERVISED, "student": student}))["/student/checkpoint"]
    assert (fault["code"], fault["got"]) == ("not_allowed", "model:graph.onnx")
    assert "'graph.onnx' is an ONNX model, which cannot be trained" in fault["message"]


async def test_student_from_one_network_of_a_registered_file_reads_what_was_registered(service: Service) -> None:
    blob = await teacher(service, loading=Loading(tensors=9, part="state_dict_ema", averaged=True))
    digest = blob.removeprefix("sha256:")
    loading = Loading(tensors=9, part="state_dict_ema", averaged=True)
    service.inspector.answers[f"start {digest}"] = start(channels=1, loading=loading)
    student = {"architecture": "convnet8", "checkpoint": "model:big"}
    resolved = await accepted(service, {**SUPERVISED, "student": student})
    assert (resolved["student"]["part"], resolved["student"]["averaged"]) == ("state_dict_ema", True)
    (_, _, options) = service.inspector.requests[-1]
    assert (options["part"], options["averaged"]) == ("state_dict_ema", True)
    await accepted(service, {**SUPERVISED, "student": {**student, "averaged": False}})
    assert "part" not in service.inspector.requests[-1][2], "what the spec says counts instead"


async def test_student_named_with_a_tag_of_weights_is_refused_with_both_spellings(service: Service) -> None:
    for name in ("timm/resnet18.a1_in1k", {"architecture": "timm/resnet18.a1_in1k", "preprocessing": ONE_CHANNEL}):
        fault = await faults_of(service, {**SUPERVISED, "student": name})
        (message,) = [one["message"] for one in fault.values() if "names weights" in one["message"]]
        assert "'checkpoint': 'weights:timm/resnet18.a1_in1k'" in message


ONE_CHANNEL = {"mean": [0.5], "std": [0.5]}


async def test_student_from_published_weights_is_checked_without_a_download(service: Service) -> None:
    stated = {"mean": [0.5] * 3, "std": [0.25] * 3}
    service.inspector.answers["start weights:torchvision/resnet18"] = NamedStartFacts(**START, **stated)
    student = {"architecture": "torchvision/resnet18", "checkpoint": "weights:torchvision/resnet18"}
    spec = {**SUPERVISED, "dataset": "cifar100", "student": student}
    resolved = await accepted(service, spec)
    assert resolved["student"]["checkpoint"] == "weights:torchvision/resnet18"
    assert resolved["student"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    service.inspector.answers["start weights:nothing"] = Refused(
        "spec_invalid", "torchvision publishes no weights 'nothing'", "try x"
    )
    faults = await faults_of(service, {**spec, "student": {**student, "checkpoint": "weights:nothing"}})
    assert (faults["/student/checkpoint"]["code"], faults["/student/checkpoint"]["got"]) == (
        "not_found", "weights:nothing",
    )  # fmt: skip


async def test_teacher_by_a_name_of_weights_that_no_library_has_is_refused_at_submit(service: Service) -> None:
    for name in ("http://127.0.0.1:1/x", "nothing"):
        service.inspector.answers[name] = Refused("spec_invalid", f"torchvision publishes no weights {name!r}")
        body = {**SUPERVISED, "method": "kd", "teacher": {"checkpoint": f"weights:{name}"}}
        fault = (await faults_of(service, body))["/teacher/checkpoint"]
        assert (fault["code"], fault["got"]) == ("not_found", f"weights:{name}")


async def test_student_from_a_job_that_has_not_ended_waits_for_it(service: Service) -> None:
    first = await service.submit()
    student = {"architecture": "convnet4", "checkpoint": f"job:{first}"}
    job = (await service.http.post("/v1/jobs", json={**SUPERVISED, "student": student})).json()
    assert job["resolved_spec"]["student"]["checkpoint"] == f"job:{first}"
    assert job["waiting"]["reason"] == "teacher"
    named = {"from_classes": 10, "from_channels": 1, "architecture": "convnet4", "classes": 10, "channels": 1}
    assert service.inspector.requests[-1] == ("named-start", SUPERVISED["student"], named)


async def test_baseline_of_a_student_from_weights_started_from_the_same(service: Service) -> None:
    blob = await service.upload(b"weights")
    service.inspector.answers[f"start {blob.removeprefix('sha256:')}"] = start(mean=[0.2], std=[0.4])
    await teacher(service)
    student = {"architecture": SUPERVISED["student"], "checkpoint": f"blob:{blob}"}
    alone = await service.submit(student=student)
    await service.succeed(alone)
    spec = kd(student=student, training=SUPERVISED["training"], baseline=f"job:{alone}")
    assert (await service.http.post("/v1/jobs", json=spec)).status_code == 201
    faults = await faults_of(service, {**spec, "student": SUPERVISED["student"]})
    assert "student.checkpoint is none here" in faults["/baseline"]["message"]


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


async def test_submit_answers_five_faults_of_different_kinds(service: Service) -> None:
    spec = kd(
        dataset="digitz",
        student={"architecture": "convnet9"},
        temprature=4,
        alpha=-1,
        training={"epochs": "many"},
    )
    await teacher(service)
    faults = await faults_of(service, spec)
    assert set(faults) == {"/dataset", "/student/architecture", "/temprature", "/alpha", "/training/epochs"}
    assert faults["/dataset"]["allowed"] == ["digits"]
    assert "did you mean 'digits'" in faults["/dataset"]["message"]
    assert faults["/temprature"]["code"] == "unknown_field"
    assert faults["/alpha"]["allowed"] == "≥ 0"
    assert faults["/training/epochs"]["got"] == "many"


async def test_submit_answers_a_teacher_mismatch_beside_other_faults(service: Service) -> None:
    await teacher(service, num_classes=100)
    faults = await faults_of(service, kd(temprature=4, student="convnet9"))
    assert set(faults) == {"/temprature", "/student", "/teacher/checkpoint"}
    assert faults["/teacher/checkpoint"]["code"] == "teacher_mismatch"
    assert (faults["/teacher/checkpoint"]["allowed"], faults["/teacher/checkpoint"]["got"]) == (10, 100)


async def test_resolved_spec_has_the_digest_of_a_registered_teacher(service: Service) -> None:
    blob = await teacher(service, mean=[0.3], std=[0.4])
    job = (await service.http.post("/v1/jobs", json=kd(baseline="train"))).json()
    resolved = job["resolved_spec"]
    assert resolved["teacher"]["checkpoint"] == f"blob:{blob}"
    assert resolved["teacher"]["architecture"] == "convnet32"
    assert resolved["teacher"]["preprocessing"] == {"mean": [0.3], "std": [0.4]}
    assert (resolved["temperature"], resolved["alpha"], resolved["beta"]) == (4, 0.1, 0.9)
    assert resolved["dataset"]["source"] == "digits"


async def test_estimate_counts_baseline_and_compression(service: Service) -> None:
    await teacher(service, parameters=30_000)
    body = (await service.http.post("/v1/jobs/validate", json=kd(baseline="train", training={"epochs": 2}))).json()
    student = body["estimate"]["parameters"]["student"]
    assert body["estimate"]["steps"] == 2 * 2 * 20
    assert body["estimate"]["parameters"]["teacher"] == 30_000
    assert body["estimate"]["compression"] == round(30_000 / student, 2)


async def test_resolved_spec_has_the_digest_of_a_registered_data_set(service: Service) -> None:
    blob = await service.upload(b"pictures")
    dataset = (await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})).json()
    for source in ("mine", dataset["id"], f"blob:{blob}"):
        job = (await service.http.post("/v1/jobs", json={**SUPERVISED, "dataset": source})).json()
        assert job["resolved_spec"]["dataset"] == Dataset(source=f"blob:{blob}").resolved().model_dump(mode="json")


async def test_resolved_spec_has_the_inspected_size_of_folders(service: Service) -> None:
    blob = await service.upload(b"folders")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = DATASET.model_copy(update={"kind": "folders", "image_size": (16, 16)})
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, "image_size": 16})
    job = (await service.http.post("/v1/jobs", json={**SUPERVISED, "dataset": "mine"})).json()
    assert job["resolved_spec"]["dataset"]["image_size"] == 16


async def test_submit_inspects_a_blob_once(service: Service) -> None:
    blob = await service.upload(b"weights")
    spec = kd(teacher={"architecture": "convnet32", "checkpoint": f"blob:{blob}"})
    for _ in range(2):
        assert (await service.http.post("/v1/jobs", json=spec)).status_code == 201
    assert service.inspector.requests == [("model", blob.removeprefix("sha256:"), {"architecture": "convnet32"})]


async def test_submit_refuses_a_teacher_that_its_inspection_refused(service: Service) -> None:
    blob = await service.upload(b"no weights")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("teacher_mismatch", "no tensor 'fc.weight'", "is it a convnet32?")
    spec = kd(teacher={"architecture": "convnet32", "checkpoint": f"blob:{blob}"})
    for _ in range(2):
        faults = await faults_of(service, spec)
        assert faults["/teacher/checkpoint"]["code"] == "teacher_mismatch"
        assert "is it a convnet32?" in faults["/teacher/checkpoint"]["message"]
    assert len(service.inspector.requests) == 1


async def test_submit_repeats_an_inspection_that_timed_out(service: Service) -> None:
    blob = await service.upload(b"weights")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = Refused("timeout", "too long", final=False)
    spec = kd(teacher={"architecture": "convnet32", "checkpoint": f"blob:{blob}"})
    await faults_of(service, spec)
    service.inspector.answers[digest] = MODEL
    assert (await service.http.post("/v1/jobs", json=spec)).status_code == 201


async def test_submit_refuses_blobs_that_were_not_uploaded(service: Service) -> None:
    nowhere = "blob:sha256:" + "0" * 64
    faults = await faults_of(service, kd(dataset=nowhere, teacher={"architecture": "convnet32", "checkpoint": nowhere}))
    assert {pointer: fault["code"] for pointer, fault in faults.items()} == {
        "/dataset": "not_found",
        "/teacher/checkpoint": "not_found",
    }


async def test_references_teacher_of_another_job(service: Service) -> None:
    job_id = await service.submit(student="convnet32")
    early = (await service.http.post("/v1/jobs", json=kd(teacher={"checkpoint": f"job:{job_id}"}))).json()
    made = await service.succeed(job_id)
    late = (await service.http.post("/v1/jobs", json=kd(teacher={"checkpoint": f"job:{job_id}"}))).json()
    assert late["resolved_spec"]["teacher"]["checkpoint"] == f"blob:sha256:{made['student.safetensors']}"
    assert late["resolved_spec"]["teacher"]["architecture"] == "convnet32"
    waited = (await service.http.get(f"/v1/jobs/{early['id']}")).json()
    assert waited["resolved_spec"] == late["resolved_spec"], "the facts of a student follow from its job's spec"


async def test_references_teacher_of_a_job_that_has_not_ended(service: Service) -> None:
    job_id = await service.submit(student="convnet32")
    answer = await service.http.post("/v1/jobs", json=kd(teacher=[{"checkpoint": f"job:{job_id}"}]))
    assert answer.status_code == 201
    job = answer.json()
    assert job["resolved_spec"]["teacher"][0]["checkpoint"] == f"job:{job_id}"
    assert (job["status"], job["queue_position"]) == ("queued", None)
    message = f"it waits for the student of job {job_id}, which is queued"
    assert job["waiting"] == {"reason": "teacher", "message": message, "until": None, "jobs": [job_id]}
    gauge = "distillery_jobs_waiting_for_teacher"
    assert f"{gauge} 1" in (await service.http.get("/metrics")).text
    estimate = (await service.http.post("/v1/jobs/validate", json=kd(teacher={"checkpoint": f"job:{job_id}"}))).json()
    assert estimate["estimate"]["parameters"]["teacher"] == 56_554
    await service.fail(job_id)
    failed = (await service.http.get(f"/v1/jobs/{job['id']}")).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "teacher_unavailable")
    refused = problem(await service.http.post(f"/v1/jobs/{job['id']}/retry"), 409, "teacher_unavailable")
    assert refused["teacher_job"] == job_id
    faults = await faults_of(service, kd(teacher={"checkpoint": f"job:{job_id}"}))
    assert faults["/teacher/checkpoint"]["code"] == "not_ready"
    assert (await service.http.post(f"/v1/jobs/{job_id}/retry")).status_code == 200
    assert (await service.http.post(f"/v1/jobs/{job['id']}/retry")).json()["waiting"]["reason"] == "teacher"


async def test_references_teacher_to_come_must_fit_the_data(service: Service) -> None:
    blob = await service.upload(b"four classes")
    assert (await service.http.post("/v1/datasets", json={"name": "four", "blob": blob})).status_code == 201
    job_id = await service.submit(dataset="four", student="convnet32")
    faults = await faults_of(service, kd(teacher={"checkpoint": f"job:{job_id}"}))
    assert (faults["/teacher/checkpoint"]["allowed"], faults["/teacher/checkpoint"]["got"]) == (10, 4)
    assert (
        await service.http.post("/v1/jobs", json=kd(dataset="four", teacher={"checkpoint": f"job:{job_id}"}))
    ).json()["waiting"]["jobs"] == [job_id]


async def test_references_baseline_of_a_supervised_job_must_be_the_same_in_all_fields(service: Service) -> None:
    """The names of the jobs, their scheduling, the device and the time between checkpoints may differ."""
    await teacher(service)
    recipe = {"epochs": 3, "seed": 4}
    free = {"device": "cpu", "checkpoint_every_s": 5}
    right = await service.submit(training={**recipe, **free})
    wrong = await service.submit(student="convnet16", training={"epochs": 5, "optimizer": {"name": "adamw"}}, alpha=0.5)
    for job_id in (right, wrong):
        await service.succeed(job_id)
    resolved = await accepted(service, kd(training=recipe, baseline=f"job:{right}"))
    assert resolved["baseline"].startswith("blob:sha256:")
    fault = (await faults_of(service, kd(training=recipe, baseline=f"job:{wrong}")))["/baseline"]
    assert fault["code"] == "not_allowed"
    assert fault["allowed"] == [
        "student.architecture: convnet8",
        "alpha: 1.0",
        "training.epochs: 3",
        "training.seed: 4",
        "training.optimizer: sgd",
        "training.schedule.milestones: [2]",
    ]
    assert fault["got"] == [
        "student.architecture: convnet16",
        "alpha: 0.5",
        "training.epochs: 5",
        "training.seed: 0",
        "training.optimizer: adamw",
        "training.schedule.milestones: [3, 4]",
    ]
    for field in ("student.architecture is convnet8 here and convnet16 there", "training.epochs is 3 here and 5 there"):
        assert field in fault["message"]


async def test_references_baseline_differences_are_beside_the_other_faults(service: Service) -> None:
    await teacher(service, num_classes=100)
    other = await service.submit()
    await service.succeed(other)
    faults = await faults_of(service, kd(training={"seed": 1}, baseline=f"job:{other}"))
    assert set(faults) == {"/teacher/checkpoint", "/baseline"}
    assert "training.seed is 1 here and 0 there" in faults["/baseline"]["message"]


async def test_references_baseline_of_a_distilled_job_is_its_own_student_alone(service: Service) -> None:
    await teacher(service)
    with_alone = (await service.http.post("/v1/jobs", json=kd(baseline="train"))).json()["id"]
    made = await service.succeed(with_alone, files={"alone.safetensors": b"weights of the student alone"})
    resolved = await accepted(service, kd(method="dkd", baseline=f"job:{with_alone}"))
    assert resolved["baseline"] == f"blob:sha256:{made['alone.safetensors']}"
    await service.succeed((await service.http.get("/v1/jobs")).json()["data"][0]["id"])
    fault = (await faults_of(service, kd(training={"batch_size": 8}, baseline=f"job:{with_alone}")))["/baseline"]
    assert (fault["allowed"], fault["got"]) == (["training.batch_size: 8"], ["training.batch_size: 64"])


async def found_baseline(client: Service, **changes: object) -> tuple[str, list[str]]:
    """The baseline of a resolved spec, and the messages of `baseline_found`. The spec is strict."""
    given = {"checkpoint": "model:big", "preprocessing": {"mean": [0.5], "std": [0.5]}}
    changes = {"teacher": given, "strict": True, **changes}
    answer = (await client.http.post("/v1/jobs/validate?probe=false", json=kd(**changes))).json()
    assert answer["valid"], answer["errors"]
    return answer["resolved_spec"]["baseline"], [
        one["message"] for one in answer["warnings"] if one["code"] == "baseline_found"
    ]


async def test_baseline_that_another_job_trained_alone_is_found(service: Service) -> None:
    await teacher(service)
    assert await found_baseline(service, baseline="train") == ("train", [])
    job_id = await service.submit(training={"epochs": 240})
    assert await found_baseline(service, baseline="train") == ("train", []), "it has not ended"
    made = await service.succeed(job_id)
    expected = f"blob:sha256:{made['student.safetensors']}"
    baseline, (message,) = await found_baseline(service, baseline="train", method="dkd")
    assert baseline == expected and job_id in message
    assert (await accepted(service, kd(baseline="train")))["baseline"] == expected
    assert await found_baseline(service, baseline="train_anew") == ("train", [])
    assert await found_baseline(service, baseline="train", seeds=2) == ("train", [])
    for other in ({"seed": 1}, {"epochs": 3}, {"threads": 3}, {"kernels": "eager"}, {"precision": "fp32"}):
        assert await found_baseline(service, baseline="train", training=other) == ("train", [])
    baseline, _ = await found_baseline(service, baseline="train", training={"checkpoint_every_s": 3, "overlap": True})
    assert baseline == expected


async def test_baseline_of_a_distilled_job_is_found_if_the_job_trained_and_kept_it(service: Service) -> None:
    await teacher(service)
    for method in ("kd", "dkd"):
        job_id = (await service.http.post("/v1/jobs", json=kd(baseline="train", method=method))).json()["id"]
        files = {"alone.safetensors": b"weights of the student alone"} if method == "dkd" else {}
        made = await service.succeed(job_id, files=files)
        baseline, _ = await found_baseline(service, baseline="train")
        assert baseline == ("train" if method == "kd" else f"blob:sha256:{made['alone.safetensors']}")
    labels = await service.http.patch(f"/v1/jobs/{job_id}", json={"labels": {"kept": "yes"}})
    assert labels.status_code == 200
    assert (await found_baseline(service, baseline="train"))[0] == f"blob:sha256:{made['alone.safetensors']}"
    await service.http.delete(f"/v1/jobs/{job_id}")
    assert await found_baseline(service, baseline="train") == ("train", [])


async def test_baseline_is_not_found_where_its_bits_or_images_may_be_others(service: Service) -> None:
    await teacher(service)
    unlike = [{"alpha": 0.5}, {"student": "convnet16"}]
    for changes in unlike:
        await service.succeed(await service.submit(training={"epochs": 240}, **changes))
    job_id = await service.submit(training={"epochs": 240})
    await service.succeed(job_id)
    warned = [WarningItem("bits_not_repeatable", "/training", "fewer threads").as_dict()]
    await service.db.write(lambda connection: connection.execute(update(tables.jobs).values(warnings=warned)))
    assert await found_baseline(service, baseline="train") == ("train", [])


async def test_baseline_of_another_project_is_not_found(service: Service) -> None:
    await teacher(service)
    await service.succeed(await service.submit(training={"epochs": 240}))
    assert len((await found_baseline(service, baseline="train"))[1]) == 1
    async with service.holder(await service.key(project="theirs", name="bob")) as theirs:
        await teacher(theirs)
        assert await found_baseline(theirs, baseline="train") == ("train", [])


async def test_references_baseline_without_a_student_alone_is_refused(service: Service) -> None:
    await teacher(service)
    ids = []
    for baseline in ("none", "train"):
        ids.append((await service.http.post("/v1/jobs", json=kd(baseline=baseline))).json()["id"])
        await service.succeed(ids[-1])
    distilled, older = [(await faults_of(service, kd(baseline=f"job:{id}")))["/baseline"] for id in ids]
    assert "trained no student alone: its method is kd, and its baseline is none" in distilled["message"]
    assert distilled["allowed"] == "a supervised job, or one with baseline: train"
    assert "did not keep its student alone: it ran in an earlier version" in older["message"]
    queued = await service.submit()
    assert (await faults_of(service, kd(baseline=f"job:{queued}")))["/baseline"]["code"] == "not_ready"
    assert (await faults_of(service, kd(baseline="job:job_0")))["/baseline"]["code"] == "not_found"


async def test_references_refuse_files_by_path(service: Service) -> None:
    faults = await faults_of(
        service, kd(dataset="file:/etc/passwd", teacher={"checkpoint": "file:/etc/passwd", "architecture": "convnet32"})
    )
    assert {fault["code"] for fault in faults.values()} == {"not_allowed"}
    assert set(faults) == {"/dataset", "/teacher/checkpoint"}
    assert service.inspector.requests == []


async def test_references_refuse_another_size_of_a_built_in_data_set(service: Service) -> None:
    faults = await faults_of(service, {**SUPERVISED, "dataset": {"source": "digits", "image_size": 32}})
    assert faults["/dataset/image_size"]["allowed"] == 8


async def test_references_suggest_names_near_an_unknown_model(service: Service) -> None:
    await teacher(service, "big-convnet")
    faults = await faults_of(service, kd(teacher={"checkpoint": "model:big-convmet"}))
    assert faults["/teacher/checkpoint"]["allowed"] == ["big-convnet"]


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
async def test_submit_and_validate_refuse_bodies_that_are_no_spec(
    service: Service, path: str, body: bytes, status: int, code: str
) -> None:
    answer = await service.http.post(path, content=body)
    if path.endswith("validate") and status == 422:
        assert answer.json()["errors"][0]["pointer"] == ""
    else:
        problem(answer, status, code)


async def test_references_inspect_networks_of_timm(service: Service) -> None:
    body = {"dataset": "digits", "student": "timm/resnet18", "method": "supervised"}
    for _ in range(2):
        assert (await service.http.post("/v1/jobs", json=body)).status_code == 201
    shape = {"classes": 10, "channels": 1, "image_size": (8, 8)}
    assert service.inspector.requests == [("architecture", "timm/resnet18", shape)]
    faults = await faults_of(service, {**body, "student": "timm/resnet_18000"})
    assert "timm has no" in faults["/student"]["message"]


async def test_submit_points_to_faults_in_lists(service: Service) -> None:
    await teacher(service)
    faults = await faults_of(
        service,
        kd(
            teacher=[{"checkpoint": "model:big"}, {"checkpoint": "model:bug"}],
            student=["convnet8", {"architecture": "convnet9"}],
            method=["kd", {"name": "attention", "p": 99}, "attentive"],
            assistants=["convnet17"],
            unlabelled="nowhere",
        ),
    )
    assert {pointer: fault["code"] for pointer, fault in faults.items()} == {
        "/teacher/1/checkpoint": "not_found",
        "/student/1/architecture": "not_allowed",
        "/method/1/p": "less_than_equal",
        "/method/2": "not_allowed",
        "/assistants/0": "not_allowed",
        "/unlabelled": "not_found",
    }


async def test_resolved_spec_has_the_digests_of_several_teachers(service: Service) -> None:
    one, other = await teacher(service, "one", parameters=1000), await teacher(service, "other", parameters=2000)
    spec = kd(teacher=[{"checkpoint": "model:one"}, {"checkpoint": "model:other", "weight": 2}])
    resolved = await accepted(service, spec)
    assert [(teacher["checkpoint"], teacher["weight"]) for teacher in resolved["teacher"]] == [
        (f"blob:{one}", 1),
        (f"blob:{other}", 2),
    ]
    body = (await service.http.post("/v1/jobs/validate", json=spec)).json()
    assert body["estimate"]["parameters"]["teacher"] == 3000


async def test_program_can_teach(service: Service) -> None:
    blob = await service.upload(b"a graph")
    resolved = await accepted(service, kd(teacher={"program": f"blob:{blob}"}))
    assert resolved["teacher"]["program"] == f"blob:{blob}"
    assert (resolved["teacher"]["architecture"], resolved["teacher"]["checkpoint"]) == (None, None)
    assert resolved["teacher"]["preprocessing"] is not None
    body = (await service.http.post("/v1/jobs/validate", json=kd(teacher={"program": f"blob:{blob}"}))).json()
    assert body["estimate"]["parameters"]["teacher"] == PROGRAM.parameters
    assert service.inspector.requests == [("program", blob.removeprefix("sha256:"), {})]


async def test_logits_can_teach(service: Service) -> None:
    blob = await service.upload(b"an archive of arrays")
    resolved = await accepted(service, kd(teacher={"logits": f"blob:{blob}"}))
    teacher = resolved["teacher"]
    assert {name for name, value in teacher.items() if value is not None} == {"logits"}
    assert teacher["logits"] == f"blob:{blob}" and resolved["training"]["augmentation"] == {"name": "none"}
    assert await accepted(service, {**resolved, "name": "again"}) == {**resolved, "name": "again"}
    body = (await service.http.post("/v1/jobs/validate", json=kd(teacher={"logits": f"blob:{blob}"}))).json()
    assert [one["code"] for one in body["warnings"] if one["pointer"] == "/teacher/logits"] == ["teacher_not_tested"]
    assert service.inspector.requests == [("logits", blob.removeprefix("sha256:"), {})]


async def test_logits_that_cannot_teach_are_refused(service: Service) -> None:
    blob = await service.upload(b"an archive of arrays")
    given = {"logits": f"blob:{blob}"}
    faults = await faults_of(service, kd(teacher=given, training={"augmentation": "crop_flip"}))
    assert list(faults) == ["/training/augmentation"] and "use none" in faults["/training/augmentation"]["message"]
    few = await service.upload(b"an archive of few rows")
    service.inspector.answers[few.removeprefix("sha256:")] = LOGITS.model_copy(update={"train": 5})
    assert list(await faults_of(service, kd(teacher={"logits": f"blob:{few}"}))) == ["/teacher/logits"]
    broken = await service.upload(b"no archive")
    refused = Refused("teacher_mismatch", "logits[3, 1] is nan, and must be a finite number", "send float32")
    service.inspector.answers[broken.removeprefix("sha256:")] = refused
    assert (
        "is nan" in (await faults_of(service, kd(teacher={"logits": f"blob:{broken}"})))["/teacher/logits"]["message"]
    )
    faults = await faults_of(service, kd(teacher={"logits": "file:/etc/passwd"}))
    assert faults["/teacher/logits"]["code"] == "not_allowed"


async def test_registered_program_teaches_by_its_name(service: Service) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX
    names = list("9876543210")
    stated = {"class_names": names, "preprocessing": {"mean": [0.25], "std": [0.5]}}
    await service.http.post("/v1/models", json={"name": "graph", "blob": blob, **stated})
    resolved = await accepted(service, kd(teacher={"checkpoint": "model:graph"}))
    teacher = resolved["teacher"]
    assert (teacher["program"], teacher["checkpoint"], teacher["architecture"]) == (f"blob:{blob}", None, None)
    assert (teacher["preprocessing"], teacher["class_names"]) == (stated["preprocessing"], names)
    assert await accepted(service, {**resolved, "name": "again"}) == {**resolved, "name": "again"}
    for method, text in (("attention", "its activations"), ("kd", "holds its own network")):
        given = {"checkpoint": "model:graph", **({"architecture": "convnet32"} if method == "kd" else {})}
        faults = await faults_of(service, kd(teacher=given, method=method))
        [(pointer, fault)] = faults.items()
        assert pointer == ("/teacher/architecture" if method == "kd" else "/teacher/checkpoint")
        assert text in fault["message"]


async def test_registered_program_has_no_parts_to_choose_from(service: Service) -> None:
    await teacher(service, "graph.onnx", ONNX)
    service.inspector.requests.clear()
    named = {"checkpoint": "model:graph.onnx", "part": "student", "averaged": True}
    faults = await faults_of(service, kd(teacher=named))
    assert {pointer: (one["code"], one["got"]) for pointer, one in faults.items()} == {
        "/teacher/part": ("unused", "student"), "/teacher/averaged": ("unused", True),
    }  # fmt: skip
    assert not service.inspector.requests, "the registered program is not inspected again"


async def test_uploaded_program_as_a_checkpoint_of_an_architecture_is_refused(service: Service) -> None:
    blob = await service.upload(b"a graph")
    service.inspector.answers[blob.removeprefix("sha256:")] = ONNX
    faults = await faults_of(service, kd(teacher={"checkpoint": f"blob:{blob}", "architecture": "convnet32"}))
    assert "an ONNX model, which holds its own network" in faults["/teacher/architecture"]["message"]


async def test_program_cannot_teach_by_activations_or_gradients(service: Service) -> None:
    blob = await service.upload(b"a graph")
    methods = ["attention", {"name": "fitnet", "tap": "layer2"}, {"name": "attention", "mapping": "gradient"}]
    for method in methods:
        faults = await faults_of(service, kd(teacher={"program": f"blob:{blob}"}, method=["kd", method]))
        assert list(faults) == ["/teacher/program"]
        assert "a program gives only logits" in faults["/teacher/program"]["message"]


async def test_program_for_other_images_is_refused(service: Service) -> None:
    blob = await service.upload(b"a graph")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = PROGRAM.model_copy(update={"image_size": (32, 32), "num_classes": 5})
    answer = await service.http.post("/v1/jobs", json=kd(teacher={"program": f"blob:{blob}"}))
    body = problem(answer, 422, "spec_invalid")["errors"]
    # It gets images of its own size; a size that is given for it is at fault.
    assert [(fault["pointer"], fault["code"]) for fault in body] == [("/teacher/program", "teacher_mismatch")]
    sized = await faults_of(service, kd(teacher={"program": f"blob:{blob}", "image_size": 16}))
    assert sized["/teacher/image_size"]["message"].endswith("and its image_size is 16 x 16")
    broken = await service.upload(b"no graph")
    refused = Refused("teacher_mismatch", "this is no torch.export program", "save it with torch.export.save")
    service.inspector.answers[broken.removeprefix("sha256:")] = refused
    faults = await faults_of(service, kd(teacher={"program": f"blob:{broken}"}))
    assert "no torch.export program" in faults["/teacher/program"]["message"]
    faults = await faults_of(service, kd(teacher={"program": "file:/etc/passwd"}))
    assert faults["/teacher/program"]["code"] == "not_allowed"


async def test_unlabelled_images_become_their_digest_and_lengthen_the_epochs(service: Service) -> None:
    """1,293 labelled images and 640 others are 1,933: 30 batches of 64; the baseline has its 20."""
    await teacher(service)
    blob = await unlabelled(service)
    spec = kd(unlabelled="more", baseline="train", training={"epochs": 2})
    assert (await accepted(service, spec))["unlabelled"] == {
        "source": f"blob:{blob}",
        "labels": "teacher",
        "labelled_too": True,
    }
    body = (await service.http.post("/v1/jobs/validate", json=spec)).json()
    assert body["estimate"]["steps"] == 2 * (30 + 20)


async def test_unlabelled_images_must_not_be_the_data_set_under_another_name(service: Service) -> None:
    await teacher(service, "ours", num_classes=4)
    blob = await service.upload(b"pictures")
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    spec = kd(dataset="mine", teacher={"checkpoint": "model:ours"})
    for source in ("mine", f"blob:{blob}"):
        faults = await faults_of(service, {**spec, "unlabelled": source})
        assert list(faults) == ["/unlabelled"] and "own training images" in faults["/unlabelled"]["message"]
        assert faults["/unlabelled"]["got"] == source


async def test_unlabelled_images_are_refused_as_the_data_set(service: Service) -> None:
    await teacher(service)
    await unlabelled(service)
    faults = await faults_of(service, kd(dataset="more", unlabelled="digits"))
    assert list(faults) == ["/dataset"] and "no labels" in faults["/dataset"]["message"]


async def test_unlabelled_images_must_have_the_size_of_the_data_set(service: Service) -> None:
    await teacher(service)
    await unlabelled(service, image_size=(16, 16))
    faults = await faults_of(service, kd(unlabelled={"source": "more"}))
    text = "the data set's images have height and width [8, 8], these have [16, 16]"
    assert faults["/unlabelled/source"]["message"] == text


async def test_unlabelled_folders_determine_the_image_size(service: Service) -> None:
    await teacher(service)
    await unlabelled(service, kind="folders")
    resolved = await accepted(service, kd(unlabelled="more"))
    assert resolved["dataset"] == Dataset(source="digits", image_size=8).resolved().model_dump(mode="json")


async def test_resolved_spec_has_no_size_for_images_that_are_not_square(service: Service) -> None:
    blob = await service.upload(b"folders")
    facts = DATASET.model_copy(update={"kind": "folders", "image_size": (16, 24)})
    service.inspector.answers[blob.removeprefix("sha256:")] = facts
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    resolved = await accepted(service, {**SUPERVISED, "dataset": "mine"})
    assert resolved["dataset"] == Dataset(source=f"blob:{blob}").resolved().model_dump(mode="json")


async def test_unlabelled_images_of_one_size_refuse_another(service: Service) -> None:
    blob = await service.upload(b"arrays")
    digest = blob.removeprefix("sha256:")
    service.inspector.answers[digest] = DATASET.model_copy(update={"image_size": (16, 16), "num_classes": 10})
    await teacher(service)
    faults = await faults_of(service, kd(dataset={"source": f"blob:{blob}", "image_size": 16}, unlabelled="digits"))
    assert faults["/unlabelled"]["message"] == "the images of digits have one size, 8 x 8"


async def test_taps_are_chosen_by_default(service: Service) -> None:
    await teacher(service)
    (method,) = (await accepted(service, kd(method=["attention"])))["method"]
    assert method["taps"] == [{"student": layer, "teacher": layer} for layer in ("layer1", "layer2", "layer3")]
    assert [request for request in service.inspector.requests if request[0] == "taps"] == [], (
        "they are in the catalogue"
    )


async def test_taps_that_are_named_are_inspected(service: Service) -> None:
    await teacher(service)
    taps = {"name": "attention", "taps": ["layer1", {"student": "layer2.0", "teacher": "layer3"}]}
    (_, method) = (await accepted(service, kd(method=["kd", taps])))["method"]
    assert method["taps"][1] == {"student": "layer2.0", "teacher": "layer3"}
    assert [request[1:-1] for request in service.inspector.requests if request[0] == "taps"] == [
        ("convnet8", "layer1", "layer2.0"),
        ("convnet32", "layer1", "layer3"),
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
async def test_taps_that_do_not_exist_are_refused(service: Service, method: Any, pointer: str) -> None:
    await teacher(service)
    faults = await faults_of(service, kd(method=method))
    assert list(faults) == [pointer]
    assert faults[pointer]["message"].endswith("(near it: layer1, layer2, layer3)")
    assert "layer9" in faults[pointer]["got"]


async def test_taps_of_exits_that_do_not_exist_are_refused(service: Service) -> None:
    spec = {"dataset": "digits", "student": "convnet8", "method": {"name": "byot", "exits": ["layer1", "layer9"]}}
    assert list(await faults_of(service, spec)) == ["/method/exits"]
    spec = {"dataset": "digits", "student": "convnet8", "method": {"name": "byot", "exits": ["layer1"]}}
    assert (await accepted(service, spec))["method"]["exits"] == ["layer1"]


async def test_taps_of_another_shape_than_the_method_needs_are_refused(service: Service) -> None:
    await teacher(service)
    service.inspector.shapes = {"fc@in": [16]}
    faults = await faults_of(service, kd(method={"name": "nst", "taps": ["layer1", "fc@in"]}))
    assert list(faults) == ["/method/taps/1"]
    assert "'nst' needs a map" in faults["/method/taps/1"]["message"]
    resolved = await accepted(service, kd(method={"name": "feature", "tap": "fc@in"}))
    assert resolved["method"]["tap"] == {"student": "fc@in", "teacher": "fc@in"}


async def test_references_inspect_each_network_once(service: Service) -> None:
    await teacher(service, architecture="timm/resnet18")
    assert (await service.http.post("/v1/jobs", json=kd(assistants=["timm/resnet18"]))).status_code == 201
    assert [request[1] for request in service.inspector.requests if request[0] == "architecture"] == ["timm/resnet18"]
    await teacher(service, "lost", architecture="timm/gone")
    faults = await faults_of(service, kd(teacher={"checkpoint": "model:lost"}))
    assert faults["/teacher/checkpoint"]["message"] == "timm has no model 'gone'"


async def test_resolved_spec_of_students_that_teach_each_other(service: Service) -> None:
    resolved = await accepted(
        service, {"dataset": "digits", "student": ["convnet8", "convnet16"], "method": "dml", "baseline": "train"}
    )
    assert [student["architecture"] for student in resolved["student"]] == ["convnet8", "convnet16"]
    assert all(student["preprocessing"] for student in resolved["student"])
    assert (resolved["alpha"], resolved["beta"], resolved["temperature"]) == (1, 1, 1)


async def test_estimate_counts_assistants_generations_and_seeds(service: Service) -> None:
    """20 batches of 64 an epoch."""
    await teacher(service)
    for changes, trials in (
        ({"assistants": ["convnet16", "convnet16"], "baseline": "train"}, 4),
        ({"method": "born_again"}, 3),
        ({"method": {"name": "born_again", "generations": 2}, "teacher": None, "baseline": "train"}, 3),
        ({"assistants": ["convnet16"], "baseline": "train", "seeds": 3}, 7),
    ):
        body = (await service.http.post("/v1/jobs/validate", json=kd(**changes, training={"epochs": 2}))).json()
        assert body["errors"] == [] and body["estimate"]["steps"] == trials * 2 * 20


async def test_references_teacher_can_be_the_first_of_several_students_but_no_ensemble(service: Service) -> None:
    peers = await service.submit(student=["convnet32", "convnet16"], method="dml")
    await service.succeed(peers)
    body = (await service.http.post("/v1/jobs/validate", json=kd(teacher={"checkpoint": f"job:{peers}"}))).json()
    assert body["resolved_spec"]["teacher"]["architecture"] == "convnet32"
    together = await service.submit(method={"name": "born_again", "answer": "ensemble"})
    early = await faults_of(service, kd(teacher={"checkpoint": f"job:{together}"}))
    await service.succeed(together)
    late = await faults_of(service, kd(teacher={"checkpoint": f"job:{together}"}))
    for faults in (early, late):
        assert "delivers an ensemble of 3 networks" in faults["/teacher/checkpoint"]["message"]


async def test_resolved_spec_can_be_parsed(service: Service) -> None:
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


async def test_submit_warns_of_a_guess_and_strict_refuses_it(service: Service) -> None:
    await teacher(service)
    answer = await service.http.post("/v1/jobs", json=kd())
    assert [(one["code"], one["pointer"]) for one in answer.json()["warnings"]] == [
        ("normalization_guessed", "/teacher/preprocessing")
    ]
    checked = (await service.http.post("/v1/jobs/validate", json=kd())).json()
    assert (checked["valid"], checked["warnings"]) == (True, answer.json()["warnings"])
    refused = problem(await service.http.post("/v1/jobs", json=kd(strict=True)), 422, "warning_refused")
    (fault,) = refused["errors"]
    assert fault["pointer"] == "/teacher/preprocessing"
    assert fault["message"].startswith("normalization_guessed: ")
    checked = (await service.http.post("/v1/jobs/validate", json=kd(strict=True))).json()
    assert (checked["valid"], checked["errors"]) == (False, [fault])
    stated = {"checkpoint": "model:big", "preprocessing": {"mean": [0.5], "std": [0.25]}}
    answer = await service.http.post("/v1/jobs", json=kd(teacher=stated, strict=True))
    assert (answer.status_code, answer.json()["warnings"]) == (201, [])


async def test_submit_of_a_strict_spec_with_faults_names_the_faults(service: Service) -> None:
    await teacher(service)
    faults = await faults_of(service, kd(strict=True, alpha=-1))
    assert set(faults) == {"/alpha"}


async def test_submit_gives_a_teacher_images_of_the_size_that_it_learned_from(service: Service) -> None:
    await teacher(service, image_size=(32, 32), mean=[0.5], std=[0.5])
    answer = await service.http.post("/v1/jobs", json=kd(strict=True))
    assert answer.status_code == 201, answer.text
    assert answer.json()["resolved_spec"]["teacher"]["image_size"] == 32 and answer.json()["warnings"] == []
    given = {"checkpoint": "model:big", "image_size": 16}
    assert (await accepted(service, kd(teacher=given)))["teacher"]["image_size"] == 16


async def test_submit_names_the_size_with_which_a_network_of_one_size_can_teach(service: Service) -> None:
    await teacher(service, architecture="torchvision/vit_b_16", channels=1, mean=[0.5], std=[0.5])
    message = (await faults_of(service, kd()))["/teacher/checkpoint"]["message"]
    assert message.endswith("the data set has 8 x 8; teacher.image_size: 224 gives it images of that size")
    spec = kd(teacher=[{"checkpoint": "model:big", "image_size": 224}, {"checkpoint": "model:big", "weight": 2}])
    faults = await faults_of(service, spec)
    assert "teacher.1.image_size: 224" in faults["/teacher/1/checkpoint"]["message"]
    assert "/teacher/0/checkpoint" not in faults and "/teacher/0/image_size" not in faults


async def test_references_inspect_a_teachers_network_at_its_own_size(service: Service) -> None:
    await teacher(service, architecture="timm/resnet18", image_size=(224, 224), mean=[0.5], std=[0.5])
    await accepted(service, kd())
    sizes = {name: shape["image_size"] for kind, name, shape in service.inspector.requests if kind == "architecture"}
    assert sizes == {"timm/resnet18": (224, 224)}


async def test_submit_a_waiting_job_knows_the_size_of_its_teachers_images(service: Service) -> None:
    job = (await service.http.post("/v1/jobs", json={**SUPERVISED, "dataset": "digits"})).json()
    resolved = await accepted(service, kd(teacher={"checkpoint": f"job:{job['id']}"}))
    assert resolved["teacher"]["image_size"] == 8


DIGITS = [str(digit) for digit in range(10)]


async def registered(service: Service, **more: Any) -> None:
    blob = await service.upload(b"weights of big")
    service.inspector.answers[blob.removeprefix("sha256:")] = MODEL.model_copy(update={"mean": [0.5], "std": [0.5]})
    answer = await service.http.post(
        "/v1/models", json={"name": "big", "architecture": "convnet32", "blob": blob, **more}
    )
    assert answer.status_code == 201, answer.text


async def test_submit_with_registered_class_names_in_another_order_warns_and_tells_the_engine(service: Service) -> None:
    await registered(service, class_names=DIGITS[::-1])
    answer = await service.http.post("/v1/jobs", json=kd())
    assert answer.status_code == 201, answer.text
    assert answer.json()["resolved_spec"]["teacher"]["class_names"] == DIGITS[::-1]
    assert [warning["code"] for warning in answer.json()["warnings"]] == ["class_order_changed"]
    strict = problem(await service.http.post("/v1/jobs", json=kd(strict=True)), 422, "warning_refused")
    assert strict["errors"][0]["pointer"] == "/teacher/class_names"


async def test_submit_with_registered_class_names_in_the_datas_order_is_as_without(service: Service) -> None:
    await registered(service, class_names=DIGITS)
    answer = await service.http.post("/v1/jobs", json=kd())
    assert answer.json()["resolved_spec"]["teacher"]["class_names"] is None and answer.json()["warnings"] == []


async def test_submit_refuses_registered_class_names_that_are_not_the_datas(service: Service) -> None:
    await registered(service, class_names=[*DIGITS[:9], "ten"])
    fault = (await faults_of(service, kd()))["/teacher/checkpoint"]
    assert fault["code"] == "teacher_mismatch"


async def test_resolved_spec_keeps_registered_class_names_until_those_of_the_data_are_known(service: Service) -> None:
    """A built-in set's names are known only when it is fetched: then the engine compares them."""
    names = [f"breed {number}" for number in range(37)]
    blob = await service.upload(b"weights of big")
    facts = {"num_classes": 37, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    service.inspector.answers[blob.removeprefix("sha256:")] = MODEL.model_copy(update=facts)
    new = {"name": "big", "architecture": "convnet32", "blob": blob, "class_names": names}
    assert (await service.http.post("/v1/models", json=new)).status_code == 201
    resolved = await accepted(service, kd(dataset="oxford_iiit_pet"))
    assert resolved["teacher"]["class_names"] == names
    stated = {"checkpoint": "model:big", "class_names": names[::-1]}
    resolved = await accepted(service, kd(dataset="oxford_iiit_pet", teacher=stated))
    assert resolved["teacher"]["class_names"] == names[::-1]


async def mine(service: Service, registration: Any = None, **facts: Any) -> str:
    """Register a data set of ten classes, like the teacher's."""
    blob = await service.upload(b"pictures of my own")
    names = [str(number) for number in range(10)]
    of_ten = {"num_classes": 10, "class_names": names, "train": 1000, **facts}
    service.inspector.answers[blob.removeprefix("sha256:")] = DATASET.model_copy(update=of_ten)
    answer = await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, **(registration or {})})
    assert answer.status_code == 201, answer.text
    return blob


async def test_jobs_use_the_options_of_a_registration(service: Service) -> None:
    options = {"resize": "pad", "image_size": 8, "skip_unreadable": True, "limit": 500}
    blob = await mine(service, options)
    resolved = await accepted(service, {**SUPERVISED, "dataset": "mine"})
    expected = Dataset(source=f"blob:{blob}", **options).resolved()
    assert resolved["dataset"] == expected.model_dump(mode="json")
    assert len(service.inspector.requests) == 1, "it is not inspected again"
    assert await accepted(service, {**SUPERVISED, "dataset": resolved["dataset"]}) == resolved


async def test_jobs_may_read_a_registered_data_set_in_another_way(service: Service) -> None:
    blob = await mine(service, {"resize": "pad", "image_size": 8})
    resolved = await accepted(service, {**SUPERVISED, "dataset": {"source": "mine", "resize": "squash"}})
    expected = Dataset(source=f"blob:{blob}", image_size=8, resize="squash").resolved()
    assert resolved["dataset"] == expected.model_dump(mode="json")
    *_, given = service.inspector.requests[-1]
    assert given == {"image_size": 8, "options": '{"resize": "squash"}'}


async def test_grey_images_get_three_channels_if_the_teacher_takes_three(service: Service) -> None:
    await teacher(service, channels=3)
    await mine(service)
    answer = (await service.http.post("/v1/jobs", json=kd(dataset="mine"))).json()
    assert answer["resolved_spec"]["dataset"]["channels"] == 3
    assert answer["resolved_spec"]["student"]["preprocessing"] == {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert answer["resolved_spec"]["training"]["augmentation"]["flip"] is False
    assert "grey_as_colour" in [warning["code"] for warning in answer["warnings"]]
    refused = await service.http.post("/v1/jobs", json=kd(dataset="mine", strict=True))
    assert "grey_as_colour" in problem(refused, 422, "warning_refused")["detail"]


async def test_grey_images_with_three_channels_that_were_asked_for_are_no_surprise(service: Service) -> None:
    await teacher(service, channels=3)
    answer = (await service.http.post("/v1/jobs", json=kd(dataset={"source": "digits", "channels": 3}))).json()
    assert answer["resolved_spec"]["dataset"]["channels"] == 3
    assert "grey_as_colour" not in [warning["code"] for warning in answer["warnings"]]


async def test_grey_images_stay_grey_where_that_was_asked_for_or_a_teacher_takes_one(service: Service) -> None:
    await teacher(service, channels=3)
    await teacher(service, "grey")
    faults = await faults_of(service, kd(dataset={"source": "digits", "channels": 1}))
    assert "dataset.channels: 3" in faults["/teacher/checkpoint"]["message"]
    two = [{"checkpoint": "model:big"}, {"checkpoint": "model:grey"}]
    faults = await faults_of(service, kd(teacher=two))
    assert list(faults) == ["/teacher/0/checkpoint"]


async def test_grey_unlabelled_images_get_three_channels_too(service: Service) -> None:
    await teacher(service, channels=3)
    await unlabelled(service)
    resolved = await accepted(service, kd(unlabelled="more"))
    assert resolved["dataset"]["channels"] == 3


async def test_unlabelled_images_are_read_with_the_options_of_the_data_set(service: Service) -> None:
    await teacher(service)
    blob = await unlabelled(service)
    dataset = {"source": "digits", "limit": 700, "limit_seed": 4, "interpolation": "nearest"}
    await accepted(service, kd(dataset=dataset, unlabelled="more"))
    kind, digest, given = service.inspector.requests[-1]
    assert (kind, digest) == ("dataset", blob.removeprefix("sha256:"))
    assert given == {"options": '{"interpolation": "nearest"}'}, "a limit is one of labelled images"


@pytest.mark.parametrize(
    ("dataset", "pointer", "said"),
    [
        ({"source": "digits", "orientation": "apply"}, "/dataset/orientation", "not for the built-in digits"),
        ({"source": "digits", "class_names": ["a", "b"]}, "/dataset/class_names", "not for the built-in digits"),
        ({"source": "digits", "limit": 9}, "/dataset/limit", "digits has 10 classes, and each needs an image"),
        ({"source": "cifar10", "channels": 1}, "/dataset/channels", "the mean and std of cifar10 in grey"),
    ],
)
async def test_options_that_a_built_in_data_set_cannot_have(service: Service, dataset, pointer, said) -> None:
    faults = await faults_of(service, {**SUPERVISED, "dataset": dataset})
    assert list(faults) == [pointer] and said in faults[pointer]["message"]


async def test_a_limit_of_a_built_in_data_set_counts(service: Service) -> None:
    answer = await service.http.post(
        "/v1/jobs/validate", json={**SUPERVISED, "dataset": {"source": "digits", "limit": 640}}
    )
    epochs = answer.json()["resolved_spec"]["training"]["epochs"]
    assert answer.json()["estimate"]["steps"] == epochs * 9, "576 images, after a tenth is held out"


# Which weights of a file


async def test_submit_writes_the_registered_choice_of_weights_into_the_spec(service: Service) -> None:
    loading = Loading(tensors=20, part="state_dict_ema", averaged=True)
    await teacher(service, loading=loading)
    resolved = await accepted(service, kd())
    assert (resolved["teacher"]["part"], resolved["teacher"]["averaged"]) == ("state_dict_ema", True)


async def test_submit_inspects_a_registered_file_again_for_other_weights_of_it(service: Service) -> None:
    blob = await teacher(service, mean=[0.3], std=[0.2])
    other = MODEL.model_copy(update={"loading": Loading(tensors=20, part="teacher", averaged=False)})
    service.inspector.answers[blob.removeprefix("sha256:")] = other
    resolved = await accepted(service, kd(teacher={"checkpoint": "model:big", "part": "teacher"}))
    options = {"architecture": "convnet32", "part": "teacher"}
    assert service.inspector.requests[-1] == ("model", blob.removeprefix("sha256:"), options)
    assert (resolved["teacher"]["part"], resolved["teacher"]["averaged"]) == ("teacher", False)
    assert resolved["teacher"]["preprocessing"] == {"mean": [0.3], "std": [0.2]}, "stated at the registration"


async def test_submit_finds_the_architecture_of_an_uploaded_file(service: Service) -> None:
    blob = await service.upload(b"no name")
    found = MODEL.model_copy(update={"loading": Loading(tensors=20, architecture_found=True)})
    service.inspector.answers[blob.removeprefix("sha256:")] = found
    body = (await service.http.post("/v1/jobs", json=kd(teacher={"checkpoint": f"blob:{blob}"}))).json()
    assert body["resolved_spec"]["teacher"]["architecture"] == "convnet32"
    assert ("architecture_found", "/teacher/architecture") in [(w["code"], w["pointer"]) for w in body["warnings"]]


async def test_submit_accepts_the_name_of_a_network_whose_classifier_is_deep(service: Service) -> None:
    blob = await service.upload(b"deep")
    deep = MODEL.model_copy(update={"architecture": "convnet32+relu16"})
    service.inspector.answers[blob.removeprefix("sha256:")] = deep
    given = {"checkpoint": f"blob:{blob}", "architecture": "convnet32"}
    assert (await accepted(service, kd(teacher=given)))["teacher"]["architecture"] == "convnet32+relu16"


def test_unknown_reference_is_compared_with_few_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are registered: with those that begin like it."""
    compared: list[str] = []
    monkeypatch.setattr(references.difflib, "get_close_matches", lambda name, names, **_: compared.extend(names) or [])
    names = [f"{letter}{number}" for letter in "abcd" for number in range(1000)]
    references._unknown("model", "c", names)
    assert len(compared) == references.COMPARED and {name[0] for name in compared} == {"c"}


@pytest.mark.parametrize("route", ["/v1/jobs", "/v1/jobs/validate"])
async def test_a_format_that_the_embedded_worker_cannot_write_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr("kdcore.spec.shipping.find_spec", lambda name: None if name == "openvino" else name)
    body = {"dataset": "digits", "student": "convnet4", "method": "supervised", "export": ["onnx", "openvino"]}
    answer = (await service.http.post(route, json=body)).json()
    [fault] = answer["errors"]
    assert (fault["pointer"], fault["got"]) == ("/export/1", "openvino")
    assert fault["allowed"] == ["safetensors", "onnx", "onnx_int8", "torch_export"]
