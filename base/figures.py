"""Figures for Prometheus that a process counts itself. What the database knows is read from there when it is asked for.

Several processes answer behind one address, and workers answer none. So each writes its figures to a file of its own in
one folder, and whichever is asked adds those of the others. The label `process` keeps them apart: the counters of a
process that was started again begin at zero under another name.
"""

import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.samples import Sample

disable_created_metrics()  # type: ignore[no-untyped-call]

WRITE_EVERY_S = 5.0
"""The time between two writes of a process."""
ENDED_S = 60.0
"""The age from which a file is that of a process that has ended."""
SUFFIX = ".prom"

REGISTRY = CollectorRegistry()
ProcessCollector(namespace="distillery", registry=REGISTRY)
_REQUESTS = Histogram(
    "distillery_http_request_seconds",
    "Time from a request to the end of its answer, by the template of its route. Streams are counted apart.",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)
_STREAMS = Counter("distillery_streams_total", "Event streams that have ended.", ["route"], registry=REGISTRY)
_REFUSALS = Counter(
    "distillery_refusals_total", "Requests and connections that a limit has refused.", ["limit"], registry=REGISTRY
)
_DELIVERIES = Counter("distillery_webhook_deliveries_total", "Webhook deliveries.", ["outcome"], registry=REGISTRY)
_ATTEMPTS = Counter("distillery_attempts_total", "Attempts of jobs that have ended.", ["outcome"], registry=REGISTRY)
_PHASES = Counter(
    "distillery_job_seconds_total", "Seconds of succeeded jobs by what was done in them.", ["phase"], registry=REGISTRY
)
_CACHE = Counter(
    "distillery_teacher_cache_views_total",
    "Views of images whose teacher's output was stored (hit) or was computed (miss), of succeeded jobs.",
    ["result"],
    registry=REGISTRY,
)


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request. `route` is a template, such as `/v1/jobs/{job_id}`: an address would be a series of its own."""
    _REQUESTS.labels(method, route, f"{status // 100}xx").observe(seconds)


def streamed(route: str) -> None:
    """Count an event stream. It lasts as long as its job, so its time says nothing about the server."""
    _STREAMS.labels(route).inc()


def refused(limit: str) -> None:
    """Count a request or connection that a limit has refused. `limit`: its name, one of a few."""
    _REFUSALS.labels(limit).inc()


def refusals(limit: str) -> float:
    """Return how many requests and connections a limit has refused in this process."""
    return float(_REFUSALS.labels(limit)._value.get())


def delivered(outcome: str) -> None:
    """Count a delivery of a webhook. `outcome`: one of a few words, such as `delivered` or `failed`."""
    _DELIVERIES.labels(outcome).inc()


def attempt_ended(outcome: str) -> None:
    """Count an attempt: `succeeded`, `failed`, `cancelled`, `released` (paused or drained), `postponed` (no disk
    space), or `lost` (another attempt owns the job)."""
    _ATTEMPTS.labels(outcome).inc()


def job_succeeded(report: Mapping[str, Any]) -> None:
    """Count the attempt, and what the report of its job says about its seconds and its teacher's outputs."""
    attempt_ended("succeeded")
    for phase, seconds in (report.get("timings") or {}).items():
        _PHASES.labels(phase).inc(sum(seconds.values()) if isinstance(seconds, dict) else seconds)
    cached = report.get("teacher_cache") or {}
    for result, key in (("hit", "hits"), ("miss", "misses")):
        _CACHE.labels(result).inc(cached.get(key) or 0)


class Exchange:
    """The folder of all processes' figures. `kind`: what this process is, such as `api`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self.process = f"{kind}.{socket.gethostname()}.{os.getpid()}"
        self._file = folder / f"{self.process}{SUFFIX}"

    def write(self) -> None:
        """Write this process's figures for the others. Nothing depends on the file: if there is no space, it is old."""
        temporary = self._file.with_suffix(".tmp")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(generate_latest(REGISTRY))
            temporary.replace(self._file)

    def remove(self) -> None:
        """Remove this process's file. A process that is killed leaves it to the others."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of all processes."""
        texts = {self.process: generate_latest(REGISTRY).decode(), **dict(self._others())}
        yield from _merged(texts)

    def _others(self) -> Iterator[tuple[str, str]]:
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(OSError, UnicodeDecodeError):
                if path == self._file:
                    continue
                if time.time() - path.stat().st_mtime > ENDED_S:
                    path.unlink()
                    continue
                yield path.stem, path.read_text()


def _merged(texts: Mapping[str, str]) -> Iterator[Metric]:
    """Yield each family once, with the samples of all processes."""
    families: dict[str, Metric] = {}
    for process, text in texts.items():
        for family in _parsed(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                Sample(sample.name, {**sample.labels, "process": process}, sample.value) for sample in family.samples
            ]
    yield from families.values()


def _parsed(text: str) -> Iterable[Metric]:
    """Return the families of a text; none if it cannot be read: another process wrote it."""
    try:
        return list(text_string_to_metric_families(text))
    except ValueError:
        return []


_NAMED = re.compile(r"\{(\w+):\w+\}")


def template(path: str) -> str:
    """Return a route's path without the types of its parameters: `/{name:path}` is `/{name}`."""
    return _NAMED.sub(r"{\1}", path)
