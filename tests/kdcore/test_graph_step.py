"""A GPU without a GPU: on the meta device nothing has a value, and a record of operators replays them as a CUDA graph.

New methods are included automatically.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base.errors import SpecInvalid
from kdcore import graph_step
from kdcore.classifier import FrozenTeacher
from kdcore.graph_step import CudaGraph, GraphStep
from kdcore.lesson import Batch
from kdcore.prepare import PreparedJob, prepare
from kdcore.run import TrialSetup
from kdcore.spec import GIVEN, METHODS
from kdcore.training import Observer, StageTraining
from tests.kdcore.engine import copied, job, method_job, same, workspace, write_arrays, write_pool, write_teacher

META = torch.device("meta")
BATCH = 4
TWO_TEACHERS = "several teachers"
RECIPES: dict[str, dict[str, Any]] = {
    "sgd with momentum of Nesterov": {"optimizer": {"name": "sgd", "nesterov": True}, "schedule": {"name": "cosine"}},
    "sgd without momentum": {"optimizer": {"name": "sgd", "momentum": 0, "weight_decay": 0}},
    "adamw and a cosine": {"optimizer": {"name": "adamw"}, "schedule": {"name": "cosine", "warmup_epochs": 2}},
    "average, clipping and smoothing": {"ema": 0.9, "clip_norm": 0.1, "label_smoothing": 0.1},
    "mixup": {"mix": "mixup"},
    "cutmix": {"mix": "cutmix"},
    "no augmentation": {"augmentation": "none"},
    "boxes": {"augmentation": {"name": "random_resized_crop"}},
    "boxes and mixup": {"augmentation": {"name": "random_resized_crop"}, "mix": "mixup"},
}
JOBS: dict[str, dict[str, Any]] = {
    TWO_TEACHERS: {"method": "kd"},
    "standardized logits": {"method": {"name": "dkd", "standardize": True}},
    "gradients at the images": {"method": {"name": "attention", "mapping": "gradient"}},
    "a sum of methods": {"method": ["kd", {"name": "rkd"}, {"name": "fitnet"}]},
    "a teacher of images of another size": {},
    "a map of classes": {},
    "unlabelled images": {},
}
CASES = [*METHODS, *RECIPES, *JOBS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    where, _ = workspace(folder / "job")
    return {
        "data": write_arrays(folder / "blobs.npz"),
        "pool": write_pool(folder / "pool.npz"),
        "teacher": write_teacher(folder / "teacher.safetensors"),
        "wide": write_teacher(folder / "wide.safetensors", classes=5),
        "workspace": where,
    }


def prepared(case: str, files: dict[str, Any]) -> PreparedJob:
    """A job as small as can be, of 40 epochs, so that warm-ups of losses take several of them."""
    recipe = {"epochs": 40, "batch_size": BATCH, "kernels": "eager", **RECIPES.get(case, {})}  # As on a GPU.
    fields: dict[str, Any] = {"baseline": "none", "training": recipe}
    teacher = {"checkpoint": f"file:{files['teacher']}"}
    if case in METHODS:
        fields["student"] = "convnet8" if case == "fsp" else ["convnet4"] * 2 if case == "dml" else "convnet4"
        spec = method_job(case, files["data"], files["teacher"], **fields)
    else:
        fields = {"method": "kd", **JOBS.get(case, {}), **fields}
        teachers = [teacher, {**teacher, "weight": 2}] if case == TWO_TEACHERS else [teacher]
        if case == "a teacher of images of another size":
            teachers[0]["image_size"] = 16
        if case == "a map of classes":
            teachers = [{"checkpoint": f"file:{files['wide']}", "class_map": {"0": [0, 3], "1": 1, "2": 2}}]
        if case == "unlabelled images":
            fields["unlabelled"] = {"source": f"file:{files['pool']}", "labels": "teacher"}
        spec = job(files["data"], teachers, **fields)
    return prepare(spec, files["workspace"])


def stages(prepared: PreparedJob) -> Iterator[StageTraining]:
    """The trainings of the job's last trial, stage after stage, with a fresh student."""
    trial = prepared.trials[-1]
    teacher = prepared.teacher
    if trial.taught_by not in (None, GIVEN):
        teacher = FrozenTeacher(prepared.student(trial.students[0]))
    setup = TrialSetup(trial, prepared, teacher)
    observer = Observer(metric=lambda *_: None, after_step=lambda _: None)
    for number in range(len(trial.stages)):  # One after the other: each sets the taps of its models.
        yield setup.training(number, observer)


class OnOneDevice(TorchDispatchMode):
    """Fails if an operator has tensors of host and device: a GPU would wait for the copy, and a graph refuses it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        assert len({one.device.type for one in tensors}) <= 1, f"{func} has tensors of host and device"
        return result


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_no_value_on_the_host_and_mixes_no_devices(case, files, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # It knows no device named meta.
    job = prepared(case, files)
    job.computing = replace(job.computing, device="meta")
    if job.teacher is not None:
        job.teacher = job.teacher.to(META)
    for training in stages(job):
        training.learners.train()
        batch = training.batches.of(training.training_set.rows[:BATCH])
        epoch = torch.ones((), device=META)
        held = Batch(batch.inputs, batch.labels, batch.index, epoch, batch.view_ids, batch.sized)
        with OnOneDevice():
            training.batches.of(training.training_set.rows[:BATCH])
            training._step(held)
        assert set(training.sums) >= {"loss", "label_loss"}


class Recorded:
    """A capture on a CPU. A replay calls the same operators on the same tensors with the same numbers as a CUDA graph
    would: nothing of Python runs again."""

    def __init__(self):
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.figures: dict[str, Tensor] = {}
        self.fresh = False

    def run(self, work):
        return work()

    def capture(self, work):
        """Unlike a CUDA graph's capture, this runs the work; the first replay has nothing left to do."""
        calls = self.calls

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                calls.append((func, args, kwargs or {}, result))
                return result

        with Recorder():
            self.figures = work()
        self.fresh = True

    def replay(self):
        if not self.fresh:
            with torch.no_grad():
                for func, args, kwargs, result in self.calls:
                    for own, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                        if isinstance(own, Tensor):
                            own.copy_(new)
        self.fresh = False
        return {name: value.clone() for name, value in self.figures.items()}


