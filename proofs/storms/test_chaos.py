"""A short run of `bench/chaos` in both settings, and its checks, each with results that it must reject."""

import fcntl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import plan
from bench.chaos.checks import violations
from bench.chaos.clients import Answer
from bench.chaos.injector import Injection
from bench.chaos.plan import PlannedJob
from bench.chaos.report import figures, recovery_times
from bench.chaos.results import File, Leftovers, Reference, Results, Rows, Step, is_locked
from bench.chaos.run import RunOptions, run
from bench.processes import UnexpectedExit

# Seeds whose first faults are of many kinds: an engine, a server and a freeze; a guard and the database. Most of a
# job's time is pauses: kills need trainings that last, not trainings that compute.
BRIEF: dict[str, Any] = {
    "jobs": 2,
    "kills": 3,
    "workers": 2,
    "recipes": ("supervised-1",),
    "epochs": 10,
    "pause_s": 0.02,
}
RUNS = [RunOptions("embedded", seed=2, misbehaving=True, **BRIEF), RunOptions("cluster", seed=7, warm=False, **BRIEF)]


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder outside of pytest's: as root, PostgreSQL runs as another user, who cannot enter those."""
    with tempfile.TemporaryDirectory(prefix="distillery-chaos-") as folder:
        yield Path(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", RUNS, ids=lambda options: options.setting)
def test_run_loses_duplicates_and_damages_no_job(options: RunOptions, root: Path):
    results = run(options, root, log=print)
    assert violations(results) == []
    counts = figures(results, [])
    assert sum(counts["kills"].values()) == options.kills
    assert counts["students_equal"] == counts["statuses"]["succeeded"] >= 1
    assert max(step.fence for step in results.steps) > 1, "no job needed a second attempt"


@pytest.mark.parametrize("lock", [fcntl.flock, fcntl.lockf], ids=["flock", "POSIX"])
def test_is_locked_finds_the_lock_of_another_process(lock: Callable[..., None], tmp_path: Path):
    path = tmp_path / "file"
    path.touch()
    assert not is_locked(path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(path)!r}, 'r+'); fcntl.{lock.__name__}(f, 2); print(); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_locked(path)
        holder.communicate(b"\n")
    assert not is_locked(path)


# ── the plan ──


def test_plan_faults_are_the_same_for_the_same_seed():
    first, again, other = (plan.faults(seed, "cluster", 50) for seed in (1, 1, 2))
    assert first == again != other
    assert sum(fault.kills for fault in first) == 50


def test_plan_faults_have_each_kind_as_often_as_its_deck():
    for setting, deck in plan.KILLS.items():
        killed = [fault.kind for fault in plan.faults(3, setting, 40) if fault.kills]
        assert {kind: killed.count(kind) for kind in deck} == {kind: 2 * times for kind, times in deck.items()}


# ── the checks ──

DIGEST = "ab" * 32
BLOB = f"blobs/ab/{DIGEST}"
ERROR = {"code": "internal"}


def job(**changes: Any) -> dict[str, Any]:
    row = {"id": "j", "idempotency_key": "k", "status": "succeeded", "event_seq": 3, "fence": 1, "error": None}
    return {**row, "resolved_spec": {}, "result": {"loss": 0.5, "seconds": 7}, **changes}


def event(seq: int, kind: str, job: str = "j", **data: Any) -> dict[str, Any]:
    return {"job_id": job, "seq": seq, "type": kind, "data": data}


def attempt(fence: int, how: str | None, started_at: float, ended_at: float | None) -> dict[str, Any]:
    return {"job_id": "j", "fence": fence, "how": how, "started_at": started_at, "ended_at": ended_at}


def correct_results(**changes: Any) -> Results:
    """Results of one job, sent twice under one key, claimed, succeeded."""
    artifact = {"job_id": "j", "name": "student.safetensors", "sha256": DIGEST, "bytes": 5}
    point = {"job_id": "j", "trial": "student", "key": "loss", "step": 9, "value": 0.25}
    rows = Rows(
        jobs=[job()],
        events=[event(1, "queued"), event(2, "claimed", attempt=1), event(3, "succeeded")],
        attempts=[attempt(1, "succeeded", 10, 20)],
        checkpoints=[],
        artifacts=[artifact],
        metrics=[point],
    )
    reference = Reference({"student.safetensors": DIGEST}, {("student", "loss", 9): 0.25}, {"loss": 0.5, "seconds": 3})
    results = Results(
        jobs=[PlannedJob("k", "kd", 2, "none", 0)],
        answers=[Answer("k", "submit", code, "j", "queued", 1) for code in (201, 200)],
        rows=rows,
        files={BLOB: File(BLOB, 5, DIGEST)},
        steps=[Step(1, "j", 1, 77, 0), Step(2, "j", 1, 77, 1)],
        references={"kd": reference},
        injections=[],
        exits=[],
        leftovers=Leftovers([], [], []),
    )
    return replace(results, **changes)


def with_rows(**changes: Any) -> Results:
    results = correct_results()
    return replace(results, rows=replace(results.rows, **changes))


def with_answer(*answer: Any) -> Results:
    return correct_results(answers=[*correct_results().answers, Answer(*answer)])


def with_file(path: str, digest: str) -> Results:
    return correct_results(files={**correct_results().files, path: File(path, 1, digest)})


