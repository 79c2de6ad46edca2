"""One run from start to end: start the system, send jobs, inject faults, wait for every job's end, read the results."""

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base.references import BLOB
from bench.chaos import plan
from bench.chaos.clients import Clients
from bench.chaos.injector import Injector
from bench.chaos.misbehaving import Misbehaving
from bench.chaos.plan import PlannedJob, Setting
from bench.chaos.results import Reference, Results, Rows, find_leftovers, read_files, read_rows, read_steps
from bench.chaos.system import System, running_system
from bench.engine_run import run_engine
from bench.service import SERVERS, run_command
from kdcore.protocol import FILES_OF_ATTEMPTS

STALLED_S = 240.0
SCRATCH_REMOVED_S = 30.0
PRINT_EVERY_S = 15
JOBS_PER_WORKER = 3
"""Jobs under way at any time, for each worker: some jobs are always queued."""
TEACHER = PlannedJob("teacher", "teacher", senders=2, action="none", action_after_s=0)

Log = Callable[[str], None]


class Stalled(Exception):
    """No job has ended for so long that none will."""


@dataclass(frozen=True)
class RunOptions:
    setting: Setting
    jobs: int
    kills: int
    seed: int
    workers: int = 3
    recipes: tuple[str, ...] = ()
    """Use only these recipes; all if empty."""
    epochs: int | None = None
    """The epochs of every job; each recipe has its own if None."""
    pause_s: float = 0.0
    """The time that an engine waits before each step: a job of few epochs then lasts as long with less work."""
    warm: bool = True
    """Start engines before there is a job for them."""
    misbehaving: bool = False
    """Also have clients that are slow, cut off and hostile."""


def run(options: RunOptions, root: Path, log: Log) -> Results:
    """Run in an empty folder with at least the given numbers of jobs and kills. Raises Stalled if jobs do not end."""
    with running_system(options.setting, root, options.workers, options.pause_s, options.warm) as system:
        injector = Injector(system)
        bad = Misbehaving(system.urls, options.seed)
        try:
            if options.misbehaving:
                bad.begin()
            clients = _inject_faults(options, system, injector, log)
        except Stalled:
            # The database is removed with the system, and its rows are needed to understand the stall.
            (root / "rows.json").write_text(json.dumps(asdict(read_rows(system.database)), indent=1))
            raise
        finally:
            bad.close()
        log("all jobs have ended; reading the results")
        injector.wait(_scratch_is_empty(system))
        injector.stop_programs()
        run_command("bench.chaos.collect_later", settings=system.settings)
        rows = read_rows(system.database)
        return Results(
            jobs=clients.jobs,
            answers=clients.answers,
            rows=rows,
            references=_references(clients, rows, system),
            files=read_files(system.home / "files"),
            steps=read_steps(system.records),
            injections=injector.injections,
            exits=injector.exits,
            broker_unreachable=injector.broker_unreachable,
            misbehaved={f"{habit} {status}": n for (habit, status), n in sorted(bad.answers.items())},
            leftovers=find_leftovers(root, system.home, [root / name for name in SERVERS]),
        )


