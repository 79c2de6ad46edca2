"""What must hold after any storm. Each check reads the evidence and tells every violation, none where all is well."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.chaos.results import Evidence, File, Row, Step
from bench.processes import Exit

TERMINAL = ("succeeded", "failed", "cancelled")
AWAY = 503
REFUSAL = "the database cannot be opened"
"""What a server says that leaves because it is started while the database is away: whoever started it does so again."""


@dataclass(frozen=True)
class Violation:
    kind: str
    what: str
    job: str = ""


Check = Callable[[Evidence], Iterable[tuple[str, str]]]


def violations(evidence: Evidence) -> list[Violation]:
    return [Violation(kind, what, job) for kind, check in CHECKS.items() for job, what in check(evidence)]


# ── what clients were promised ──


def lost(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every job that an answer named is there, and has ended."""
    rows = {job["id"]: job for job in evidence.rows.jobs}
    for job in sorted(_accepted(evidence)):
        if job not in rows:
            yield job, "it was accepted, and is not there"
        elif rows[job]["status"] not in TERMINAL:
            yield job, f"it was accepted, and is {rows[job]['status']} for ever"


def doubled(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """One key, one job; and no job that nobody was told of."""
    told: dict[str, set[str]] = defaultdict(set)
    for answer in evidence.answers:
        if answer.verb == "submit" and answer.code in (200, 201):
            told[answer.key].add(answer.job)
    for key, jobs in told.items():
        if len(jobs) > 1:
            yield min(jobs), f"the key {key} was answered with {len(jobs)} jobs"
    created = Counter(answer.job for answer in evidence.answers if answer.code == 201)
    for job, times in created.items():
        if times > 1:
            yield job, f"{times} senders were told that they made it"
    for key, times in Counter(job["idempotency_key"] for job in evidence.rows.jobs).items():
        if times > 1:
            yield "", f"{times} jobs have the key {key}"
    for job in {row["id"] for row in evidence.rows.jobs} - _accepted(evidence):
        yield job, "nobody was told of it"


def ends(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A job ends as its client wished: done, or cancelled where that was asked for."""
    wishes = {errand.key: errand.wish for errand in evidence.errands}
    retried = {answer.key for answer in evidence.answers if answer.verb == "retry" and answer.code == 200}
    for job in evidence.rows.jobs:
        key, status = job["idempotency_key"], job["status"]
        wish = wishes.get(key, "none")
        cancelled = wish == "cancel" or (wish == "retry" and key not in retried)
        if status != "succeeded" and not (status == "cancelled" and cancelled):
            yield job["id"], f"it is {status} ({job['error']}), its client wished: {wish}"
    for answer in evidence.answers:
        if answer.code >= 500 and answer.code != AWAY:
            yield answer.job, f"{answer.verb} of {answer.key} was answered {answer.code}"
    for ended in evidence.exits:
        if not refused(ended):
            yield "", f"{ended.name} ended by itself with {ended.code}:\n{ended.last_words}"


# ── the feed, and who wrote it ──


def feed(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Events are numbered 1, 2, … to what the row says."""
    for job, events in _events(evidence):
        numbers = [event["seq"] for event in events]
        if numbers != list(range(1, job["event_seq"] + 1)):
            yield job["id"], f"its events are numbered {numbers}, the row says {job['event_seq']}"


def ended_twice(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Each life (a retry begins a new one) ends once, and nothing follows; and the row says the same."""
    for job, events in _events(evidence):
        lives: list[list[str]] = [[]]
        for event in events:
            if event["type"] == "retried":
                lives.append([])
            lives[-1].append(event["type"])
        for number, types in enumerate(lives, 1):
            terminal = [kind for kind in types if kind in TERMINAL]
            if len(terminal) != 1 or types[-1:] != terminal:
                yield job["id"], f"life {number} ended as {terminal}; its last event is {types[-1:]}"
        if lives[-1][-1:] != [job["status"]]:
            yield job["id"], f"the last event says {lives[-1][-1:]}, the row {job['status']}"


def stale(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """What was published is the newest attempt's; attempts follow each other, and none is open."""
    attempts: dict[str, list[Row]] = defaultdict(list)
    for attempt in evidence.rows.attempts:
        attempts[attempt["job_id"]].append(attempt)
    for job, events in _events(evidence):
        mine = attempts[job["id"]]
        fences = [attempt["fence"] for attempt in mine]
        claimed = [event["data"]["attempt"] for event in events if event["type"] == "claimed"]
        if claimed != fences:
            yield job["id"], f"claims told of were {claimed}, attempts are {fences}"
        if unended := [attempt["fence"] for attempt in mine if attempt["ended_at"] is None]:
            yield job["id"], f"attempts {unended} have no end"
        if beside := [b["fence"] for a, b in pairwise(mine) if b["started_at"] < (a["ended_at"] or 0)]:
            yield job["id"], f"attempts {beside} began before the one before had ended"
        published = [attempt["fence"] for attempt in mine if attempt["how"] == "succeeded"]
        if published != ([job["fence"]] if job["status"] == "succeeded" else []):
            yield job["id"], f"attempts {published} published, the job is {job['status']} with fence {job['fence']}"
        if job["status"] == "succeeded" and fences and published != fences[-1:]:
            yield job["id"], f"attempt {published} published, the last one was {fences[-1]}"


# ── bytes ──


def torn(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every file that a row names has the bytes that it names."""
    for artifact in evidence.rows.artifacts:
        digest = artifact["sha256"]
        yield from _damage(artifact, evidence.files.get(f"blobs/{digest[:2]}/{digest}"), f"artifact {artifact['name']}")
    for checkpoint in evidence.rows.checkpoints:
        found = evidence.files.get(checkpoint["path"])
        yield from _damage(checkpoint, found, f"checkpoint {checkpoint['path']}")
    for path, file in evidence.files.items():
        if path.startswith("blobs/") and not path.endswith(file.sha256):
            yield "", f"{path} holds other bytes than its name says"


def unlike(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every job that succeeded has, bit for bit, what the undisturbed run has: students, curves, report."""
    recipes = {errand.key: errand.recipe for errand in evidence.errands}
    artifacts: dict[str, dict[str, str]] = defaultdict(dict)
    for artifact in evidence.rows.artifacts:
        artifacts[artifact["job_id"]][artifact["name"]] = artifact["sha256"]
    points: dict[str, dict[tuple[str, str, int], float | None]] = defaultdict(dict)
    for point in evidence.rows.metrics:
        points[point["job_id"]][point["trial"], point["key"], point["step"]] = point["value"]
    for job in evidence.rows.jobs:
        by_hand = evidence.references[recipes[job["idempotency_key"]]]
        if job["status"] == "succeeded":
            students = {name: digest for name, digest in artifacts[job["id"]].items() if name != "report.json"}
            if students != by_hand.files:
                yield job["id"], f"its files are {students}, those of the undisturbed run {by_hand.files}"
            if points[job["id"]] != by_hand.points:
                yield (
                    job["id"],
                    f"{_apart(points[job['id']], by_hand.points)} points of its curves are not those by hand",
                )
            if _timeless(job["result"]) != _timeless(by_hand.report):
                yield job["id"], "its report is not that of the undisturbed run"
        elif wrong := {at: value for at, value in points[job["id"]].items() if by_hand.points.get(at, "") != value}:
            yield job["id"], f"{len(wrong)} points of its curves are not those by hand"


# ── the trainings themselves ──


def side_by_side(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No step of an attempt begins after the first step of a later one."""
    for job, late in _late_steps(evidence.steps).items():
        before = [step for step in evidence.steps if step.job == job and step.fence > late[0].fence]
        yield job, f"{len(late)} steps of fence {late[0].fence} after fence {before[0].fence} had begun"


def refused(ended: Exit) -> bool:
    return REFUSAL in ended.last_words.rpartition("\n")[2]


def wasted_beside(steps: Sequence[Step]) -> tuple[int, float]:
    """How many steps old trainings took beside their successors, and for how many seconds."""
    late = _late_steps(steps).values()
    return sum(map(len, late)), sum(one[-1].at - one[0].at for one in late)


def left_over(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No process, lock, scratch folder or half-written file; no checkpoint or blob that no row names."""
    left = evidence.leftovers
    for kind, names in (("process", left.processes), ("held lock", left.locks), ("file", left.files)):
        for name in names:
            yield "", f"{kind}: {name}"
    named = {checkpoint["path"] for checkpoint in evidence.rows.checkpoints}
    for path in evidence.files:
        if path.startswith("checkpoints/") and path not in named:
            yield path.split("/")[1], f"file: {path} is named by no row"
    wanted = {artifact["sha256"] for artifact in evidence.rows.artifacts}
    specs = " ".join(str(job["resolved_spec"]) for job in evidence.rows.jobs)
    for path in evidence.files:
        digest = path.rpartition("/")[2]
        if path.startswith(("blobs/", "trash/")) and digest not in wanted and digest not in specs:
            yield "", f"file: {path} is named by no row"


CHECKS: dict[str, Check] = {
    "lost": lost,
    "doubled": doubled,
    "ended otherwise": ends,
    "ended twice": ended_twice,
    "torn": torn,
    "stale publish": stale,
    "events with gaps": feed,
    "unlike the undisturbed run": unlike,
    "side by side": side_by_side,
    "leftover": left_over,
}


def _accepted(evidence: Evidence) -> set[str]:
    return {answer.job for answer in evidence.answers if answer.verb == "submit" and answer.code in (200, 201)}


def _events(evidence: Evidence) -> list[tuple[Row, list[Row]]]:
    """Each job with its feed."""
    by_id: dict[str, list[Row]] = defaultdict(list)
    for event in evidence.rows.events:
        by_id[event["job_id"]].append(event)
    return [(job, by_id[job["id"]]) for job in evidence.rows.jobs]


def _damage(row: Row, file: File | None, name: str) -> Iterator[tuple[str, str]]:
    if file is None:
        yield row["job_id"], f"{name} is not there"
    elif (file.sha256, file.bytes) != (row["sha256"], row["bytes"]):
        yield row["job_id"], f"{name} holds other bytes than its row says"


def _late_steps(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """By job, steps of a fence that a newer one had overtaken already."""
    newest: dict[str, int] = {}
    late: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if step.fence < newest.get(step.job, 0):
            late[step.job].append(step)
        newest[step.job] = max(step.fence, newest.get(step.job, 0))
    return late


def _apart(one: dict[Any, Any], other: dict[Any, Any]) -> int:
    return sum(one.get(at, "none") != other.get(at, "none") for at in one.keys() | other.keys())


def _timeless(report: Row | None) -> Row:
    return {name: value for name, value in (report or {}).items() if name != "seconds"}
