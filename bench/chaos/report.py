"""The figures of a run: the faults, what became of the jobs, and the recovery times."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.chaos.checks import CHECKS, Violation, overlap, refused_to_start
from bench.chaos.injector import Injection
from bench.chaos.results import Results, Step

Figures = dict[str, Any]


def figures(results: Results, violations: Sequence[Violation]) -> Figures:
    steps_overlapping, seconds_overlapping = overlap(results.steps)
    recovery = sorted(recovery_times(results.injections, results.steps))
    succeeded = sum(job["status"] == "succeeded" for job in results.rows.jobs)
    by_kind = {kind: sum(violation.kind == kind for violation in violations) for kind in CHECKS}
    return {
        "kills": _counts(injection.kind for injection in results.injections if injection.kills),
        "other_faults": _counts(injection.kind for injection in results.injections if not injection.kills),
        "broker_unreachable": results.broker_unreachable,
        "refused_to_start": sum(map(refused_to_start, results.exits)),
        "misbehaved": dict(results.misbehaved),
        "jobs": len(results.rows.jobs),
        "statuses": _counts(job["status"] for job in results.rows.jobs),
        "submit_answers": _counts(answer.code for answer in results.answers if answer.verb == "submit"),
        "attempts": _counts(attempt["how"] for attempt in results.rows.attempts),
        "events": len(results.rows.events),
        "artifacts_hashed": len(results.rows.artifacts),
        "students_equal": succeeded - by_kind["unlike the reference"],
        "violations": by_kind,
        "steps": len(results.steps),
        "steps_repeated": len(results.steps) - len({(step.job, step.step) for step in results.steps}),
        "steps_overlapping": steps_overlapping,
        "seconds_overlapping": round(seconds_overlapping, 3),
        "recovery_s": {
            "kills": len(recovery),
            "median": round(statistics.median(recovery), 2) if recovery else None,
            "longest": round(recovery[-1], 2) if recovery else None,
        },
    }


def recovery_times(injections: Sequence[Injection], steps: Sequence[Step]) -> list[float]:
    """Seconds from each kill that ended a training to the first step of the job's next attempt."""
    by_job: dict[str, list[Step]] = {}
    for step in steps:
        by_job.setdefault(step.job, []).append(step)
    times = []
    for injection in injections:
        last_steps = {step.process: step for step in steps if step.at <= injection.at}
        for engine in injection.engines if injection.kills else ():
            last = last_steps.get(engine)
            later = [step.at for step in by_job[last.job] if step.fence > last.fence] if last else []
            if later:
                times.append(later[0] - injection.at)
    return times


def as_text(figures: Figures, violations: Sequence[Violation], setting: str, seed: int, wall_s: float) -> str:
    recovery = figures["recovery_s"]
    lines = [
        f"bench.chaos, {setting}, seed {seed}: {wall_s:.0f} s",
        f"  kills                 {_total(figures['kills'])}",
        f"  other faults          {_total(figures['other_faults'])}; "
        f"{figures['broker_unreachable']} could not reach the broker",
        f"  refused to start      {figures['refused_to_start']} times, without a database",
        f"  misbehaved            {_total(figures['misbehaved'])}",
        f"  jobs                  {figures['jobs']}: {_listed(figures['statuses'])}",
        f"  submits answered      {_listed(figures['submit_answers'])}",
        f"  attempts              {_listed(figures['attempts'])}",
        f"  checked               {figures['events']} events, {figures['artifacts_hashed']} artifacts, "
        f"{figures['steps']} steps ({figures['steps_repeated']} repeated)",
        f"  equal, bit for bit    {figures['students_equal']} of {figures['statuses'].get('succeeded', 0)} "
        "that succeeded",
        *(f"  {kind + ' ':.<25} {number}" for kind, number in figures["violations"].items()),
        f"  overlap of attempts   {figures['steps_overlapping']} steps, {figures['seconds_overlapping']:g} s",
        f"  kill to next step     {recovery['kills']} times: median {recovery['median']} s, "
        f"longest {recovery['longest']} s",
    ]
    return "\n".join([*lines, *(f"VIOLATION {one.kind}: {one.job} {one.message}" for one in violations)])


def as_json(results: Results, violations: Sequence[Violation], figures: Figures) -> Figures:
    """The figures, all injections, and the violations with the rows of their jobs."""
    jobs = {violation.job for violation in violations}
    return {
        **figures,
        "violation_details": [dataclasses.asdict(violation) for violation in violations],
        "injections": [dataclasses.asdict(injection) for injection in results.injections],
        "rows": {
            kind: [row for row in getattr(results.rows, kind) if row.get("job_id", row.get("id")) in jobs]
            for kind in ("jobs", "events", "attempts", "checkpoints", "artifacts")
        },
    }


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): number for value, number in Counter(values).most_common()}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in counts.items()) or "none"


def _total(counts: dict[str, int]) -> str:
    return f"{sum(counts.values())}: {_listed(counts)}"
