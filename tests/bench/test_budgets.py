"""The benches of accuracy: their jobs are valid specs, their results are continued, their tables say what was found."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import budgets, fidelity
from bench.budgets import ALONE, BUDGETS, ROWS, SMOKE, cifar100
from bench.runs import EngineFailed, Kdcore, Results, Run, figures, gains, interval, points, run_missing
from kdcore.spec import parse

BUDGET = cifar100(6_000, 4)


def _figures(accuracy: float, **others: Any) -> dict[str, Any]:
    kept = {"accuracy": accuracy, "last": accuracy - 0.01, "teacher": 0.7, "seconds": 90.0, "precision": "bf16"}
    return {**kept, **others}


def test_specs_of_all_rows_on_all_budgets_are_valid() -> None:
    for budget in BUDGETS.values():
        for row in ROWS:
            parse(budget.run(row, 0).spec)
        if budget.teacher_run is not None:
            parse(budget.teacher_run.spec)
    for run in (*fidelity.whole_runs(fidelity.rows_of(["nst"]), 2), *fidelity.precision_runs(fidelity.SHORT, 8)):
        parse(run.spec)


def test_runs_of_a_seed_differ_in_teacher_and_method_alone() -> None:
    alone, taught = BUDGET.run(ALONE, 1), BUDGET.run("kd + nst", 1)
    same = ("dataset", "student", "training")
    assert all(alone.spec[name] == taught.spec[name] for name in same)
    assert "teacher" not in alone.spec and alone.inputs == taught.inputs[:1]
    assert taught.spec["method"][1] == {"name": "nst", "weight": 50.0}


def test_budget_in_another_precision_changes_it_for_all_runs_of_the_budget_and_its_teacher() -> None:
    flowers = BUDGETS["flowers"].at("fp32")
    assert flowers.run(ALONE, 0).spec["training"]["precision"] == "fp32"
    assert flowers.teacher_run is not None and flowers.teacher_run.spec["training"]["precision"] == "fp32"
    assert flowers.run("kd", 1).key != BUDGETS["flowers"].run("kd", 1).key
    assert BUDGETS["flowers"].at("bf16") == BUDGETS["flowers"] and BUDGETS["digits"].at("fp32") is BUDGETS["digits"]


def test_spec_of_a_run_names_no_path() -> None:
    for budget in BUDGETS.values():
        assert "file:" not in json.dumps(budget.run("kd", 0).spec)


def test_run_missing_adds_a_line_for_each_run_and_continues_with_what_is_missing(tmp_path: Path) -> None:
    runs = [BUDGET.run(row, seed) for seed in range(2) for row in (ALONE, "kd")]
    ran: list[Run] = []

    def engine(run: Run) -> Mapping[str, Any]:
        if len(ran) == 3:
            raise EngineFailed("out_of_memory", "no memory")
        ran.append(run)
        return _figures(0.1)

    path = tmp_path / "results" / "budgets.jsonl"
    assert not run_missing(runs, Results(path), engine)
    assert ran == runs[:3] and len(path.read_text().splitlines()) == 3
    again: list[Run] = []
    assert run_missing(runs, Results(path), lambda run: again.append(run) or _figures(0.2))
    assert again == runs[3:]
    assert run_missing(runs, Results(path), lambda run: pytest.fail("all are done"))


def test_results_of_another_spec_are_not_used(tmp_path: Path) -> None:
    results = Results(tmp_path / "lines.jsonl")
    run = BUDGET.run("kd", 0)
    results.add(run, _figures(0.1))
    changed = Run(run.budget, run.row, run.seed, {**run.spec, "temperature": 2.0}, run.inputs)
    assert results.of(run) is not None and results.of(changed) is None
    assert results.accuracies([run, changed]) == {0: 0.1}


def test_run_that_the_engine_refuses_gets_a_line_and_is_not_repeated(tmp_path: Path) -> None:
    def engine(run: Run) -> Mapping[str, Any]:
        raise EngineFailed("spec_invalid", "no pairs of stages")

    results, run = Results(tmp_path / "lines.jsonl"), BUDGET.run("nst", 0)
    assert run_missing([run], results, engine)
    results.add(BUDGET.run(ALONE, 0), _figures(0.1))
    assert run_missing([run], results, lambda run: pytest.fail("it is refused again"))
    assert "| nst | refused: spec_invalid: no pairs of stages |" in budgets.table([BUDGET], ["nst"], 1, results)


def test_figures_keep_what_tables_need() -> None:
    report = {
        "student": {"accuracy": 0.123456789, "last": {"accuracy": 0.1}, "agreement": 0.2},
        "teacher": None,
        "test_samples": 10,
        "seconds": 1.5,
        "computing": {"threads": 1, "bf16": True},
    }
    kept = figures(report)
    assert (kept["accuracy"], kept["last"], kept["teacher"]) == (0.123457, 0.1, None)
    assert (kept["threads"], kept["precision"]) == (1, "bf16")


def test_interval_is_students_t() -> None:
    # Mean 2, standard deviation 1, three values: 2 ± 4.303 / √3.
    low, high = interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)
    assert interval([1.0]) is None
    assert points([0.01, 0.02, 0.03]) == "+2.00 (-0.48 to +4.48)"
    assert points([0.01]) == "+1.00 (one seed)"
    assert points([]) == "–"


def test_gains_are_of_seeds_that_both_have() -> None:
    assert gains({0: 0.5, 2: 0.7}, {0: 0.4, 1: 0.1, 2: 0.5}) == pytest.approx([0.1, 0.2])


def test_budgets_table_has_gain_interval_and_the_best_method_first(tmp_path: Path) -> None:
    results = Results(tmp_path / "lines.jsonl")
    for seed, (alone, kd, nst) in enumerate([(0.10, 0.09, 0.14), (0.11, 0.12, 0.16), (0.09, 0.08, 0.12)]):
        for row, accuracy in ((ALONE, alone), ("kd", kd), ("nst", nst)):
            results.add(BUDGET.run(row, seed), _figures(accuracy))
    lines = budgets.table([BUDGET], ["kd", "nst"], 3, results).splitlines()
    assert lines[0] == "cifar100 6000 x 4: batch 64, precision bf16, teacher 70.00 %"
    # Gains 4, 5 and 3 points: 4 ± 4.303 / √3.
    assert lines[4] == "| nst | 14.00 | +4.00 (+1.52 to +6.48) | 3 of 3 | 13.00 | 90 |"
    assert lines[5].startswith("| **alone** | 10.00 | – | – |")
    assert lines[6].startswith("| kd | 9.67 | -0.33 (") and "| 1 of 3 |" in lines[6]


def test_budgets_table_without_results_is_empty(tmp_path: Path) -> None:
    assert budgets.table(list(BUDGETS.values()), list(ROWS), 3, Results(tmp_path / "none.jsonl")) == ""


def test_fidelity_tables_pair_by_seed_and_say_what_is_not_done(tmp_path: Path) -> None:
    results = Results(tmp_path / "lines.jsonl")
    rows = fidelity.rows_of(["nst", "kd"])
    assert rows == [ALONE, "kd", "nst"]
    for seed in range(2):
        results.add(fidelity.WHOLE.run(ALONE, seed), _figures(0.5))
        results.add(fidelity.WHOLE.run("kd", seed), _figures(0.53))
    whole = fidelity.whole_table(rows, 2, results)
    assert "| kd | 2 | 53.00 | 52.00 | +3.00 (+3.00 to +3.00) | 1.5 |" in whole
    assert "| nst | 0 | not done |" in whole
    for seed, run in enumerate(fidelity.precision_runs(fidelity.SHORT, 2)):
        results.add(run, _figures(0.2 + 0.01 * seed))
    # fp32, bf16, fp32, bf16 of kd, then of the student alone: bf16 is one point above in each pair.
    assert fidelity.precision_table(fidelity.SHORT, 2, results).count("| 2 |") == 2
    assert "| kd | 2 | 21.00 | 22.00 | +1.00 (+1.00 to +1.00) |" in fidelity.precision_table(fidelity.SHORT, 2, results)


@pytest.mark.slow
def test_kdcore_runs_a_job_and_reads_its_report_the_second_time(tmp_path: Path) -> None:
    assert SMOKE.teacher_run is not None
    engine = Kdcore(tmp_path, {}, threads=1)
    first = engine(SMOKE.teacher_run)
    assert 0 < first["accuracy"] < 1 and (first["precision"], first["threads"]) != (None, None)
    (engine.folder(SMOKE.teacher_run) / "requested.json").unlink()
    assert engine(SMOKE.teacher_run) == first
    with pytest.raises(EngineFailed, match="spec_invalid"):
        engine(Run("smoke", "kd", 0, {"dataset": "digits", "student": "convnet4", "method": "kd"}))
