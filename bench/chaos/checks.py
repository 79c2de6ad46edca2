"""Checks of the results of a run. Each check yields its violations; a correct run has none."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from base.jobs import TERMINAL
from bench.chaos.results import File, Results, Row, Step
from bench.processes import UnexpectedExit
from kdcore.protocol import FILES_OF_ATTEMPTS, REPORT_OF_ATTEMPTS

UNAVAILABLE = 503
OF_ATTEMPTS = ("engine_ended", "checkpoint_not_saved", "checkpoint_not_kept", "checkpoint_skipped")
"""Codes of warnings that a job has because of what was done to it."""
START_REFUSED = "the database cannot be opened"
"""The last line of a server that exits because it was started without a database. It is started again."""


@dataclass(frozen=True)
class Violation:
    kind: str
    message: str
    job: str = ""


Check = Callable[[Results], Iterable[tuple[str, str]]]
"""Yields the job and the message of each violation."""


def violations(results: Results) -> list[Violation]:
    return [Violation(kind, message, job) for kind, check in CHECKS.items() for job, message in check(results)]


# ── the promises to clients ──


def lost_jobs(results: Results) -> Iterator[tuple[str, str]]:
    """Every accepted job exists and has ended."""
    rows = {job["id"]: job for job in results.rows.jobs}
    for job in sorted(_accepted(results)):
        if job not in rows:
            yield job, "it was accepted and does not exist"
        elif rows[job]["status"] not in TERMINAL:
            yield job, f"it was accepted and is still {rows[job]['status']}"


def answered_500(results: Results) -> Iterator[tuple[str, str]]:
    """No client that misbehaves is answered by an error of the service."""
    for request, times in results.misbehaved.items():
        if request.endswith(" 500"):
            yield "", f"{request}, {times} times; the server's log has each"


def duplicated_jobs(results: Results) -> Iterator[tuple[str, str]]:
    """One idempotency key gives one job, and every job was named in an answer."""
    by_key: dict[str, set[str]] = defaultdict(set)
    for answer in results.answers:
        if answer.verb == "submit" and answer.code in (200, 201):
            by_key[answer.key].add(answer.job)
    for key, jobs in by_key.items():
        if len(jobs) > 1:
            yield min(jobs), f"the key {key} was answered with {len(jobs)} jobs"
    created = Counter(answer.job for answer in results.answers if answer.code == 201)
    for job, times in created.items():
        if times > 1:
            yield job, f"{times} submits were answered 201"
    for key, times in Counter(job["idempotency_key"] for job in results.rows.jobs).items():
        if times > 1:
            yield "", f"{times} jobs have the key {key}"
    for job in {row["id"] for row in results.rows.jobs} - _accepted(results):
        yield job, "no answer has named it"


def wrong_ends(results: Results) -> Iterator[tuple[str, str]]:
    """A job succeeds, unless its client has cancelled it. No program crashes, and no answer is an unexpected error."""
    actions = {job.key: job.action for job in results.jobs}
    retried = {answer.key for answer in results.answers if answer.verb == "retry" and answer.code == 200}
    for job in results.rows.jobs:
        key, status = job["idempotency_key"], job["status"]
        action = actions.get(key, "none")
        cancelled = action == "cancel" or (action == "retry" and key not in retried)
        if status != "succeeded" and not (status == "cancelled" and cancelled):
            yield job["id"], f"it is {status} ({job['error']}); the client's action: {action}"
    for answer in results.answers:
        if answer.code >= 500 and answer.code != UNAVAILABLE:
            yield answer.job, f"{answer.verb} of {answer.key} was answered {answer.code}"
    for unexpected in results.exits:
        if not refused_to_start(unexpected):
            yield "", f"{unexpected.name} exited with {unexpected.code}:\n{unexpected.log_tail}"


# ── the events, and the attempt that wrote them ──


def event_gaps(results: Results) -> Iterator[tuple[str, str]]:
    """Events are numbered from 1 to the number in the job's row."""
    for job, events in _events(results):
        numbers = [event["seq"] for event in events]
        if numbers != list(range(1, job["event_seq"] + 1)):
            yield job["id"], f"its events are numbered {numbers}, its row has {job['event_seq']}"


