"""The engine as a program: its lines, its exit codes, its answer to SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from kdcore import __main__ as main_module
from kdcore.catalog import ModelFacts
from tests.kdcore.engine import supervised, write_arrays, write_teacher

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz")


def engine(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "kdcore", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_main_run_ends_with_done_and_sigterm_ends_with_a_checkpoint(data, tmp_path):
    """One process after the other: stopped in mid-training, then resumed to the end."""
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(supervised(data, epochs=30).as_json()))
    seen = []
    with engine("run", spec, "--out", tmp_path / "first") as first:
        for line in first.stdout:
            seen.append(json.loads(line))
            if seen[-1]["event"] == "metric":
                first.send_signal(signal.SIGTERM)
    assert first.returncode == 75
    assert seen[-1]["event"] == "checkpoint"
    resume = tmp_path / "first" / seen[-1]["path"]
    with engine("run", spec, "--out", tmp_path / "second", "--resume", resume) as second:
        lines = [json.loads(line) for line in second.stdout]
    assert second.returncode == 0
    assert lines[-1]["event"] == "done" and lines[-1]["report"]["student"]["architecture"] == "convnet4"
    metrics = [line for line in seen + lines if line["event"] == "metric"]
    assert [line["epoch"] for line in metrics] == list(range(1, 31))

    measured = engine("evaluate", tmp_path / "second" / "student.safetensors", "--dataset", f"file:{data}",
                      "--cache", tmp_path / "cache")  # fmt: skip
    answer = json.loads(measured.communicate()[0])
    assert answer["accuracy"] == lines[-1]["report"]["student"]["accuracy"]


def test_main_run_of_an_evaluation_ends_with_its_figures(data, tmp_path):
    """The same verb as a distillation: the field `kind` of the spec decides."""
    model = write_teacher(tmp_path / "teacher.safetensors")
    spec = tmp_path / "spec.json"
    body = {"kind": "evaluation", "model": {"checkpoint": f"file:{model}"}, "dataset": {"source": f"file:{data}"}}
    spec.write_text(json.dumps(body))
    with engine("run", spec, "--out", tmp_path / "out") as process:
        lines = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert [line["phase"] for line in lines if line["event"] == "phase"] == [
        "validating", "preparing", "evaluating", "exporting",
    ]  # fmt: skip
    assert lines[-1]["event"] == "done" and lines[-1]["report"]["test_samples"] == 30
    spec.write_text(json.dumps({**body, "epochs": 3}))
    with engine("run", spec, "--out", tmp_path / "out") as process:
        lines = [json.loads(line) for line in process.stdout]
    assert process.returncode == 1 and lines[-1]["code"] == "spec_invalid" and "/epochs" in lines[-1]["message"]


def test_main_lines_go_to_the_descriptor_asked_for(tmp_path):
    (tmp_path / "spec.json").write_text('{"dataset": "digits", "student": "resnet21", "method": "supervised"}')
    read, write = os.pipe()
    process = engine("run", tmp_path / "spec.json", "--out", tmp_path, "--events-fd", write, pass_fds=[write])
    os.close(write)
    with os.fdopen(read) as stream:
        lines = [json.loads(line) for line in stream]
    assert process.communicate()[0] == "" and process.returncode == 1
    assert [line["event"] for line in lines] == ["phase", "error"]
    assert lines[1]["code"] == "spec_invalid" and "resnet21" in lines[1]["message"] and lines[1]["retryable"] is False


def test_main_an_inspection_prints_its_progress_if_asked(data, capsys, monkeypatch):
    monkeypatch.setattr(main_module, "PROGRESS_S", 0.0)
    assert main_module.main(["inspect", "dataset", str(data), "--progress"]) == 0
    *progress, answer = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answer["ok"]
    total = answer["facts"]["train"] + answer["facts"]["test"]
    assert progress[-1] == {"progress": {"done": total, "total": total}}


def test_main_an_inspection_names_the_option_that_does_not_fit(data, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK nothing")
    for path, options, option in (
        (data, '{"limit": 2}', "limit"),
        (data, '{"class_names": ["a", "b"]}', "class_names"),
        (broken, "{}", None),
    ):
        main_module.main(["inspect", "dataset", str(path), "--options", options])
        answer = json.loads(capsys.readouterr().out)
        assert answer["error"]["code"] == "dataset_unreadable" and answer["error"]["option"] == option


def test_inspect_a_data_set_with_a_long_name_of_a_class(data, tmp_path, capsys):
    with np.load(data) as arrays:
        np.savez(tmp_path / "a.npz", **arrays, class_names=np.array(["left", "b" * 201, "right"]))
    main_module.main(["inspect", "dataset", str(tmp_path / "a.npz")])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"] == "The name of class 1 has 201 characters; the most is 200."
    assert "class_names" in error["hint"]


@pytest.mark.parametrize(
    ("notes", "text"),
    [
        ({"class_names": ["n" * 100_000] * 30}, "has 3,0"),
        ({"class_names": ["\ud800", *"abcdefghi"]}, "the name of class 0, \\ud800: character 0 is a lone"),
        ({"class_names": ["\0", *"abcdefghi"]}, "the name of class 0, \\x00: character 0 is a control"),
    ],
    ids=["long", "surrogate", "NUL"],
)
def test_inspect_a_file_that_says_too_much_or_no_text(tmp_path, capsys, monkeypatch, notes, text):
    facts = ModelFacts(architecture="convnet4", num_classes=10, channels=1, parameters=1, bytes=1, format="pytorch")
    monkeypatch.setattr(main_module, "_facts", lambda *_: facts.model_copy(update=notes))
    assert main_module.main(["inspect", "model", str(tmp_path / "x")]) == 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "teacher_mismatch" and text in error["message"]


def test_inspect_with_arguments_from_a_file(tmp_path, capsys):
    arguments = tmp_path / "arguments.json"
    arguments.write_text(
        json.dumps(["taps", "--classes=2", "--channels=1", "--image-size", "8", "--", "convnet4", "-h"])
    )
    assert main_module.main(["inspect", "--arguments", str(arguments)]) == 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "spec_invalid" and "'-h'" in error["message"], "a name, no option"


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[2J", "\ud800", "a\nb"])
def test_main_an_inspection_refuses_names_that_no_database_or_terminal_takes(data, tmp_path, capsys, name):
    named = tmp_path / "named.npz"
    with np.load(data) as arrays:
        np.savez(named, **arrays, class_names=np.array(["left", name, "right"]))
    main_module.main(["inspect", "dataset", str(named)])
    line = capsys.readouterr().out
    answer = json.loads(line)["error"]
    assert answer["code"] == "dataset_unreadable" and "the name of class 1" in answer["message"], answer
    assert name not in answer["message"] and "\\\\" in line, "the name is shown as an escape"
    # New names at the registration cure it.
    options = json.dumps({"class_names": ["first", "second", "third"]})
    main_module.main(["inspect", "dataset", str(named), "--options", options])
    assert json.loads(capsys.readouterr().out)["ok"]


def test_inspect_a_data_set_with_options(tmp_path):
    data = tmp_path / "grey.npz"
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(data, x_train=x, y_train=np.arange(40) % 4, x_test=x[:8], y_test=np.arange(8) % 4)
    options = '{"channels": 3, "limit": 8, "class_names": ["a", "b", "c", "d"]}'
    answer = json.loads(engine("inspect", "dataset", data, "--image-size", 4, "--options", options).communicate()[0])
    facts = answer["facts"]
    assert (facts["channels"], facts["image_size"], facts["grey"]) == (3, [4, 4], True)
    assert facts["class_names"] == ["a", "b", "c", "d"]
    assert facts["class_counts"] == {"train": [2, 2, 2, 2], "test": [2, 2, 2, 2]}


def test_main_evaluate_and_images_take_the_options_of_a_data_set(tmp_path, capsys):
    data, teacher = tmp_path / "grey.npz", write_teacher(tmp_path / "teacher.safetensors", classes=4)
    x = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    np.savez(data, x_train=x, y_train=np.arange(40) % 4, x_test=x[:8], y_test=np.arange(8) % 4)
    read = ["--dataset", f"file:{data}", "--cache", str(tmp_path / "cache"), "--image-size", "8"]
    assert main_module.main(["evaluate", str(teacher), *read, "--options", '{"channels": 1, "limit": 8}']) == 0
    facts = json.loads(capsys.readouterr().out)["dataset"]
    assert (facts["channels"], facts["image_size"], facts["train"], facts["test"]) == (1, [8, 8], 8, 8)
    images = tmp_path / "images.safetensors"
    assert main_module.main(["images", str(images), *read, "--options", '{"channels": 1}']) == 0
    assert load_file(images)["images"].shape == (8, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('{"resize": "stretch"}', "the data set's option resize: .*'stretch'"),
        ("[3]", "--options is no JSON object"),
        ("{", "--options is no JSON:"),
    ],
)
def test_main_options_of_a_data_set_that_are_wrong_are_named(options, said, data, capsys):
    assert main_module.main(["evaluate", "x", "--dataset", f"file:{data}", "--options", options]) == 1
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["code"] == "spec_invalid" and re.match(said, error["message"])


def test_main_inspections_of_what_a_student_can_start_from(tmp_path, capsys):
    weights = write_teacher(tmp_path / "weights.safetensors", "convnet4", classes=7)
    network = ["--architecture", "convnet4", "--classes", "3", "--channels", "1", "--freeze", "layer1", "layer9"]
    named = ["named-start", "convnet4", "--from-classes", "7", "--from-channels", "1"]
    found = []
    for of in (["start", str(weights), "--progress"], named):
        assert main_module.main(["inspect", *of, *network]) == 0
        *begun, answer = map(json.loads, capsys.readouterr().out.splitlines())
        assert begun == ([{"progress": {"done": 0, "total": 0}}] if of[0] == "start" else [])
        facts = answer["facts"]
        found.append({name: facts[name] for name in ("num_classes", "taken", "fresh", "frozen", "unknown_modules")})
    assert found[0] == found[1]
    assert found[0]["num_classes"] == 7 and list(found[0]["unknown_modules"]) == ["layer9"]


def test_main_inspections_answer_with_facts_or_with_the_reason(data, tmp_path):
    answer = json.loads(engine("inspect", "dataset", data).communicate()[0])
    assert answer["ok"] and answer["facts"]["num_classes"] == 3 and answer["facts"]["train"] == 120
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK nothing")
    process = engine("inspect", "dataset", broken)
    answer = json.loads(process.communicate()[0])
    assert process.returncode == 0 and not answer["ok"] and answer["error"]["code"] == "dataset_unreadable"
