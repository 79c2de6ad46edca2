import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from client.commands import jobs
from tests.client.fake_service import (
    FakeFiles,
    FakeService,
    attempt,
    benchmark,
    evaluation,
    evaluation_job,
    event,
    export_job,
    job,
    listed,
    page,
    prediction,
    problem,
    report,
    teacher_check,
    warning,
)

JOBS = "POST /v1/jobs"
PROMISED = (
    "up demo submit list show watch cancel pause resume retry download models datasets uploads methods workers storage "
    "keys projects limits audit webhooks predict"
)


def run(fake: FakeService, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, obj=fake.client(), input=stdin)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_help_lists_every_command():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    for command in PROMISED.split():
        assert re.search(rf"│ {command} ", shown), command


def test_submit_makes_a_spec_from_flags():
    fake = FakeService({JOBS: job(status="queued")})
    flags = "--dataset digits --teacher model:big --teacher-architecture resnet56 --student convnet4 --method kd"
    numbers = "--temperature 4 --alpha 0.1 --beta 0.9 --epochs 15 --seed 3 --seeds 2 --baseline train --name n"
    done = run(fake, "submit", *flags.split(), *numbers.split(), "--set", "training.batch_size=64")
    assert done.exit_code == 0, done.output
    assert done.stdout == "job_1\n"
    assert "distillery watch job_1" in done.stderr
    assert fake.bodies(JOBS) == [
        {
            "name": "n",
            "dataset": "digits",
            "teacher": {"checkpoint": "model:big", "architecture": "resnet56"},
            "student": "convnet4",
            "method": "kd",
            "temperature": 4.0,
            "alpha": 0.1,
            "beta": 0.9,
            "seeds": 2,
            "baseline": "train",
            "training": {"epochs": 15, "seed": 3, "batch_size": 64},
        }
    ]


def test_submit_makes_a_sum_of_several_methods():
    fake = FakeService({JOBS: job(status="queued")})
    flags = "--method kd=0.9 --method attention --set method.attention.p=1 --set method.kd.standardize=true"
    assert run(fake, "submit", *flags.split()).exit_code == 0
    kd = {"name": "kd", "weight": 0.9, "standardize": True}
    assert fake.bodies(JOBS) == [{"method": [kd, {"name": "attention", "p": 1}]}]


@pytest.mark.parametrize("text", ["kd=lots", "kd=", "=1", "kd=nan", "kd=inf"])
def test_submit_refuses_a_method_weight_that_is_no_number(text: str):
    done = run(FakeService(), "submit", "--method", text)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: --method {text!r}: write it as NAME, or as NAME=WEIGHT")


def test_submit_takes_what_the_student_starts_from(tmp_path: Path):
    weights = tmp_path / "start.pth"
    weights.write_bytes(b"weights")
    fake = FakeFiles().service()
    fake.routes[JOBS] = job(status="queued")
    flags = ["--student", "resnet8", "--student-checkpoint", str(weights), "--freeze", "*", "--head-lr", "10"]
    done = run(fake, "submit", *flags)
    assert done.exit_code == 0, done.output
    start = {"checkpoint": f"blob:sha256:{hashlib.sha256(b'weights').hexdigest()}", "freeze": ["*"], "head_lr": 10.0}
    assert fake.bodies(JOBS) == [{"student": {"architecture": "resnet8", **start}}]


def test_submit_takes_several_teachers_assistants_and_students():
    fake = FakeService({JOBS: job(status="queued")})
    teachers = "--teacher model:a --teacher-architecture resnet56 --teacher job:b --teacher-architecture resnet110"
    others = "--assistant resnet32 --assistant resnet20 --student convnet4 --student convnet8"
    assert run(fake, "submit", *teachers.split(), *others.split()).exit_code == 0
    assert fake.bodies(JOBS) == [
        {
            "teacher": [
                {"checkpoint": "model:a", "architecture": "resnet56"},
                {"checkpoint": "job:b", "architecture": "resnet110"},
            ],
            "assistants": ["resnet32", "resnet20"],
            "student": ["convnet4", "convnet8"],
        }
    ]
    assert run(fake, "submit", "--assistant", "resnet20").exit_code == 0
    assert fake.bodies(JOBS)[1] == {"assistants": ["resnet20"]}


@pytest.mark.parametrize("name", ["teacher.pt2", "teacher.onnx", "TEACHER.ONNX"])
def test_submit_uploads_a_program(tmp_path: Path, name: str):
    program = tmp_path / name
    program.write_bytes(b"program")
    fake = FakeFiles().service()
    fake.routes[JOBS] = job(status="queued")
    done = run(fake, "submit", "--teacher", str(program))
    assert done.exit_code == 0, done.output
    digest = hashlib.sha256(b"program").hexdigest()
    assert fake.bodies(JOBS) == [{"teacher": {"program": f"blob:sha256:{digest}"}}]


def test_submit_uploads_and_registers_unlabelled_images(tmp_path: Path):
    images = tmp_path / "images.npz"
    images.write_bytes(b"images")
    fake = FakeFiles().service()
    fake.routes.update({JOBS: job(status="queued"), "POST /v1/datasets": {}})
    done = run(fake, "submit", "--dataset", "digits", "--unlabelled", str(images), "--set", "unlabelled.labels=none")
    assert done.exit_code == 0, done.output
    (registered,) = fake.bodies("POST /v1/datasets")
    assert fake.bodies(JOBS) == [
        {"dataset": "digits", "unlabelled": {"source": registered["name"], "labels": "none"}},
    ]


def test_submit_flags_override_the_file(tmp_path: Path):
    fake = FakeService({JOBS: job(status="queued")})
    spec = tmp_path / "spec.yaml"
    spec.write_text("dataset: digits\nstudent: convnet4\ntraining: {epochs: 3, seed: 1}\n")
    assert run(fake, "submit", str(spec), "--student", "convnet8", "--seed", "2").exit_code == 0
    assert fake.bodies(JOBS) == [{"dataset": "digits", "student": "convnet8", "training": {"epochs": 3, "seed": 2}}]


def test_submit_reads_standard_input():
    fake = FakeService({JOBS: job(status="queued")})
    assert run(fake, "submit", "-", "--json", stdin='{"dataset": "digits"}').exit_code == 0
    assert fake.bodies(JOBS) == [{"dataset": "digits"}]


def test_submit_uploads_and_registers_a_local_teacher(tmp_path: Path):
    checkpoint = tmp_path / "t.pth"
    checkpoint.write_bytes(b"weights")
    fake = FakeFiles().service()
    fake.routes.update({JOBS: job(status="queued"), "POST /v1/models": {}})
    done = run(fake, "submit", "--teacher", str(checkpoint), "--teacher-architecture", "resnet56")
    assert done.exit_code == 0, done.output
    (model,) = fake.bodies("POST /v1/models")
    assert model["architecture"] == "resnet56"
    assert fake.bodies(JOBS)[0]["teacher"]["checkpoint"] == f"model:{model['name']}"


def test_submit_sends_the_idempotency_key():
    fake = FakeService({JOBS: job(status="queued")})
    run(fake, "submit", "--dataset", "digits", "--idempotency-key", "mine")
    assert fake.requests[0].headers["idempotency-key"] == "mine"


def test_submit_without_a_spec_is_an_error():
    done = run(FakeService(), "submit")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: nothing to submit")


