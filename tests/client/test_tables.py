from datetime import UTC, datetime
from typing import Any

import pytest
from rich.table import Table

from client import tables
from tests.client.console import console, printed
from tests.client.fake_service import (
    attempt,
    evaluation,
    job,
    listed,
    measured,
    report,
    teacher_check,
    waiting,
    warning,
)


def text(table: Table, width: int = 140) -> str:
    screen = console(width)
    screen.print(table)
    return printed(screen)


def cells(shown: Table) -> list[list[str]]:
    """Row by row; rich keeps them by column."""
    return [[str(cell) for cell in row] for row in zip(*(column.cells for column in shown.columns), strict=True)]


def test_job_table_never_breaks_an_id():
    name = "job_" + "0" * 26
    assert name in text(tables.job_table([listed(job(id=name, name="a very long name " * 5))]), width=80)


def test_report_table_of_one_run():
    assert cells(tables.report_table([report(0.95, 0.9)])) == [
        ["teacher", "convnet32", "56,554", "4,304", "99.0 %", "–"],
        ["student", "convnet4", "1,030", "4,304", "95.0 %", "95.0 %"],
        ["student alone", "convnet4", "1,030", "4,304", "90.0 %", "90.0 %"],
    ]


def test_report_table_of_several_runs_has_mean_and_standard_deviation():
    """Of 92 and 96 the mean is 94, the sample standard deviation √8 = 2.83."""
    rows = cells(tables.report_table([report(0.92, 0.9), report(0.96, 0.9)]))
    assert rows[1][4:] == ["94.0 ± 2.8 %", "94.0 %"]
    assert rows[2][4:] == ["90.0 %", "90.0 %"]


def test_report_table_without_teacher_and_baseline():
    alone = {**report(0.95, None), "teacher": None, "student": measured(0.95, agreement=None)}
    assert cells(tables.report_table([alone])) == [["student", "convnet4", "1,030", "4,304", "95.0 %", "–"]]


def test_report_table_lists_other_models_last():
    first, second = report(0.92, 0.9), report(0.96, 0.9)
    first["models"] = {"assistant-1": measured(0.97, architecture="convnet16"), "teacher-2": measured(0.5)}
    second["models"] = {"assistant-1": measured(0.97, architecture="convnet16")}
    rows = cells(tables.report_table([first, second]))
    assert [row[0] for row in rows] == ["teacher", "student", "student alone", "assistant 1", "teacher 2"]
    assert rows[3] == ["assistant 1", "convnet16", "1,030", "4,304", "97.0 %", "97.0 %"]
    assert rows[4][4] == "50.0 %"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("student", "student"),
        ("alone", "student alone"),
        ("student-2", "student 2"),
        ("generation-10", "generation 10"),
        ("last", "last generation"),
        ("ensemble", "ensemble"),
        ("student-seed-3", "student, seed 3"),
        ("alone-seed-3", "student alone, seed 3"),
        ("student-seed-3/fsp", "student, seed 3, fsp stage"),
        ("assistant-1/activation_boundary", "assistant 1, activation boundary stage"),
    ],
)
def test_display_name(name: str, expected: str):
    assert tables.display_name(name) == expected


def test_gain_sentence_of_one_run():
    sentence = tables.gain_sentence([report(0.95, 0.9)])
    assert "+5.0 points of accuracy, one run (400 test images; one image is 0.25 points)." in sentence


def test_gain_sentence_of_several_runs():
    """Gains of +2 and -1: mean 0.5, standard deviation √4.5 = 2.12."""
    sentence = tables.gain_sentence([report(0.92, 0.9), report(0.89, 0.9)])
    assert "+0.5 ± 2.1 points of accuracy, runs +2.0, -1.0 (" in sentence


def test_gain_sentence_without_a_baseline():
    assert "not known" in tables.gain_sentence([report(0.95, None)])
    untaught = {**report(0.95, None), "teacher": None}
    assert "no teacher" in tables.gain_sentence([untaught])
    assert "not known" in tables.gain_sentence([{**untaught, "models": {"student-2": measured(0.9)}}])


