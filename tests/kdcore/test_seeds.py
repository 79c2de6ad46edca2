"""A job of several seeds: each run is the job of that seed, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from kdcore import checkpoint
from kdcore.checkpoint import Stopped
from kdcore.protocol import REPORT_OF_ATTEMPTS
from kdcore.run import run
from kdcore.training import StageTraining
from tests.kdcore.engine import distilled, events, same, workspace, write_arrays, write_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    write_arrays(folder / "data.npz")
    write_teacher(folder / "teacher.safetensors")
    return folder


def spec(folder, seeds: int = 1, **training):
    one = distilled(folder / "data.npz", folder / "teacher.safetensors", epochs=1, **training)
    return one.model_copy(update={"seeds": seeds})


class Finished:
    def __init__(self, spec, out, cache, resume=None) -> None:
        where, self.stream = workspace(out, cache)
        self.report = run(spec, where, resume)
        last = checkpoint.load(max((out / "checkpoints").iterdir()), torch.device("cpu"))
        self.ended = {trial: outcomes["student"].best for trial, outcomes in last.finished.items()}
        self.out = out


@pytest.fixture(scope="module")
def twice(folder, tmp_path_factory):
    return Finished(spec(folder, seeds=2, seed=3), tmp_path_factory.mktemp("twice"), folder / "cache")


@pytest.mark.parametrize(("seed", "suffix"), [(3, ""), (4, "-seed-4")])
def test_run_each_seed_is_the_job_of_that_seed_bit_for_bit(seed, suffix, twice, folder, tmp_path):
    """Its first weights, held-out images, order and augmentation."""
    single = Finished(spec(folder, seed=seed), tmp_path, folder / "cache")
    for trial in ("student", "alone"):
        assert same(twice.ended[f"{trial}{suffix}"], single.ended[trial])
        row = twice.report["models"][f"{trial}{suffix}"] if suffix else twice.report[trial]
        assert row == {name: single.report[trial][name] for name in row}


def test_run_the_first_seed_is_delivered(twice):
    assert [path.stem for path in sorted(twice.out.glob("*.safetensors"))] == ["alone", "student"]
    assert same(load_file(twice.out / "student.safetensors"), twice.ended["student"])


def test_run_each_seed_has_curves_costs_and_figures_of_its_own(twice):
    trials = ["student", "alone", "student-seed-4", "alone-seed-4"]
    assert list(twice.ended) == trials
    assert list(dict.fromkeys(line["trial"] for line in events(twice.stream, "metric"))) == trials
    assert list(twice.report["cost"]["stages"]) == list(twice.report["timings"]["training"]) == trials
    proof = twice.report["proof"]
    rows = {name: twice.report.get(name) or twice.report["models"][name] for name in trials}
    assert [(one["seed"], one["student"], one["alone"]) for one in proof["seeds"]] == [
        (3, rows["student"]["accuracy"], rows["alone"]["accuracy"]),
        (4, rows["student-seed-4"]["accuracy"], rows["alone-seed-4"]["accuracy"]),
    ]
    assert proof["over_seeds"]["seeds"] == 2
    assert events(twice.stream, "progress")[-1]["percent"] == 100


@pytest.mark.parametrize("steps", [15, 20])
def test_run_a_job_of_seeds_that_was_stopped_goes_on_to_the_same_bits(steps, twice, folder, tmp_path, monkeypatch):
    """Six steps a trial: stopped in the student and in the baseline of the second seed."""
    job = spec(folder, seeds=2, seed=3)
    where, stream = workspace(tmp_path / "stopped", folder / "cache")
    done, step = [0], StageTraining._step

    def counted(self, *given):
        done[0] += 1
        where.stop_requested = done[0] == steps
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "_step", counted)
        with pytest.raises(Stopped):
            run(job, where)
    last = where.out / events(stream, "checkpoint")[-1]["path"]
    resumed = Finished(job, tmp_path / "resumed", folder / "cache", last)
    assert all(same(resumed.ended[trial], twice.ended[trial]) for trial in twice.ended)
    of_attempts = dict.fromkeys(REPORT_OF_ATTEMPTS)
    assert {**resumed.report, **of_attempts} == {**twice.report, **of_attempts}