def _inject_faults(options: RunOptions, system: System, injector: Injector, log: Log) -> Clients:
    """Send jobs and inject faults until every job has ended. Returns the clients."""
    concurrent = min(JOBS_PER_WORKER * options.workers, max(options.workers, options.jobs // 2))
    clients = Clients(system.urls, _bodies(options, "job:unknown"), concurrent)
    injector.watch = _Progress(clients, injector, log).check
    try:
        if any("teacher" in body for body in clients.bodies.values()):
            clients.bodies = _bodies(options, f"job:{_train_teacher(clients, injector)}")
            log("the teacher is trained")
        planned, jobs = plan.jobs(options.seed, list(clients.bodies)), options.jobs + len(clients.jobs)
        clients.begin(planned, lambda begun: begun >= jobs and injector.kills >= options.kills)
        injector.inject_all(
            plan.faults(options.seed, options.setting, options.kills),
            # Kills and jobs are spread evenly: neither is left over at the end.
            lambda kills: kills / options.kills <= len(clients.jobs) / jobs,
        )
        injector.end_lasting_faults()
        injector.wait(lambda: not clients.busy)
    finally:
        clients.close()
    return clients


def _bodies(options: RunOptions, teacher: str) -> dict[str, dict[str, Any]]:
    bodies = plan.bodies(teacher)
    if options.epochs is not None:
        for body in bodies.values():
            body["training"]["epochs"] = options.epochs
    return {name: bodies[name] for name in options.recipes or bodies}


def _train_teacher(clients: Clients, injector: Injector) -> str:
    """Train the teacher of all jobs before the first fault. Returns the id of its job."""
    bodies, clients.bodies = clients.bodies, {"teacher": plan.TEACHER}
    clients.begin(iter([TEACHER]), lambda begun: begun == 1)
    injector.wait(lambda: not clients.busy)
    clients.bodies = bodies
    return next(answer.job for answer in clients.answers if answer.job)


class _Progress:
    def __init__(self, clients: Clients, injector: Injector, log: Log) -> None:
        self._clients, self._injector, self._log = clients, injector, log
        self._began = self._last_end = self._last_print = time.monotonic()
        self._ended = 0

    def check(self) -> None:
        """Print the progress from time to time. Raises Stalled, or the failure of a client."""
        if self._clients.failures:
            raise self._clients.failures[0]
        now, ended = time.monotonic(), len(self._clients.ended)
        if ended != self._ended:
            self._ended, self._last_end = ended, now
        if now - self._last_end > STALLED_S:
            open_keys = [job.key for job in self._clients.jobs if job.key not in self._clients.ended]
            raise Stalled(f"no job has ended for {STALLED_S:g} s; not ended: {', '.join(open_keys)}")
        if now - self._last_print > PRINT_EVERY_S:
            self._last_print = now
            self._log(f"{now - self._began:.0f} s: {ended} jobs ended, {self._injector.kills} kills")


def _scratch_is_empty(system: System) -> Callable[[], bool]:
    """A condition: the sweeps have removed the scratch folders of killed workers, or had enough time for it."""
    end = time.monotonic() + SCRATCH_REMOVED_S
    scratch = system.home / "scratch"
    return lambda: not any(scratch.glob("*")) or time.monotonic() > end


def _references(clients: Clients, rows: Rows, system: System) -> dict[str, Reference]:
    """Run each distinct job once more, by the engine alone and undisturbed."""
    recipes = {job.key: job.recipe for job in clients.jobs}
    specs: dict[str, Any] = {}
    for job in rows.jobs:
        first = specs.setdefault(recipes[job["idempotency_key"]], job["resolved_spec"])
        assert first == job["resolved_spec"], "jobs of one recipe have equal specs"
    with ThreadPoolExecutor(2) as pool:
        references = pool.map(lambda spec: _reference(spec, system.home / "files" / "blobs"), specs.values())
        return dict(zip(specs, references, strict=True))


def _reference(spec: dict[str, Any], blobs: Path) -> Reference:
    inputs = {f"{BLOB}{digest}": blobs / digest[:2] / digest for digest in _digests(spec)}
    with tempfile.TemporaryDirectory(prefix="chaos-reference-") as name:
        lines = run_engine(spec, Path(name) / "run", inputs).lines
    artifacts = {line["name"]: line["sha256"] for line in lines if line["event"] == "artifact"}
    files = {name: digest for name, digest in artifacts.items() if name not in FILES_OF_ATTEMPTS}
    points = {
        (line["trial"], key, line["step"]): value
        for line in lines
        if line["event"] == "metric"
        for key, value in line["values"].items()
    }
    return Reference(files, points, lines[-1]["report"])


def _digests(value: Any) -> set[str]:
    """The digests of all blobs in a spec."""
    match value:
        case str() if value.startswith(BLOB):
            return {value.removeprefix(BLOB)}
        case dict():
            return set(itertools.chain.from_iterable(map(_digests, value.values())))
        case list():
            return set(itertools.chain.from_iterable(map(_digests, value)))
    return set()