def test_submit_prints_a_line_for_each_fault_and_exits_with_2():
    faults = [{"pointer": "/student", "message": "is needed"}, {"pointer": "/alpha", "message": "must be ≥ 0"}]
    done = run(FakeService({JOBS: problem(422, "spec_invalid", errors=faults)}), "submit", "--dataset", "digits")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: spec invalid", "  /student: is needed", "  /alpha: must be ≥ 0"]


def test_list_without_a_server_prints_how_to_start_one():
    done = run(FakeService({"GET /v1/jobs": httpx.ConnectError("Connection refused")}), "list")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[0] == "error: no answer from http://fake: Connection refused"
    assert "./run up" in done.stderr


def test_submit_dry_run_prints_the_resolved_spec_or_every_fault():
    answer: dict[str, Any] = {
        "valid": True,
        "errors": [],
        "warnings": [],
        "resolved_spec": {"alpha": 0.1},
        "estimate": {"steps": 5},
    }
    fake = FakeService({"POST /v1/jobs/validate": answer})
    done = run(fake, "submit", "--dataset", "digits", "--dry-run")
    assert json.loads(done.stdout) == {"resolved_spec": {"alpha": 0.1}, "estimate": {"steps": 5}}
    assert done.stderr == "estimate: 5 steps; their time was never measured\n"
    fake.routes["POST /v1/jobs/validate"] = {
        **answer,
        "valid": False,
        "errors": [{"pointer": "/a", "message": "no"}],
    }
    done = run(fake, "submit", "--dataset", "digits", "--dry-run")
    assert (done.exit_code, done.stderr) == (2, "/a: no\n")
    assert fake.requests_to(JOBS) == []


def ending(status: str) -> FakeService:
    error = {"code": "loss_diverged", "message": "nan", "retryable": False, "hint": None}
    ended = job(status=status, result=report() if status == "succeeded" else None)
    return FakeService(
        {
            JOBS: job(status="queued"),
            "GET /v1/jobs/job_1/events/stream": problem(501, "none"),
            "GET /v1/jobs/job_1/events": page([event(1, "queued"), event(2, status)]),
            "GET /v1/jobs/job_1": {**ended, "error": error if status == "failed" else None},
        }
    )


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("succeeded", 0, "+5.0 points"), ("failed", 1, "loss_diverged: nan"), ("cancelled", 1, "job job_1 cancelled")],
)
def test_watch_exits_with_the_result_of_the_job(status: str, code: int, expected: str):
    for arguments in (["watch", "job_1"], ["submit", "--dataset", "digits", "--watch"]):
        done = run(ending(status), *arguments)
        assert done.exit_code == code, done.output
        assert expected in done.stdout


def test_watch_json_prints_a_line_for_each_event():
    done = run(ending("failed"), "watch", "job_1", "--json")
    assert done.exit_code == 1
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["queued", "failed"]


def test_watch_detaches_on_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    fake = FakeService({"GET /v1/jobs/job_1": job(status="running")})
    done = run(fake, "watch", "job_1")
    assert done.exit_code == 130
    assert "the job continues" in done.stderr
    assert fake.requests_to("POST /v1/jobs/job_1/cancel") == []


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
def test_actions_on_a_job(verb: str):
    done = run(FakeService({f"POST /v1/jobs/job_1/{verb}": job(status="running", requested=verb)}), verb, "job_1")
    assert (done.exit_code, done.stdout) == (0, f"job_1 is running, {verb} requested\n")


def test_retry_from_checkpoint_or_from_scratch():
    fake = FakeService({"POST /v1/jobs/job_1/retry": job(status="queued")})
    assert run(fake, "retry", "job_1").exit_code == 0
    assert run(fake, "retry", "job_1", "--from", "scratch").exit_code == 0
    assert fake.bodies("POST /v1/jobs/job_1/retry") == [{"from": "checkpoint"}, {"from": "scratch"}]
    assert run(fake, "retry", "job_1", "--from", "start").exit_code == 2
    assert len(fake.requests) == 2


def test_submit_makes_scheduling_from_flags():
    fake = FakeService({JOBS: job(status="queued")})
    flags = "--student convnet4 --priority -5 --deadline 1h30m --max-attempts 7"
    assert run(fake, "submit", *flags.split()).exit_code == 0
    scheduling = {"priority": -5, "deadline_s": 5400, "max_attempts": 7}
    assert fake.bodies(JOBS) == [{"student": "convnet4", "scheduling": scheduling}]
    done = run(fake, "submit", "--deadline", "tomorrow")
    assert done.exit_code == 2
    assert done.stderr == "error: --deadline 'tomorrow': write it in seconds, or as 30m, 8h, 1h30m or 2d\n"


def test_workers():
    fake = FakeService({"GET /v1/workers": page([{"id": "w1", "alive": True, "devices": [], "seen_at": "now"}])})
    assert "w1" in run(fake, "workers").stdout
    assert json.loads(run(fake, "workers", "--json").stdout)[0]["alive"] is True
    assert "distillery up" in run(FakeService({"GET /v1/workers": page([])}), "workers").stderr


def test_storage():
    removed = {"to_trash": {"count": 2, "bytes": 4096}, "logs": {"count": 1, "bytes": 10}}
    ran = {"id": "col_1", "host": "h", "began_at": "then", "ended_at": "now", "removed": removed, "error": "logs: busy"}
    killed = {**ran, "ended_at": None, "removed": None, "error": None}
    usage = {
        "project": {"open_uploads": {"files": 1, "bytes": 30}},
        "usage": {"blobs": {"files": 1234, "bytes": 5_678_901}},
        "free_bytes": 100,
        "min_free_bytes": 200,
        "collections": [killed, ran],
    }
    shown = run(FakeService({"GET /v1/storage": usage}), "storage").stdout
    assert re.search(r"all +blobs +1,234 +5,678,901", shown)
    assert re.search(r"project +open uploads +1 +30", shown)
    assert "100 bytes are free, 200 are needed to start a job: no job is started\n" in shown
    assert re.search(r"then +has not ended", shown)
    assert re.search(r"then +2 to trash \(4,096 bytes\), 1 logs \(10 bytes\) +logs: busy", shown)
    assert json.loads(run(FakeService({"GET /v1/storage": usage}), "storage", "--json").stdout) == usage
    enough = {**usage, "free_bytes": 200, "collections": []}
    shown = run(FakeService({"GET /v1/storage": enough}), "storage").stdout
    assert "no job is started" not in shown
    assert "collected at" not in shown


def test_storage_collect_and_uploads():
    usage = {"project": {}, "usage": {}, "free_bytes": 300, "min_free_bytes": 200, "collections": []}
    fake = FakeService({"POST /v1/storage/collections": {"id": "col_1"}, "GET /v1/storage": usage})
    assert "300 bytes are free" in run(fake, "storage", "--collect").stdout
    row = {"id": "up_1", "filename": None, "offset": 1000, "bytes": 2560, "status": "open", "blob": None}
    uploads = FakeService({"GET /v1/uploads": page([row]), "DELETE /v1/uploads/up_1": ""})
    assert re.search(r"1,000 +2,560 +open +up_1", run(uploads, "uploads").stdout)
    assert "up_1 removed" in run(uploads, "uploads", "remove", "up_1").stdout


def limits_of(**limits: object) -> dict[str, object]:
    default = {"value": None, "used": 0, "is_default": True, "counts_in": "project"}
    return {"project": "ours", "limits": {name: {**default, **one} for name, one in limits.items()}}


