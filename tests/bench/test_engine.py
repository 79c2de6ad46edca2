"""The bench of the engine's speed: its check of the first step, its figures, what it refuses. No speed is tested."""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import contestants, engine
from bench.contestants import Arena, Contestant, Turns
from bench.engine import (
    CHECK_FAILED,
    TOO_FEW_QUIET,
    Field,
    Measured,
    Row,
    Slot,
    Turn,
    check_faults,
    exit_code,
    figure,
    resolved,
    tables,
)
from bench.processes import REPOSITORY
from worker import devices

RATIO = Row("ours against plain", ("live", "plain"), lambda rates: rates["live"] / rates["plain"], 2.0, 3.0)
EXACT = {"loss_error": 2e-7, "plain_loss_error": 1e-7, "cosine": 1.0, "plain_cosine": 1.0}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    options = engine._arguments(["--smoke"])
    return engine.arena(options, tmp_path_factory.mktemp("arena"))


def _first_step(arena: Arena, folder: Path, **fields: Any) -> Path:
    """Run one step of a job of ours and return what it has written for the check."""
    me = Contestant("live", "ours", arena, str(folder), **fields)
    written: list[Path] = []

    def after_step(training: Any, workspace: Any) -> None:
        written.append(Path(contestants.write_first_step(training, folder)))
        workspace.stop_requested = True

    with pytest.raises(SystemExit):
        contestants.run_job(me, "job", after_step)
    return written[0]


def test_check_first_step_accepts_a_step_of_the_engine_in_both_precisions(arena: Arena, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        path = _first_step(arena, tmp_path / precision, training={"precision": precision})
        assert check_faults(contestants.check_first_step(arena, path, True, precision), precision) == []


def test_check_first_step_accepts_a_student_alone(arena: Arena, tmp_path: Path) -> None:
    path = _first_step(arena, tmp_path, taught=False, training={"precision": "fp32"})
    assert check_faults(contestants.check_first_step(arena, path, False, "fp32"), "fp32") == []
    (fault,) = check_faults(contestants.check_first_step(arena, path, True, "fp32"), "fp32")[:1]
    assert "the first loss is off by" in fault


def test_check_first_step_finds_another_gradient_and_a_missing_one(arena: Arena, tmp_path: Path) -> None:
    path = _first_step(arena, tmp_path, training={"precision": "fp32"})
    step = torch.load(path, weights_only=True)
    name = "conv1.weight"
    kept = step["gradients"][name].clone()
    step["gradients"][name] = -kept
    torch.save(step, path)
    (fault,) = check_faults(contestants.check_first_step(arena, path, True, "fp32"), "fp32")
    assert "the gradients' cosine is" in fault
    del step["gradients"][name]
    torch.save(step, path)
    assert "other gradients: ['conv1.weight']" in check_faults(
        contestants.check_first_step(arena, path, True, "fp32"), "fp32"
    )


def test_run_job_with_other_computing_replaces_what_the_job_would_choose(arena: Arena, tmp_path: Path) -> None:
    # Not folded, as not every CPU has oneDNN's bfloat16.
    me = Contestant("live", "ours", arena, str(tmp_path), computing={"bf16": True, "folded": False})
    seen = []

    def after_step(training: Any, workspace: Any) -> None:
        seen.append(training.scheme.models["student"].bf16)
        workspace.stop_requested = True

    with pytest.raises(SystemExit):
        contestants.run_job(me, "job", after_step)
    assert seen[0] is True


def _of_a_first_step(arena: Arena, folder: Path, **fields: Any) -> dict[str, Any]:
    """Run one step of a job of ours and return how it computed, with the levers that it used."""

    def after_step(_: Any, workspace: Any) -> None:
        workspace.stop_requested = True

    with pytest.raises(SystemExit):
        contestants.run_job(Contestant("live", "ours", arena, str(folder), **fields), "job", after_step)
    (path,) = (folder / "job" / "checkpoints").iterdir()
    state = torch.load(path, weights_only=True)
    return {**state["computing"], "used": state["used"]["student"]}


LACKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "precision fp32": lambda computing: not computing["bf16"],
    "kernels eager": lambda computing: (
        not (computing["used"]["kernels"]["used"] or computing["used"]["folded"]["used"])
    ),
    "unfused norms": lambda computing: not computing["used"]["kernels"]["used"],
    "oneDNN's convolutions": lambda computing: not computing["used"]["convolutions"]["used"],
    "unfolded teacher": lambda computing: not computing["used"]["folded"]["used"],
    "overlap on": lambda computing: computing["used"]["overlap"]["used"],
    "cache off": lambda computing: not computing["used"]["teacher_cache"]["used"],
    "one thread": lambda computing: computing["why"] == "training.threads",
}
"""What a job with each lever changed shows, and the default does not, on a machine that has the lever."""


