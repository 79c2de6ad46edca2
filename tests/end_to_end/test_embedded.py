"""From a POST to a distilled checkpoint on the embedded default, with the requests of a new user."""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdcore import models
from tests.end_to_end.embedded_server import embedded_server
from tests.end_to_end.network import watched
from tests.kdcore.engine import write_arrays
from tests.worker.job_database import engines

TRAINING = {"epochs": 2, "batch_size": 32, "seed": 1}
TEACHER = {"name": "teacher", "dataset": "digits", "student": "convnet8", "method": "supervised", "training": TRAINING}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return watched(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, network):
    with embedded_server(tmp_path_factory.mktemp("service") / "home", **network.environment) as server:
        yield server


@pytest.fixture(scope="module")
def together(server):
    """The job of a digits teacher and that of its student, submitted at once; and the student's job as it was then."""
    teacher = server.submit(TEACHER)
    student = server.submit(distillation(teacher))
    return teacher, student, server.get(f"/v1/jobs/{student}")


@pytest.fixture(scope="module")
def teacher_job(server, together):
    """The teacher's job, which has succeeded."""
    server.ended(together[0])
    return together[0]


@pytest.fixture(scope="module")
def distilled(server, together):
    """The student's job, which has succeeded: the first one with this teacher."""
    return server.ended(together[1])


@pytest.fixture(scope="module")
def again(server, teacher_job, distilled):
    """The same job, submitted when the teacher's and the student's had succeeded."""
    return server.ended(server.submit(distillation(teacher_job)))


