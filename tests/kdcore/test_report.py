import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from kdcore import checkpoint, models, report
from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble
from kdcore.data import load
from kdcore.data.images import Data
from kdcore.measure import evaluate
from kdcore.measure.grading import Outcome
from kdcore.report import logits_row
from kdcore.run import run
from kdcore.spec import Dataset, parse
from tests.kdcore.engine import events, job, workspace, write_arrays, write_teacher

LABELS = torch.tensor([0, 1, 2, 0])
# Right, right, wrong, wrong; the right class of the third is its second choice.
LOGITS = torch.tensor([[3.0, 0, 0], [0, 3, 0], [2, 0, 1], [0, 0, 1]])


def test_logits_row_answers_are_counted_against_labels_and_against_the_teacher():
    teacher = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    row = report.logits_row(LOGITS, LABELS, teacher)
    assert row["accuracy"] == 0.5 and row["accuracy_top5"] == 1 and row["agreement"] == 0.5
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(LOGITS.tolist(), LABELS, strict=True)
    ]
    assert row["loss"] == pytest.approx(sum(by_hand) / 4)


def test_logits_row_without_a_teacher_there_is_none_to_agree_with():
    assert report.logits_row(LOGITS, LABELS)["agreement"] is None


def test_model_row_parameters_and_bytes_are_those_of_the_network():
    """A convolution of 2 x 1 x 3 x 3, a batch norm of 2: weight, bias, mean, variance in fp32 and a count in int64."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
    assert evaluate.parameters(network) == 18 + 4
    assert evaluate.size_bytes(network) == 4 * (18 + 8) + 8
    row = report.model_row("tiny", network, LOGITS, LABELS)
    assert (row["architecture"], row["parameters"], row["bytes"]) == ("tiny", 22, 112)


def test_size_bytes_what_two_parts_share_counts_once():
    layer = nn.Linear(3, 3)
    network = nn.ModuleList([layer, nn.Sequential(layer)])
    assert evaluate.parameters(network) == 12 and evaluate.size_bytes(network) == 48


def test_training_row_a_training_is_told_by_its_best_epoch_and_its_last():
    outcome = Outcome(best={}, last={}, best_epoch=3, best_accuracy=0.75, epochs=5)
    assert report.training_row(outcome, LOGITS, LABELS) == {
        "best": {"epoch": 3, "validation_accuracy": 0.75},
        "last": {"epoch": 5, "accuracy": 0.5},
    }


FIGURES = ("accuracy", "accuracy_top5", "loss", "agreement")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proof")
    write_arrays(folder / "data.npz")
    for seed, name in enumerate(("convnet8", "convnet4")):
        write_teacher(folder / f"{name}.safetensors", name, seed)
    return folder


@pytest.fixture(scope="module")
def data(folder) -> Data:
    return load(Dataset(source="data"), folder / "data.npz", folder / "cache")


def proven(folder, out, teacher: object = None, **fields) -> dict:
    where, _ = workspace(out, folder / "cache")
    return run(job(folder / "data.npz", teacher, **fields), where)


def from_file(path, data: Data, architecture: str | None = None) -> Classifier:
    """As a user of the file would build it."""
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    network = models.build(architecture or notes["architecture"], 3, 1)
    network.load_state_dict(load_file(path))
    return Classifier(network, notes.get("mean", data.facts.mean), notes.get("std", data.facts.std))


def measured(classifier: Classifier, data: Data, teacher: torch.Tensor | None = None) -> list[float]:
    row = logits_row(evaluate.logits_on(classifier, data.test), data.test.labels, teacher)
    return [row[name] for name in FIGURES]


def test_build_report_a_row_tells_what_the_exported_file_achieves_on_test_images(folder, data, tmp_path):
    report = proven(
        folder, tmp_path, folder / "convnet8.safetensors", method="kd", training={"epochs": 3, "kernels": "eager"}
    )
    teacher = from_file(folder / "convnet8.safetensors", data)
    teacher_nK = evaluate.logits_on(teacher, data.test)
    student = from_file(tmp_path / "student.safetensors", data)
    assert [report["student"][name] for name in FIGURES] == measured(student, data, teacher_nK)
    assert [report["teacher"][name] for name in FIGURES] == measured(teacher, data)
    assert report["test_samples"] == 30 and report["models"] == {}
    assert report["teacher"]["architecture"] == "convnet8" and report["student"]["architecture"] == "convnet4"


def test_build_report_peers_are_rows_and_files_of_their_own(folder, data, tmp_path):
    report = proven(folder, tmp_path, method="dml", student=["convnet4", "convnet8"], baseline="train")
    assert list(report["models"]) == ["student-2"] and report["models"]["student-2"]["architecture"] == "convnet8"
    rows = {"student": report["student"], "student-2": report["models"]["student-2"]}
    for name, row in rows.items():
        assert [row[figure] for figure in FIGURES] == measured(from_file(tmp_path / f"{name}.safetensors", data), data)
    assert report["teacher"] is None and report["alone"]["architecture"] == "convnet4"


@pytest.mark.parametrize(
    ("method", "rows"), [("one", ["ensemble"]), ("byot", ["exit-1", "exit-2"])], ids=["branches", "exits"]
)
def test_what_is_measured_but_not_delivered_is_a_row_without_a_file(method, rows, folder, data, tmp_path):
    report = proven(folder, tmp_path, method=method)
    assert list(report["models"]) == rows
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["student.safetensors"]
    plain = sum(p.numel() for p in models.build("convnet4", 3, 1).parameters())
    assert report["student"]["parameters"] == plain
    assert [report["student"][name] for name in FIGURES] == measured(
        from_file(tmp_path / "student.safetensors", data), data
    )
    for row in report["models"].values():
        assert row["parameters"] > plain and 0 <= row["accuracy"] <= 1 and row["best"]["epoch"] in (1, 2)


def test_build_report_several_teachers_are_measured_together_and_one_by_one(folder, data, tmp_path):
    paths = [folder / "convnet8.safetensors", folder / "convnet4.safetensors"]
    teachers = [{"checkpoint": f"file:{path}", "weight": weight} for weight, path in enumerate(paths, 1)]
    report = proven(folder, tmp_path, teachers, method="kd", temperature=4, training={"kernels": "eager"})
    each = [from_file(path, data) for path in paths]
    for number, teacher in enumerate(each, 1):
        assert [report["models"][f"teacher-{number}"][name] for name in FIGURES] == measured(teacher, data)
    logits = [evaluate.logits_on(teacher, data.test) for teacher in each]
    together = TeacherEnsemble([FrozenTeacher(teacher) for teacher in each], [1, 2], 4.0).combined(logits)
    row = logits_row(together, data.test.labels)
    assert [report["teacher"][name] for name in FIGURES] == [row[name] for name in FIGURES]
    assert report["teacher"]["architecture"] == "convnet8 + convnet4"
    assert report["teacher"]["parameters"] == sum(
        report["models"][f"teacher-{number}"]["parameters"] for number in (1, 2)
    )
    student = from_file(tmp_path / "student.safetensors", data)
    assert [report["student"][name] for name in FIGURES] == measured(student, data, together)


def test_build_report_the_last_epoch_stands_beside_the_best(folder, data, tmp_path):
    report = proven(folder, tmp_path, training={"epochs": 6, "optimizer": {"name": "sgd", "lr": 1.0}})
    end = checkpoint.load(max((tmp_path / "checkpoints").iterdir()), torch.device("cpu"))
    outcome = end.finished["student"]["student"]
    student = from_file(tmp_path / "student.safetensors", data)
    assert report["student"]["best"] == {
        "epoch": outcome.best_epoch, "validation_accuracy": outcome.best_accuracy,
    }  # fmt: skip
    assert outcome.best_epoch < 6, "a rate so high makes the last epoch another than the best"
    student.network.load_state_dict(outcome.last)
    assert report["student"]["last"] == {"epoch": 6, "accuracy": measured(student, data)[0]}


def test_build_report_a_baseline_of_an_earlier_job_is_held_against_the_teacher_too(folder, data, tmp_path):
    proven(folder, tmp_path / "alone", training={"epochs": 1})
    path = tmp_path / "alone" / "student.safetensors"
    report = proven(folder, tmp_path / "student", folder / "convnet8.safetensors", method="kd", baseline=f"file:{path}")
    teacher_nK = evaluate.logits_on(from_file(folder / "convnet8.safetensors", data), data.test)
    assert [report["alone"][name] for name in FIGURES] == measured(from_file(path, data), data, teacher_nK)
    assert report["gain"] == report["student"]["accuracy"] - report["alone"]["accuracy"]


def by_hand(path) -> float:
    """Accuracy of a delivered file on the digits' test images, with the network and PyTorch alone."""
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    network = models.build(notes["architecture"], notes["num_classes"], notes["channels"]).eval()
    network.load_state_dict(load_file(path))
    test = load(Dataset(source="digits"), None, path.parent).test
    mean, std = (torch.tensor(notes[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return (network((test.pixels / 255 - mean) / std).argmax(1) == test.labels).double().mean().item()


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "supervised"},
        {"method": "supervised", "training": {"ema": 0.5}},
        {"method": {"name": "born_again", "generations": 2}, "baseline": "train"},
        {"method": "dml", "student": ["convnet4", "convnet8"], "baseline": "train"},
        {"method": "kd", "assistants": ["convnet4"], "baseline": "train"},
    ],
    ids=["supervised", "ema", "born_again", "dml", "assistants"],
)
def test_build_report_says_what_a_file_achieves_whose_running_averages_are_far_off(fields, tmp_path):
    """Ten steps, so that an average of momentum 0.1 still holds much of its start: the rows show both accuracies."""
    training = {"epochs": 2, "batch_size": 256, "optimizer": {"name": "sgd", "lr": 0.2}, **fields.get("training", {})}
    body = {"dataset": "digits", "student": "convnet4", **fields, "training": training}
    if fields["method"] == "kd":
        body["teacher"] = {"checkpoint": f"file:{write_teacher(tmp_path / 'teacher', classes=10)}"}
    where, stream = workspace(tmp_path / "run")
    report = run(parse(body), where)
    rows = {"student": report["student"], "alone": report["alone"], **report["models"]}
    files = list(where.out.glob("*.safetensors"))
    assert {path.stem for path in files} >= {name for name in ("student", "alone") if rows[name]}
    for path in files:
        assert rows[path.stem]["accuracy"] == by_hand(path)
    warned = [line for line in events(stream, "warning") if line["code"] == "batch_norm_not_converged"]
    flagged = {name for name, row in rows.items() if row and "accuracy_running_averages" in row}
    assert {line["message"].partition(":")[0] for line in warned} == flagged
    assert flagged and all(line["pointer"] == "/training" for line in warned)
    assert all(rows[name]["accuracy"] > rows[name]["accuracy_running_averages"] + 0.1 for name in flagged)