def proven(gap: float | None, *seeds: dict[str, Any], no_gap: str = "it is not measurable", **fields: Any) -> dict:
    proof = {
        "gap_closed": None if gap is None else {"value": gap, "low": gap - 0.1, "high": gap + 0.2},
        "no_gap": None if gap is not None else {"code": "teacher_gap_holds_zero", "message": no_gap},
        "gain": {"value": 0.05, "low": 0.012, "high": 0.091},
        "seeds": list(seeds),
        "over_seeds": {"seeds": len(seeds)} if seeds else None,
    }
    return {**report(0.95, 0.9), "proof": proof, **fields}


def test_proof_lines_begin_with_the_gap_closed():
    assert tables.proof_lines([proven(0.62)]) == [
        "Gap closed: 62 % (95 % interval 52 to 82 %).",
        "Gain over the same student alone: +5.0 points of accuracy (95 % interval +1.2 to +9.1), one run (400 test "
        "images; one image is 0.25 points).",
    ]


def test_proof_lines_say_why_no_gap_is_stated():
    assert tables.proof_lines([proven(None)])[0] == "Gap closed: not stated: it is not measurable."
    several = tables.proof_lines([proven(None), proven(0.5)])
    assert several[0] == "Gap closed: not stated in 1 of 2 runs: it is not measurable."


def test_proof_lines_of_several_runs_and_of_a_report_of_an_earlier_version():
    assert tables.proof_lines([proven(0.5), proven(0.7)])[0] == "Gap closed: 60 ± 14 %, runs 50, 70."
    assert tables.proof_lines([report()]) == [tables.gain_sentence([report()])]
    assert tables.proof_lines([{**report(), "proof": {**proven(None)["proof"], "gain": None}}])[0].startswith("Gain")


def test_proof_lines_have_each_seed():
    seeds = [
        {"seed": 3, "student": 0.9, "alone": 0.8, "gap_closed": 0.5},
        {"seed": 4, "student": 0.91, "alone": None, "gap_closed": None},
    ]
    assert tables.proof_lines([proven(0.5, *seeds)]) == [
        "seed 3: student 90.0 %, student alone 80.0 %, gap closed 50 %",
        "seed 4: student 91.0 %",
    ]


def test_job_table_has_the_gap_closed_if_a_job_states_one():
    rows = cells(tables.job_table([listed(job(result=proven(0.62))), listed(job(result=report()))]))
    assert [row[2:4] for row in rows] == [["62 %", "95.0 %"], ["", "95.0 %"]]


def test_job_table_of_jobs_in_any_status():
    running = job(id="job_2", status="running", phase="caching_teacher", progress={"percent": 41.6}, requested="cancel")
    error = {"code": "loss_diverged", "message": "nan", "retryable": False, "hint": None}
    rows = cells(
        tables.job_table(
            map(
                listed,
                [
                    job(id="job_6", **waiting(2, "behind_others")),
                    job(id="job_5", **waiting(1, "no_worker")),
                    job(id="job_4", **waiting(None, "backing_off"), error=error),
                    job(id="job_3", status="failed", error=error),
                    running,
                    job(result=report()),
                ],
            )
        )
    )
    assert [row[1:3] for row in rows] == [
        ["queued, position 2", ""],
        ["queued, no worker", ""],
        ["queued, backing off: loss_diverged", ""],
        ["failed: loss_diverged", ""],
        ["running 42 % (cancel requested)", ""],
        ["succeeded", "95.0 %"],
    ]


def test_phase_text():
    assert tables.phase_text(job(status="running", phase="caching_teacher")) == "caching teacher"
    assert tables.phase_text(job(status="running")) == "starting"
    assert tables.phase_text(job(status="paused")) == "paused"


