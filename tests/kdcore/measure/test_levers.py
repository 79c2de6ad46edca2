"""What a report says of the levers of a step: what ran in each stage, and why the others did not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdcore import device, kernels, models
from kdcore.checkpoint import Stopped
from kdcore.device import Computing
from kdcore.measure import levers
from kdcore.programs import Program
from kdcore.run import run
from kdcore.training import StageTraining
from tests.kdcore.engine import (
    as_by_the_version_before,
    distilled,
    events,
    job,
    method_job,
    workspace,
    write_arrays,
    write_teacher,
)

NOT = {"used": False, "places": None, "of": None}
YES = {"used": True, "places": None, "of": None, "why": ""}
NO_TEACHER = {**NOT, "why": "no teacher runs in this stage"}
RECIPE = {"epochs": 1, "batch_size": 36}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t.safetensors")


def without_a_compiler(*_):
    kernels.disable()
    return kernels.Support(False, "eager: no compiler was found")


def computing_of(spec, folder, checkpoint=None):
    where, _ = workspace(folder)
    return run(spec, where, checkpoint)["computing"]


def test_used_counts_the_layers_of_each_stage_that_ran_in_the_faster_form(data, teacher, tmp_path):
    """convnet8 and convnet4 have three convolutions and three batch norms."""
    report = computing_of(job(data, teacher, method="kd", baseline="train", training=RECIPE), tmp_path)
    assert report["used"].keys() == {"student", "alone"}
    student, alone = report["used"]["student"], report["used"]["alone"]
    if report["folded"]:  # These two depend on the machine.
        assert student["folded"] == {"used": True, "places": 3, "of": 3, "why": ""}
    if report["kernels"]:
        assert student["kernels"] == alone["kernels"] == {"used": True, "places": 3, "of": 3, "why": ""}
    else:
        assert student["kernels"] == {"used": False, "places": 0, "of": 3, "why": report["note"]}
    if report["convolutions"]:  # convnet4 has none of 16 channels.
        why = "it is for 3 × 3 convolutions of 16, 32, … channels without a stride that no method reads"
        assert alone["convolutions"] == {"used": False, "places": 0, "of": 3, "why": why}
    assert student["teacher_cache"] == YES
    assert student["overlap"] == {**NOT, "why": "training.overlap is false"}
    assert student["graph"] == alone["graph"] == {**NOT, "why": "training.step is 'eager'"}
    assert alone["folded"] == alone["overlap"] == alone["teacher_cache"] == NO_TEACHER


@pytest.mark.parametrize(("precision", "which"), [("bf16", ""), ("fp32", " without a stride")])
def test_used_counts_our_own_convolutions_of_student_and_teacher(
    data, teacher, tmp_path, own_convolutions, precision, which
):
    """convnet16 has maps of 16 channels and more. On images of 8 pixels only the first are wide enough for bfloat16; in
    float32 there are none for the image."""
    recipe = {**RECIPE, "precision": precision}
    fields = {"student": "convnet16", "method": "kd", "baseline": "none", "training": recipe}
    found = computing_of(job(data, teacher, **fields), tmp_path)["used"]["student"]["convolutions"]
    assert found["used"] and 0 < found["places"] < found["of"] == 6
    assert found["why"] == f"it is for 3 × 3 convolutions of 16, 32, … channels{which} that no method reads"


@pytest.mark.parametrize(
    ("computing", "flags", "why"),
    [
        (Computing("cpu", True, 1, kernels=True), {"avx512_bf16"}, "the job began without it"),
        (Computing("cpu", True, 1, kernels=True), set(), "in bfloat16 it is for CPUs with AVX512_BF16"),
        (Computing("cpu", True, 1, note="eager: no compiler"), {"avx512_bf16"}, "eager: no compiler"),
        (Computing("cpu", False, 1, kernels=True), {"avx2", "fma"}, "the job began without it"),
        (Computing("cpu", False, 1, kernels=True), {"avx2"}, "in float32 it is for CPUs with AVX2 and FMA"),
        (Computing("cuda", True, 1), set(), "it is for CPUs"),
    ],
)
def test_used_says_why_there_are_no_convolutions_of_our_own(computing, flags, why, monkeypatch):
    monkeypatch.setattr(levers.cores, "flags", lambda: flags)
    training = SimpleNamespace(learners=nn.Conv2d(1, 1, 3), scheme=SimpleNamespace(teacher=None))
    spec = SimpleNamespace(training=SimpleNamespace(kernels="auto"))
    of_job = SimpleNamespace(computing=computing, device=torch.device(computing.device), spec=spec)
    assert levers._convolutions(of_job, training) == {"used": False, "places": 0, "of": 1, "why": why}


def test_used_says_what_the_job_has_turned_off(data, teacher, tmp_path):
    recipe = {**RECIPE, "kernels": "eager", "teacher_cache": "off"}
    used = computing_of(job(data, teacher, method="kd", baseline="none", training=recipe), tmp_path)["used"]["student"]
    none = {"used": False, "places": 0, "of": 3, "why": "training.kernels is 'eager'"}
    assert used["folded"] == used["kernels"] == none and used["convolutions"] == {**none, "of": 6}
    assert used["teacher_cache"] == {**NOT, "why": "training.teacher_cache is 'off'"}


def test_used_names_what_this_machine_cannot_do(data, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "can_fold", lambda _: False)
    monkeypatch.setattr(levers, "can_fold", lambda _: False)
    monkeypatch.setattr(kernels, "enable", without_a_compiler)
    recipe = {**RECIPE, "mix": "mixup"}
    used = computing_of(job(data, teacher, method="kd", baseline="none", training=recipe), tmp_path)["used"]["student"]
    assert used["folded"]["why"] == "PyTorch has no fused convolutions here that are right"
    assert used["kernels"]["why"] == "eager: no compiler was found"
    assert "have no numbers" in used["teacher_cache"]["why"] and not used["teacher_cache"]["used"]


def test_used_leaves_out_the_places_that_a_method_reads(data, teacher, tmp_path):
    """ofd reads activations before the last ReLU of each stage, so that these norms are modules of their own."""
    report = computing_of(method_job("ofd", data, teacher, baseline="none", training=RECIPE), tmp_path)
    for allowed, lever in ((report["folded"], "folded"), (report["kernels"], "kernels")):
        if allowed:
            found = report["used"]["student"][lever]
            assert found["places"] < found["of"] and "a method reads their activations" in found["why"]


class ItsOwnWay(nn.Module):
    """A network that calls its convolution by itself, as blocks of other libraries do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


