"""A home that an earlier version left is opened by this one: migrated by itself, read, and gone on with.

`tests/golden/make_home.py` made it: a job of every kind that a home may hold, and in `known.json` what the API told of
them then. The teacher and the data are registered there under the name `theirs`.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.service import Service, service

GOLDEN = Path(__file__).parents[1] / "golden"
GOES_ON = ("stopped", "queued")
"""Jobs that run as soon as a server is there."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The server on the home, and what is known of it."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(GOLDEN / "home_af300df.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    with service(folder / "home", DISTILLERY_LOOK_S="0.3") as one:
        yield one, json.loads((folder / "known.json").read_text())
        assert one.stop() == 0


def test_stored_jobs_are_told_as_before(opened):
    one, known = opened
    for name in ("succeeded", "failed", "cancelled"):
        told, job_id = known["told"][name], known["jobs"][name]
        job = one.get(f"/v1/jobs/{job_id}")
        assert {field: job[field] for field in told["job"]} == told["job"]
        assert events(one, job_id) == told["events"]
        assert attempts(one, job_id, "how") == told["attempts"]
        assert metrics(one, job_id) == told["metrics"]
        if told["attempts"]:
            assert "training" in one.http.get(f"/v1/jobs/{job_id}/logs").text


def test_stored_artifacts_are_downloaded_whole(opened):
    one, known = opened
    job_id, kept = known["jobs"]["succeeded"], known["told"]["succeeded"]["artifacts"]
    listed = one.get(f"/v1/jobs/{job_id}/artifacts")["data"]
    assert {artifact["name"]: artifact["sha256"] for artifact in listed} == kept
    for artifact in listed:
        assert sha256(one, artifact["href"]) == kept[artifact["name"]]
    assert sha256(one, f"/v1/jobs/{job_id}/checkpoint") == kept["student.safetensors"]


def test_stored_idempotency_key_answers_with_the_same_job(opened):
    one, known = opened
    answer = one.post("/v1/jobs", known["spec"], headers={"Idempotency-Key": known["key"]})
    assert (answer.status_code, answer.json()["id"]) == (200, known["jobs"]["succeeded"])


def test_stored_models_data_sets_and_students_are_found(opened):
    one, known = opened
    assert one.get("/v1/models/theirs")["blob"] == known["model"]
    assert one.get("/v1/datasets/theirs")["blob"] == known["dataset"]
    student = known["jobs"]["succeeded"]
    spec = {
        "dataset": "theirs",
        "teacher": [{"checkpoint": "model:theirs"}, {"checkpoint": f"job:{student}"}],
        "student": "convnet4",
        "method": "kd",
        "training": {"epochs": 1, "batch_size": 16},
        "baseline": f"job:{student}",
    }
    alone = one.ended(one.submit(spec))["result"]["alone"]
    told = known["told"]["succeeded"]["job"]["result"]["student"]
    assert (alone["parameters"], alone["accuracy"]) == (told["parameters"], told["accuracy"])


def test_stored_queue_is_worked_off(opened):
    """One had a checkpoint, to which its server had brought it when it was stopped; one had never begun."""
    one, known = opened
    stopped, queued = (known["jobs"][name] for name in GOES_ON)
    one.ended(stopped)
    one.ended(queued)
    assert attempts(one, stopped, "first_step") == [None, known["steps"]["stopped"]]
    assert attempts(one, queued, "first_step") == [None]
    assert events(one, stopped)[-1] == events(one, queued)[-1] == "succeeded"


def test_stored_paused_job_is_resumed_from_its_checkpoint(opened):
    """In the second of two stages. What had been measured stays as it was, and every epoch is there once."""
    one, known = opened
    job_id, told = known["jobs"]["paused"], known["told"]["paused"]
    job = one.get(f"/v1/jobs/{job_id}")
    assert {field: job[field] for field in told["job"]} == told["job"]
    assert job["checkpoint_step"] == known["steps"]["paused"]
    assert (events(one, job_id), metrics(one, job_id)) == (told["events"], told["metrics"])

    assert one.post(f"/v1/jobs/{job_id}/resume").status_code == 200
    job = one.ended(job_id)
    *before, last = attempts(one, job_id, "first_step")
    assert len(before) == len(told["attempts"]) and last == known["steps"]["paused"]
    assert events(one, job_id)[: len(told["events"])] == told["events"]
    measured = metrics(one, job_id)
    for trial, series in told["metrics"].items():
        for key, points in series.items():
            assert measured[trial][key][: len(points)] == points
    training = job["resolved_spec"]["training"]
    steps = [step for step, _ in measured["student"]["validation/accuracy"]]
    assert steps == [27 * epoch for epoch in range(1, training["epochs"] + 1)]
    listed = one.get(f"/v1/jobs/{job_id}/artifacts")["data"]
    assert sha256(one, f"/v1/jobs/{job_id}/checkpoint") in {artifact["sha256"] for artifact in listed}


def events(one: Service, job_id: str) -> list[str]:
    """Their types, in order and without a gap."""
    told = one.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    return [event["type"] for event in told]


def attempts(one: Service, job_id: str, field: str) -> list[Any]:
    return [attempt[field] for attempt in one.get(f"/v1/jobs/{job_id}/attempts")["data"]]


def metrics(one: Service, job_id: str) -> dict[str, Any]:
    series: dict[str, Any] = one.get(f"/v1/jobs/{job_id}/metrics", max_points=10_000)["series"]
    return series


def sha256(one: Service, path: str) -> str:
    answer = one.http.get(path)
    assert answer.status_code == 200, answer.text
    return hashlib.sha256(answer.content).hexdigest()
