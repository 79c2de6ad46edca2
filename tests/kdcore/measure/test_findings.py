"""What a report says beyond accuracies, of whole jobs; the figures themselves are in test_fidelity and
test_calibration."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kdcore.catalog import DatasetFacts
from kdcore.data import load
from kdcore.data.images import split
from kdcore.measure import calibration, evaluate, fidelity, findings
from kdcore.run import run
from kdcore.spec import Dataset
from tests.kdcore.engine import distilled, job, workspace, write_arrays, write_teacher
from tests.kdcore.test_report import from_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("findings")
    write_arrays(folder / "data.npz")
    write_arrays(folder / "with validation.npz", validation=24)
    write_teacher(folder / "teacher.safetensors")
    return folder


def reported(folder, out, spec) -> dict:
    where, _ = workspace(out, folder / "cache")
    return run(spec, where)


def test_findings_are_those_of_the_delivered_files(folder, tmp_path):
    spec = distilled(folder / "data.npz", folder / "teacher.safetensors", epochs=3, kernels="eager")
    report = reported(folder, tmp_path, spec)
    data = load(Dataset(source="data"), folder / "data.npz", folder / "cache")
    labels = data.test.labels
    teacher = from_file(folder / "teacher.safetensors", data, "convnet8")
    teacher_nK = evaluate.logits_on(teacher, data.test)
    rows = split(data.train, spec.training.validation_fraction, spec.training.seed)[1]
    held_out = data.train.take(rows)
    for name in ("student", "alone"):
        model = from_file(tmp_path / f"{name}.safetensors", data)
        test_nK, held_out_hK = (evaluate.logits_on(model, images) for images in (data.test, held_out))
        temperature = calibration.fitted_temperature(held_out_hK, held_out.labels)
        assert report["calibration"][name] == calibration.calibration(test_nK, labels, temperature)
        assert report["fidelity"][name] == fidelity.fidelity(test_nK, teacher_nK, labels, 3)
        assert report[name]["temperature"] == temperature
        assert report["classes"][name] == fidelity.by_class(test_nK.argmax(1) == labels, labels, 3)
        if name == "student":
            assert report["confusion"] == fidelity.confusion(test_nK.argmax(1), labels, 3)
            known_nK = test_nK
    assert report["calibration"]["held_out"] == "training" and report["calibration"]["held_out_images"] == len(rows)
    assert report["fidelity"]["teacher_errs"] == int((teacher_nK.argmax(1) != labels).sum())
    temperature = report["classes"]["temperature"]
    assert report["classes"]["similar"] == fidelity.similar_classes(teacher_nK, labels, temperature, 3)
    assert temperature == 4
    example = report["classes"]["worst"][0]["examples"][0]
    assert known_nK[example["image"]].argmax() == example["predicted"] != labels[example["image"]]


def test_findings_without_a_teacher_say_what_there_is(folder, tmp_path):
    report = reported(folder, tmp_path, job(folder / "with validation.npz"))
    assert report["fidelity"] is None and report["calibration"]["teacher"] is None
    assert report["calibration"]["held_out"] == "validation" and report["calibration"]["held_out_images"] == 24
    classes = report["classes"]
    assert (classes["teacher"], classes["alone"], classes["temperature"], classes["similar"]) == (None, None, None, [])
    assert sum(classes["test_samples"]) == 30


def test_findings_of_an_ensemble_are_those_of_its_generations_together(folder, tmp_path):
    method = {"name": "born_again", "generations": 2, "answer": "ensemble"}
    spec = distilled(folder / "data.npz", folder / "teacher.safetensors", baseline="none", method=method, epochs=1)
    report = reported(folder, tmp_path, spec)
    assert report["fidelity"]["student"]["agreement"] == report["student"]["agreement"]
    assert "temperature" in report["student"] and "temperature" not in report["models"]["last"]


def test_held_out_images_are_bounded_and_evenly_spaced(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "HELD_OUT", 5)
    report = reported(folder, tmp_path, job(folder / "data.npz"))
    assert report["calibration"]["held_out_images"] == 5
    facts = DatasetFacts.model_validate(report["dataset"])
    assert findings.images_measured(facts, job(folder / "data.npz").training) == 5


def test_temperature_makes_the_loss_on_held_out_images_no_larger(folder, tmp_path):
    """Of a model that is measured: at its temperature the loss is at most that at 1."""
    data = load(Dataset(source="data"), folder / "data.npz", folder / "cache")
    logits_nK = evaluate.logits_on(from_file(folder / "teacher.safetensors", data, "convnet8"), data.train)
    found = calibration.fitted_temperature(logits_nK, data.train.labels)
    assert found is None or cross_entropy(logits_nK / found, data.train.labels) <= cross_entropy(
        logits_nK, data.train.labels
    ) + torch.tensor(1e-6)