def test_limits():
    rate = {"value": 1000, "counts_in": "process"}
    view = limits_of(
        jobs_queued={"value": 10_000, "used": 1234, "is_default": False}, bytes_stored={}, requests_per_s=rate
    )
    fake = FakeService({"GET /v1/limits": view})
    shown = run(fake, "limits", "--project", "ours").stdout
    assert dict(fake.requests[0].url.params) == {"project": "ours"}
    assert re.search(r"jobs_queued +10,000 +1,234 +set", shown)
    assert re.search(r"bytes_stored +none +0", shown)
    assert re.search(r"requests_per_s +1,000 +0 +in one API process", shown)


def test_limits_are_set():
    change = "PATCH /v1/projects/ours"
    fake = FakeService({"GET /v1/limits": limits_of(), change: limits_of(jobs_running={"value": 4})})
    assert re.search(r"jobs_running +4", run(fake, "limits", "jobs_running=4", "bytes_stored=default").stdout)
    assert fake.bodies(change) == [{"limits": {"jobs_running": 4, "bytes_stored": None}}]
    assert "NAME=default" in run(fake, "limits", "jobs_running=many").stderr


def test_audit():
    entry = {
        "id": "audit_1", "at": "2026-11-29T10:00:00Z", "project": "ours", "key_id": "key_1", "key_name": "ann",
        "role": "member", "action": "job.submit", "resource": "job_1", "address": "10.0.0.7", "request_id": "req_1",
        "outcome": "done", "details": {},
    }  # fmt: skip
    nobody = {"key_id": None, "key_name": None, "role": None, "project": None, "resource": None}
    wrong = {**entry, **nobody, "action": "key.refused", "outcome": "refused", "details": {"path": "/v1/jobs"}}
    fake = FakeService({"GET /v1/audit": page([entry, wrong])})
    shown = run(fake, "audit", "--key", "ann", "--refused").stdout
    assert re.search(r"ann \(member\) +job.submit +job_1 +10.0.0.7 +ours", shown)
    assert re.search(r"unknown key +key.refused +/v1/jobs", shown)
    sent = dict(fake.requests[0].url.params)
    assert (sent["key"], sent["outcome"]) == ("ann", "refused")
    assert json.loads(run(fake, "audit", "--json").stdout)[0] == entry
    assert run(FakeService({"GET /v1/audit": page([])}), "audit").stderr == "no entries\n"


def test_cancel_that_is_not_allowed_prints_the_allowed_actions():
    refusal = problem(409, "action_not_allowed", "job_1 is succeeded", allowed_actions=["delete"])
    done = run(FakeService({"POST /v1/jobs/job_1/cancel": refusal}), "cancel", "job_1")
    assert done.exit_code == 2
    assert "allowed actions: delete" in done.stderr


def test_list_has_a_limit_and_a_filter():
    fake = FakeService({"GET /v1/jobs": page([listed(job(id=f"job_{n}")) for n in range(3)], "more")})
    done = run(fake, "list", "--limit", "2", "--status", "running", "--json")
    assert [one["id"] for one in json.loads(done.stdout)] == ["job_0", "job_1"]
    assert dict(fake.requests[0].url.params) == {"status": "running", "limit": "2"}
    assert "job_2" in run(fake, "list", "--limit", "3").stdout


def test_list_sends_filters_that_combine_and_shows_labels():
    fake = FakeService({"GET /v1/jobs": page([listed(job(labels={"team": "vision"}))])})
    flags = ("--label", "team=vision", "--label", "urgent", "--status", "queued", "--status", "running")
    shown = run(fake, "list", *flags, "--sort=-accuracy", "--teacher", "resnet56").stdout
    assert "team=vision" in shown
    sent = fake.requests[0].url.params
    assert sent.get_list("labels") == ["team:vision", "urgent"]
    assert sent.get_list("status") == ["queued", "running"]
    assert (sent["sort"], sent["teacher"]) == ("-accuracy", "resnet56")


def test_label_replaces_the_labels():
    answer = {"labels": {"team": "vision", "note": "a=b"}}
    fake = FakeService({"PATCH /v1/jobs/job_1": answer, "PATCH /v1/models/big": answer})
    assert "team=vision note=a=b" in run(fake, "label", "job_1", "team=vision", "note=a=b").stdout
    assert json.loads(fake.requests[0].content) == answer
    assert run(fake, "label", "model:big").exit_code == 0
    assert json.loads(fake.requests[1].content) == {"labels": {}}
    assert "name=value" in run(fake, "label", "job_1", "team").stderr


def test_list_of_no_jobs_prints_a_hint():
    assert "distillery submit" in run(FakeService({"GET /v1/jobs": page([])}), "list").stderr


def test_show():
    file = {
        "name": "student.onnx", "format": "onnx", "bytes": 1234, "runtime": "onnxruntime 1.28", "accuracy": 0.812,
        "agreement": 0.995, "latency": [{"batch": 1, "p50_ms": 0.37, "p95_ms": 1, "cpu_share": 0.4}], "refused": None,
    }  # fmt: skip
    artifact = {"name": "report.html", "bytes": 7, "sha256": "0" * 64, "media_type": "text/html", "href": "/"}
    fake = FakeService(
        {
            "GET /v1/jobs/job_1": job(result={**report(), "files": [file]}),
            "GET /v1/jobs/job_1/artifacts": page([{**artifact, "name": "student.onnx"}, artifact]),
            "GET /v1/jobs/job_1/attempts": page([attempt(1, how="lost"), attempt(2, how="succeeded", first_step=40)]),
            "GET /v1/jobs/job_1/logs": httpx.Response(200, text="what it printed\n"),
            "GET /v1/jobs/job_1/events": page([event(1, "queued")]),
        }
    )
    shown = run(fake, "show", "job_1").stdout
    assert "student alone" in shown
    assert "allowed actions" in shown
    assert re.search(r"student.onnx +onnxruntime 1.28 +1,234 +81.2 % +99.5 % +0.37", shown)
    assert "files to download: student.onnx, report.html\n" in shown
    assert "a file had 40 % of it): the latencies are too long\n" in shown
    assert re.search(r"^ *1 +0 +lost .*host-7-abc", shown, re.MULTILINE)
    assert re.search(r"^ *2 +40 +succeeded ", shown, re.MULTILINE)
    assert json.loads(run(fake, "show", "job_1", "--json").stdout)["id"] == "job_1"
    assert run(fake, "show", "job_1", "--logs").stdout == "what it printed\n"
    assert run(fake, "show", "job_1", "--events").stdout == "03:04:01  queued\n"
    assert json.loads(run(fake, "show", "job_1", "--events", "--json").stdout)["seq"] == 1


def test_download_prints_path_size_and_digest(tmp_path: Path):
    done = run(FakeFiles(b"weights").service(), "download", "job_1", "--to", str(tmp_path / "s.st"))
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 's.st'}  7 bytes  sha256:{hashlib.sha256(b'weights').hexdigest()}\n"


def test_delete_and_remove():
    fake = FakeService({"DELETE /v1/jobs/job_1": httpx.Response(204), "DELETE /v1/models/m": httpx.Response(204)})
    fake.routes["DELETE /v1/datasets/d"] = httpx.Response(204)
    assert run(fake, "delete", "job_1").stdout == "job_1 deleted\n"
    assert run(fake, "models", "remove", "m").stdout == "m removed\n"
    assert run(fake, "datasets", "remove", "d").stdout == "d removed\n"