def trained(training: StageTraining, steps: range = range(3)) -> dict[str, Tensor]:
    """All that some steps have changed; two steps an epoch."""
    training.learners.train()
    if training.objective is not None:
        training.objective.train()
    training.steps_per_epoch = 2
    for step in steps:
        training.position.epoch, training.position.step = divmod(step, 2)
        training._step(training.batches.of(training.training_set.rows[step * BATCH :][:BATCH]))
    state = {
        "learners": dict(training.learners.state_dict()),
        "averages": [a.state for a in training.averages.values()],
    }
    leaves = tree_leaves((state, training.sums, dict(training.objective.state_dict()) if training.objective else {}))
    return dict(zip(map(str, range(len(leaves))), leaves, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_graph_step_replays_what_eager_steps_compute(case, files, monkeypatch):
    """An eager step, one that is captured, and a replay in the next epoch, with another rate, batch and draws."""
    monkeypatch.setattr(graph_step, "EAGER_STEPS", 1)
    monkeypatch.setattr(graph_step, "CudaGraph", Recorded)
    results = []
    for graph in (False, True):
        results.append([])
        job = prepared(case, files)
        job.computing = replace(job.computing, step="graph")
        for training in stages(job):
            if not graph:
                training.graph_step = None
            results[-1].append(trained(training))
    for eager, replayed in zip(*results, strict=True):
        assert eager.keys() == replayed.keys()
        for name, value in eager.items():
            # The weight of a loss that rises with the epoch is computed in float32 here.
            close = {"rtol": 1e-4, "atol": 1e-6} if case in {"dkd", "one", "reviewkd"} else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(replayed[name], value, **close, equal_nan=True)


@pytest.mark.parametrize("case", ["crd", "adamw and a cosine"])
def test_graph_step_a_training_that_was_stopped_goes_on_to_the_same_bits(case, files, monkeypatch):
    """crd draws from torch's generator. A resumed training begins with an eager step again."""
    monkeypatch.setattr(graph_step, "EAGER_STEPS", 1)
    monkeypatch.setattr(graph_step, "CudaGraph", Recorded)
    job = prepared(case, files)
    job.computing = replace(job.computing, step="graph")
    (undisturbed,) = stages(job)
    whole = trained(undisturbed, range(6))
    (stopped,) = stages(job)
    trained(stopped, range(3))
    state = copied(stopped.state())
    (resumed,) = stages(job)
    resumed.restore(state)
    assert same(whole, trained(resumed, range(3, 6)))


def batch(value: int, epoch: int) -> Batch:
    pixels = torch.full((2, 1, 2, 2), value, dtype=torch.uint8)
    return Batch(
        pixels, torch.tensor([value, 0]), torch.tensor([value, 1]), epoch, torch.tensor([value, 2]), {4: pixels}
    )


def test_graph_step_gives_each_batch_in_the_same_tensors():
    seen = []
    step = GraphStep(Recorded)
    for number in (1, 2):
        step(lambda given: seen.append(given) or {"value": given.labels.sum()}, batch(number, epoch=number))
    first, second = seen
    assert first is second and first.epoch.item() == 2
    held = (first.inputs, first.labels, first.index, first.view_ids, first.sized[4])
    given = batch(2, epoch=2)
    for own, other in zip(held, (given.inputs, given.labels, given.index, given.view_ids, given.sized[4]), strict=True):
        assert torch.equal(own, other) and own is not other


def test_graph_step_is_captured_after_three_eager_steps_and_runs_no_work_of_python_afterwards():
    calls = []
    step = GraphStep(Recorded)

    def work(given):
        calls.append(1)
        return {"doubled": (2 * given.inputs.float()).mean()}

    values = [step(work, batch(number, 1))["doubled"].item() for number in range(7)]
    assert values == [2.0 * number for number in range(7)] and len(calls) == graph_step.EAGER_STEPS + 1


def test_graph_step_a_replay_leaves_earlier_figures_as_they_are():
    step = GraphStep(Recorded)
    figures = [step(lambda given: {"mean": given.inputs.float().mean()}, batch(number, 1)) for number in range(7)]
    assert [one["mean"].item() for one in figures] == list(range(7))


class Invalidated:
    """The capture of work that a stream refuses: its end raises another error."""

    def __enter__(self):
        pass

    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_cuda_graph_a_step_that_cannot_be_captured_names_the_field_and_the_first_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Invalidated())
    graph = object.__new__(CudaGraph)
    graph.graph = graph.stream = None

    def reads_a_value():
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    with pytest.raises(
        SpecInvalid, match=r"training\.step is 'graph'.*not permitted when stream is capturing$"
    ) as refused:
        graph.capture(reads_a_value)
    assert refused.value.hint == "set training.step to 'eager'"


@pytest.mark.parametrize("step", ["eager", "graph"])
def test_a_training_that_is_over_is_freed_without_a_search_for_cycles(step, files):
    """Its weights and its graph would stay on the GPU until the next search."""
    job = prepared("kd", files)
    job.computing = replace(job.computing, step=step)
    trainings = list(stages(job))
    over = weakref.ref(trainings[0])
    trainings.clear()
    assert over() is None
