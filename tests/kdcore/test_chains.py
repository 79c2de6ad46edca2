"""Jobs of several trials: assistants between teacher and student, and generations."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import nll_loss

from base.errors import TeacherMismatch
from kdcore import checkpoint, models, weights
from kdcore import run as running
from kdcore.classifier import Classifier
from kdcore.data import load
from kdcore.run import TrialSetup
from kdcore.spec import Dataset, JobSpec
from tests.kdcore.engine import copied, events, job, same, workspace, write_arrays, write_teacher

TWICE = {"name": "born_again", "generations": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    write_arrays(folder / "data.npz")
    write_teacher(folder / "teacher.safetensors", "convnet16")
    return folder


class Chain:
    """A job that has run: by trial, what its student began and ended as, and the teacher that it had."""

    def __init__(self, spec: JobSpec, folder, out) -> None:
        began, taught_by = {}, {}

        class Watched(TrialSetup):
            def __init__(self, trial, job, teacher) -> None:
                super().__init__(trial, job, teacher)
                began[trial.name] = copied(self.students[0].network.state_dict())
                taught_by[trial.name] = teacher and copied(teacher.members[0].network.state_dict())

        where, stream = workspace(out, folder / "cache")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running, "TrialSetup", Watched)
            self.report = running.run(spec, where)
        self.began, self.taught_by, self.out = began, taught_by, out
        self.metrics = events(stream, "metric")
        last = checkpoint.load(max((out / "checkpoints").iterdir()), torch.device("cpu"))
        self.ended = {trial: outcomes["student"].best for trial, outcomes in last.finished.items()}

    @property
    def exported(self) -> dict:
        return load_file(self.out / "student.safetensors")


@pytest.fixture(scope="module")
def assisted(folder, tmp_path_factory):
    spec = job(folder / "data.npz", folder / "teacher.safetensors", method="kd", assistants=["convnet8", "convnet4"],
               student="convnet4", baseline="train")  # fmt: skip
    return Chain(spec, folder, tmp_path_factory.mktemp("assisted"))


@pytest.fixture(scope="module")
def reborn(folder, tmp_path_factory):
    spec = job(folder / "data.npz", method={**TWICE, "generations": 3})
    return Chain(spec, folder, tmp_path_factory.mktemp("reborn"))


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    spec = job(folder / "data.npz", folder / "teacher.safetensors", method={**TWICE, "answer": "ensemble"},
               baseline="train")  # fmt: skip
    return Chain(spec, folder, tmp_path_factory.mktemp("together"))


def test_run_each_assistant_learns_from_the_one_before_it_alone(assisted, folder):
    assert list(assisted.taught_by) == ["assistant-1", "assistant-2", "student", "alone"]
    assert same(assisted.taught_by["assistant-1"], load_file(folder / "teacher.safetensors"))
    assert same(assisted.taught_by["assistant-2"], assisted.ended["assistant-1"])
    assert same(assisted.taught_by["student"], assisted.ended["assistant-2"])
    assert assisted.taught_by["alone"] is None
    assert same(assisted.exported, assisted.ended["student"])


def test_run_the_report_has_a_row_for_each_assistant(assisted):
    rows = assisted.report["models"]
    assert {name: row["architecture"] for name, row in rows.items()} == {
        "assistant-1": "convnet8", "assistant-2": "convnet4",
    }  # fmt: skip
    assert rows["assistant-1"]["parameters"] > rows["assistant-2"]["parameters"]
    assert all(row["agreement"] is not None and row["best"]["epoch"] in (1, 2) for row in rows.values())
    assert assisted.report["teacher"]["architecture"] == "convnet16"
    assert assisted.report["gain"] == assisted.report["student"]["accuracy"] - assisted.report["alone"]["accuracy"]


def test_run_the_metrics_of_a_chain_name_their_trials_in_order(assisted):
    assert [(line["trial"], line["epoch"]) for line in assisted.metrics] == [
        (trial, epoch) for trial in ("assistant-1", "assistant-2", "student", "alone") for epoch in (1, 2)
    ]


def test_run_the_first_generation_without_a_teacher_is_plain_supervised(reborn, folder, tmp_path):
    plain = Chain(job(folder / "data.npz"), folder, tmp_path)
    assert reborn.taught_by["generation-1"] is None
    assert same(reborn.began["generation-1"], plain.began["student"])
    assert same(reborn.ended["generation-1"], plain.exported)


def test_run_each_generation_is_a_fresh_start_of_another_seed_taught_by_the_one_before(reborn):
    assert list(reborn.began) == ["generation-1", "generation-2", "student"]
    for before, after in (("generation-1", "generation-2"), ("generation-2", "student")):
        assert same(reborn.taught_by[after], reborn.ended[before])
        assert not same(reborn.began[after], reborn.began[before])
        assert not same(reborn.began[after], reborn.ended[before])


def test_run_the_last_generation_is_the_answer_and_the_ensemble_stands_beside_it(reborn):
    assert same(reborn.exported, reborn.ended["student"])
    assert list(reborn.report["models"]) == ["generation-1", "generation-2", "ensemble"]
    ensemble, last = reborn.report["models"]["ensemble"], reborn.report["student"]
    assert ensemble["architecture"] == "3 x convnet4" and last["architecture"] == "convnet4"
    assert ensemble["parameters"] == 3 * last["parameters"] and ensemble["bytes"] == 3 * last["bytes"]


def test_run_a_first_generation_with_a_teacher_learns_from_it(together, folder):
    assert same(together.taught_by["generation-1"], load_file(folder / "teacher.safetensors"))
    assert same(together.taught_by["student"], together.ended["generation-1"])
    first = next(line for line in together.metrics if line["trial"] == "generation-1")
    assert "train/distillation_loss" in first["values"]


def test_run_an_ensemble_holds_every_generation_behind_its_number(together):
    with safe_open(together.out / "student.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    assert notes["members"] == 2 and notes["architecture"] == "convnet4"
    for number, trial in enumerate(("generation-1", "student")):
        prefix = f"{number}."
        member = {name.removeprefix(prefix): value for name, value in together.exported.items() if name[:2] == prefix}
        assert same(member, together.ended[trial])
    assert len(together.exported) == 2 * len(together.ended["student"])


def test_run_an_ensemble_is_measured_by_the_mean_of_its_members_probabilities(together, folder):
    """As a user of the file would compute it."""
    with safe_open(together.out / "student.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    test = load(Dataset(source="data"), folder / "data.npz", folder / "cache").test
    probabilities = []
    for number in range(notes["members"]):
        network = models.build(notes["architecture"], notes["num_classes"], notes["channels"]).eval()
        prefix = f"{number}."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in together.exported.items() if k[:2] == prefix})
        with torch.no_grad():
            probabilities.append(Classifier(network, notes["mean"], notes["std"])(test.pixels).logits.softmax(1))
    mean = torch.stack(probabilities).mean(0)
    row = together.report["student"]
    assert row["accuracy"] == (mean.argmax(1) == test.labels).double().mean().item()
    assert row["loss"] == pytest.approx(nll_loss(mean.log(), test.labels).item(), rel=1e-4)
    assert row["architecture"] == "2 x convnet4"
    assert row["parameters"] == 2 * together.report["models"]["last"]["parameters"]


def test_run_the_report_of_an_ensemble_shows_the_last_generation_beside_it(together):
    assert list(together.report["models"]) == ["generation-1", "last"]
    last = together.report["models"]["last"]
    assert last["architecture"] == "convnet4" and last["best"]["epoch"] in (1, 2)
    gain = together.report["student"]["accuracy"] - together.report["alone"]["accuracy"]
    assert together.report["gain"] == gain


def test_run_an_ensemble_is_no_one_teacher(together, folder, tmp_path):
    path = together.out / "student.safetensors"
    for architecture in (None, "convnet4"):
        with pytest.raises(TeacherMismatch, match="ensemble of 2 networks"):
            weights.inspect(path, architecture)
    with pytest.raises(TeacherMismatch, match="ensemble of 2 networks"):
        Chain(job(folder / "data.npz", path, method="kd"), folder, tmp_path)