def test_models_and_datasets_list_and_add(tmp_path: Path):
    facts = {"architecture": "resnet56", "num_classes": 100, "parameters": 861_620}
    model = {"name": "t", "facts": facts, "warnings": [], "id": "mdl_1"}
    facts = {"num_classes": 10, "channels": 1, "image_size": [8, 8], "train": 1437, "test": 360}
    dataset = {"name": "digits", "facts": facts, "warnings": [], "id": None}
    file = tmp_path / "t.pth"
    file.write_bytes(b"bytes")
    for kind, one, extra in (("models", model, ["--architecture", "resnet56"]), ("datasets", dataset, [])):
        fake = FakeFiles().service()
        fake.routes.update({f"GET /v1/{kind}": page([one]), f"POST /v1/{kind}": one})
        assert one["name"] in run(fake, kind).stdout
        assert json.loads(run(fake, kind, "--json").stdout) == [one]
        done = run(fake, kind, "add", str(file), *extra)
        assert done.exit_code == 0, done.output
        assert f"{one['name']}\n" in done.stderr
        assert fake.bodies(f"POST /v1/{kind}")[0]["name"] == "t"


def test_datasets_add_packs_a_folder(tmp_path: Path):
    folder = tmp_path / "flowers"
    (folder / "rose").mkdir(parents=True)
    (folder / "rose" / "1.png").write_bytes(b"rose")
    files = FakeFiles()
    fake = files.service()
    facts = {"num_classes": 2, "channels": 3, "image_size": [8, 8], "train": 9, "test": 1}
    fake.routes["POST /v1/datasets"] = {"name": "flowers", "facts": facts, "warnings": [], "id": "dat_1"}
    done = run(fake, "datasets", "add", str(folder))
    assert done.exit_code == 0, done.output
    assert fake.bodies("POST /v1/datasets")[0]["name"] == "flowers"
    assert b"rose/1.png" in files.taken
    (folder / "rose" / "1.png").unlink()
    done = run(fake, "datasets", "add", str(folder))
    assert done.exit_code == 2 and "holds no files" in done.stderr


def test_datasets_add_sends_the_options_that_are_given(tmp_path: Path):
    facts = {"num_classes": 10, "channels": 1, "image_size": [8, 8], "train": 1437, "test": 360}
    file = tmp_path / "t.zip"
    file.write_bytes(b"bytes")
    fake = FakeFiles().service()
    fake.routes["POST /v1/datasets"] = {"name": "t", "facts": facts, "warnings": [], "id": "ds_1"}
    words = [
        "--image-size",
        "224",
        "--resize-to",
        "256",
        "--interpolation",
        "bicubic",
        "--channels",
        "3",
        "--orientation",
        "apply",
    ]
    done = run(fake, "datasets", "add", str(file), *words, "--skip-unreadable", "--limit", "50", "--encoding", "cp932")
    assert done.exit_code == 0, done.output
    (body,) = fake.bodies("POST /v1/datasets")
    expected = {"image_size": 224, "resize_to": 256, "interpolation": "bicubic", "channels": 3, "orientation": "apply"}
    more = {"skip_unreadable": True, "limit": 50, "encoding": "cp932"}
    assert {name: value for name, value in body.items() if name not in ("name", "blob")} == {**expected, **more}
    assert run(fake, "datasets", "add", str(file), "--resize", "pad").exit_code == 0
    assert fake.bodies("POST /v1/datasets")[-1].keys() == {"name", "blob", "resize"}


def inspecting_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeService, Path]:
    """A service that inspects the data set of a file for a while."""
    monkeypatch.setattr("client.sdk.INSPECTION_POLL_S", 0)
    file = tmp_path / "t.zip"
    file.write_bytes(b"bytes")
    fake = FakeFiles().service()
    row = {"id": "ds_1", "name": "t", "facts": None, "warnings": [], "error": None}
    waiting = {**row, "state": "inspecting", "progress": {"done": 1200, "total": 60000}}
    fake.routes["POST /v1/datasets"] = httpx.Response(202, json=waiting)
    fake.routes["DELETE /v1/datasets/ds_1"] = httpx.Response(204)
    facts = {"num_classes": 10, "channels": 1, "image_size": [8, 8], "train": 1437, "test": 360}
    fake.routes["GET /v1/datasets/ds_1"] = [waiting, {**row, "state": "ready", "progress": None, "facts": facts}]
    error = {"code": "unusable", "message": "no pictures", "hint": "add some", "errors": []}
    fake.routes["GET /v1/datasets"] = page(
        [waiting, {**row, "name": "u", "state": "refused", "progress": None, "error": error}]
    )
    return fake, file


def test_datasets_add_waits_for_the_inspection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake, file = inspecting_dataset(monkeypatch, tmp_path)
    done = run(fake, "datasets", "add", str(file))
    assert done.exit_code == 0 and "1,437" in done.stdout and "use it: --dataset t" in done.stderr


def test_datasets_add_no_wait_and_the_list_show_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake, file = inspecting_dataset(monkeypatch, tmp_path)
    done = run(fake, "datasets", "add", str(file), "--no-wait")
    assert done.exit_code == 0 and "inspecting, 1,200 of 60,000 images" in done.stdout
    assert "it is still being inspected" in done.stderr and not fake.requests_to("GET /v1/datasets/ds_1")
    done = run(fake, "datasets")
    assert "inspecting, 1,200 of 60,000 images" in done.stdout and "refused" in done.stdout
    assert done.stderr.splitlines() == ["u was refused: no pictures", "  hint: add some"]


def test_datasets_add_that_is_interrupted_cancels_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupt(_: httpx.Request) -> httpx.Response:
        raise KeyboardInterrupt

    fake, file = inspecting_dataset(monkeypatch, tmp_path)
    fake.routes["GET /v1/datasets/ds_1"] = interrupt
    done = run(fake, "datasets", "add", str(file))
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (130, "cancelled; nothing is registered")
    assert len(fake.requests_to("DELETE /v1/datasets/ds_1")) == 1


def evaluating(**changes: Any) -> FakeService:
    done = evaluation_job(**changes)
    events = [event(1, "queued"), event(2, "phase", phase="evaluating"), event(3, done["status"])]
    return FakeService(
        {
            "POST /v1/models/big/evaluations": {**done, "status": "queued", "result": None},
            "GET /v1/jobs/job_1": done,
            "GET /v1/jobs/job_1/events/stream": problem(501, "none"),
            "GET /v1/jobs/job_1/events": page(events),
        }
    )


def test_models_evaluate_prints_accuracy_and_interval_and_warnings_on_standard_error():
    warning = {
        "code": "normalization_guessed",
        "pointer": "/preprocessing",
        "message": "nothing says how",
        "hint": "say",
    }
    fake = evaluating(warnings=[warning])
    done = run(fake, "models", "evaluate", "big", "--dataset", "digits", "--image-size", "8", "--strict")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "accuracy 75.0 % (95 % interval 70.1 to 79.4 %, 1,400 test images)",
        "top-5 accuracy 100.0 %, loss 0.1",
        "convnet4, 1,030 parameters",
        "least accurate classes: dog 50.0 %, fox 70.0 %, gnu 80.0 %",
    ]
    assert "warning: normalization_guessed (/preprocessing)\n" in done.stderr
    assert "phase  evaluating" in done.stderr
    assert fake.bodies("POST /v1/models/big/evaluations") == [{"dataset": "digits", "image_size": 8, "strict": True}]