def test_attempt_table():
    first = attempt(1, how="lost", ended_at="2026-01-02T03:05:00.000Z", last_step=40)
    rows = cells(tables.attempt_table([first, attempt(2, first_step=40)]))
    assert [row[:4] for row in rows] == [["1", "0", "40", "lost"], ["2", "40", "", "running"]]
    assert rows[0][4:] == ["2026-01-02T03:04:01.000Z", "2026-01-02T03:05:00.000Z", "cuda:0", "host-7-abc"]


def test_worker_table():
    slots = [
        {"name": "cuda:0", "job": "job_1", "state": "busy"},
        {"name": "cuda:1", "job": None, "state": "out_of_disk_space"},
    ]
    workers = [
        {"id": "w1", "alive": True, "devices": slots, "seen_at": "now"},
        {"id": "w2", "alive": False, "devices": [], "seen_at": "then"},
    ]
    assert cells(tables.worker_table(workers)) == [
        ["w1", "yes", "cuda:0 job_1, cuda:1 out of disk space", "now"],
        ["w2", "no", "", "then"],
    ]


def test_tables_never_read_names_as_markup():
    assert "[bold]x[/bold]" in text(tables.job_table([listed(job(name="[bold]x[/bold]", labels={"[b]": "[i]"}))]))
    assert "[/nonsense]" in text(tables.job_facts(job(name="[/nonsense]")))


def test_tables_show_a_hostile_name_as_escapes_in_its_own_row():
    shown = text(tables.job_table([listed(job(name="\x1b]0;x\x07\x1b[2J\x9b2J\nFAKE ROW\u202e"))]))
    assert r"\x1b]0;x\x07\x1b[2J\x9b2J\x0aFAKE ROW\u202e" in "".join(part.strip() for part in shown.splitlines())
    assert not any(line.strip().startswith("FAKE ROW") for line in shown.splitlines())
    assert "\x9b" not in shown and "\u202e" not in shown
    assert r"\x0aFAKE" in text(tables.job_facts(job(name="a\nFAKE")))


def test_job_facts_are_the_fields_that_have_a_value():
    shown = cells(tables.job_facts(job(priority=0, deadline_at="2026-01-03", checkpoint_step=40, spec={"a": 1})))
    assert shown == [
        ["id", "job_1"],
        ["name", "first light"],
        ["status", "succeeded"],
        ["allowed actions", "delete"],
        ["kind", "distillation"],
        ["method", "kd"],
        ["deadline", "2026-01-03"],
        ["checkpoint step", "40"],
        ["created", "2026-01-02T03:04:05.678Z"],
    ]


def test_teacher_check_text():
    assert tables.teacher_check_text(teacher_check()) == "70.2 % on 1,000 of 10,000 test images"
    assert tables.teacher_check_text({**teacher_check(), "test_samples": 1000}) == "70.2 % on all 1,000 test images"
    mapped = tables.teacher_check_text({**teacher_check(), "dropped": 0.134})
    assert mapped == "70.2 % on 1,000 of 10,000 test images, 13.4 % of its probability left out"


def test_percent_leaves_out_what_could_not_be_measured():
    assert (tables.percent([None]), tables.percent([0.5, None])) == ("–", "50.0 %")


def test_warning_lines():
    assert tables.warning_lines(warning("student_at_chance", "")) == [
        "warning: student_at_chance",
        "  the data's mean is used",
        "  hint: give the teacher's",
    ]
    without_hint = {**warning("budget_short", "/training"), "hint": None}
    assert tables.warning_lines(without_hint, "m") == [
        "warning: budget_short (m, /training)",
        "  the data's mean is used",
    ]


def test_evaluation_lines_and_accuracy_text():
    done = job(kind="evaluation", result=evaluation())
    assert list(tables.evaluation_lines(done)) == [
        "accuracy 72.6 % (95 % interval 71.7 to 73.5 %, 10,000 test images)",
        "top-5 accuracy 91.9 %, loss 1.5",
        "resnet56, 861,620 parameters",
        "least accurate classes: b 10.0 %, a 50.0 %",
    ]
    assert "72.6 %" in text(tables.job_table([listed(done)]))


