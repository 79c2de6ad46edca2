"""One storm from beginning to end: start all, send jobs, strike, wait for every job's end, stop all, look."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.chaos import plan, results
from bench.chaos.clients import Clients
from bench.chaos.injector import Storm
from bench.chaos.plan import Errand, Setting
from bench.chaos.results import Evidence, Reference, Rows
from bench.chaos.system import SERVERS, Service, started
from bench.processes import ROOT

STALLED_S = 240.0
SETTLED_S = 30.0
AT_ONCE = 3
"""Errands under way at any time, a worker: some jobs always wait."""
TEACHER = Errand("teacher", "teacher", senders=2, wish="none", patience_s=0)
BLOB = "blob:sha256:"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""The same bits need as many threads as the engines had."""


class Stalled(Exception):
    """Nothing has ended for so long that nothing will."""


@dataclass(frozen=True)
class Terms:
    setting: Setting
    jobs: int
    kills: int
    seed: int
    workers: int = 3
    recipes: tuple[str, ...] = ()
    """Only these; all, where none is named."""


def run(terms: Terms, root: Path, say: Callable[[str], None]) -> Evidence:
    """At least so many jobs under so many kills, in an empty folder; raises Stalled where they do not end."""
    with started(terms.setting, root, terms.workers) as service:
        storm = Storm(service)
        try:
            clients = _weathered(terms, service, storm, say)
        except Stalled:
            # The database ends with the service; what stands in it says why.
            (root / "rows.json").write_text(json.dumps(asdict(results.rows(service.database)), indent=1))
            raise
        say("all jobs have ended; looking")
        storm.wait(_settled(service))
        storm.stop()
        service.run("bench.chaos.collect_later")
        rows = results.rows(service.database)
        references = _references(clients, rows, service)
        return Evidence(
            errands=clients.errands,
            answers=clients.answers,
            rows=rows,
            files=results.files(service.home / "files"),
            steps=results.steps(service.records),
            references=references,
            strikes=storm.strikes,
            exits=storm.exits,
            unheard=storm.unheard,
            leftovers=results.leftovers(root, service.home, [root / name for name in SERVERS]),
        )


def _weathered(terms: Terms, service: Service, storm: Storm, say: Callable[[str], None]) -> Clients:
    """The clients after the storm, each job ended."""
    at_once = min(AT_ONCE * terms.workers, max(terms.workers, terms.jobs // 2))
    clients = Clients(service.urls, _bodies(terms, "job:nobody"), at_once)
    storm.watch = _Progress(clients, storm, say).look
    try:
        if any("teacher" in body for body in clients.bodies.values()):
            clients.bodies = _bodies(terms, f"job:{_teacher(clients, storm)}")
            say("a teacher is there")
        errands, jobs = plan.errands(terms.seed, list(clients.bodies)), terms.jobs + len(clients.errands)
        clients.begin(errands, lambda begun: begun >= jobs and storm.kills >= terms.kills)
        storm.rage(
            plan.faults(terms.seed, terms.setting, terms.kills),
            # A kill for a job on average: no more of either are left for the end.
            lambda kills: kills / terms.kills <= len(clients.errands) / jobs,
        )
        storm.calm()
        storm.wait(lambda: not clients.busy)
    finally:
        clients.close()
    return clients


def _bodies(terms: Terms, teacher: str) -> dict[str, dict[str, Any]]:
    bodies = plan.bodies(teacher)
    return {name: bodies[name] for name in terms.recipes or bodies}


def _teacher(clients: Clients, storm: Storm) -> str:
    """The job that trains what the others learn from, in the calm before the storm."""
    bodies, clients.bodies = clients.bodies, {"teacher": plan.TEACHER}
    clients.begin(iter([TEACHER]), lambda begun: begun == 1)
    storm.wait(lambda: not clients.busy)
    clients.bodies = bodies
    return next(answer.job for answer in clients.answers if answer.job)


class _Progress:
    def __init__(self, clients: Clients, storm: Storm, say: Callable[[str], None]) -> None:
        self._clients, self._storm, self._say = clients, storm, say
        self._began = self._moved = self._told = time.monotonic()
        self._ended = 0

    def look(self) -> None:
        """Say how far it is, every now and then; Stalled where nothing moves."""
        if self._clients.failures:
            raise self._clients.failures[0]
        now, ended = time.monotonic(), len(self._clients.ended)
        if ended != self._ended:
            self._ended, self._moved = ended, now
        if now - self._moved > STALLED_S:
            open_keys = [one.key for one in self._clients.errands if one.key not in self._clients.ended]
            raise Stalled(f"no job has ended for {STALLED_S:g} s; these have not: {', '.join(open_keys)}")
        if now - self._told > 15:
            self._told = now
            self._say(f"{now - self._began:.0f} s: {ended} jobs ended, {self._storm.kills} kills")


def _settled(service: Service) -> Callable[[], bool]:
    """Whether the sweeps have removed what killed workers left; or had time enough for it."""
    until = time.monotonic() + SETTLED_S
    scratch = service.home / "scratch"
    return lambda: not any(scratch.glob("*")) or time.monotonic() > until


def _references(clients: Clients, rows: Rows, service: Service) -> dict[str, Reference]:
    """Each distinct job once more, by hand: nobody disturbs it."""
    recipes = {errand.key: errand.recipe for errand in clients.errands}
    specs: dict[str, Any] = {}
    for job in rows.jobs:
        before = specs.setdefault(recipes[job["idempotency_key"]], job["resolved_spec"])
        assert before == job["resolved_spec"], "one recipe is resolved in one way"
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda spec: _by_hand(spec, service), specs.values())
        return dict(zip(specs, done, strict=True))


def _by_hand(spec: dict[str, Any], service: Service) -> Reference:
    with tempfile.TemporaryDirectory(prefix="chaos-by-hand-") as folder:
        out = Path(folder) / "out"
        (Path(folder) / "spec.json").write_text(json.dumps(spec))
        command = [sys.executable, "-m", "kdcore", "run", f"{folder}/spec.json", "--out", str(out)]
        for digest in _digests(spec):
            path = service.home / "files" / "blobs" / digest[:2] / digest
            command += ["--input", f"{BLOB}{digest}={path}"]
        environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode:
            raise RuntimeError(f"by hand it ends with {done.returncode}: {lines[-1:]}\n{done.stderr[-2000:]}")
        made = {line["name"]: line["sha256"] for line in lines if line["event"] == "artifact"}
        del made["report.json"]
        points = {
            (line["trial"], key, line["step"]): value
            for line in lines
            if line["event"] == "metric"
            for key, value in line["values"].items()
        }
        return Reference(made, points, lines[-1]["report"])


def _digests(value: Any) -> set[str]:
    match value:
        case str() if value.startswith(BLOB):
            return {value.removeprefix(BLOB)}
        case dict():
            return set(itertools.chain.from_iterable(map(_digests, value.values())))
        case list():
            return set(itertools.chain.from_iterable(map(_digests, value)))
    return set()