def test_models_evaluate_sends_the_class_map():
    fake = evaluating()
    done = run(fake, "models", "evaluate", "big", "--dataset", "digits", "--class-map", '{"cat": ["tabby", 282]}')
    assert done.exit_code == 0, done.output
    assert fake.bodies("POST /v1/models/big/evaluations") == [
        {"dataset": "digits", "class_map": {"cat": ["tabby", 282]}}
    ]


def test_models_evaluate_json_prints_only_the_job_on_standard_output():
    done = run(evaluating(), "models", "evaluate", "big", "--dataset", "digits", "--json")
    assert json.loads(done.stdout)["result"]["accuracy"] == 0.75


def test_models_evaluate_that_fails_exits_with_1():
    error = {"code": "teacher_mismatch", "message": "it does not fit", "retryable": False, "hint": None}
    fake = evaluating(status="failed", error=error, result=None)
    done = run(fake, "models", "evaluate", "big", "--dataset", "digits")
    assert done.exit_code == 1 and done.stdout == "" and "teacher_mismatch: it does not fit" in done.stderr


def test_models_evaluate_refused_prints_the_faults():
    fault = {"pointer": "/dataset", "message": "there is no data set", "code": "not_found"}
    fake = FakeService({"POST /v1/models/big/evaluations": problem(422, "spec_invalid", errors=[fault])})
    done = run(fake, "models", "evaluate", "big", "--dataset", "digitz")
    assert done.exit_code == 2 and "/dataset: there is no data set" in done.stderr


def exporting(**changes: Any) -> FakeService:
    done = export_job(**changes)
    files = [artifact_of(name, content) for name, content in (("student.onnx", b"graph"), ("report.json", b"{}"))]
    return FakeService(
        {
            "POST /v1/jobs/job_0/exports": {**done, "status": "queued", "result": None},
            "GET /v1/jobs/job_1": done,
            "GET /v1/jobs/job_1/events/stream": problem(501, "none"),
            "GET /v1/jobs/job_1/events": page([event(1, "queued"), event(2, done["status"])]),
            "GET /v1/jobs/job_1/artifacts": page(files),
            "GET /v1/jobs/job_1/artifacts/student.onnx": httpx.Response(200, content=b"graph"),
            "GET /v1/jobs/job_1/artifacts/report.json": httpx.Response(200, content=b"{}"),
        }
    )


def artifact_of(name: str, content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    href = f"/v1/jobs/job_1/artifacts/{name}"
    return {"name": name, "sha256": sha256, "bytes": len(content), "media_type": "application/json", "href": href}


def test_export_prints_each_file_and_fetches_them(tmp_path: Path):
    fake = exporting()
    options = ("--format", "onnx", "--format", "onnx_int8", "--checkpoint", "last", "--tolerance", "0.1")
    done = run(fake, "export", "job_0", *options, "--out", str(tmp_path / "files"))
    assert done.exit_code == 0, done.output
    options = {"tolerance": 0.1}
    assert fake.bodies("POST /v1/jobs/job_0/exports") == [
        {"export": ["onnx", "onnx_int8"], "checkpoint": "last", "export_options": options}
    ]
    assert "convnet4, last weights of job_0, epoch 7, checkpoint of step 1,200" in done.stdout
    assert "accuracy 63.9 % (95 % interval 58.8 to 68.7 %)" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "student.onnx " in line)
    assert row.split() == [
        "student.onnx",
        "onnxruntime",
        "1.28.0",
        "19,114",
        "63.9",
        "%",
        "98.9",
        "%",
        "0.01",
        "1.50",
        "51",
        "MiB",
    ]
    assert "refused: it lost too much" in done.stdout
    assert (tmp_path / "files" / "student.onnx").read_bytes() == b"graph"
    assert str(tmp_path / "files" / "report.json") in done.stdout


def test_export_that_does_not_wait_prints_the_new_jobs_id():
    fake = exporting()
    done = run(fake, "export", "job_0", "--no-wait", "--strict")
    assert (done.exit_code, done.stdout) == (0, "job_1\n")
    assert fake.bodies("POST /v1/jobs/job_0/exports") == [
        {"export": ["safetensors"], "checkpoint": "best", "strict": True}
    ]
    done = run(exporting(), "export", "job_0", "--no-wait", "--out", "files")
    assert done.exit_code == 2 and "--no-wait does not wait" in done.stderr


def test_export_that_fails_or_is_refused_says_why():
    error = {"code": "spec_invalid", "message": "no epoch is the best", "retryable": False, "hint": "take 'last'"}
    done = run(exporting(status="failed", error=error, result=None), "export", "job_0")
    assert done.exit_code == 1 and "no epoch is the best" in done.stderr and done.stdout == ""
    refused = problem(409, "not_exportable", "the job has no checkpoint", allowed_checkpoints=[])
    done = run(FakeService({"POST /v1/jobs/job_0/exports": refused}), "export", "job_0")
    assert done.exit_code == 2 and "the job has no checkpoint" in done.stderr


def benchmarking(made: dict[str, Any], **job_changes: Any) -> FakeService:
    measuring = job(**{"kind": "benchmark", "method": "benchmark", **job_changes})
    return FakeService(
        {
            "POST /v1/benchmarks": made,
            "GET /v1/benchmarks": page([benchmark()]),
            f"GET /v1/benchmarks/{made['key']}": benchmark(),
            "GET /v1/jobs/job_1": measuring,
            "GET /v1/jobs/job_1/events/stream": problem(501, "none"),
            "GET /v1/jobs/job_1/events": page([event(1, "queued"), event(2, measuring["status"])]),
        }
    )


def test_benchmark_waits_for_the_figures_and_prints_them():
    fake = benchmarking(benchmark(status="queued", figures=None, measured_at=None))
    options = ("--image-size", "8", "--channels", "1", "--threads", "1", "--anew")
    done = run(fake, "benchmark", "convnet8", *options)
    assert done.exit_code == 0, done.output
    assert fake.bodies("POST /v1/benchmarks") == [
        {"architecture": "convnet8", "image_size": 8, "channels": 1, "threads": 1, "anew": True}
    ]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("convnet8, 3,778 parameters, 2.5 million multiplications an image; images of 1 x 8 x 8")
    assert lines[1] == "on fast, 1 thread"
    assert "accuracy" not in done.stdout and "measured at 2026-01-02" in done.stdout


def test_benchmark_of_a_model_or_a_job_that_is_kept_asks_for_no_job():
    for named, field in (("model:big", "model"), ("job:job_7", "job")):
        fake = benchmarking(benchmark())
        done = run(fake, "benchmark", named, "--json")
        assert json.loads(done.stdout)["figures"]["macs"] == 2_500_000
        assert fake.bodies("POST /v1/benchmarks") == [{field: named.partition(":")[2]}]
        assert not fake.requests_to("GET /v1/jobs/job_1")


def test_benchmark_that_fails_exits_with_1_and_lists_without_a_network():
    error = {"code": "out_of_memory", "message": "no memory", "retryable": False, "hint": None}
    made = benchmark(status="queued", figures=None, measured_at=None)
    done = run(benchmarking(made, status="failed", error=error), "benchmark", "convnet8")
    assert done.exit_code == 1 and "no memory" in done.stderr and done.stdout == ""
    done = run(benchmarking(made), "benchmark")
    assert done.exit_code == 0 and "convnet8, 3,778 parameters" in done.stdout


