"""From a POST to a distilled checkpoint on the embedded default, as a first user walks it."""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdcore import models
from tests.end_to_end.embedded_server import service, wait_until
from tests.kdcore.engine import write_arrays
from tests.worker.table import engines

TRAINING = {"epochs": 2, "batch_size": 32, "seed": 1}
TEACHER = {"name": "teacher", "dataset": "digits", "student": "convnet8", "method": "supervised", "training": TRAINING}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with service(tmp_path_factory.mktemp("service") / "home") as one:
        yield one


@pytest.fixture(scope="module")
def taught(running):
    """A digits teacher, trained by the service itself."""
    job_id = running.submit(TEACHER)
    running.ended(job_id)
    return job_id


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
        "baseline": "train",
        **changes,
    }


def test_a_job_is_watched_and_its_student_downloaded_and_used(running, taught, tmp_path):
    job_id = running.submit(distillation(taught))
    job = running.ended(job_id)
    report = job["result"]
    assert report["gain"] == report["student"]["accuracy"] - report["alone"]["accuracy"]
    assert job["resolved_spec"]["teacher"]["architecture"] == "convnet8"

    checkpoint = running.http.get(f"/v1/jobs/{job_id}/checkpoint")
    listed = {one["name"]: one for one in running.get(f"/v1/jobs/{job_id}/artifacts")["data"]}
    assert set(listed) == {"student.safetensors", "report.json", "spec.json"}
    assert hashlib.sha256(checkpoint.content).hexdigest() == listed["student.safetensors"]["sha256"]

    path = tmp_path / "student.safetensors"
    path.write_bytes(checkpoint.content)
    network = models.build("convnet4", 10, 1)
    network.load_state_dict(load_file(path))
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_feed_has_no_gap_and_metrics_come_as_series(running, taught):
    job_id = running.submit(distillation(taught, baseline="none"))
    running.ended(job_id)
    events = running.get(f"/v1/jobs/{job_id}/events")["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "queued" and events[-1]["type"] == "succeeded"
    series = running.get(f"/v1/jobs/{job_id}/metrics")["series"]["student"]
    assert len(series["validation/accuracy"]) == TRAINING["epochs"]
    assert "train/distillation_loss" in series


def test_an_earlier_job_is_the_baseline_of_a_later_one(running, taught):
    alone = running.submit({**TEACHER, "student": "convnet4"})
    running.ended(alone)
    job = running.ended(running.submit(distillation(taught, baseline=f"job:{alone}")))
    assert job["result"]["alone"]["accuracy"] == running.get(f"/v1/jobs/{alone}")["result"]["student"]["accuracy"]


def test_five_mistakes_of_different_kinds_come_back_in_one_answer(running):
    answer = running.post(
        "/v1/jobs",
        {
            "dataset": "digitz",
            "teacher": {"checkpoint": "model:nobody"},
            "student": {"architecture": "resnet21"},
            "method": "kd",
            "temperature": -1,
            "trainning": {},
        },
    )
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    pointers = {error["pointer"] for error in answer.json()["errors"]}
    assert pointers == {"/dataset", "/teacher/checkpoint", "/student/architecture", "/temperature", "/trainning"}


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_queued(running, taught, tmp_path):
    blob = running.upload(write_arrays(tmp_path / "three.npz"))
    assert running.post("/v1/datasets", {"name": "three-blobs", "blob": blob}).status_code == 201
    before = len(running.get("/v1/jobs")["data"])
    answer = running.post("/v1/jobs", distillation(taught, dataset="three-blobs"))
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["code"], fault["got"]) == ("/teacher/checkpoint", "teacher_mismatch", 10)
    assert len(running.get("/v1/jobs")["data"]) == before


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(running, tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": Trap(sprung)}, tmp_path / "evil.pth")
    blob = running.upload(tmp_path / "evil.pth")
    answer = running.post("/v1/models", {"name": "evil", "blob": blob, "architecture": "resnet20"})
    assert answer.status_code == 422 and "system" in answer.text
    assert not sprung.exists()
    assert running.http.get("/v1/models/evil").status_code == 404


def test_one_broken_image_in_an_archive_is_named(running, tmp_path):
    path = tmp_path / "folders.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(24):
            image = io.BytesIO()
            Image.new("L", (8, 8), number).save(image, "png")
            content = b"no picture" if number == 5 else image.getvalue()
            archive.writestr(f"{'cat' if number % 2 else 'dog'}/{number:02}.png", content)
    answer = running.post("/v1/datasets", {"name": "broken", "blob": running.upload(path)})
    assert answer.status_code == 422 and "cat/05.png" in answer.text


def test_a_teacher_as_people_have_them_is_registered_and_teaches(running, tmp_path):
    """A nested, prefixed .pth of a network that somebody trained elsewhere, on data of their own."""
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in models.build("resnet8", 3, 1).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "teacher.pth")
    model = {"name": "theirs", "blob": running.upload(tmp_path / "teacher.pth"), "architecture": "resnet8"}
    registered = running.post("/v1/models", model)
    assert registered.status_code == 201 and registered.json()["facts"]["num_classes"] == 3
    data = running.upload(write_arrays(tmp_path / "blobs.npz", train=150))
    assert running.post("/v1/datasets", {"name": "their-data", "blob": data}).status_code == 201
    job = running.ended(
        running.submit(
            {
                "dataset": "their-data",
                "teacher": {"checkpoint": "model:theirs"},
                "student": "convnet4",
                "method": {"name": "kd", "form": "logits_l2"},
                "training": {"epochs": 1, "batch_size": 16},
            }
        )
    )
    assert job["result"]["teacher"]["parameters"] == registered.json()["facts"]["parameters"]


