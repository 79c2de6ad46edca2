"""Ended jobs in MLflow: one run of the tracking server for each, if `mlflow_tracking_uri` names one.

A slot notes a job that has ended, and goes on. A thread of the worker reads its rows, and a child process with time
limits writes them by MLflow's own client. What the tracker does, or does not do, changes nothing of the job: if it
fails, the job gets the warning `tracking_failed`. A worker that stops first leaves its last jobs out.

`python -m worker.tracking` is the child: a `Run` as JSON on standard input, one JSON object on standard output.
"""

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from base.clock import boottime
from base.defaults import DEFAULT_PROJECT
from base.jobs import TERMINAL
from base.processes import kill_group
from base.warning import WarningItem
from store import artifacts, events, jobs, metrics
from store.errors import NotFound
from store.records import Job
from worker.context import UNAVAILABLE, WorkerContext
from worker.devices import PASSED_ON, PROXIES

log = logging.getLogger("distillery.tracking")

LIMIT_S = 300.0
"""The longest time for one job, with its files."""
WAITING = 1000
"""Jobs that wait for the tracker; beyond them the newest are left out."""
LEAVES_IN_S = 5.0
POINTS = 1000
FILE_BYTES = 200_000_000
"""Larger files are not sent; a tag has their digest."""
PASSED_ON_PREFIXES = ("LC_", "MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "SSL_", "REQUESTS_CA")
"""Variables of the child beside those of an engine: MLflow's own settings and keys, and those of its file stores."""
QUIET = {
    # Nothing is sent but to the tracker.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # Without it MLflow refuses a folder as its server.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}

# MLflow's own bounds, and ours where it has none.
PARAMS_AT_ONCE, METRICS_AT_ONCE, TAGS_AT_ONCE = 100, 1000, 100
MOST_PARAMS, VALUE_CHARACTERS, KEY_CHARACTERS, TAG_CHARACTERS = 300, 500, 250, 5000
_NO_KEY = re.compile(r"[^\w\-. /:]", re.ASCII)


@dataclass(frozen=True)
class Run:
    """What the tracker gets of one job. Plain data: it is sent to the child as JSON."""

    uri: str
    experiment: str
    name: str
    status: str
    """MLflow's: FINISHED, FAILED or KILLED."""
    started_ms: int
    ended_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    points: list[tuple[str, float, int]]
    """Key, value and step."""
    files: dict[str, str]
    """Paths by the names under which the job has them."""


class Tracker:
    """Sends ended jobs to the tracking server, one after the other, on a thread of its own."""

    def __init__(self, context: WorkerContext, uri: str) -> None:
        self._context, self._uri = context, uri
        self._waiting: queue.Queue[str | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._thread.start()

    def note(self, job_id: str) -> None:
        """Send a job, if it has ended. Returns at once and never raises."""
        try:
            self._waiting.put_nowait(job_id)
        except queue.Full:
            log.warning("job %s: is not tracked, too many jobs wait for the tracker", job_id)

    def stop(self) -> None:
        """Give what is under way a few seconds, and leave the rest out."""
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        if self._thread.is_alive():
            self._thread.join(LEAVES_IN_S)
        if (child := self._child) is not None:
            log.warning("the tracker does not answer, leaving without it")
            kill_group(child.pid)

    def _run(self) -> None:
        while (job_id := self._waiting.get()) is not None:
            try:
                self.track(job_id)
            except UNAVAILABLE as error:
                log.warning("job %s: is not tracked: %s", job_id, error)
            except Exception:
                # No fault of one job may end the thread.
                log.exception("job %s: is not tracked", job_id)

    def track(self, job_id: str) -> None:
        """Send one job, if it is a distillation that has ended. A failure becomes a warning of the job."""
        try:
            with self._context.database.connect() as connection:
                job = jobs.get(connection, job_id)
                if job.kind != "distillation" or job.status not in TERMINAL:
                    return
                curves = metrics.series(connection, job_id, max_points=POINTS)
                made = artifacts.list_artifacts(connection, job_id)
        except NotFound:
            return
        paths = {one.name: str(self._context.files.path(one.sha256)) for one in made if one.bytes <= FILE_BYTES}
        left_out = {f"distillery.file.{one.name}": f"sha256:{one.sha256}" for one in made if one.bytes > FILE_BYTES}
        fault = self.send(run_of(job, curves, paths, left_out, self._uri))
        if fault is None:
            return
        log.warning("job %s: %s", job_id, fault)
        hint = "see DISTILLERY_MLFLOW_TRACKING_URI and the tracker; the job itself is complete"
        warning = WarningItem("tracking_failed", "", f"MLflow has not got the job: {fault}", hint)
        with self._context.database.begin() as connection:
            events.append_late_warning(connection, job_id, warning)

    def send(self, run: Run, limit_s: float = LIMIT_S) -> str | None:
        """Let a child send a run. Returns why that failed, in words without the address, which may have a password."""
        began = boottime()
        child = self._child = subprocess.Popen(
            [sys.executable, "-m", "worker.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(os.environ),
            cwd="/",
            start_new_session=True,
            text=True,
        )
        try:
            out, err = child.communicate(json.dumps(asdict(run)), limit_s)
        except subprocess.TimeoutExpired:
            return f"it did not answer within {limit_s:g} s"
        finally:
            if child.returncode is None:
                kill_group(child.pid)
                child.communicate()
            self._child = None
        try:
            fault = json.loads(out.splitlines()[-1])["error"]
        except (IndexError, ValueError, KeyError, TypeError):
            last = err.strip().splitlines()[-1:] or ["it printed nothing"]
            fault = f"its client ended with exit code {child.returncode}: {last[0]}"
        if fault is None:
            log.info("job %s: tracked in %.1f s", run.tags.get("distillery.job"), boottime() - began)
            return None
        return str(fault).replace(run.uri, "the tracker")[:1000]


def run_of(
    job: Job, curves: Mapping[str, Any], files: Mapping[str, str], more_tags: Mapping[str, str], uri: str
) -> Run:
    """Return what the tracker gets of a job that has ended."""
    ended = job.finished_at or job.created_at
    return Run(
        uri=uri,
        experiment="distillery" if job.project == DEFAULT_PROJECT else f"distillery-{job.project}",
        name=job.name or job.id,
        status={"succeeded": "FINISHED", "failed": "FAILED"}.get(job.status, "KILLED"),
        started_ms=int(1000 * (job.started_at or job.created_at)),
        ended_ms=int(1000 * ended),
        params=params_of(job.resolved_spec),
        tags={**_tags(job), **more_tags},
        points=[*_points(curves), *((key, value, 0) for key, value in _figures(job.result or {}))],
        files=dict(files),
    )


def params_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a resolved spec as MLflow's params: `training.epochs` is 60. What is not set is left out."""
    found: dict[str, str] = {}
    for key, value in _leaves(spec):
        if len(found) == MOST_PARAMS:
            break
        text = value if isinstance(value, str) else json.dumps(value)
        found[_key(key)] = text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 1] + "…"
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{path}.{number}")
    elif value is not None and value != []:
        yield path, value


def _tags(job: Job) -> dict[str, str]:
    result = job.result or {}
    tags = {
        "distillery.job": job.id,
        "distillery.method": job.method,
        "distillery.status": job.status,
        "distillery.attempt": str(job.fence),
        "distillery.warnings": ", ".join(sorted({str(one["code"]) for one in job.warnings})),
        "distillery.error": f"{job.error['code']}: {job.error['message']}" if job.error else "",
        "mlflow.note.content": str(result.get("verdict") or ""),
        **{f"label.{name}": value for name, value in job.labels.items()},
    }
    return {_key(name): value[:TAG_CHARACTERS] for name, value in tags.items() if value}


def _points(curves: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    for trial, by_key in curves.items():
        for key, points in by_key.items():
            yield from ((_key(f"{trial}/{key}"), value, step) for step, value in points if value is not None)


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures of a report: of each model its row, the gain, and the gap closed."""
    rows = {name: result.get(name) for name in ("teacher", "student", "alone")} | (result.get("models") or {})
    for name, row in rows.items():
        for figure in ("accuracy", "accuracy_top5", "loss", "agreement", "parameters", "bytes"):
            value = row.get(figure) if isinstance(row, Mapping) else None
            if isinstance(value, int | float):
                yield _key(f"final/{name}/{figure}"), float(value)
    proof = result.get("proof") or {}
    for name in ("gain", "gap_closed"):
        interval: Mapping[str, Any] = proof.get(name) or {}
        for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            if isinstance(interval.get(part), int | float):
                yield f"final/{name}{suffix}", float(interval[part])
    if isinstance(result.get("seconds"), int | float):
        yield "final/seconds", float(result["seconds"])


def _key(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return _NO_KEY.sub("_", name)[:KEY_CHARACTERS]


# ── the child ──


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the child's environment, without addresses and keys of our services."""
    passed_on = {
        name: value
        for name, value in environment.items()
        if name in (*PASSED_ON, *PROXIES) or name.startswith(PASSED_ON_PREFIXES)
    }
    paths = [str(Path(__file__).parents[1]), *filter(None, [passed_on.get("PYTHONPATH")])]
    return {**DEFAULTS, **passed_on, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}


def main() -> int:
    # The worker, which has this time limit, too, may be killed.
    signal.alarm(int(LIMIT_S) + 10)
    run = Run(**json.load(sys.stdin))
    os.nice(10)
    logging.disable()
    try:
        _send(run)
        error = None
    except Exception as fault:  # Any: those of MLflow, of HTTP and of file stores have no common class.
        lines = str(fault).splitlines()
        error = f"{type(fault).__name__}: {lines[0] if lines else ''}"
    print(json.dumps({"error": error}))
    return 0


def _send(run: Run) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(tracking_uri=run.uri)
    known = client.get_experiment_by_name(run.experiment)
    experiment = client.create_experiment(run.experiment) if known is None else known.experiment_id
    made = client.create_run(experiment, start_time=run.started_ms, run_name=run.name).info.run_id
    tags = [RunTag(name, value) for name, value in run.tags.items()]
    params = [Param(name, value) for name, value in run.params.items()]
    points = [Metric(key, value, run.ended_ms, step) for key, value, step in run.points]
    for at in range(0, len(tags), TAGS_AT_ONCE):
        client.log_batch(made, tags=tags[at : at + TAGS_AT_ONCE])
    for at in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(made, params=params[at : at + PARAMS_AT_ONCE])
    for at in range(0, len(points), METRICS_AT_ONCE):
        client.log_batch(made, metrics=points[at : at + METRICS_AT_ONCE])
    with TemporaryDirectory() as folder:
        for name, path in run.files.items():
            # MLflow takes a file's own name, and ours is its digest.
            link = Path(folder, name)
            link.symlink_to(path)
            client.log_artifact(made, str(link))
    client.set_terminated(made, run.status, run.ended_ms)


if __name__ == "__main__":
    sys.exit(main())