def repeated_ends(results: Results) -> Iterator[tuple[str, str]]:
    """A job has one end, after which no event follows; after a retry it has another one. The row has the last end."""
    for job, events in _events(results):
        lives: list[list[str]] = [[]]
        for event in events:
            if event["type"] == "retried":
                lives.append([])
            lives[-1].append(event["type"])
        for number, types in enumerate(lives, 1):
            ends = [kind for kind in types if kind in TERMINAL]
            if len(ends) != 1 or types[-1:] != ends:
                yield job["id"], f"after {number - 1} retries: its ends are {ends}, its last event is {types[-1:]}"
        if lives[-1][-1:] != [job["status"]]:
            yield job["id"], f"its last event is {lives[-1][-1:]}, its status {job['status']}"


def stale_publishes(results: Results) -> Iterator[tuple[str, str]]:
    """Only the newest attempt has published. Attempts do not overlap, and all have ended."""
    by_job: dict[str, list[Row]] = defaultdict(list)
    for attempt in results.rows.attempts:
        by_job[attempt["job_id"]].append(attempt)
    for job, events in _events(results):
        attempts = by_job[job["id"]]
        fences = [attempt["fence"] for attempt in attempts]
        claimed = [event["data"]["attempt"] for event in events if event["type"] == "claimed"]
        if claimed != fences:
            yield job["id"], f"claims in its events are {claimed}, its attempts are {fences}"
        if unended := [attempt["fence"] for attempt in attempts if attempt["ended_at"] is None]:
            yield job["id"], f"attempts {unended} have no end"
        if early := [b["fence"] for a, b in pairwise(attempts) if b["started_at"] < (a["ended_at"] or 0)]:
            yield job["id"], f"attempts {early} began before the attempt before had ended"
        published = [attempt["fence"] for attempt in attempts if attempt["how"] == "succeeded"]
        if published != ([job["fence"]] if job["status"] == "succeeded" else []):
            yield job["id"], f"attempts {published} published, the job is {job['status']} with fence {job['fence']}"
        if job["status"] == "succeeded" and fences and published != fences[-1:]:
            yield job["id"], f"attempts {published} published, the last attempt was {fences[-1]}"


# ── the files ──


def damaged_files(results: Results) -> Iterator[tuple[str, str]]:
    """Every file has the size and digest in its row, and every blob the digest in its name."""
    for artifact in results.rows.artifacts:
        digest = artifact["sha256"]
        yield from _damage(artifact, results.files.get(f"blobs/{digest[:2]}/{digest}"), f"artifact {artifact['name']}")
    for checkpoint in results.rows.checkpoints:
        file = results.files.get(checkpoint["path"])
        yield from _damage(checkpoint, file, f"checkpoint {checkpoint['path']}")
    for path, file in results.files.items():
        if path.startswith("blobs/") and not path.endswith(file.sha256):
            yield "", f"the content of {path} does not match its name"


def reference_differences(results: Results) -> Iterator[tuple[str, str]]:
    """Students, metrics and report equal those of the undisturbed run, bit for bit. A cancelled job has its points."""
    recipes = {job.key: job.recipe for job in results.jobs}
    artifacts: dict[str, dict[str, str]] = defaultdict(dict)
    for artifact in results.rows.artifacts:
        artifacts[artifact["job_id"]][artifact["name"]] = artifact["sha256"]
    points_of: dict[str, dict[tuple[str, str, int], float | None]] = defaultdict(dict)
    for point in results.rows.metrics:
        points_of[point["job_id"]][point["trial"], point["key"], point["step"]] = point["value"]
    for job in results.rows.jobs:
        reference, points = results.references[recipes[job["idempotency_key"]]], points_of[job["id"]]
        if job["status"] == "succeeded":
            students = {name: digest for name, digest in artifacts[job["id"]].items() if name not in FILES_OF_ATTEMPTS}
            if students != reference.files:
                yield job["id"], f"its files are {students}, those of the reference {reference.files}"
            if points != reference.points:
                yield job["id"], f"{_count_differences(points, reference.points)} points of its metrics differ"
            own, right = _of_the_training(job["result"]), _of_the_training(reference.report)
            if other := sorted(name for name in own.keys() | right.keys() if own.get(name) != right.get(name)):
                yield job["id"], f"its report differs in {', '.join(other)}"
        elif wrong := {at: value for at, value in points.items() if reference.points.get(at, "") != value}:
            yield job["id"], f"{len(wrong)} points of its metrics differ"