def suggested(**changes: Any) -> dict[str, Any]:
    one = {
        "architecture": "convnet8", "format": "onnx", "runtime": "onnxruntime 1.28.0",
        "device": {"kind": "cpu", "name": "fast"}, "threads": 2, "bytes": 19_114, "p50_ms": 0.5, "p95_ms": 1.0,
        "batch": 1,
        "parameters": 3778, "macs": None, "accuracy": 0.639, "accuracy_job": "job_1", "accuracy_of": "file",
        "measured_by": "job_1", "measured_at": "2026-01-02T03:04:05.000Z",
    }  # fmt: skip
    body = {"architecture": "convnet4", "num_classes": 10, "channels": 3, "image_size": 32}
    missing = [{"architecture": "convnet4", "parameters": 1000, "body": body}]
    fields = {"ranked_by": "accuracy", "why": "ranked by accuracy", "data": [one], "measured": 1}
    return {**fields, "not_measured": missing, "not_measured_count": 9, **changes}


def test_suggest_prints_what_fits_and_how_to_measure_more():
    fake = FakeService({"GET /v1/suggestions": suggested()})
    done = run(fake, "suggest", "--ms", "2", "--image-size", "32")
    assert done.exit_code == 0, done.output
    (request,) = fake.requests_to("GET /v1/suggestions")
    assert dict(request.url.params) == {"budget_ms": "2.0", "image_size": "32"}
    row = next(line for line in done.stdout.splitlines() if "onnxruntime" in line)
    assert row.split() == [
        "convnet8",
        "onnx",
        "onnxruntime",
        "1.28.0",
        "fast,",
        "2",
        "threads",
        "0.50",
        "19,114",
        "3,778",
        "63.9",
        "%",
    ]
    assert "not measured at this shape: convnet4 and 3 more" in done.stdout
    assert "measure one: distillery benchmark convnet4 --image-size 32 --channels 3 --classes 10" in done.stdout
    nothing = FakeService({"GET /v1/suggestions": suggested(data=[])})
    assert run(nothing, "suggest", "--bytes", "5").exit_code == 1


def test_list_and_show_an_evaluation():
    done = evaluation_job()
    attempts = "GET /v1/jobs/job_1/attempts"
    fake = FakeService({"GET /v1/jobs": page([listed(done)]), "GET /v1/jobs/job_1": done, attempts: page([])})
    assert "75.0 %" in run(fake, "list", "--kind", "evaluation").stdout
    assert fake.requests[0].url.params["kind"] == "evaluation"
    assert "95 % interval 70.1 to 79.4 %" in run(fake, "show", "job_1").stdout


WARNED = [
    "warning: normalization_guessed (/teacher/preprocessing)",
    "  the data's mean is used",
    "  hint: give the teacher's",
]


def test_submit_prints_warnings_on_standard_error():
    fake = FakeService({JOBS: job(status="queued", warnings=[warning()])})
    done = run(fake, "submit", "--dataset", "digits")
    assert (done.exit_code, done.stdout) == (0, "job_1\n")
    assert done.stderr.splitlines() == [*WARNED, "follow it: distillery watch job_1"]
    done = run(fake, "submit", "--dataset", "digits", "--json")
    assert json.loads(done.stdout)["warnings"] == [warning()]
    assert done.stderr.splitlines() == WARNED


def test_submit_dry_run_prints_warnings_on_standard_error():
    answer = {"valid": True, "errors": [], "warnings": [warning()], "resolved_spec": {}, "estimate": None}
    for flags in ([], ["--json"]):
        done = run(
            FakeService({"POST /v1/jobs/validate": answer}), "submit", "--dataset", "digits", "--dry-run", *flags
        )
        assert done.exit_code == 0
        assert done.stderr.splitlines() == WARNED
        assert "warning: " not in done.stdout


def test_submit_watch_prints_each_warning_once():
    at_submit, later = warning(), warning("student_at_chance", "")
    fake = ending("succeeded")
    fake.routes[JOBS] = job(status="queued", warnings=[at_submit])
    fake.routes["GET /v1/jobs/job_1"]["warnings"] = [at_submit, later]
    events = [event(1, "queued"), event(2, "warning", **later), event(3, "succeeded")]
    fake.routes["GET /v1/jobs/job_1/events"] = page(events)
    for flags in ([], ["--json"]):
        done = run(fake, "submit", "--dataset", "digits", "--watch", *flags)
        assert done.exit_code == 0, done.output
        headings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert headings == [WARNED[0], "warning: student_at_chance"]
        assert "warning: " not in done.stdout


def test_submit_strict_refuses_warnings(tmp_path: Path):
    faults = [{"pointer": "/dataset", "message": "test_split_carved: no test split", "allowed": "add a folder test"}]
    fake = FakeService({JOBS: problem(422, "warning_refused", errors=faults)})
    done = run(fake, "submit", "--dataset", "digits", "--strict")
    assert fake.bodies(JOBS) == [{"dataset": "digits", "strict": True}]
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "error: warning refused",
        "  /dataset: test_split_carved: no test split (allowed: add a folder test)",
    ]


def test_submit_without_strict_keeps_the_one_of_the_file(tmp_path: Path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("{dataset: digits, strict: true}")
    fake = FakeService({JOBS: job(status="queued")})
    run(fake, "submit", str(spec))
    assert fake.bodies(JOBS) == [{"dataset": "digits", "strict": True}]


def registered(kind: str, **changes: Any) -> dict[str, Any]:
    facts = {"architecture": "resnet56", "num_classes": 100, "parameters": 861_620}
    if kind == "datasets":
        facts = {"num_classes": 10, "channels": 1, "image_size": [8, 8], "train": 1437, "test": 360}
    return {"name": "t", "facts": facts, "warnings": [warning(pointer="/blob")], "id": "x_1", **changes}


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_models_and_datasets_print_warnings_on_standard_error(kind: str, tmp_path: Path):
    file = tmp_path / "t.pth"
    file.write_bytes(b"bytes")
    fake = FakeFiles().service()
    fake.routes.update({f"GET /v1/{kind}": page([registered(kind)]), f"POST /v1/{kind}": registered(kind)})
    done = run(fake, kind, "add", str(file), "--strict")
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[:3] == ["warning: normalization_guessed (/blob)", *WARNED[1:]]
    assert fake.bodies(f"POST /v1/{kind}")[0]["strict"] is True
    done = run(fake, kind)
    assert done.exit_code == 0
    assert done.stderr.splitlines() == ["warning: normalization_guessed (t, /blob)", *WARNED[1:]]
    assert json.loads(run(fake, kind, "--json").stdout) == [registered(kind)]


def test_models_add_sends_normalization_and_class_names(tmp_path: Path):
    checkpoint, names = tmp_path / "t.pth", tmp_path / "names.txt"
    checkpoint.write_bytes(b"bytes")
    names.write_text("cat\n\n  sea lion\n")
    fake = FakeFiles().service()
    fake.routes["POST /v1/models"] = registered("models")
    flags = ["--mean", "0.5,0.4,0.3", "--std", "0.2 0.2 0.25"]
    assert run(fake, "models", "add", str(checkpoint), *flags, "--class-names", str(names)).exit_code == 0
    more = ["--class-names", "cat, sea lion", "--part", "student", "--raw", "--image-size", "32"]
    assert run(fake, "models", "add", str(checkpoint), *more).exit_code == 0
    first, second = fake.bodies("POST /v1/models")
    assert (second["part"], second["averaged"], second["image_size"]) == ("student", False, 32)
    assert not first.keys() & {"part", "averaged", "image_size", "architecture"}
    assert first["preprocessing"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25]}
    assert first["class_names"] == second["class_names"] == ["cat", "sea lion"]
    assert "strict" not in first
    assert "preprocessing" not in second


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mean", "0.5"], "--mean and --std belong together: give both"),
        (["--mean", "half", "--std", "1"], "--mean 'half': write one number for each channel, such as 0.507,0.487"),
        (["--mean", "0.5", "--std", "nan"], "--std 'nan': write one number for each channel"),
        (["--class-names", "nowhere.txt"], "--class-names 'nowhere.txt': there is no such file; give a file with one"),
    ],
)
def test_models_add_refuses_bad_flags_before_the_upload(flags: list[str], expected: str, tmp_path: Path):
    (tmp_path / "t.pth").write_bytes(b"bytes")
    fake = FakeFiles().service()
    done = run(fake, "models", "add", str(tmp_path / "t.pth"), *flags)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {expected}")
    assert fake.requests == []