@pytest.fixture(scope="module")
def their_data(server, tmp_path_factory):
    """The name of a registered data set of the user's own, with three classes."""
    data = server.upload(write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz", train=150))
    assert server.registered("datasets", {"name": "their-data", "blob": data})["state"] == "ready"
    return "their-data"


@pytest.fixture(scope="module")
def alone(server):
    """A supervised job with the student of `distilled`, which has succeeded."""
    return server.ended(server.submit({**TEACHER, "student": "convnet4"}))


def distillation(teacher_job: str, **changes) -> dict:
    return {
        "name": "digits",
        "dataset": "digits",
        "teacher": {"checkpoint": f"job:{teacher_job}"},
        "student": {"architecture": "convnet4"},
        "method": "kd",
        "temperature": 4.0,
        "alpha": 0.1,
        "beta": 0.9,
        "training": TRAINING,
        "baseline": "train_anew",
        **changes,
    }


def test_submitted_job_gives_a_student_that_loads_in_plain_pytorch(server, distilled, tmp_path):
    job_id, report = distilled["id"], distilled["result"]
    assert report["gain"] == report["student"]["accuracy"] - report["alone"]["accuracy"]
    assert distilled["resolved_spec"]["teacher"]["architecture"] == "convnet8"

    checkpoint = server.http.get(f"/v1/jobs/{job_id}/checkpoint")
    artifacts = {artifact["name"]: artifact for artifact in server.get(f"/v1/jobs/{job_id}/artifacts")["data"]}
    assert set(artifacts) == {
        "student.safetensors", "student.py", "alone.safetensors", "report.html", "report.json", "spec.json",
        "model_card.zip",
    }  # fmt: skip
    assert hashlib.sha256(checkpoint.content).hexdigest() == artifacts["student.safetensors"]["sha256"]
    [file] = report["files"]
    assert (file["name"], file["sha256"]) == ("student.safetensors", artifacts["student.safetensors"]["sha256"])
    assert (file["accuracy"], file["agreement"]) == (pytest.approx(report["student"]["accuracy"]), 1.0)
    assert file["refused"] is None and file["peak_memory_bytes"] > 0 and len(file["latency"]) == 2

    path = tmp_path / "student.safetensors"
    path.write_bytes(checkpoint.content)
    network = models.build("convnet4", 10, 1)
    network.load_state_dict(load_file(path))
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_student_file_contains_a_copy_of_the_spec(server, distilled):
    content = server.http.get(f"/v1/jobs/{distilled['id']}/checkpoint").content
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"]["distillery"])
    assert metadata["spec"]["method"]["name"] == "kd" and len(metadata["class_names"]) == 10


@pytest.mark.usefixtures("distilled")
def test_validate_estimates_a_job_from_one_like_it_and_probes_another(server, teacher_job):
    """Another seed and other epochs of the same job; then a job with a network that has not been trained here."""
    spec = distillation(teacher_job, training={**TRAINING, "epochs": 4, "seed": 7})
    estimate = server.post("/v1/jobs/validate", spec).json()["estimate"]
    assert estimate["basis"] == "measured" and estimate["device"].startswith("cpu, ")
    assert all(seconds > 0 for seconds in estimate["seconds_by_phase"].values())
    assert 100e6 < estimate["memory_bytes"] < 2e9
    (worker,) = server.get("/v1/workers")["data"]
    assert all(device["memory_bytes"] > estimate["memory_bytes"] for device in worker["devices"])
    estimate = server.post("/v1/jobs/validate", {**spec, "student": "convnet16"}).json()["estimate"]
    assert estimate["basis"] == "probe" and estimate["seconds"] > 0
    assert estimate["seconds_by_phase"]["preparing"] is None


def test_events_have_no_gap_and_metrics_are_series(server, distilled):
    job_id = distilled["id"]
    events = server.get(f"/v1/jobs/{job_id}/events")["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "queued" and events[-1]["type"] == "succeeded"
    series = server.get(f"/v1/jobs/{job_id}/metrics")["series"]["student"]
    assert len(series["validation/accuracy"]) == TRAINING["epochs"]
    assert "train/distillation_loss" in series


def test_teacher_is_measured_once_for_a_project(server, distilled, again):
    """The second job gets the result, too; both show it on the job and in an event."""
    for number, job in enumerate((distilled, again)):
        events = server.get(f"/v1/jobs/{job['id']}/events", limit=100)["data"]
        (event,) = [event for event in events if event["type"] == "teacher_check"]
        assert event["data"] == job["teacher_check"]
        assert job["teacher_check"]["accuracy"] == pytest.approx(job["result"]["teacher"]["accuracy"])
        log = server.http.get(f"/v1/jobs/{job['id']}/logs").text
        assert ("the teacher was measured by an earlier job" in log) == (number == 1)
    assert distilled["teacher_check"] == again["teacher_check"]
    assert distilled["result"]["warnings"] == again["result"]["warnings"]


def test_teacher_and_student_can_be_submitted_together(server, together, distilled, again):
    """The student's job waits for its teacher's, and its result is that of a job with the finished student."""
    _, student, waiting = together
    assert (waiting["status"], waiting["waiting"]["reason"]) == ("queued", "teacher")
    order = [one for one in event_types(server, student) if one in ("teacher_ready", "claimed")]
    assert order == ["teacher_ready", "claimed"]
    assert distilled["resolved_spec"] == again["resolved_spec"]
    students = [
        {one["name"]: one["sha256"] for one in server.get(f"/v1/jobs/{job['id']}/artifacts")["data"]}
        for job in (distilled, again)
    ]
    assert students[0]["student.safetensors"] == students[1]["student.safetensors"], "the same bits"


def test_cancelled_running_job_leaves_no_process_and_the_student_that_waits_for_it_fails(server):
    teacher = server.submit({**TEACHER, "training": {**TRAINING, "epochs": 5000}})
    student = server.submit(distillation(teacher))
    server.wait_until(lambda: server.get(f"/v1/jobs/{teacher}")["progress"] is not None, 60)
    assert len(engines(server.home)) == 2, "guard and engine"
    assert server.post(f"/v1/jobs/{teacher}/cancel").status_code == 200
    server.ended(teacher, "cancelled")
    assert not engines(server.home)
    error = server.ended(student, "failed")["error"]
    assert error["code"] == "teacher_unavailable"
    assert error["message"] == f"job {teacher}, whose student this job needs, is cancelled"


def test_export_of_a_job_that_was_stopped_has_its_newest_weights(server):
    """A cancelled job saves its state, from which its student can still be shipped."""
    stopped = server.submit({**TEACHER, "training": {**TRAINING, "epochs": 5000}})
    server.wait_until(lambda: (server.get(f"/v1/jobs/{stopped}")["progress"] or {}).get("step", 0) > 0, 60)
    assert server.post(f"/v1/jobs/{stopped}/cancel").status_code == 200
    server.ended(stopped, "cancelled")
    body = {"checkpoint": "last", "export_options": {"measure": False}}
    answer = server.post(f"/v1/jobs/{stopped}/exports", body)
    assert answer.status_code == 201, answer.text
    job = server.ended(answer.json()["id"])
    taken = job["result"]["checkpoint"]
    assert taken["which"] == "last" and taken["step"] == server.get(f"/v1/jobs/{stopped}")["checkpoint_step"] > 0
    files = {one["name"]: one for one in server.get(f"/v1/jobs/{job['id']}/artifacts")["data"]}
    assert files.keys() == {"student.safetensors", "student.py", "report.json"}
    student = server.http.get(f"/v1/jobs/{job['id']}/artifacts/student.safetensors").content
    assert hashlib.sha256(student).hexdigest() == files["student.safetensors"]["sha256"]
    assert [one["id"] for one in server.get(f"/v1/jobs/{stopped}/exports")["data"]] == [job["id"]]


def test_benchmark_of_a_students_network_is_kept_and_suggested(server, teacher_job):
    answer = server.post("/v1/benchmarks", {"job": teacher_job, "threads": 1, "batch_size": 2})
    assert answer.status_code == 201, answer.text
    job = server.ended(answer.json()["job"])
    kept = server.post("/v1/benchmarks", {"job": teacher_job, "threads": 1, "batch_size": 2})
    assert kept.status_code == 200 and kept.json()["figures"] == job["result"]
    assert job["result"]["parameters"] == server.get(f"/v1/jobs/{teacher_job}")["result"]["student"]["parameters"]
    shape = {"image_size": 8, "channels": 1, "classes": 10}
    found = server.get("/v1/suggestions", budget_ms=1e5, runtime="torch", **shape)
    suggested = next(one for one in found["data"] if one["measured_by"] == job["id"])
    assert (suggested["architecture"], suggested["format"], suggested["threads"]) == ("convnet8", "safetensors", 1)


def test_evaluation_of_a_registered_model_is_its_accuracy_in_the_report(server, teacher_job, tmp_path):
    """The student of a job, registered as a model, has on request the accuracy that its job's report has."""
    path = tmp_path / "student.safetensors"
    path.write_bytes(server.http.get(f"/v1/jobs/{teacher_job}/checkpoint").content)
    assert server.registered("models", {"name": "convnet8", "blob": server.upload(path)})["state"] == "ready"
    answer = server.post("/v1/models/convnet8/evaluations", {"dataset": "digits", "strict": True})
    assert answer.status_code == 201, answer.text
    job = server.ended(answer.json()["id"])
    result, expected = job["result"], server.get(f"/v1/jobs/{teacher_job}")["result"]["student"]
    for figure in ("accuracy", "accuracy_top5", "loss", "parameters"):
        assert result[figure] == pytest.approx(expected[figure]), figure
    low, high = result["interval"]
    assert low < result["accuracy"] < high and result["test_samples"] == 360
    assert [one["name"] for one in result["per_class"]] == [str(digit) for digit in range(10)]
    assert [one["name"] for one in server.get(f"/v1/jobs/{job['id']}/artifacts")["data"]] == ["report.json"]
    assert job["progress"]["percent"] == 100 and "phase" in event_types(server, job["id"])
    assert [one["id"] for one in server.get("/v1/models/convnet8/evaluations")["data"]] == [job["id"]]
    assert server.http.get(f"/v1/jobs/{job['id']}/checkpoint").status_code in (404, 409)


def test_baseline_can_be_an_earlier_job(server, teacher_job, alone):
    other = server.post("/v1/jobs", distillation(teacher_job, baseline=f"job:{teacher_job}"))
    (fault,) = other.json()["errors"]
    assert (fault["allowed"], fault["got"]) == (["student.architecture: convnet4"], ["student.architecture: convnet8"])
    job = server.ended(server.submit(distillation(teacher_job, baseline=f"job:{alone['id']}")))
    assert job["result"]["alone"]["accuracy"] == alone["result"]["student"]["accuracy"]


def test_baseline_can_be_the_student_alone_of_a_distilled_job(server, teacher_job, distilled, alone):
    """Never its distilled student. The student alone is the same as that of a supervised job with this recipe, and is
    found without being named."""
    supervised = alone["result"]["student"]
    changes = {"method": "dkd", "temperature": None, "alpha": None, "beta": None}
    second = server.ended(server.submit(distillation(teacher_job, baseline="train", **changes)))
    assert [one["code"] for one in second["warnings"] if one["pointer"] == "/baseline"] == ["baseline_found"]
    assert set(second["result"]["timings"]["training"]) == {"student"}
    baseline = second["result"]["alone"]
    assert baseline["accuracy"] == distilled["result"]["alone"]["accuracy"] == supervised["accuracy"]
    assert baseline["loss"] == pytest.approx(supervised["loss"])


def test_submit_reports_five_faults_in_one_answer(server):
    answer = server.post(
        "/v1/jobs",
        {
            "dataset": "digitz",
            "teacher": {"checkpoint": "model:unknown"},
            "student": {"architecture": "resnet21"},
            "method": "kd",
            "temperature": -1,
            "trainning": {},
        },
    )
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    pointers = {error["pointer"] for error in answer.json()["errors"]}
    assert pointers == {"/dataset", "/teacher/checkpoint", "/student/architecture", "/temperature", "/trainning"}


def test_submit_refuses_a_teacher_that_does_not_fit_the_data(server, teacher_job, their_data):
    before = len(server.get("/v1/jobs")["data"])
    answer = server.post("/v1/jobs", distillation(teacher_job, dataset=their_data))
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"], fault["got"]) == ("/teacher/checkpoint", "teacher_mismatch", 10)
    assert len(server.get("/v1/jobs")["data"]) == before


class MaliciousPickle:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_register_model_refuses_a_malicious_pickle_without_running_it(server, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"state_dict": MaliciousPickle(marker)}, tmp_path / "evil.pth")
    blob = server.upload(tmp_path / "evil.pth")
    assert "system" in server.refusal("models", {"name": "evil", "blob": blob, "architecture": "resnet20"})
    assert not marker.exists()
    assert server.http.get("/v1/models/evil").status_code == 404


def test_register_dataset_names_a_broken_image_in_an_archive(server, tmp_path):
    path = tmp_path / "folders.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(24):
            image = io.BytesIO()
            Image.new("L", (8, 8), number).save(image, "png")
            content = b"no picture" if number == 5 else image.getvalue()
            archive.writestr(f"{'cat' if number % 2 else 'dog'}/{number:02}.png", content)
    assert "cat/05.png" in server.refusal("datasets", {"name": "broken", "blob": server.upload(path)})


def test_register_model_accepts_a_nested_and_prefixed_checkpoint_as_teacher(server, their_data, tmp_path):
    """The file has the form that other training programs write; the data set is the user's own."""
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in models.build("resnet8", 3, 1).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "teacher.pth")
    model = {"name": "theirs", "blob": server.upload(tmp_path / "teacher.pth"), "architecture": "resnet8"}
    registered = server.registered("models", model)
    assert registered["facts"]["num_classes"] == 3
    job = server.ended(
        server.submit(
            {
                "dataset": their_data,
                "teacher": {"checkpoint": "model:theirs"},
                "student": "convnet4",
                "method": {"name": "kd", "form": "logits_l2"},
                "training": {"epochs": 1, "batch_size": 16},
            }
        )
    )
    assert job["result"]["teacher"]["parameters"] == registered["facts"]["parameters"]


def event_types(server, job_id: str) -> list[str]:
    return [event["type"] for event in server.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]]


def test_image_is_answered_by_teacher_and_student(server, distilled):
    """A grey picture of another size; the models run in an engine of their own."""
    stream = io.BytesIO()
    Image.new("L", (64, 48), 200).save(stream, "PNG")
    answer = server.http.post(f"/v1/jobs/{distilled['id']}/predict", content=stream.getvalue())
    if answer.status_code == httpx.codes.ACCEPTED:  # On a busy machine.
        server.wait_until(lambda: server.get(answer.headers["location"])["state"] not in ("waiting", "running"), 60)
        answer = server.http.get(answer.headers["location"])
    said = answer.json()["answer"]
    assert said["teacher"]["architecture"] == "convnet8" and said["student"]["architecture"] == "convnet4"
    assert all(len(said[model]["top"]) == 5 for model in ("teacher", "student", "alone"))


def test_no_process_has_called_another_machine(network, distilled):
    """The last test: those before it have run jobs, inspections, an evaluation and an image in this server."""
    commands = network.began()
    assert any("serve" in one for one in commands) and any("kdcore run" in one for one in commands)
    assert any("kdcore inspect" in one for one in commands)
    assert network.elsewhere() == []
