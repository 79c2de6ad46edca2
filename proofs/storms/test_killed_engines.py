"""Every method of the catalogue, and what can be made of them, as whole jobs: run, exported, killed and resumed."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from base import files
from kdcore import models, protocol
from kdcore.catalog import architecture
from kdcore.protocol import REPORT_OF_ATTEMPTS
from kdcore.run import run
from kdcore.spec import METHODS, JobSpec
from proofs.storms.killing import killed
from tests.kdcore.engine import job, method_job, same, workspace, write_arrays, write_pool, write_teacher


@dataclass(frozen=True)
class Inputs:
    """Files that all jobs of this page share."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data.npz"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def teacher(self) -> Path:
        """As wide as the students, which FSP asks for."""
        return self.folder / "teacher.safetensors"

    @property
    def teachers(self) -> list[dict]:
        files = [self.teacher, self.folder / "other.safetensors"]
        return [{"checkpoint": f"file:{path}", "weight": weight} for weight, path in enumerate(files, 1)]

    def job(self, **fields: Any) -> JobSpec:
        return job(self.data, self.teacher, **fields)

    def without_teacher(self, **fields: Any) -> JobSpec:
        return job(self.data, **fields)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_arrays(folder / "data.npz")
    write_pool(folder / "pool.npz")
    write_teacher(folder / "teacher.safetensors", "convnet4")
    write_teacher(folder / "other.safetensors", "convnet8", seed=2)
    return Inputs(folder)


def pool(inputs: Inputs, **fields: Any) -> dict:
    return {"unlabelled": {"source": f"file:{inputs.folder / 'pool.npz'}", **fields}}


def named(name: str) -> Callable[[Inputs], JobSpec]:
    baseline = "none" if name == "supervised" else "train"
    return lambda inputs: method_job(name, inputs.data, inputs.teacher, baseline=baseline)


NAMED = {name: named(name) for name in METHODS}
TWO_HINTS = {"name": "fitnet", "stages": "two"}
BOUNDARY, FACTORS, FLOWS = {"name": "activation_boundary"}, {"name": "factor_transfer"}, {"name": "fsp"}
CRD = {"name": "crd", "negatives": 8}
AVERAGED = {"ema": 0.8, "clip_norm": 1.0, "label_smoothing": 0.1}
BORN_AGAIN = {"name": "born_again", "generations": 2}
MADE = {
    "kd of every switch": lambda w: w.job(
        method={"name": "kd", "standardize": True}, baseline="train", training={**AVERAGED, "mix": "mixup"}
    ),
    "attention by gradient": lambda w: w.job(method={"name": "attention", "mapping": "gradient"}),
    "fitnet in two stages": lambda w: w.job(method=TWO_HINTS, training=AVERAGED),
    "factor_transfer averaged": lambda w: w.job(method=FACTORS, training=AVERAGED),
    "crd averaged, by AdamW": lambda w: w.job(method=CRD, training={"ema": 0.8, "optimizer": "adamw"}),
    "sum of kd and crd": lambda w: w.job(method=[{"name": "kd"}, CRD]),
    "sum of three stages": lambda w: w.job(method=[{"name": "kd"}, FACTORS, BOUNDARY]),
    "sum of two hints and attention": lambda w: w.job(method=[TWO_HINTS, {"name": "attention"}]),
    "three peers averaged": lambda w: w.without_teacher(method="dml", student=["convnet4"] * 3, training=AVERAGED),
    "branches averaged": lambda w: w.without_teacher(method="one", training=AVERAGED),
    "exits averaged": lambda w: w.without_teacher(method="byot", training=AVERAGED),
    "generations as an ensemble": lambda w: w.job(method={**BORN_AGAIN, "answer": "ensemble"}),
    "generations with attention": lambda w: w.job(method=[BORN_AGAIN, {"name": "attention"}]),
    "assistants": lambda w: w.job(method="kd", assistants=["convnet8", "convnet4"], baseline="train"),
    "several teachers": lambda w: w.without_teacher(method="kd", teacher=w.teachers),
    "crd on unlabelled images": lambda w: w.job(method=CRD, **pool(w), baseline="train"),
    "kd on unlabelled images alone": lambda w: w.job(method="kd", **pool(w, labels="none", labelled_too=False)),
}
JOBS = {**NAMED, **MADE}


