import json
from typing import Any

import httpx
import pytest

from base.wire import WarningView
from client import tables, terminal
from client.errors import Unreachable
from client.terminal import duration, event_line, follow, print_result, print_warnings, progress_text
from tests.client.console import console, printed
from tests.client.fake_service import FakeService, event, job, page, problem, report, teacher_check, waiting, warning

PROGRESS = {"trial": "student", "epoch": 7, "epochs": 15, "percent": 40.0, "seconds_remaining": 8.4}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "POLL_S", 0)


def test_progress_text():
    running = job(status="running", phase="training", progress=PROGRESS)
    assert progress_text(running, 0.912) == "epoch 7/15, validation accuracy 91.2 %, 8 s left"
    alone = job(status="running", phase="training", progress={**PROGRESS, "trial": "alone", "seconds_remaining": None})
    assert progress_text(alone, None) == "student alone, epoch 7/15"
    first_stage = job(status="running", progress={"trial": "student/fsp", "epoch": 1, "epochs": 30})
    assert progress_text(first_stage, None) == "student, fsp stage, epoch 1/30"
    assert progress_text(job(**waiting(3, "behind_others", "2 jobs are before it")), None) == "2 jobs are before it"
    backs_off = job(**waiting(None, "backing_off", "the device was full", "2026-01-02T03:04:05.000Z"))
    assert progress_text(backs_off, None) == "the device was full, until 2026-01-02T03:04:05.000Z"
    assert progress_text(job(result=report(0.95), progress=PROGRESS), 0.5) == "test accuracy 95.0 %"
    assert progress_text(job(status="running"), None) == ""


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (3_599, "1 h 00 min"), (7_500, "2 h 05 min")]
)
def test_duration(seconds: float, expected: str):
    assert duration(seconds) == expected


def test_event_line():
    line = event_line(event(7, "released", reason="drain", none=None, artifacts=[{"name": "a"}, {"name": "b"}]))
    assert line == "03:04:07  released  reason=drain  artifacts=a,b"
    assert event_line(event(8, "phase", phase="training")) == "03:04:08  phase  training"
    lost = {"code": "worker_lost", "message": "the worker was killed", "retryable": True, "hint": None}
    assert event_line(event(9, "queued", error=lost)) == "03:04:09  queued  error=worker_lost: the worker was killed"


def test_follow_on_a_terminal_shows_a_bar_and_unusual_events(capsys: pytest.CaptureFixture[str]):
    found = {"teacher_check": teacher_check(), "warnings": [warning()]}
    events = [event(1, "queued"), event(2, "resumed"), event(3, "teacher_check", **teacher_check())]
    fake = FakeService(
        {
            "GET /v1/jobs/job_1": [
                job(**waiting(1, "starting", "in seconds")),
                job(status="running", phase="training", progress=PROGRESS, **found),
                job(result=report(0.95), **found),
            ],
            "GET /v1/jobs/job_1/events": [page(events), page([])],
            "GET /v1/jobs/job_1/metrics": {"series": {"student": {"validation/accuracy": [[1, 0.8], [2, 0.912]]}}},
        }
    )
    screen = console(is_terminal=True)
    assert follow(fake.client(), "job_1", screen)["status"] == "succeeded"
    text = printed(screen)
    assert "first light: training" in text
    assert "epoch 7/15, validation accuracy 91.2 %, 8 s left" in text
    assert "03:04:02  resumed" in text
    assert text.count("teacher: 70.2 % on 1,000 of 10,000 test images") == 1
    assert capsys.readouterr().err.splitlines() == tables.warning_lines(warning())
    assert "03:04:01  queued" not in text
    assert "test accuracy 95.0 %" in text


def test_follow_tolerates_a_restart_of_the_server():
    back = [httpx.ConnectError("refused")] * 3 + [problem(503, "unavailable")] * 3 + [job(status="cancelled")]
    fake = FakeService({"GET /v1/jobs/job_1": [job(status="running"), *back], "GET /v1/jobs/job_1/events": page([])})
    fake.routes["GET /v1/jobs/job_1/metrics"] = {"series": {}}
    screen = console(is_terminal=True)
    assert follow(fake.client(), "job_1", screen)["status"] == "cancelled"
    assert "server unreachable" in printed(screen)


def test_follow_raises_unreachable_after_a_long_outage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "MAX_OUTAGE_S", 0)
    fake = FakeService({"GET /v1/jobs/job_1": [job(status="running"), httpx.ConnectError("refused")]})
    with pytest.raises(Unreachable):
        follow(fake.client(), "job_1", console(is_terminal=True))


def test_follow_without_a_terminal_prints_a_line_for_each_event():
    fake = FakeService(
        {
            "GET /v1/jobs/job_1/events/stream": httpx.Response(501, json={"code": "none"}),
            "GET /v1/jobs/job_1/events": page([event(1, "queued"), event(2, "checkpoint"), event(3, "succeeded")]),
            "GET /v1/jobs/job_1": job(),
        }
    )
    screen = console(is_terminal=False)
    follow(fake.client(), "job_1", screen, "teacher")
    assert printed(screen).splitlines() == ["teacher: job_1", "03:04:01  queued", "03:04:03  succeeded"]


def test_follow_without_a_terminal_prints_warnings_and_the_teachers_accuracy(capsys: pytest.CaptureFixture[str]):
    events = [event(1, "teacher_check", **teacher_check()), event(2, "warning", **warning()), event(3, "succeeded")]
    at_the_end = warning("student_below_baseline", "")
    fake = FakeService(
        {
            "GET /v1/jobs/job_1/events/stream": httpx.Response(501, json={"code": "none"}),
            "GET /v1/jobs/job_1/events": page(events),
            "GET /v1/jobs/job_1": job(warnings=[warning("test_split_carved", "/dataset"), warning(), at_the_end]),
        }
    )
    screen = console(is_terminal=False)
    follow(fake.client(), "job_1", screen, shown=[warning("test_split_carved", "/dataset")])
    lines = printed(screen).splitlines()
    assert lines[1:] == ["03:04:01  teacher: 70.2 % on 1,000 of 10,000 test images", "03:04:03  succeeded"]
    expected = tables.warning_lines(warning()) + tables.warning_lines(at_the_end)
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize(
    ("ended", "good", "expected"),
    [
        (job(result=report(0.95, 0.9)), True, "+5.0 points"),
        (job(status="cancelled"), False, "job job_1 cancelled"),
        (
            job(status="failed", error={"code": "internal", "message": "[red]?", "retryable": True, "hint": None}),
            False,
            "internal: [red]?",
        ),
    ],
)
def test_print_result(ended: Any, good: bool, expected: str):
    screen = console(is_terminal=False)
    assert print_result(ended, screen, "fetch job_1") is good
    assert expected in printed(screen)
    assert ("fetch job_1" in printed(screen)) is good


def test_print_json_escapes_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]):
    answer = {"name": "a\x1b\x9b2J\u202e\0ö"}
    terminal.print_json(answer)
    shown = capsys.readouterr().out
    assert json.loads(shown) == answer and "ö" in shown
    assert not {"\x1b", "\x9b", "\u202e"} & set(shown)


def test_print_warnings_control_characters_of_a_class_name_reach_no_terminal(capsys: pytest.CaptureFixture[str]):
    message = "class a\x1b]0;title\x07\x9b2J b\u202ec größe"
    print_warnings([WarningView(code="class_too_small", pointer="/blob", message=message, hint="")])
    shown = capsys.readouterr().err
    assert "class a\\x1b]0;title\\x07\\x9b2J b\\u202ec größe" in shown