@pytest.mark.slow
def test_levers_each_changes_what_it_says_and_the_default_does_not(arena: Arena, tmp_path: Path) -> None:
    default = _of_a_first_step(arena, tmp_path / "default")
    used = {name: default["used"][name]["used"] for name in ("kernels", "convolutions", "folded")}
    has = {
        "precision fp32": default["bf16"],
        "kernels eager": used["kernels"] or used["folded"],
        "unfused norms": used["kernels"],
        "oneDNN's convolutions": used["convolutions"],
        "unfolded teacher": used["folded"],
    }
    assert set(engine.LEVERS) == {*LACKS, "the allocator as it is"}
    for name, lacks in LACKS.items():
        assert lacks(_of_a_first_step(arena, tmp_path / name, **engine.LEVERS[name])), name
        assert not has.get(name, True) or not lacks(default), name


def test_environment_has_the_allocator_of_a_worker_unless_the_lever_is_off(arena: Arena, tmp_path: Path) -> None:
    off = engine.LEVERS["the allocator as it is"]
    of_worker, as_it_is, plain = (
        engine.environment(Contestant("one", kind, arena, str(tmp_path), **fields), 1)
        for kind, fields in (("ours", {}), ("ours", off), ("plain", {}))
    )
    kept = devices.KEPT.items()
    assert of_worker.items() >= kept and not as_it_is.items() >= kept and not plain.items() >= kept


def test_levers_field_gives_all_its_jobs_the_precision_that_is_asked_for(arena: Arena, tmp_path: Path) -> None:
    field = engine.levers_field(arena, tmp_path, ["cache off", "precision fp32"], "bf16")
    trainings = {one.name: one.training for one in field.contestants if one.kind == "ours"}
    off = {"precision": "bf16", "teacher_cache": "off"}
    assert trainings == {"live": {"precision": "bf16"}, "cache off": off, "precision fp32": {"precision": "fp32"}}


def test_view_bytes_is_what_a_view_takes_in_the_files_of_the_cache(arena: Arena, tmp_path: Path) -> None:
    sizes = []

    def after_step(training: Any, workspace: Any) -> None:
        sizes.append(contestants.view_bytes(training))
        workspace.stop_requested = training.global_step >= 3

    with pytest.raises(SystemExit):
        contestants.run_job(Contestant("live", "ours", arena, str(tmp_path)), "job", after_step)
    (path,) = tmp_path.glob("cache/*-teacher/*")
    blocks, rest = divmod(path.stat().st_size, sizes[0] * arena.batch)
    # The step after which the job stops is not seen here; 24 bytes are the head of a block.
    assert (blocks, rest) == (len(sizes) + 1, 24)


def test_without_dropout_passes_the_input_on_and_ends() -> None:
    dropout, ones = torch.nn.Dropout(0.5), torch.ones(1000)
    with contestants.without_dropout():
        assert torch.equal(dropout(ones), ones)
    assert not torch.equal(dropout(ones), ones)