def test_a_running_job_is_cancelled_once_its_process_has_ended(running):
    job_id = running.submit({**TEACHER, "training": {**TRAINING, "epochs": 5000}})
    wait_until(lambda: running.get(f"/v1/jobs/{job_id}")["progress"] is not None, 60, running.log)
    assert len(engines(running.home)) == 2, "guard and engine"
    assert running.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
    running.ended(job_id, "cancelled")
    assert not engines(running.home)


def test_the_server_is_killed_and_started_again_and_its_job_goes_on(tmp_path):
    """`kill -9` in mid-training: nothing of the old training is left, and the job ends by itself, once."""
    timings = {"DISTILLERY_LEASE_S": "3", "DISTILLERY_HEARTBEAT_S": "0.5", "DISTILLERY_LOOK_S": "0.3"}
    with service(tmp_path / "home", **timings) as one:
        training = {**TRAINING, "epochs": 150, "checkpoint_every_s": 0.2}
        job_id = one.submit({**TEACHER, "training": training})
        wait_until(lambda: "checkpoint" in types(one, job_id), 60, one.log)
        assert engines(one.home)
        one.kill()
        wait_until(lambda: not engines(one.home), 10)
        one.start()
        job = one.ended(job_id)
        assert "claimed" in types(one, job_id)[2:], "a second attempt took it over"
        points = one.get(f"/v1/jobs/{job_id}/metrics", max_points=1000)["series"]["student"]["validation/accuracy"]
        steps = [step for step, _ in points]
        assert len(steps) == 150 and steps == sorted(set(steps))
        assert job["attempts_without_progress"] >= 1
        assert one.stop() == 0


def types(one, job_id: str) -> list[str]:
    return [event["type"] for event in one.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]]


def test_a_hidden_copy_of_the_spec_is_in_the_student(running, taught, tmp_path):
    job = running.ended(running.submit(distillation(taught, baseline="none")))
    content = running.http.get(f"/v1/jobs/{job['id']}/checkpoint").content
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    said = json.loads(header["__metadata__"]["distillery"])
    assert said["spec"]["method"]["name"] == "kd" and len(said["class_names"]) == 10
