"""A home of an earlier version: the server migrates it, answers with the same content, and continues its jobs.

`tests/golden/make_home.py` made the home, with a job of every kind. `known.json` has the API's answers of that version.
The teacher and the data set are registered under the name `theirs`.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.end_to_end.embedded_server import EmbeddedServer, embedded_server

GOLDEN = Path(__file__).parents[1] / "golden"
QUEUED = ("stopped", "queued")
"""Jobs that run as soon as a server is started."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The server on the home, and the content of `known.json`."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(GOLDEN / "home_af300df.tar.xz") as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # noqa: S202
    with embedded_server(folder / "home", DISTILLERY_LOOK_S="0.3") as server:
        yield server, json.loads((folder / "known.json").read_text())
        assert server.stop() == 0


def test_stored_jobs_have_the_same_answers(opened):
    server, known = opened
    for name in ("succeeded", "failed", "cancelled"):
        expected, job_id = known["told"][name], known["jobs"][name]
        job = server.get(f"/v1/jobs/{job_id}")
        assert {field: job[field] for field in expected["job"]} == expected["job"]
        assert events(server, job_id) == expected["events"]
        assert attempts(server, job_id, "how") == expected["attempts"]
        assert metrics(server, job_id) == expected["metrics"]
        if expected["attempts"]:
            assert "training" in server.http.get(f"/v1/jobs/{job_id}/logs").text


def test_stored_artifacts_have_the_same_digests(opened):
    server, known = opened
    job_id, digests = known["jobs"]["succeeded"], known["told"]["succeeded"]["artifacts"]
    listed = server.get(f"/v1/jobs/{job_id}/artifacts")["data"]
    assert {artifact["name"]: artifact["sha256"] for artifact in listed} == digests
    for artifact in listed:
        assert sha256(server, artifact["href"]) == digests[artifact["name"]]
    assert sha256(server, f"/v1/jobs/{job_id}/checkpoint") == digests["student.safetensors"]


def test_stored_idempotency_key_answers_with_the_same_job(opened):
    server, known = opened
    answer = server.post("/v1/jobs", known["spec"], headers={"Idempotency-Key": known["key"]})
    assert (answer.status_code, answer.json()["id"]) == (200, known["jobs"]["succeeded"])


def test_stored_models_data_sets_and_students_can_be_used(opened):
    server, known = opened
    assert server.get("/v1/models/theirs")["blob"] == known["model"]
    assert server.get("/v1/datasets/theirs")["blob"] == known["dataset"]
    job_id = known["jobs"]["succeeded"]
    spec = {
        "dataset": "theirs",
        "teacher": [{"checkpoint": "model:theirs"}, {"checkpoint": f"job:{job_id}"}],
        "student": "convnet4",
        "method": "kd",
        "training": {"epochs": 1, "batch_size": 16},
        "baseline": f"job:{job_id}",
    }
    (fault,) = server.post("/v1/jobs", spec).json()["errors"]
    assert fault["pointer"] == "/baseline", "a distilled student is no baseline, as it was in the version of this home"
    models = server.ended(server.submit({**spec, "baseline": "none"}))["result"]["models"]
    student = known["told"]["succeeded"]["job"]["result"]["student"]
    assert models["teacher-2"]["accuracy"] == student["accuracy"]


def test_stored_job_answers_an_image(opened):
    server, known = opened
    stream = io.BytesIO()
    Image.new("L", (20, 30), 200).save(stream, "PNG")
    job_id = known["jobs"]["succeeded"]
    place = server.http.post(f"/v1/jobs/{job_id}/predict", content=stream.getvalue()).headers["location"]
    server.wait_until(lambda: server.get(place)["state"] not in ("waiting", "running"), 60)
    answer = server.get(place)["answer"]
    named = known["told"]["succeeded"]["job"]["result"]["student"]["architecture"]
    assert answer["student"]["architecture"] == named and answer["teacher"]["top"]


def test_stored_queued_jobs_run(opened):
    """One job had saved a checkpoint when its server was stopped; the other one had never begun."""
    server, known = opened
    stopped, queued = (known["jobs"][name] for name in QUEUED)
    server.ended(stopped)
    server.ended(queued)
    assert attempts(server, stopped, "first_step") == [None, known["steps"]["stopped"]]
    assert attempts(server, queued, "first_step") == [None]
    assert events(server, stopped)[-1] == events(server, queued)[-1] == "succeeded"


def test_stored_paused_job_can_be_exported_from_its_checkpoint(opened):
    server, known = opened
    body = {"checkpoint": "last", "export_options": {"measure": False}}
    answer = server.post(f"/v1/jobs/{known['jobs']['paused']}/exports", body)
    assert answer.status_code == 201, answer.text
    result = server.ended(answer.json()["id"])["result"]
    assert result["checkpoint"] == {"which": "last", "step": 298, "epoch": 6}
    assert [(row["format"], row["refused"]) for row in result["files"]] == [("safetensors", None)]


def test_stored_paused_job_is_resumed_from_its_checkpoint(opened):
    """The job was in the second of two stages. Its earlier metrics are unchanged, and every epoch is there once."""
    server, known = opened
    job_id, expected = known["jobs"]["paused"], known["told"]["paused"]
    job = server.get(f"/v1/jobs/{job_id}")
    assert {field: job[field] for field in expected["job"]} == expected["job"]
    assert job["checkpoint_step"] == known["steps"]["paused"]
    assert (events(server, job_id), metrics(server, job_id)) == (expected["events"], expected["metrics"])

    assert server.post(f"/v1/jobs/{job_id}/resume").status_code == 200
    job = server.ended(job_id)
    *before, last = attempts(server, job_id, "first_step")
    assert len(before) == len(expected["attempts"]) and last == known["steps"]["paused"]
    assert events(server, job_id)[: len(expected["events"])] == expected["events"]
    measured = metrics(server, job_id)
    for trial, series in expected["metrics"].items():
        for key, points in series.items():
            assert measured[trial][key][: len(points)] == points
    training = job["resolved_spec"]["training"]
    steps = [step for step, _ in measured["student"]["validation/accuracy"]]
    assert steps == [27 * epoch for epoch in range(1, training["epochs"] + 1)]
    spec = server.http.get(f"/v1/jobs/{job_id}/artifacts/spec.json").json()
    assert spec["training"]["batch_norm"] == "running", "the statistics of the version that began the job"
    assert "bits_not_repeatable" not in {warning["code"] for warning in job["warnings"]}
    listed = server.get(f"/v1/jobs/{job_id}/artifacts")["data"]
    assert sha256(server, f"/v1/jobs/{job_id}/checkpoint") in {artifact["sha256"] for artifact in listed}


def events(server: EmbeddedServer, job_id: str) -> list[str]:
    """The types of a job's events; their numbers must have no gap."""
    rows = server.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]
    assert [event["seq"] for event in rows] == list(range(1, len(rows) + 1))
    return [event["type"] for event in rows]


def attempts(server: EmbeddedServer, job_id: str, field: str) -> list[Any]:
    return [attempt[field] for attempt in server.get(f"/v1/jobs/{job_id}/attempts")["data"]]


def metrics(server: EmbeddedServer, job_id: str) -> dict[str, Any]:
    series: dict[str, Any] = server.get(f"/v1/jobs/{job_id}/metrics", max_points=10_000)["series"]
    return series


def sha256(server: EmbeddedServer, path: str) -> str:
    answer = server.http.get(path)
    assert answer.status_code == 200, answer.text
    return hashlib.sha256(answer.content).hexdigest()