def test_check_faults_allow_three_times_what_the_plain_loop_is_off() -> None:
    plain = {"plain_loss_error": 1e-6, "plain_cosine": 0.9999}
    assert check_faults({**plain, "loss_error": 2.9e-6, "cosine": 0.99971}, "fp32") == []
    assert len(check_faults({**plain, "loss_error": 3.1e-6, "cosine": 0.99969}, "fp32")) == 2
    assert check_faults({**EXACT, "loss_error": 9e-4, "cosine": 0.991}, "bf16") == []
    assert len(check_faults({**EXACT, "loss_error": 5.1e-3, "cosine": 0.989}, "bf16")) == 2
    assert len(check_faults({**EXACT, "loss_error": float("nan"), "cosine": float("nan")}, "bf16")) == 2


def _measured(others: list[float], check: dict[str, Any] = EXACT) -> Measured:
    """Rounds in which ours is 2, 3, 4 … times as fast as plain without loaders, and plain with one is slower."""
    of = Arena("resnet20", "resnet8", "", "", 10, (0.5,), (0.5,))
    names = ("plain, 0 workers", "plain, 1 workers", "live")
    kinds = ("plain", "plain", "ours")
    field = Field(
        "a field",
        of,
        tuple(Contestant(name, kind, of, "") for name, kind in zip(names, kinds, strict=True)),
        tuple(Slot(name, (name,)) for name in names),
        (RATIO,),
    )
    rounds = [
        {
            "plain, 0 workers": Turn(100.0, 0.0, 1.0, 10**8),
            "plain, 1 workers": Turn(90.0, 0.0, 1.0, 10**8),
            "live": Turn(100.0 * (number + 2), used, 1.0, 10**8),
        }
        for number, used in enumerate(others)
    ]
    ready = {name: {"setup_s": 1.0, "threads": 1, "precision": "fp32"} for name in names}
    return resolved(Measured(field, ready, rounds, {"live": check}))


def test_figure_is_the_median_of_the_quiet_rounds_against_the_faster_plain_loop() -> None:
    one = figure(RATIO, _measured([0.0, 0.9, 0.1, 0.2, 0.0, 0.24, 0.0]))
    # Ratios 2 to 8 without the second round's 3: 2, 4, 5, 6, 7, 8.
    assert (one.quiet, one.rounds) == (6, 7)
    assert one.ratio == pytest.approx((5.5, 3.0, 7.5))
    assert one.mark == "beyond"


def test_figure_with_four_quiet_rounds_is_refused() -> None:
    measured = _measured([0.0, 0.0, 0.0, 0.0, 0.25, 2.0])
    one = figure(RATIO, measured)
    assert one.ratio is None
    assert one.text == "refused: 4 of 6 rounds were quiet, at least 5 are needed"
    assert exit_code([(measured, [one])]) == TOO_FEW_QUIET


def test_tables_of_growth_have_what_an_epoch_takes_in_time_and_in_the_cache() -> None:
    """Of two that run at once, each has half of the rate: 45,000 images at 450 a second, and 200 bytes of each view."""
    measured = _measured([0.0] * 3)
    slot = Slot("two at once", ("live", "plain, 0 workers"))
    measured.field = replace(measured.field, slots=(slot,), by_epoch=True)
    measured.ready["live"]["view_bytes"] = 200
    measured.rounds = [{slot.name: Turn(900.0, 0.0, 1.0, 10**8)}] * 3
    head, line, row = tables(measured, []).splitlines()[2:5]
    assert head.count("|") == line.count("|") == row.count("|")
    assert "| s an epoch of 45,000 images | MB of the cache an epoch |" in head and "| 100.0 | 9.0 |" in row
    measured.field = replace(measured.field, by_epoch=False)
    assert "an epoch" not in tables(measured, [])