TIMINGS = {
    "imports": 0.05, "data": 12.3, "preparing": 0.049, "training": {"student": 147.0, "alone": 9.5}, "evaluating": 2.0,
}  # fmt: skip


def test_show_has_verdict_teacher_check_and_warnings():
    ended = job(
        kind="distillation",
        result={**report(), "verdict": "The student is worse than the student alone.", "timings": TIMINGS},
        teacher_check=teacher_check(),
        warnings=[warning()],
    )
    fake = FakeService({"GET /v1/jobs/job_1": ended, "GET /v1/jobs/job_1/attempts": page([])})
    fake.routes["GET /v1/jobs/job_1/artifacts"] = page([])
    done = run(fake, "show", "job_1")
    assert done.stdout.splitlines()[0] == "The student is worse than the student alone."
    assert re.search(r"^teacher check +70\.2 % on 1,000 of 10,000 test images", done.stdout, re.MULTILINE)
    assert re.search(r"^kind +distillation", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == (
        "time: imports 0.1 s, data 12 s, training 3 min (student 2 min, alone 9.5 s), evaluating 2.0 s"
    )
    assert done.stderr.splitlines() == WARNED
    assert json.loads(run(fake, "show", "job_1", "--json").stdout) == ended


def test_show_of_an_evaluation():
    fake = FakeService({"GET /v1/jobs/job_1": job(kind="evaluation", method="evaluation", result=evaluation())})
    fake.routes["GET /v1/jobs/job_1/attempts"] = page([])
    done = run(fake, "show", "job_1")
    assert done.exit_code == 0, done.output
    assert "accuracy 72.6 % (95 % interval 71.7 to 73.5 %, 10,000 test images)" in done.stdout


def test_models_evaluate_prints_figures_and_each_warning_once():
    ended = job(kind="evaluation", method="evaluation", result=evaluation(), warnings=[warning()])
    fake = FakeService(
        {
            "POST /v1/models/m/evaluations": job(kind="evaluation", status="queued", warnings=[warning()]),
            "GET /v1/jobs/job_1": ended,
            "GET /v1/jobs/job_1/events/stream": problem(501, "none"),
            "GET /v1/jobs/job_1/events": page([event(1, "queued"), event(2, "succeeded")]),
        }
    )
    done = run(fake, "models", "evaluate", "m", "--dataset", "digits")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("accuracy 72.6 %")
    assert done.stderr.count("warning: normalization_guessed") == 1
    assert json.loads(run(fake, "models", "evaluate", "m", "--dataset", "digits", "--json").stdout) == ended


def test_models_add_prints_the_faults_of_an_inspection(tmp_path: Path):
    (tmp_path / "t.pth").write_bytes(b"bytes")
    fake = FakeFiles().service()
    faults = [{"pointer": "/blob", "message": "fc.weight is missing"}]
    fake.routes["POST /v1/models"] = problem(422, "unusable", errors=faults, hint="is it a resnet20?")
    done = run(fake, "models", "add", str(tmp_path / "t.pth"))
    assert done.exit_code == 2
    assert done.stderr.splitlines()[1:] == ["  /blob: fc.weight is missing", "  hint: is it a resnet20?"]


def test_methods_and_architectures():
    kd = {"name": "kd", "matches": "logits", "paper": "Hinton"}
    net = {"name": "resnet20", "source": "kdcore", "family": "resnet", "parameters_counted": 272_474}
    fake = FakeService({"GET /v1/methods": page([kd]), "GET /v1/methods/kd": kd, "GET /v1/architectures": page([net])})
    assert "Hinton" in run(fake, "methods").stdout
    assert json.loads(run(fake, "methods", "kd", "--json").stdout) == kd
    assert "matches  logits" in run(fake, "methods", "kd").stdout
    assert "272,474" in run(fake, "architectures", "--classes", "100").stdout
    assert dict(fake.requests[-1].url.params) == {"source": "kdcore", "classes": "100", "channels": "3"}


def test_architectures_of_an_unknown_source_or_family_name_those_that_there_are():
    net = {"name": "resnet20", "source": "kdcore", "family": "resnet"}

    def listing(request: httpx.Request) -> httpx.Response:
        return page([] if {"source", "family"} & set(request.url.params) else [net])

    fake = FakeService({"GET /v1/architectures": listing})
    for flags, said in (
        (("--source", "torch"), "no networks of source 'torch'; sources are kdcore"),
        (("--family", "x"), "no networks of source 'kdcore' and family 'x'; its families are resnet"),
        (("--source", "timm"), "timm.list_models()"),
    ):
        done = run(fake, "architectures", *flags)
        assert done.exit_code == 2 and said in done.stderr, done.output


KEY = {
    "id": "key_1", "project": "vision", "name": "ann", "role": "member", "prefix": "0123456789",
    "created_at": "2026-01-01T00:00:00.000Z", "created_by": "root", "expires_at": None, "revoked_at": None,
    "last_used_at": None,
}  # fmt: skip


def test_keys_create_prints_the_key_alone_on_standard_output():
    fake = FakeService({"POST /v1/keys": httpx.Response(201, json={**KEY, "key": "dk_0123456789_secret"})})
    done = run(fake, "keys", "create", "ann", "--role", "reader", "--project", "vision", "--expires", "2h")
    assert done.stdout == "dk_0123456789_secret\n"
    assert "member of vision; shown only now" in done.stderr
    sent = {"name": "ann", "role": "reader", "project": "vision", "expires_in_s": 7200}
    assert fake.bodies("POST /v1/keys") == [sent]


def test_keys_rotate_and_revoke_name_the_key():
    fake = FakeService(
        {
            "POST /v1/keys/key_1/rotate": httpx.Response(200, json={**KEY, "key": "dk_new"}),
            "DELETE /v1/keys/key_1": httpx.Response(204),
        }
    )
    assert run(fake, "keys", "rotate", "key_1").stdout == "dk_new\n"
    assert run(fake, "keys", "revoke", "key_1").stdout == "key_1 revoked\n"


def test_keys_list_says_which_can_be_used():
    ends = [
        {},
        {"revoked_at": "2026-01-02T00:00:00.000Z"},
        {"expires_at": "2026-01-02T00:00:00.000Z"},
        {"expires_at": "2999-01-02T00:00:00.000Z"},
    ]
    fake = FakeService({"GET /v1/keys": page([{**KEY, **end} for end in ends])})
    rows = [line for line in run(fake, "keys", "list").stdout.splitlines() if "ann" in line]
    for row, state in zip(rows, ("valid ", "revoked 2026", "expired 2026", "valid until 2999"), strict=True):
        assert state in row
    assert json.loads(run(fake, "keys", "list", "--json").stdout)[0] == KEY


def test_projects_are_made_listed_and_deleted():
    project = {"name": "vision", "created_at": "2026-01-01T00:00:00.000Z"}
    fake = FakeService(
        {
            "POST /v1/projects": httpx.Response(201, json=project),
            "GET /v1/projects": page([project]),
            "DELETE /v1/projects/vision": httpx.Response(204),
        }
    )
    made = run(fake, "projects", "create", "vision")
    assert made.stdout == "vision created\n"
    assert "keys create NAME --role admin --project vision" in made.stderr
    assert "vision" in run(fake, "projects").stdout
    assert run(fake, "projects", "delete", "vision").stdout == "vision deleted\n"


def test_keys_new_prints_a_key_and_its_digest():
    first, second = (CliRunner().invoke(app, ["keys", "new"]).stdout for _ in range(2))
    key = re.search(r"distillery_[\w-]{43}", first)
    assert key is not None
    assert f"DISTILLERY_ADMIN_KEY_HASH={hashlib.sha256(key[0].encode()).hexdigest()}\n" in first
    assert first != second


def test_up_executes_the_server(monkeypatch: pytest.MonkeyPatch):
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    CliRunner().invoke(app, ["up", "--port", "9000", "--home", "here"])
    assert started[0][1:] == ["-m", "serve", "--port", "9000", "--home", "here"]


WEBHOOK = {
    "id": "wh_1", "url": "https://example.org/hook", "events": ["job.failed"], "enabled": True, "note": None,
    "failing_since": None, "created_at": "2026-01-02T03:04:05.678Z",
}  # fmt: skip
DELIVERY = {
    "id": "msg_1", "webhook_id": "wh_1", "type": "job.failed", "data": {}, "status": "pending", "attempts": 2,
    "next_at": "2026-01-02T03:09:05.678Z", "attempted_at": "2026-01-02T03:04:06.678Z", "answer_status": 500,
    "answer": "", "error": "the answer is 500", "created_at": "2026-01-02T03:04:05.678Z",
}  # fmt: skip


def test_webhooks_list_shows_state_and_note():
    disabled = {**WEBHOOK, "id": "wh_2", "enabled": False, "note": "it was disabled because it answered 410 (gone)"}
    fake = FakeService({"GET /v1/webhooks": page([WEBHOOK, disabled])})
    done = run(fake, "webhooks")
    assert "wh_1" in done.stdout and "disabled" in done.stdout and "job.failed" in done.stdout
    assert "wh_2: it was disabled because it answered 410 (gone)" in done.stderr
    assert json.loads(run(fake, "webhooks", "--json").stdout) == [WEBHOOK, disabled]
    none = run(FakeService({"GET /v1/webhooks": page([])}), "webhooks")
    assert "distillery webhooks add URL" in none.stderr


def test_webhooks_add_and_rotate_print_the_secret_once():
    secret = {**WEBHOOK, "secret": "whsec_abc"}
    fake = FakeService({"POST /v1/webhooks": secret, "POST /v1/webhooks/wh_1/rotate": secret})
    done = run(fake, "webhooks", "add", WEBHOOK["url"], "--event", "job.failed", "--event", "job.alert")
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("whsec_abc\n") and "shown only now" in done.stderr
    assert run(fake, "webhooks", "add", WEBHOOK["url"]).exit_code == 0
    assert fake.bodies("POST /v1/webhooks") == [
        {"url": WEBHOOK["url"], "events": ["job.failed", "job.alert"]},
        {"url": WEBHOOK["url"]},
    ]
    assert run(fake, "webhooks", "rotate", "wh_1").stdout == "whsec_abc\n"


def test_webhooks_change_test_replay_and_remove():
    fake = FakeService(
        {
            "PATCH /v1/webhooks/wh_1": {**WEBHOOK, "enabled": False},
            "POST /v1/webhooks/wh_1/test": DELIVERY,
            "POST /v1/webhooks/wh_1/deliveries/msg_1/replay": DELIVERY,
            "DELETE /v1/webhooks/wh_1": httpx.Response(204),
        }
    )
    assert "disabled" in run(fake, "webhooks", "change", "wh_1", "--disable").stdout
    assert fake.bodies("PATCH /v1/webhooks/wh_1") == [{"enabled": False}]
    assert "distillery webhooks deliveries wh_1" in run(fake, "webhooks", "test", "wh_1").stdout
    assert run(fake, "webhooks", "replay", "wh_1", "msg_1").stdout == "msg_1 will be sent again\n"
    assert run(fake, "webhooks", "remove", "wh_1").stdout == "wh_1 removed\n"


def test_webhooks_deliveries_show_tries_and_the_last_error():
    fake = FakeService({"GET /v1/webhooks/wh_1/deliveries": page([DELIVERY])})
    done = run(fake, "webhooks", "deliveries", "wh_1", "--status", "pending")
    for text in ("msg_1", "job.failed", "pending, next 2026-01-02T03:09:05.678Z", "the answer is 500", "2"):
        assert text in done.stdout
    assert json.loads(run(fake, "webhooks", "deliveries", "wh_1", "--json").stdout) == [DELIVERY]


def test_predict_prints_the_models_side_by_side(tmp_path: Path):
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"picture")
    answer = prediction()["answer"]
    other = {"architecture": "convnet4", "top": [{"class": "[red]dog", "number": 1, "probability": 0.5}]}
    fake = FakeService({"POST /v1/jobs/job_1/predict": prediction(answer={**answer, "student": other, "agree": False})})
    done = run(fake, "predict", "job_1", str(picture))
    assert done.exit_code == 0, done.output
    assert re.search(r"teacher +student", done.stdout) and "alone" not in done.stdout
    assert re.search(r"cat 93.1 % +\[red\]dog 50.0 %", done.stdout)
    assert "teacher and student do not agree" in done.stdout
    assert "of 300 x 200 pixels, the student was shown the square in its middle" in done.stdout
    assert json.loads(run(fake, "predict", "job_1", str(picture), "--json").stdout)["answer"]["agree"] is False


def test_predict_without_an_answer_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"picture")
    error = {"code": "out_of_memory", "message": "too little memory", "retryable": True, "hint": None}
    fake = FakeService({"POST /v1/jobs/job_1/predict": prediction(state="failed", answer=None, error=error)})
    done = run(fake, "predict", "job_1", str(picture))
    assert done.exit_code == 1 and done.stderr == "out_of_memory: too little memory\n"
    refused = problem(422, "image_unreadable", "the image is no image")
    done = run(FakeService({"POST /v1/jobs/job_1/predict": refused}), "predict", "job_1", str(picture))
    assert done.exit_code == 2 and "the image is no image" in done.stderr