@dataclass(frozen=True)
class Done:
    """A job from its start to its end; `lines` are those of all its processes, one after the other."""

    out: Path
    lines: list[dict]

    @property
    def report(self) -> dict:
        return json.loads((self.out / "report.json").read_text()) | dict.fromkeys(REPORT_OF_ATTEMPTS)

    @property
    def weights(self) -> dict[str, dict]:
        return {path.name: load_file(path) for path in sorted(self.out.glob("*.safetensors"))}

    @property
    def metrics(self) -> list[dict]:
        """Each line once; one that a resumed process writes again must be the same."""
        series: dict[tuple, dict] = {}
        for line in self.lines:
            if line["event"] == "metric":
                assert series.setdefault((line["trial"], line["step"]), line) == line
        return list(series.values())

    @property
    def steps(self) -> list[tuple[int, str]]:
        """Every step with a progress line, and what it trained."""
        return sorted({(line["step"], line["trial"]) for line in self.lines if line["event"] == "progress"})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Write a progress line for every step of these tiny jobs, use one thread, and skip the fsyncs."""
    monkeypatch.setattr(protocol, "PROGRESS_EVERY_S", 0)
    monkeypatch.setattr(files, "sync", lambda _: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", JOBS)
def test_run_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(name, inputs, tmp_path):
    """The folder of every process is its own, and it goes on from the newest checkpoint of the one before."""
    spec = JOBS[name](inputs)
    # Few steps an epoch, a checkpoint after each.
    spec = with_training(spec, batch_size=50, checkpoint_every_s=0)
    whole = finish(spec, tmp_path / "whole", inputs)
    if name in NAMED:
        delivers_the_plain_network(name, whole)
    again = finish_after_kills(spec, tmp_path, inputs, kills(name, whole))
    assert again.report == whole.report
    assert again.metrics == whole.metrics
    assert again.steps == whole.steps == [(number, trial) for number, (_, trial) in enumerate(whole.steps, 1)]
    assert again.weights.keys() == whole.weights.keys()
    assert all(same(again.weights[file], weights) for file, weights in whole.weights.items())


def finish(spec: JobSpec, folder: Path, inputs: Inputs, resume: Path | None = None) -> Done:
    where, stream = workspace(folder, inputs.cache)
    run(spec, where, resume)
    return Done(where.out, list(map(json.loads, stream.getvalue().splitlines())))


def finish_after_kills(spec: JobSpec, folder: Path, inputs: Inputs, files: list[str]) -> Done:
    """Each process dies writing the next of `files`; the last one lives."""
    lines, resume = [], None
    for file in files:
        attempt = killed(spec, folder / f"until {file}", inputs.cache, resume, file)
        lines += attempt.lines
        resume = attempt.checkpoints[-1] if attempt.checkpoints else resume
    last = finish(spec, folder / "last", inputs, resume)
    return Done(last.out, lines + last.lines)


def kills(name: str, whole: Done) -> list[str]:
    """Files that a process shall die writing: the checkpoint at the end of each stage and the one after it, so that
    the next goes on from within the stage and from its end; one drawn by lot; and the report."""
    ends = {trial: step for step, trial in whole.steps}.values()
    last = max(ends)
    drawn = random.Random(name).randint(1, last)
    steps = {drawn, *ends, *(end + 1 for end in ends if end < last)}
    return [*(f"{step:09d}.pt" for step in sorted(steps)), "report.json"]


def with_training(spec: JobSpec, **fields: Any) -> JobSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update=fields)})


def delivers_the_plain_network(name: str, done: Done) -> None:
    """Exactly the parameters of the catalogue, under their own names: nothing that a method owns is in the file."""
    exported = done.weights["student.safetensors"]
    plain = models.build("convnet4", 3, 1)
    plain.load_state_dict(exported, strict=True)
    promised = architecture("convnet4").parameters(3, 1)
    assert sum(value.numel() for value in plain.parameters()) == promised == done.report["student"]["parameters"]
    with safe_open(done.out / "student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["distillery"])["members"] == 1
    assert (done.report["teacher"] is not None) == (METHODS[name].facts.teacher == "required")
    if name == "supervised":
        assert done.report["alone"] is None and done.report["gain"] is None
    else:
        assert done.report["alone"]["parameters"] == promised
        assert done.report["gain"] == done.report["student"]["accuracy"] - done.report["alone"]["accuracy"]
