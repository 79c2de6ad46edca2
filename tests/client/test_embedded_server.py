"""The command line and the SDK against the real embedded server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors import safe_open
from typer.testing import CliRunner

from client.cli import app
from client.errors import ApiError
from client.local_server import local_server
from client.sdk import Distillery

README = (Path(__file__).parents[2] / "README.md").read_text()
SHORT = "submit --dataset digits --student convnet4 --method supervised --epochs 1 --seed 7"


@pytest.fixture(scope="module")
def distillery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Distillery]:
    with local_server(tmp_path_factory.mktemp("home")) as server, Distillery(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def job_id(distillery: Distillery) -> str:
    """A job that has succeeded, watched to its end."""
    done = run(distillery, *SHORT.split(), "--name", "first light", "--watch")
    assert done.exit_code == 0, done.output
    assert "succeeded" in done.stdout
    return str(done.stdout.splitlines()[0])


@pytest.fixture(scope="module")
def student(distillery: Distillery, job_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distillery.download(job_id, to=tmp_path_factory.mktemp("student"))


def run(distillery: Distillery, *arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, obj=distillery)


def test_download_of_a_student_is_complete(distillery: Distillery, job_id: str, student: Path):
    with safe_open(student, "pt") as file:
        assert "fc.weight" in file.keys()  # noqa: SIM118 - the reader is no dictionary
    (artifact,) = (one for one in distillery.artifacts(job_id) if one["name"] == student.name)
    assert student.stat().st_size == artifact["bytes"]


def test_download_continues_a_broken_one_by_range(distillery: Distillery, job_id: str, student: Path, tmp_path: Path):
    (artifact,) = (one for one in distillery.artifacts(job_id) if one["name"] == student.name)
    part = tmp_path / f".again.{artifact['sha256'][:16]}.part"
    part.write_bytes(student.read_bytes()[:1000])
    offsets: list[int] = []
    again = distillery.download(job_id, to=tmp_path / "again", on_progress=lambda done, total: offsets.append(done))
    assert again.read_bytes() == student.read_bytes()
    assert offsets[0] > 1000


def test_watch_yields_all_events_in_order(distillery: Distillery, job_id: str):
    events = list(distillery.watch(job_id))
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (events[0]["type"], events[-1]["type"]) == ("queued", "succeeded")
    assert events == distillery.events(job_id)


def test_metrics_and_logs(distillery: Distillery, job_id: str):
    ((_, accuracy),) = distillery.metrics(job_id, ["validation/accuracy"])["student"]["validation/accuracy"]
    assert accuracy is not None
    assert 0 <= accuracy <= 1
    assert isinstance(distillery.logs(job_id), str)


def test_attempts_workers_and_storage(distillery: Distillery, job_id: str):
    (tried,) = distillery.attempts(job_id)
    assert tried["how"] == "succeeded"
    assert [(worker["id"], worker["alive"]) for worker in distillery.workers()] == [(tried["worker"], True)]
    artifacts = distillery.artifacts(job_id)
    usage = distillery.storage()["usage"]["blobs"]
    assert usage["files"] >= len({artifact["sha256"] for artifact in artifacts}) > 0
    shown = run(distillery, "show", job_id).stdout
    assert re.search(rf"^ *1 +0 .* succeeded .* {tried['worker']}", shown, re.MULTILINE), shown


def test_list_and_show(distillery: Distillery, job_id: str):
    jobs = json.loads(run(distillery, "list", "--status", "succeeded", "--json").stdout)
    assert job_id in [job["id"] for job in jobs]
    assert "first light" in run(distillery, "show", job_id).stdout


def test_submit_with_a_local_file_as_teacher(distillery: Distillery, student: Path):
    flags = ["--dataset", "digits", "--teacher", str(student), "--student", "convnet4", "--method", "kd", "--dry-run"]
    done = run(distillery, "submit", *flags)
    assert done.exit_code == 0, done.output
    resolved = json.loads(done.stdout)["resolved_spec"]
    assert resolved["teacher"]["architecture"] == "convnet4"
    assert student.stem in run(distillery, "models").stdout


def test_submit_with_peers(distillery: Distillery):
    flags = "--dataset digits --student convnet4 --student convnet8 --method dml --epochs 1 --watch"
    done = run(distillery, "submit", *flags.split())
    assert done.exit_code == 0, done.output
    assert re.search(r"student 2 +│ convnet8 ", done.stdout), done.stdout


def test_submit_with_a_sum_unlabelled_images_and_an_assistant(distillery: Distillery, student: Path, tmp_path: Path):
    images = tmp_path / "pool.npz"
    np.savez(images, x=np.zeros((100, 8, 8), dtype=np.uint8))
    names = ["--dataset", "digits", "--teacher", str(student), "--assistant", "convnet8", "--student", "convnet4"]
    methods = ["--method", "kd=0.5", "--method", "dkd", "--set", "method.dkd.non_target_weight=8"]
    done = run(distillery, "submit", *names, *methods, "--unlabelled", str(images), "--dry-run")
    assert done.exit_code == 0, done.output
    resolved = json.loads(done.stdout)["resolved_spec"]
    assert [(method["name"], method["weight"]) for method in resolved["method"]] == [("kd", 0.5), ("dkd", 1.0)]
    assert resolved["method"][1]["non_target_weight"] == 8
    assert [assistant["architecture"] for assistant in resolved["assistants"]] == ["convnet8"]
    assert resolved["unlabelled"]["source"].startswith("blob:sha256:")
    assert "no labels" in run(distillery, "datasets").stdout


def test_methods_shows_a_page_for_each_method(distillery: Distillery):
    for method in distillery.methods():
        page = run(distillery, "methods", method["name"])
        assert page.exit_code == 0, page.output
        for fact in (method["paper"], method["cost"]):
            assert " ".join(fact.split()) in " ".join(page.stdout.split()), method["name"]


def test_upload_in_parts_makes_one_blob(distillery: Distillery, student: Path):
    blob = distillery.upload(student, chunk_bytes=1000)
    assert blob == distillery.upload(student)


def test_submit_prints_every_fault(distillery: Distillery):
    done = run(distillery, "submit", "--dataset", "nowhere", "--student", "resnet21", "--set", "training.epochs=0")
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    for pointer in ("/dataset", "/student", "/method", "/training/epochs"):
        assert any(line.strip().startswith(pointer) for line in lines), (pointer, lines)


def test_cancel_then_delete(distillery: Distillery):
    long = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 5_000}}
    job = distillery.submit(long)
    distillery.cancel(job["id"])
    assert distillery.wait(job["id"], timeout_s=60)["status"] == "cancelled"
    with pytest.raises(ApiError) as refused:
        distillery.pause(job["id"])
    assert refused.value.extra["allowed_actions"] == ["retry", "delete"]
    distillery.delete(job["id"])
    with pytest.raises(ApiError, match=job["id"]):
        distillery.job(job["id"])


def test_catalogue_commands(distillery: Distillery):
    assert "kd" in [method["name"] for method in distillery.methods()]
    assert "convnet4" in [one["name"] for one in distillery.architectures(family="convnet")]
    assert "digits" in [one["name"] for one in distillery.datasets()]
    assert distillery.ready()
    assert len(distillery.workers()) == 1
    for command in ("methods", "architectures", "datasets"):
        assert run(distillery, command).exit_code == 0


def test_datasets_add_and_submit_warn_and_are_refused_if_strict(distillery: Distillery, tmp_path: Path):
    """Data without a test split: the service sets images aside, and says so wherever the data are used."""
    labels = np.arange(200) % 2
    np.savez(
        tmp_path / "unsplit.npz", x_train=np.full((200, 8, 8), 100 * labels[:, None, None], np.uint8), y_train=labels
    )
    refused = run(distillery, "datasets", "add", str(tmp_path / "unsplit.npz"), "--strict")
    assert refused.exit_code == 2
    assert "/blob: test_split_carved: the data has no test split" in refused.stderr
    added = run(distillery, "datasets", "add", str(tmp_path / "unsplit.npz"))
    assert added.exit_code == 0, added.output
    assert added.stderr.startswith("warning: test_split_carved (/blob)\n  the data has no test split")
    spec = "submit --dataset unsplit --student convnet4 --method supervised --set training.optimizer.lr=0.1 --epochs 1"
    checked = run(distillery, *spec.split(), "--dry-run")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["resolved_spec"]["training"]["optimizer"]["lr"] == 0.1
    assert "warning: test_split_carved (/dataset)" in checked.stderr
    for flags in (["--strict"], ["--strict", "--dry-run"]):
        refused = run(distillery, *spec.split(), *flags)
        assert refused.exit_code == 2
        assert "/dataset: test_split_carved: the data has no test split" in refused.stderr
        assert "warning: " not in refused.stderr


def test_submit_prints_the_faults_of_the_readme(
    distillery: Distillery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    block = re.search(r"```console\n\$ cat five\.json\n(.*?)\n\$ \./run distillery (.*?)\n(.*?)```", README, re.DOTALL)
    assert block is not None
    spec, command, expected = block.groups()
    monkeypatch.chdir(tmp_path)
    Path("five.json").write_text(spec)
    # A fault lists what is registered: on the page a data set and a model are, and here nothing is.
    expected = expected.replace(", my-cifar100)", ")").replace(" (allowed: cifar100-resnet56)", "")
    for model in distillery.models():
        distillery.delete_model(model["id"])
    done = run(distillery, *command.split())
    assert done.stderr == expected
    assert (done.exit_code, done.stdout) == (2, "")