def test_failure_lines():
    error = {"code": "out_of_memory", "message": "the device is full", "retryable": True, "hint": "a smaller batch"}
    failed = job(error=error, status="failed", started_at="2026-01-02T03:04:06.000Z")
    assert tables.failure_lines(failed) == [
        "out_of_memory: the device is full",
        "  hint: a smaller batch",
        "  a retry may help: distillery retry job_1; its output: distillery show job_1 --logs",
    ]
    queued_again = tables.failure_lines({**failed, "status": "queued"})
    assert queued_again[-1] == "  it is tried again by itself; its output: distillery show job_1 --logs"
    never_ran = tables.failure_lines({**failed, "started_at": None, "error": {**error, "retryable": False}})
    assert never_ran[-1] == "  a retry alone does not help"
    assert tables.failure_lines(job()) == []


def test_tables_of_registry_and_catalogue():
    facts = {"architecture": "resnet56", "num_classes": 100, "parameters": 861_620}
    assert cells(tables.model_table([{"name": "m", "facts": facts, "id": "mdl_1", "blob": "", "created_at": ""}])) == [
        ["m", "resnet56", "100", "861,620", "mdl_1"]
    ]
    facts = {"num_classes": 10, "channels": 1, "image_size": [8, 9], "train": 1437, "test": 360}
    assert cells(
        tables.dataset_table([{"id": None, "name": "digits", "blob": None, "facts": facts, "created_at": None}])
    ) == [["digits", "10", "1 x 8 x 9", "1,437", "360", "built in"]]
    facts = {**facts, "num_classes": 0, "test": 0, "labelled": False}
    ((_, classes, *_),) = cells(
        tables.dataset_table([{"id": "ds_1", "name": "pool", "blob": None, "facts": facts, "created_at": None}])
    )
    assert classes == "no labels"
    assert cells(tables.method_table([{"name": "kd", "matches": "logits", "paper": "2015"}])) == [
        ["kd", "logits", "2015"]
    ]
    rows = cells(
        tables.architecture_table(
            [
                {"name": "resnet20", "source": "kdcore", "family": "resnet", "parameters_counted": 272_474},
                {"name": "timm/x", "source": "timm", "family": "x", "parameters_counted": None},
            ]
        )
    )
    assert [row[3] for row in rows] == ["272,474", ""]


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ("2026-01-02T12:00:00Z", "now"),
        ("2026-01-02T11:58:30Z", "1 min"),
        ("2026-01-02T09:00:00Z", "3 h"),
        ("2025-12-31T12:00:00Z", "2 d"),
        ("2026-01-02T12:00:05Z", "now"),
    ],
)
def test_age(then: str, expected: str):
    assert tables.age(then, datetime(2026, 1, 2, 12, tzinfo=UTC)) == expected


METHOD = {
    "name": "attention",
    "title": "Attention transfer",
    "paper": "Zagoruyko & Komodakis, ICLR 2017",
    "matches": "where the teacher looks",
    "scheme": "offline",
    "teacher": "required",
    "needs": ["maps", "input_gradient"],
    "taps": "none",
    "alpha": 1,
    "beta": 1000.0,
    "temperature": None,
    "defaults_from": "CRD's code",
    "owns": "nothing",
    "cost": "one more forward pass",
    "options": {
        "$defs": {"Pair": {"type": "object", "properties": {"student": {}, "teacher": {}}}},
        "properties": {
            "name": {"const": "attention", "default": "attention"},
            "weight": {"type": "number", "default": None},
            "mapping": {"enum": ["sum", "max"], "default": "sum", "description": "What is made of the [channels]."},
            "p": {"type": "number", "minimum": 1, "maximum": 8.0, "default": 2.0},
            "gradient": {"type": "boolean", "default": False},
            "taps": {"anyOf": [{"items": {"$ref": "#/$defs/Pair"}, "type": "array"}, {"type": "null"}]},
        },
    },
}