# ── the trainings ──


def overlapping_attempts(results: Results) -> Iterator[tuple[str, str]]:
    """No attempt begins a step after the first step of a later attempt."""
    for job, late in _late_steps(results.steps).items():
        newer = next(step for step in results.steps if step.job == job and step.fence > late[0].fence)
        yield job, f"{len(late)} steps of attempt {late[0].fence} after attempt {newer.fence} had begun"


def refused_to_start(unexpected: UnexpectedExit) -> bool:
    return START_REFUSED in unexpected.log_tail.rpartition("\n")[2]


def overlap(steps: Sequence[Step]) -> tuple[int, float]:
    """Number of steps that attempts took after a newer attempt had begun, and their time in seconds."""
    late = _late_steps(steps).values()
    return sum(map(len, late)), sum(steps_of_job[-1].at - steps_of_job[0].at for steps_of_job in late)


def leftovers(results: Results) -> Iterator[tuple[str, str]]:
    """No process, lock, scratch folder or temporary file is left, and no checkpoint or blob without a row."""
    left = results.leftovers
    for kind, names in (("process", left.processes), ("held lock", left.locks), ("file", left.files)):
        for name in names:
            yield "", f"{kind}: {name}"
    checkpoints = {checkpoint["path"] for checkpoint in results.rows.checkpoints}
    for path in results.files:
        if path.startswith("checkpoints/") and path not in checkpoints:
            yield path.split("/")[1], f"file: {path} has no row"
    artifacts = {artifact["sha256"] for artifact in results.rows.artifacts}
    specs = " ".join(str(job["resolved_spec"]) for job in results.rows.jobs)
    for path in results.files:
        digest = path.rpartition("/")[2]
        if path.startswith(("blobs/", "trash/")) and digest not in artifacts and digest not in specs:
            yield "", f"file: {path} has no row"


CHECKS: dict[str, Check] = {
    "lost": lost_jobs,
    "duplicated": duplicated_jobs,
    "wrong end": wrong_ends,
    "ended twice": repeated_ends,
    "damaged file": damaged_files,
    "stale publish": stale_publishes,
    "event gap": event_gaps,
    "unlike the reference": reference_differences,
    "overlapping attempts": overlapping_attempts,
    "leftover": leftovers,
    "answered 500": answered_500,
}


def _accepted(results: Results) -> set[str]:
    return {answer.job for answer in results.answers if answer.verb == "submit" and answer.code in (200, 201)}


def _events(results: Results) -> list[tuple[Row, list[Row]]]:
    """Each job with its events."""
    by_job: dict[str, list[Row]] = defaultdict(list)
    for event in results.rows.events:
        by_job[event["job_id"]].append(event)
    return [(job, by_job[job["id"]]) for job in results.rows.jobs]


def _damage(row: Row, file: File | None, name: str) -> Iterator[tuple[str, str]]:
    if file is None:
        yield row["job_id"], f"{name} does not exist"
    elif (file.sha256, file.bytes) != (row["sha256"], row["bytes"]):
        yield row["job_id"], f"the content of {name} does not match its row"


def _late_steps(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps that an attempt began after a newer attempt had begun, by job."""
    newest: dict[str, int] = {}
    late: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if step.fence < newest.get(step.job, 0):
            late[step.job].append(step)
        newest[step.job] = max(step.fence, newest.get(step.job, 0))
    return late


def _count_differences(one: dict[Any, Any], other: dict[Any, Any]) -> int:
    return sum(one.get(at, "none") != other.get(at, "none") for at in one.keys() | other.keys())


def _of_the_training(report: Row | None) -> Row:
    """Return a report without what depends on the attempts: times, costs, and warnings about what was killed."""
    kept = {name: value for name, value in (report or {}).items() if name not in REPORT_OF_ATTEMPTS}
    warnings = [one for one in kept.get("warnings", ()) if one["code"] not in OF_ATTEMPTS]
    # A worker preloads an allocator where one is installed; the reference has no worker. It decides no bits.
    computing = {name: value for name, value in kept.get("computing", {}).items() if name != "allocator"}
    return {**kept, "warnings": warnings, "computing": computing}