def test_figure_of_a_wrong_first_step_is_refused() -> None:
    measured = _measured([0.0] * 6, {**EXACT, "cosine": 0.9})
    one = figure(RATIO, measured)
    assert one.ratio is None
    assert one.text.startswith("refused: live: the gradients' cosine is 0.9")
    assert exit_code([(measured, [one])]) == CHECK_FAILED
    assert "refused" in tables(measured, [one])


def test_exit_code_is_0_for_figures_without_faults() -> None:
    measured = _measured([0.0] * 5)
    assert exit_code([(measured, [figure(RATIO, measured)])]) == 0


def test_mark_of_a_time_is_reached_below_its_limit() -> None:
    row = replace(RATIO, value=lambda rates: 2.1, must=2.2, beyond=2.0, at_most=True)
    assert figure(row, _measured([0.0] * 5)).mark == "reached"
    assert figure(replace(row, must=2.05), _measured([0.0] * 5)).mark == "missed"


def test_turns_time_only_the_steps_after_the_warm_ones_and_leave_out_those_that_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(contestants.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(contestants, "_end", lambda: None)
    commands = io.StringIO(json.dumps({"warm": 2, "steps": 2}) + "\n")
    answers = io.StringIO()
    turns = Turns(commands.readline, answers, began=0.0)
    now[0] = 5.0
    turns.ready(threads=1)
    for seconds, counted in ((10.0, True), (10.0, True), (1.0, True), (100.0, False), (2.0, True)):
        now[0] += seconds
        turns.after_step(counted)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first == {"setup_s": 5.0, "threads": 1}
    assert (second["steps"], second["seconds"]) == (2, 3.0)


def test_arguments_refuse_a_pair_without_a_student() -> None:
    with pytest.raises(SystemExit):
        engine._arguments(["--pair", "resnet56"])


def test_table_field_of_all_settings_has_every_row_of_the_issue() -> None:
    options = engine._arguments([])
    assert isinstance(options, argparse.Namespace)
    of = Arena("resnet56", "resnet20", "", "", 100, (0.5,), (0.5,))
    field = engine.table_field(of, Path("/nowhere"), options)
    uses = {name for row in field.rows for name in row.uses}
    assert {"live", "hits", "alone", "fp32", "bf16", "plain", "plain alone"} <= uses
    assert field.whole_job and sum(slot.neighbour for slot in field.slots) == 2
    assert [row.must for row in field.rows if row.must] == [2.8, 4.6, 1.08, 1.7, 2.2, 2.2]
    (hits,) = (one for one in field.contestants if one.name == "hits")
    assert hits.fill_steps > (options.rounds + 1) * (options.turn + 2)


@pytest.mark.slow
def test_smoke_runs_both_sides_checks_their_first_step_and_refuses_a_ratio(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.engine", "--smoke", "--json", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(path.read_text())
    assert len(figures["rounds"]) == 2 and figures["checks"]["live"]["cosine"] > 0.99
    assert "of 2 rounds were quiet, at least 5 are needed" in done.stdout


def test_growth_fields_compare_each_quantity_with_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Arena("resnet20", "resnet8", "", "", 100, (0.5,), (0.5,))
    monkeypatch.setattr(engine, "arena", lambda options, folder: replace(of, classes=options.classes))
    fields = list(engine.growth_fields(engine._arguments(["--growth", "--precision", "fp32"]), tmp_path))
    assert [len(field.contestants) for field in fields[:4]] == [5, 3, 3, 3]
    for field in fields:
        names = {slot.name for slot in field.slots}
        assert all(set(row.uses) <= names for row in field.rows)
        assert len({contestant.folder for contestant in field.contestants}) == len(field.contestants)
        assert {contestant.training["precision"] for contestant in field.contestants} == {"fp32"} and field.by_epoch
    one, two = fields[0].rows[0], fields[2].rows[0]
    assert one.value({"batch 64": 2.0, "batch 16": 1.0}) == 0.5
    assert two.value({"1 student": 4.0, "2 students": 1.0}) == 0.25