def page_lines(method: dict[str, Any]) -> list[str]:
    screen = console(width=120)
    screen.print(*tables.method_page(method), sep="\n")
    return [" ".join(line.split()) for line in printed(screen).splitlines() if line.strip()]


def test_method_page():
    assert page_lines(METHOD) == [
        "attention Attention transfer",
        "Zagoruyko & Komodakis, ICLR 2017",
        "matches where the teacher looks",
        "scheme offline",
        "teacher required",
        "needs maps, input gradient",
        "cost of a step one more forward pass",
        "defaults alpha 1, beta 1000",
        "defaults from CRD's code",
        "option values default description",
        "─" * len(page_lines(METHOD)[10]),
        "mapping sum | max sum What is made of the [channels].",
        "p number, ≥ 1, ≤ 8 2",
        "gradient true | false false",
        "taps list of {student, teacher}",
        "set an option: --set method.OPTION=VALUE, in a sum --set method.attention.OPTION=VALUE",
    ]


@pytest.mark.parametrize("options", [None, {}, [], {"properties": {"name": {}, "weight": {}}}])
def test_method_page_without_options(options: Any):
    assert page_lines({"name": "new", "matches": "x", "options": options}) == ["new", "matches x"]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 1e6}, "whole number, > 0, ≤ 1000000"),
        ({"type": "number", "minimum": 0.02, "exclusiveMaximum": 1}, "number, ≥ 0.02, < 1"),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 16}, "list of text, 0 to 16 long"),
        (
            {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/unknown"}]}},
            "list of (text | any)",
        ),
        ({"anyOf": [{"type": "integer"}, {"const": "all"}, {"type": "null"}]}, "whole number | all"),
        ({"$ref": "#/$defs/unknown"}, "any"),
    ],
)
def test_allowed_values(field: dict[str, Any], expected: str):
    assert tables.allowed_values(field, {}) == expected


MEASURED: Any = {
    "steps": 1000,
    "parameters": {"teacher": 5, "student": 1},
    "compression": 5.0,
    "seconds": 4000.0,
    "seconds_by_phase": {"preparing": 3.2, "training": 3876.8, "evaluating": 120.0, "exporting": 42.0},
    "memory_bytes": 640_000_000,
    "device": "cpu, 2 threads",
    "basis": "measured",
}


def test_estimate_lines_give_time_by_phase_and_memory():
    assert tables.estimate_lines(MEASURED) == [
        "estimate: about 1 h 07 min (preparing 3 s, training 1 h 05 min, evaluating 2 min, exporting 42 s)",
        "  640 MB of memory on cpu, 2 threads, as measured in earlier jobs",
    ]


def test_estimate_lines_name_a_phase_that_is_not_known():
    phases = {**MEASURED["seconds_by_phase"], "preparing": None, "exporting": None}
    lines = tables.estimate_lines({**MEASURED, "basis": "probe", "seconds_by_phase": phases})
    assert lines[0].endswith("(training 1 h 05 min, evaluating 2 min), without preparing and exporting")
    del phases["exporting"]  # Of an older server.
    assert tables.estimate_lines({**MEASURED, "basis": "probe", "seconds_by_phase": phases}) == lines
    assert lines[1].endswith("from a probe of a few steps")


@pytest.mark.parametrize(
    ("memory", "basis", "end"),
    [(2_000_000, "parameters", "; at least 2 MB of memory, by the parameters alone"), (None, None, "")],
)
def test_estimate_lines_without_a_measurement_give_no_time(memory: int | None, basis: str | None, end: str):
    unknown: Any = {**MEASURED, "seconds": None, "memory_bytes": memory, "device": None, "basis": basis}
    assert tables.estimate_lines(unknown) == [f"estimate: 1,000 steps; their time was never measured{end}"]
