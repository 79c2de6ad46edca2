import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kdcore import checkpoint, evaluate, models
from kdcore.classifier import Classifier
from kdcore.data import Data, load
from kdcore.report import of_logits
from kdcore.run import run
from kdcore.spec import Dataset
from kdcore.teacher import FrozenTeacher, TeacherEnsemble
from tests.kdcore.engine import job, place, write_arrays, write_teacher

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
    where, _ = place(out, folder / "cache")
    return run(job(folder / "data.npz", teacher, **fields), where)


def from_file(path, data: Data, architecture: str | None = None) -> Classifier:
    """As whoever takes the file would build it."""
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    network = models.build(architecture or notes["architecture"], 3, 1)
    network.load_state_dict(load_file(path))
    return Classifier(network, notes.get("mean", data.facts.mean), notes.get("std", data.facts.std))


def measured(classifier: Classifier, data: Data, teacher: torch.Tensor | None = None) -> list[float]:
    told = of_logits(evaluate.logits_on(classifier, data.test), data.test.labels, teacher)
    return [told[name] for name in FIGURES]


def test_a_row_tells_what_the_exported_file_achieves_on_test_images(folder, data, tmp_path):
    report = proven(folder, tmp_path, folder / "convnet8.safetensors", method="kd", training={"epochs": 3})
    teacher = from_file(folder / "convnet8.safetensors", data)
    teacher_nK = evaluate.logits_on(teacher, data.test)
    student = from_file(tmp_path / "student.safetensors", data)
    assert [report["student"][name] for name in FIGURES] == measured(student, data, teacher_nK)
    assert [report["teacher"][name] for name in FIGURES] == measured(teacher, data)
    assert report["test_samples"] == 30 and report["models"] == {}
    assert report["teacher"]["architecture"] == "convnet8" and report["student"]["architecture"] == "convnet4"


def test_peers_are_rows_and_files_of_their_own(folder, data, tmp_path):
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


def test_several_teachers_are_measured_together_and_one_by_one(folder, data, tmp_path):
    paths = [folder / "convnet8.safetensors", folder / "convnet4.safetensors"]
    teachers = [{"checkpoint": f"file:{path}", "weight": weight} for weight, path in enumerate(paths, 1)]
    report = proven(folder, tmp_path, teachers, method="kd", temperature=4)
    each = [from_file(path, data) for path in paths]
    for number, teacher in enumerate(each, 1):
        assert [report["models"][f"teacher-{number}"][name] for name in FIGURES] == measured(teacher, data)
    logits = [evaluate.logits_on(teacher, data.test) for teacher in each]
    together = TeacherEnsemble([FrozenTeacher(teacher) for teacher in each], [1, 2], 4.0).combined(logits)
    told = of_logits(together, data.test.labels)
    assert [report["teacher"][name] for name in FIGURES] == [told[name] for name in FIGURES]
    assert report["teacher"]["architecture"] == "convnet8 + convnet4"
    assert report["teacher"]["parameters"] == sum(
        report["models"][f"teacher-{number}"]["parameters"] for number in (1, 2)
    )
    student = from_file(tmp_path / "student.safetensors", data)
    assert [report["student"][name] for name in FIGURES] == measured(student, data, together)


def test_the_last_epoch_stands_beside_the_best(folder, data, tmp_path):
    report = proven(folder, tmp_path, training={"epochs": 6, "optimizer": {"name": "sgd", "lr": 1.0}})
    end = checkpoint.load(max((tmp_path / "checkpoints").iterdir()), torch.device("cpu"))
    outcome = end["finished"]["student"]["student"]
    student = from_file(tmp_path / "student.safetensors", data)
    assert report["student"]["best"] == {
        "epoch": outcome["best_epoch"], "validation_accuracy": outcome["best_accuracy"],
    }  # fmt: skip
    assert outcome["best_epoch"] < 6, "a rate so high makes the last epoch another than the best"
    student.network.load_state_dict(outcome["last"])
    assert report["student"]["last"] == {"epoch": 6, "accuracy": measured(student, data)[0]}


def test_a_baseline_of_an_earlier_job_is_held_against_the_teacher_too(folder, data, tmp_path):
    proven(folder, tmp_path / "alone", training={"epochs": 1})
    path = tmp_path / "alone" / "student.safetensors"
    report = proven(folder, tmp_path / "student", folder / "convnet8.safetensors", method="kd", baseline=f"file:{path}")
    teacher_nK = evaluate.logits_on(from_file(folder / "convnet8.safetensors", data), data.test)
    assert [report["alone"][name] for name in FIGURES] == measured(from_file(path, data), data, teacher_nK)
    assert report["gain"] == report["student"]["accuracy"] - report["alone"]["accuracy"]
