"""The story of a user's own pictures: its jobs are valid specs, and its table says what the reports say."""

from typing import Any

from bench.own_pictures import (
    ALONE,
    METHODS,
    MOBILENET,
    ROWS,
    SMOKE,
    TEACHER,
    Budget,
    pretraining_spec,
    row_spec,
    table,
    teacher_spec,
)
from kdcore.spec import JobSpec

BUDGET = Budget()


def _ids() -> dict[str, str]:
    return {name: f"job_{number}" for number, name in enumerate([TEACHER, *(row.name for row in ROWS)])}


def _report(accuracy: float, gain: float | None = None, verdict: str = "The student is right.") -> dict[str, Any]:
    student = {"accuracy": accuracy}
    return {"result": {"student": student, "gain": gain, "verdict": verdict, "test_samples": 100, "seconds": 90.0}}


def test_specs_of_all_jobs_are_valid_in_both_budgets() -> None:
    for budget in (BUDGET, SMOKE):
        JobSpec.model_validate(pretraining_spec(budget))
        JobSpec.model_validate(teacher_spec(budget))
        for row in ROWS:
            JobSpec.model_validate(row_spec(row, _ids(), "model:weights", budget))


def test_rows_compare_each_method_with_the_same_student_alone_from_the_same_start() -> None:
    ids = _ids()
    for row in ROWS:
        spec = row_spec(row, ids, "model:weights", BUDGET)
        if row.method == ALONE:
            assert "teacher" not in spec and "baseline" not in spec
            continue
        alone = row_spec(row.alone, ids, "model:weights", BUDGET)
        assert spec["baseline"] == f"job:{ids[row.alone.name]}"
        assert all(spec[field] == alone[field] for field in ("dataset", "student", "training"))
    assert len(ROWS) == 2 * 2 * (1 + len(METHODS))


def test_row_spec_starts_from_weights_only_where_the_row_says_so() -> None:
    specs = {row: row_spec(row, _ids(), "model:weights", BUDGET) for row in ROWS if row.student == MOBILENET}
    for row, spec in specs.items():
        assert (spec["student"] == MOBILENET) == (row.start == "nothing")
        assert ("schedule" in spec["training"]) == (row.start == "nothing")


def test_table_has_accuracy_interval_gain_finding_and_minutes() -> None:
    done = {TEACHER: _report(0.9)} | {row.name: _report(0.5) for row in ROWS}
    helped, harmed, unsure = [row.name for row in ROWS if row.method != ALONE][:3]
    done[helped] = _report(0.6, 0.1, "Distilling helped: the student is right on 60 %, 10.0 points above.")
    done[harmed] = _report(0.4, -0.1, "Gap closed: -50 %; distilling harmed: the student is 10.0 points below.")
    done[unsure] = _report(0.51, 0.01, "No measurable gain: the interval holds 0 (-2.0 to +4.0 points).")
    lines = table(done, BUDGET).splitlines()
    assert "10 epochs" in lines[0] and "64 pixels" in lines[0]
    # Wilson's interval of 50 of 100: (50 + 1.92 ± 1.96 √(25 + 0.96)) / 103.84.
    assert lines[5] == f"| {MOBILENET} | nothing | alone | 50.0 (40.4 to 59.6) | – | – | 1.5 |"
    assert lines[6].endswith("| +10.0 | helped | 1.5 |")
    assert lines[7].endswith("| -10.0 | harmed | 1.5 |")
    assert lines[9].endswith("| +1.0 | not measurable | 1.5 |")
    assert len(lines) == 4 + 1 + len(ROWS)


def test_table_of_a_run_that_was_stopped_has_the_rows_that_there_are() -> None:
    assert len(table({}, BUDGET).splitlines()) == 4
    assert len(table({TEACHER: _report(0.9), ROWS[1].name: _report(0.5, 0.0)}, BUDGET).splitlines()) == 6
