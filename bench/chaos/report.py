"""A storm in figures: what was done, what came of it, and how long work stood still."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.chaos.checks import CHECKS, Violation, refused, wasted_beside
from bench.chaos.injector import Strike
from bench.chaos.results import Evidence, Step

Figures = dict[str, Any]


def figures(evidence: Evidence, found: Sequence[Violation]) -> Figures:
    """All that is printed, as plain data."""
    beside, beside_s = wasted_beside(evidence.steps)
    waits = sorted(standstills(evidence.strikes, evidence.steps))
    taken = len(evidence.steps)
    return {
        "kills": _counted(strike.kind for strike in evidence.strikes if strike.kills),
        "other_faults": _counted(strike.kind for strike in evidence.strikes if not strike.kills),
        "refused_to_start": sum(map(refused, evidence.exits)),
        "jobs": len(evidence.rows.jobs),
        "ends": _counted(job["status"] for job in evidence.rows.jobs),
        "sent": _counted(answer.code for answer in evidence.answers if answer.verb == "submit"),
        "attempts": _counted(attempt["how"] for attempt in evidence.rows.attempts),
        "events": len(evidence.rows.events),
        "unheard": evidence.unheard,
        "artifacts_hashed": len(evidence.rows.artifacts),
        "students_equal": sum(job["status"] == "succeeded" for job in evidence.rows.jobs)
        - sum(one.kind == "unlike the undisturbed run" for one in found),
        "violations": {kind: sum(one.kind == kind for one in found) for kind in CHECKS},
        "steps": taken,
        "steps_again": taken - len({(step.job, step.step) for step in evidence.steps}),
        "steps_side_by_side": beside,
        "seconds_side_by_side": round(beside_s, 3),
        "killed_to_going_on_s": {
            "cases": len(waits),
            "median": round(statistics.median(waits), 2) if waits else None,
            "longest": round(waits[-1], 2) if waits else None,
        },
    }


def standstills(strikes: Sequence[Strike], steps: Sequence[Step]) -> list[float]:
    """Seconds from each kill that cost a job its training to the first step of the next attempt at it."""
    by_process: dict[int, Step] = {}
    by_job: dict[str, list[Step]] = {}
    for step in steps:
        by_job.setdefault(step.job, []).append(step)
    waits = []
    for strike in strikes:
        by_process = {step.process: step for step in steps if step.at <= strike.at}
        for engine in strike.engines if strike.kills else ():
            last = by_process.get(engine)
            after = [one.at for one in by_job[last.job] if one.fence > last.fence] if last else []
            if after:
                waits.append(after[0] - strike.at)
    return waits


def printed(figures: Figures, found: Sequence[Violation], setting: str, seed: int, wall_s: float) -> str:
    waits, bad = figures["killed_to_going_on_s"], figures["violations"]
    lines = [
        f"bench.chaos, {setting}, seed {seed}: {wall_s:.0f} s",
        f"  kills                 {sum(figures['kills'].values())}: {_told(figures['kills'])}",
        f"  other faults          {sum(figures['other_faults'].values())}: {_told(figures['other_faults'])}; "
        f"{figures['unheard']} met no broker",
        f"  refused to start      {figures['refused_to_start']} times, the database being away",
        f"  jobs                  {figures['jobs']}: {_told(figures['ends'])}",
        f"  submits answered      {_told(figures['sent'])}",
        f"  attempts              {_told(figures['attempts'])}",
        f"  looked at             {figures['events']} events, {figures['artifacts_hashed']} artifacts, "
        f"{figures['steps']} steps ({figures['steps_again']} taken again)",
        f"  equal, bit for bit    {figures['students_equal']} of {figures['ends'].get('succeeded', 0)} that succeeded",
        *(f"  {kind + ' ':.<25} {number}" for kind, number in bad.items()),
        f"  old beside new        {figures['steps_side_by_side']} steps, {figures['seconds_side_by_side']:g} s",
        f"  killed to going on    {waits['cases']} times: median {waits['median']} s, longest {waits['longest']} s",
    ]
    return "\n".join([*lines, *(f"VIOLATION {one.kind}: {one.job} {one.what}" for one in found)])


def as_json(evidence: Evidence, found: Sequence[Violation], figures: Figures) -> Figures:
    """The figures, and what is needed to understand a violation: its job's rows, and all strikes."""
    concerned = {one.job for one in found}
    return {
        **figures,
        "found": [dataclasses.asdict(one) for one in found],
        "strikes": [dataclasses.asdict(strike) for strike in evidence.strikes],
        "concerned": {
            kind: [row for row in getattr(evidence.rows, kind) if row.get("job_id", row.get("id")) in concerned]
            for kind in ("jobs", "events", "attempts", "checkpoints", "artifacts")
        },
    }


def _counted(of: Any) -> dict[str, int]:
    return {str(kind): number for kind, number in Counter(of).most_common()}


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in counts.items()) or "none"