def test_used_finds_a_teacher_that_computes_its_convolutions_by_itself(data, teacher, tmp_path, monkeypatch):
    build = models.build
    monkeypatch.setattr(models, "build", lambda name, *of: ItsOwnWay() if name == "convnet8" else build(name, *of))
    monkeypatch.setattr("kdcore.weights.load_into", lambda *_: None)
    report = computing_of(job(data, teacher, method="kd", baseline="none", training=RECIPE), tmp_path)
    why = "its network computes them by itself, or a method reads their activations"
    if report["folded"]:
        assert report["used"]["student"]["folded"] == {"used": False, "places": 0, "of": 1, "why": why}


class Silent(Program):
    def __init__(self):
        super().__init__(SimpleNamespace(digest=""))


def test_used_knows_that_a_program_computes_by_itself():
    of_job = SimpleNamespace(stored=None, computing=Computing("cpu", True, 1, folded=True))
    teacher = SimpleNamespace(members=[SimpleNamespace(network=Silent())])
    assert levers._folded(of_job, teacher) == {**NOT, "why": "a program computes by itself"}
    teacher.members[0].network = nn.Linear(1, 1)
    assert levers._folded(of_job, teacher) == {**NOT, "why": "the teacher has no convolution"}


def test_used_shows_a_teacher_that_runs_ahead_and_that_a_file_of_logits_does_not(data, teacher, tmp_path):
    recipe = {**RECIPE, "overlap": True, "threads": 1}
    spec = job(data, teacher, method="kd", baseline="none", training=recipe)
    assert computing_of(spec, tmp_path / "network")["used"]["student"]["overlap"] == YES
    np.savez(tmp_path / "logits.npz", logits=np.zeros((120, 3), dtype=np.float32))
    file = [{"logits": f"file:{tmp_path / 'logits.npz'}"}]
    recipe = {**recipe, "augmentation": {"name": "none"}}
    report = computing_of(job(data, file, method="kd", baseline="none", training=recipe), tmp_path / "file")
    used = report["used"]["student"]
    assert report["overlap"] and used["overlap"] == {**NOT, "why": "a file of logits computes nothing"}
    assert used["folded"] == {**NOT, "why": "a file of logits runs no network"}
    assert used["teacher_cache"] == {**NOT, "why": "a file of logits is in memory already"}


def test_used_of_an_assistants_student_names_no_cache(data, teacher, tmp_path):
    spec = job(data, teacher, method="kd", assistants=["convnet4"], baseline="none", training=RECIPE)
    used = computing_of(spec, tmp_path)["used"]
    assert used["assistant-1"]["teacher_cache"] == YES
    assert used["student"]["teacher_cache"] == {**NOT, "why": "no other job has the teacher of this stage"}


@pytest.fixture
def checkpoint(data, teacher, tmp_path, monkeypatch):
    """The last one of a job that was stopped in its second epoch."""
    where, stream = workspace(tmp_path / "stopped")
    done, step = [0], StageTraining._step

    def counted(self, batch):
        step(self, batch)
        done[0] += 1
        where.stop_requested = done[0] == 8

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StageTraining, "_step", counted)
        run(distilled(data, teacher, baseline="none"), where)
    return where.out / events(stream, "checkpoint")[-1]["path"]


def test_used_of_a_resumed_job_is_what_it_goes_on_with(data, teacher, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "enable", without_a_compiler)
    report = computing_of(distilled(data, teacher, baseline="none"), tmp_path / "resumed", checkpoint)
    assert not report["kernels"] and not report["used"]["student"]["kernels"]["used"]


def test_used_of_a_job_that_an_earlier_version_began_is_what_it_goes_on_with(data, teacher, checkpoint, tmp_path):
    as_by_the_version_before(checkpoint)
    report = computing_of(distilled(data, teacher, baseline="none"), tmp_path / "resumed", checkpoint)
    none = {"used": False, "places": 0, "of": 3, "why": "the job began without it"}
    assert report["used"]["student"]["kernels"] == none and not report["used"]["student"]["folded"]["used"]
    assert report["used"]["student"]["teacher_cache"] == {**NOT, "why": "the job began without it"}


def test_in_words_is_one_line_for_the_log():
    counted = {"used": True, "places": 2, "of": 3, "why": "one is read"}
    text = levers.in_words({"folded": counted, "overlap": YES, "graph": {**NOT, "why": "off"}})
    assert text == "folded: used in 2 of 3 places (one is read); overlap: used; graph: not used (off)"