def test_violations_of_correct_results_are_none():
    assert violations(correct_results()) == []


EVENTS = correct_results().rows.events
OVERLAPPING = [Step(1, "j", 1, 77, 0), Step(2, "j", 2, 78, 0), Step(3, "j", 1, 77, 1)]
WRONG: list[tuple[str, Callable[[], Results]]] = [
    ("lost", lambda: with_answer("gone", "submit", 201, "gone", "queued", 1)),
    ("lost", lambda: with_rows(jobs=[job(status="running")])),
    ("duplicated", lambda: with_rows(jobs=[job(), job(id="twin")])),
    ("duplicated", lambda: with_answer("k", "submit", 201, "j", "queued", 1)),
    ("duplicated", lambda: with_answer("k", "submit", 200, "twin", "queued", 1)),
    ("wrong end", lambda: with_rows(jobs=[job(status="cancelled")])),
    ("wrong end", lambda: with_rows(jobs=[job(status="failed", error=ERROR)])),
    ("wrong end", lambda: with_answer("k", "cancel", 500, "j", "", 1)),
    ("wrong end", lambda: correct_results(exits=[UnexpectedExit("worker-1", 1, 0, "Traceback")])),
    ("answered 500", lambda: correct_results(misbehaved={"half_body none": 9, "hostile_body 500": 1})),
    ("ended twice", lambda: with_rows(events=[*EVENTS, event(4, "succeeded")], jobs=[job(event_seq=4)])),
    ("ended twice", lambda: with_rows(events=[*EVENTS, event(4, "checkpoint")], jobs=[job(event_seq=4)])),
    ("event gap", lambda: with_rows(jobs=[job(event_seq=4)])),
    ("event gap", lambda: with_rows(events=[event(1, "queued"), *EVENTS[:0:-1]])),
    ("stale publish", lambda: with_rows(jobs=[job(fence=2)])),
    ("stale publish", lambda: with_rows(attempts=[attempt(1, None, 10, None)])),
    ("stale publish", lambda: with_rows(attempts=[attempt(1, "succeeded", 10, 20), attempt(2, "lost", 15, 30)])),
    ("damaged file", lambda: correct_results(files={})),
    ("damaged file", lambda: correct_results(files={BLOB: File(BLOB, 4, "cd" * 32)})),
    (
        "damaged file",
        lambda: with_rows(checkpoints=[{"job_id": "j", "path": "checkpoints/j/1/1.pt", "sha256": "", "bytes": 1}]),
    ),
    ("unlike the reference", lambda: with_rows(metrics=[])),
    ("unlike the reference", lambda: with_rows(jobs=[job(result={"loss": 0.75, "seconds": 7})])),
    ("overlapping attempts", lambda: correct_results(steps=OVERLAPPING)),
    ("leftover", lambda: correct_results(leftovers=Leftovers(["7: python -m kdcore"], [], []))),
    ("leftover", lambda: correct_results(leftovers=Leftovers([], ["scratch/j.1.lock"], []))),
    ("leftover", lambda: with_file("checkpoints/j/1/9.pt", "")),
    ("leftover", lambda: with_file("blobs/cd/cd", "cd")),
]


@pytest.mark.parametrize(("kind", "results"), WRONG)
def test_violations_of_wrong_results_have_the_right_kind(kind: str, results: Callable[[], Results]):
    assert kind in {violation.kind for violation in violations(results())}


def test_violations_allow_a_server_that_refuses_to_start_without_a_database():
    log = "Traceback of something older\nthe database cannot be opened: connection refused"
    results = correct_results(exits=[UnexpectedExit("api-1", 1, 0, log)])
    assert violations(results) == [] and figures(results, [])["refused_to_start"] == 1


def test_violations_allow_a_job_that_its_client_has_cancelled():
    results = with_rows(
        jobs=[job(status="cancelled", result=None)],
        attempts=[attempt(1, "cancelled", 10, 20)],
        events=[*EVENTS[:2], event(3, "cancelled")],
    )
    assert violations(replace(results, jobs=[PlannedJob("k", "kd", 2, "cancel", 0)])) == []


def test_violations_allow_a_second_end_after_a_retry():
    events = [event(1, "queued"), event(2, "cancelled"), event(3, "retried"), event(4, "claimed", attempt=1)]
    assert violations(with_rows(jobs=[job(event_seq=5)], events=[*events, event(5, "succeeded")])) == []


# ── the figures ──


def test_figures_count_overlapping_steps_and_their_seconds():
    old, new = [Step(at, "j", 1, 77, 0) for at in (1, 3, 4.5)], Step(2, "j", 2, 78, 0)
    counts = figures(correct_results(steps=[old[0], new, *old[1:]]), [])
    assert (counts["steps_overlapping"], counts["seconds_overlapping"]) == (2, 1.5)


def test_recovery_times_are_from_the_kill_to_the_first_step_of_the_next_attempt():
    steps = [Step(1, "j", 1, 77, 0), Step(2, "other", 1, 88, 0), Step(9, "j", 2, 79, 0), Step(9.5, "j", 2, 79, 1)]
    injections = [
        Injection("worker", "worker-1", 1.5, True, (77,)),
        Injection("freeze a worker", "worker-2", 3, False, (88,)),
    ]
    assert recovery_times(injections, steps) == [7.5]
