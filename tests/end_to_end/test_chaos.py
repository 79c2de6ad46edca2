"""`bench/chaos` in short, in both settings; and its checks, each shown what it must not let pass."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import plan, report
from bench.chaos.checks import violations
from bench.chaos.clients import Answer
from bench.chaos.injector import Strike
from bench.chaos.plan import Errand
from bench.chaos.results import Evidence, File, Leftovers, Reference, Rows, Step
from bench.chaos.run import Terms, run
from bench.processes import Exit

# A seed whose first faults are of many kinds: an engine, a server and whoever is frozen; a guard and the database.
STORMS = [
    Terms("embedded", jobs=2, kills=3, seed=2, workers=2, recipes=("supervised-1",)),
    Terms("cluster", jobs=2, kills=3, seed=7, workers=2, recipes=("supervised-1",)),
]


@pytest.fixture
def root() -> Iterator[Path]:
    """As root, PostgreSQL runs as somebody else, who may not enter pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix="distillery-chaos-") as folder:
        yield Path(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("terms", STORMS, ids=lambda terms: terms.setting)
def test_no_job_is_lost_doubled_or_half_done_whatever_is_killed(terms: Terms, root: Path):
    seen = run(terms, root, say=print)
    assert violations(seen) == []
    figures = report.figures(seen, [])
    assert sum(figures["kills"].values()) == terms.kills
    assert figures["students_equal"] == figures["ends"]["succeeded"] >= 1
    assert max(step.fence for step in seen.steps) > 1, "no job had to be taken up again"


# ── the plan ──


def test_a_seed_repeats_its_faults_and_another_has_others():
    first, again, other = (plan.faults(seed, "cluster", 50) for seed in (1, 1, 2))
    assert first == again != other
    assert sum(fault.kills for fault in first) == 50


def test_every_kind_is_killed_as_often_as_its_deck_says():
    for setting, deck in plan.KILLS.items():
        killed = [fault.kind for fault in plan.faults(3, setting, 40) if fault.kills]
        assert {kind: killed.count(kind) for kind in deck} == {kind: 2 * times for kind, times in deck.items()}


# ── the checks ──

DIGEST = "ab" * 32
BLOB = f"blobs/ab/{DIGEST}"
ERROR = {"code": "internal"}


def job(**changes: Any) -> dict[str, Any]:
    told = {"id": "j", "idempotency_key": "k", "status": "succeeded", "event_seq": 3, "fence": 1, "error": None}
    return {**told, "resolved_spec": {}, "result": {"loss": 0.5, "seconds": 7}, **changes}


def event(seq: int, kind: str, job: str = "j", **data: Any) -> dict[str, Any]:
    return {"job_id": job, "seq": seq, "type": kind, "data": data}


def attempt(fence: int, how: str | None, started_at: float, ended_at: float | None) -> dict[str, Any]:
    return {"job_id": "j", "fence": fence, "how": how, "started_at": started_at, "ended_at": ended_at}


def sound(**changes: Any) -> Evidence:
    """One job, sent twice under one key, claimed, done."""
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
    by_hand = Reference({"student.safetensors": DIGEST}, {("student", "loss", 9): 0.25}, {"loss": 0.5, "seconds": 3})
    evidence = Evidence(
        errands=[Errand("k", "kd", 2, "none", 0)],
        answers=[Answer("k", "submit", code, "j", "queued", 1) for code in (201, 200)],
        rows=rows,
        files={BLOB: File(BLOB, 5, DIGEST)},
        steps=[Step(1, "j", 1, 77, 0), Step(2, "j", 1, 77, 1)],
        references={"kd": by_hand},
        strikes=[],
        exits=[],
        leftovers=Leftovers([], [], []),
    )
    in_rows = {name: changes.pop(name) for name in list(changes) if hasattr(rows, name)}
    return replace(evidence, rows=replace(rows, **in_rows), **changes)


def test_a_sound_job_violates_nothing():
    assert violations(sound()) == []


WRONG: list[tuple[str, Callable[[], Evidence]]] = [
    ("lost", lambda: sound(answers=[*sound().answers, Answer("gone", "submit", 201, "gone", "queued", 1)])),
    ("lost", lambda: sound(jobs=[job(status="running")])),
    ("doubled", lambda: sound(jobs=[job(), job(id="twin")])),
    ("doubled", lambda: sound(answers=[*sound().answers, Answer("k", "submit", 201, "j", "queued", 1)])),
    ("doubled", lambda: sound(answers=[*sound().answers, Answer("k", "submit", 200, "twin", "queued", 1)])),
    ("ended otherwise", lambda: sound(jobs=[job(status="cancelled")])),
    ("ended otherwise", lambda: sound(jobs=[job(status="failed", error=ERROR)])),
    ("ended otherwise", lambda: sound(answers=[*sound().answers, Answer("k", "cancel", 500, "j", "", 1)])),
    ("ended otherwise", lambda: sound(exits=[Exit("worker-1", 1, 0, "Traceback")])),
    ("ended twice", lambda: sound(events=[*sound().rows.events, event(4, "succeeded")], jobs=[job(event_seq=4)])),
    ("ended twice", lambda: sound(events=[*sound().rows.events, event(4, "checkpoint")], jobs=[job(event_seq=4)])),
    ("events with gaps", lambda: sound(jobs=[job(event_seq=4)])),
    ("events with gaps", lambda: sound(events=[event(1, "queued"), *sound().rows.events[:0:-1]])),
    ("stale publish", lambda: sound(jobs=[job(fence=2)])),
    ("stale publish", lambda: sound(attempts=[attempt(1, None, 10, None)])),
    ("stale publish", lambda: sound(attempts=[attempt(1, "succeeded", 10, 20), attempt(2, "lost", 15, 30)])),
    ("torn", lambda: sound(files={})),
    ("torn", lambda: sound(files={BLOB: File(BLOB, 4, "cd" * 32)})),
    ("torn", lambda: sound(checkpoints=[{"job_id": "j", "path": "checkpoints/j/1/1.pt", "sha256": "", "bytes": 1}])),
    ("unlike the undisturbed run", lambda: sound(metrics=[])),
    ("unlike the undisturbed run", lambda: sound(jobs=[job(result={"loss": 0.75, "seconds": 7})])),
    ("side by side", lambda: sound(steps=[Step(1, "j", 1, 77, 0), Step(2, "j", 2, 78, 0), Step(3, "j", 1, 77, 1)])),
    ("leftover", lambda: sound(leftovers=Leftovers(["7: python -m kdcore"], [], []))),
    ("leftover", lambda: sound(leftovers=Leftovers([], ["scratch/j.1.lock"], []))),
    ("leftover", lambda: sound(files={**sound().files, "checkpoints/j/1/9.pt": File("checkpoints/j/1/9.pt", 1, "")})),
    ("leftover", lambda: sound(files={**sound().files, "blobs/cd/cd": File("blobs/cd/cd", 1, "cd")})),
]


@pytest.mark.parametrize(("kind", "evidence"), WRONG)
def test_what_is_wrong_is_told_by_its_kind(kind: str, evidence: Callable[[], Evidence]):
    assert kind in {one.kind for one in violations(evidence())}


def test_a_server_may_refuse_to_start_while_the_database_is_away():
    refusal = "Traceback of something older\nthe database cannot be opened: connection refused"
    evidence = sound(exits=[Exit("api-1", 1, 0, refusal)])
    assert violations(evidence) == [] and report.figures(evidence, [])["refused_to_start"] == 1


def test_a_cancelled_job_is_as_its_client_wished():
    wished = [Errand("k", "kd", 2, "cancel", 0)]
    cancelled = {"jobs": [job(status="cancelled", result=None)], "attempts": [attempt(1, "cancelled", 10, 20)]}
    events = [*sound().rows.events[:2], event(3, "cancelled")]
    assert violations(sound(errands=wished, events=events, **cancelled)) == []


def test_a_retried_job_has_two_lives_and_ends_once_in_each():
    events = [event(1, "queued"), event(2, "cancelled"), event(3, "retried"), event(4, "claimed", attempt=1)]
    assert violations(sound(jobs=[job(event_seq=5)], events=[*events, event(5, "succeeded")])) == []


def test_old_beside_new_is_counted_in_steps_and_seconds():
    old, new = [Step(at, "j", 1, 77, 0) for at in (1, 3, 4.5)], Step(2, "j", 2, 78, 0)
    figures = report.figures(sound(steps=[old[0], new, *old[1:]]), [])
    assert (figures["steps_side_by_side"], figures["seconds_side_by_side"]) == (2, 1.5)


def test_standing_still_is_from_the_kill_to_the_next_attempts_first_step():
    steps = [Step(1, "j", 1, 77, 0), Step(2, "other", 1, 88, 0), Step(9, "j", 2, 79, 0), Step(9.5, "j", 2, 79, 1)]
    strikes = [Strike("worker", "worker-1", 1.5, True, (77,)), Strike("freeze a worker", "worker-2", 3, False, (88,))]
    assert report.standstills(strikes, steps) == [7.5]
