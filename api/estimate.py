"""The estimate of a job: its steps and parameters, and the seconds and memory that it will take.

Seconds and memory are those that this service has measured of the same stages in earlier jobs of the project
(`kdcore/spec/cost.py`). Where a part was never measured, a probe of a few steps can be run, in a child process of the
API as inspections are (`kdcore/measure/probe.py`); what it finds is kept, until a job measures it.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from api.inspections import Refused
from api.places import Busy
from api.references import References
from api.submission import Examined
from base.cores import asked_threads, cores
from base.errors import StorageFull
from base.warning import WarningItem, refused_if_strict, warning_faults
from kdcore.catalog import DatasetFacts
from kdcore.spec import JobSpec, Known, each_start, each_teacher, start_summary, trials
from kdcore.spec.cost import (
    DEVICE_KINDS,
    DeviceKind,
    JobCost,
    Prediction,
    ProbeRequest,
    cost_keys,
    cost_rows,
    least_memory,
    predict,
)
from store import registry, workers
from store.settings import Settings
from store.workers import Worker

log = logging.getLogger("distillery.estimate")

LARGEST_PROBED_PARAMETERS = 150_000_000
"""Of teacher and student together. Larger ones take too long to build, and too much memory beside a training."""
LARGEST_PROBED_BATCH_BYTES = 64 << 20
PROBE_TIMEOUT_S = 25.0
"""Less than the 30 s after which clients give up; the probe may also wait for other inspections."""


@dataclass(frozen=True)
class Estimated:
    """The result of `examine` with the warnings that follow from the estimate; it may now be refused for them."""

    examined: Examined
    estimate: dict[str, Any] | None


async def estimated(examined: Examined, references: References, settings: Settings, *, probe: bool) -> Estimated:
    """Return the estimate of a valid spec; None for one with faults. With `probe`, what was not measured is probed."""
    spec, known, dataset = examined.resolved, examined.known, examined.known.dataset
    if spec is None or dataset is None:
        return Estimated(examined, None)
    teacher, student = _teacher_parameters(spec, known), _parameters(spec.students[0].architecture, known)
    started = {at: one for at, one in each_start(vars(spec)) if at in known.starts}
    starts = {at: start_summary(one, known.starts[at], dataset) for at, one in started.items()}
    first = starts.get("/student") or starts.get("/student/0")
    trained = first["trained"] if first is not None else student
    rows, consuming = await _measured(spec, known, references, settings)
    prediction = _prediction(spec, known, rows, consuming)
    if prediction is None and probe and _is_small(spec, dataset, (teacher or 0) + (student or 0)):
        rows |= await _probed(spec, dataset, references, settings)
        prediction = _prediction(spec, known, rows, consuming)
    estimate = {
        "steps": sum(stage.steps for trial in trials(spec, dataset, known.unlabelled) for stage in trial.stages),
        "parameters": {"teacher": teacher, "student": student, "trained": trained},
        "compression": round(teacher / student, 2) if teacher and student else None,
        "starts": starts,
        **_cost(prediction, teacher if spec.teachers else 0, student, trained),
    }
    return Estimated(_warned(examined, spec, _memory_warnings(estimate, prediction, consuming)), estimate)


def _cost(
    prediction: Prediction | None, teacher: int | None, student: int | None, trained: int | None
) -> dict[str, Any]:
    """Return the fields of the estimate that are measured; without a measurement, the least memory that is needed."""
    if prediction is not None:
        phases = prediction.seconds_by_phase.items()
        return {
            "seconds": _rounded(prediction.seconds),
            "seconds_by_phase": {phase: None if value is None else _rounded(value) for phase, value in phases},
            "memory_bytes": prediction.memory_bytes,
            "device": prediction.device,
            "basis": prediction.basis,
        }
    least = None
    if teacher is not None and student is not None:
        least = least_memory(student, teacher, 0 if trained is None else student - trained)
    phases_unknown = dict.fromkeys(("preparing", "training", "evaluating", "exporting"))
    basis = None if least is None else "parameters"
    cost = {"seconds": None, "seconds_by_phase": phases_unknown, "memory_bytes": least, "device": None, "basis": basis}
    return cost


def _rounded(seconds: float) -> float:
    """Return three significant digits: more would promise too much, and a short phase is not 0."""
    return float(f"{seconds:.3g}")


async def _measured(
    spec: JobSpec, known: Known, references: References, settings: Settings
) -> tuple[dict[str, dict[str, Any]], Sequence[Worker]]:
    """Return what was measured of this job's parts, by key, and the workers that take jobs."""
    keys, project = cost_keys(spec, known), references.caller.project

    def read(connection: Connection) -> tuple[dict[str, dict[str, Any]], Sequence[Worker]]:
        figures = {key: registry.get_measurement(connection, project, "cost", key) for key in keys}
        found = {key: row for key, row in figures.items() if row is not None}
        return found, workers.list_consuming(connection, settings.lease_s)

    return await references.db.read(read)


def _prediction(
    spec: JobSpec, known: Known, rows: Mapping[str, Mapping[str, Any]], consuming: Sequence[Worker]
) -> Prediction | None:
    """Return what was measured on the workers' kind of device, or else on the other one."""
    for device in _kinds(spec, consuming):
        if (prediction := predict(spec, known, rows, device)) is not None:
            return prediction
    return None


def _kinds(spec: JobSpec, consuming: Sequence[Worker]) -> list[DeviceKind]:
    """Return the kinds of devices, that on which the job will probably run first."""
    wanted = spec.training.device
    has_gpu = any(device.kind == "cuda" for worker in consuming for device in worker.devices)
    first: DeviceKind = wanted if wanted != "auto" else "cuda" if has_gpu or not consuming else "cpu"
    return sorted(DEVICE_KINDS, key=lambda kind: kind != first)


def _is_small(spec: JobSpec, dataset: DatasetFacts, parameters: int) -> bool:
    """Return True if a probe is cheap beside a running training."""
    height, width = dataset.image_size
    pixels = max(height * width, *((teacher.image_size or 0) ** 2 for teacher in spec.teachers), 0)
    batch_bytes = spec.training.batch_size * dataset.channels * pixels
    return parameters <= LARGEST_PROBED_PARAMETERS and batch_bytes <= LARGEST_PROBED_BATCH_BYTES


async def _probed(
    spec: JobSpec, dataset: DatasetFacts, references: References, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Probe the job, and keep what is found where nothing was measured. A probe that fails leaves the cost unknown."""
    facts = dataset.model_copy(update={"class_names": []})
    request = ProbeRequest(spec=spec, dataset=facts, threads=_threads(settings))
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            inspections = references.inspections
            cost = await inspections.inspector.inspect(JobCost, request.model_dump_json(), asker=inspections.asker)
    except (Refused, Busy, StorageFull, TimeoutError) as refused:
        log.info("no probe of the job's cost: %s: %s", type(refused).__name__, refused)
        return {}
    rows, project = cost_rows(spec, Known(dataset=dataset), cost), references.caller.project

    def keep(connection: Connection) -> None:
        for key, figures in rows.items():
            if registry.get_measurement(connection, project, "cost", key) is None:
                registry.put_measurement(connection, project, "cost", key, figures)

    await references.db.write(keep)
    return rows


def _threads(settings: Settings) -> int:
    """Return the threads that a worker on a host like this one would give to an engine."""
    return asked_threads(os.environ) or max(1, cores() // (settings.slots or 1))


def _memory_warnings(
    estimate: Mapping[str, Any], prediction: Prediction | None, consuming: Sequence[Worker]
) -> list[WarningItem]:
    """Return a warning if no worker has as much memory as the job needs, as far as both are known."""
    needed = estimate["memory_bytes"]
    kind = prediction.device_kind if prediction else None
    sizes = [
        device.memory_bytes
        for worker in consuming
        for device in worker.devices
        if device.memory_bytes is not None and kind in (None, device.kind)
    ]
    if needed is None or not sizes or needed <= max(sizes):
        return []
    largest = prediction.largest_batch(max(sizes)) if prediction else None
    what = "a smaller batch_size, image_size or network" if largest is None else f"a batch_size of {largest} or less"
    least = "at least " if prediction is None else "about "
    text = f"the job needs {least}{_gigabytes(needed)} of memory; the largest device of a worker has "
    return [WarningItem("memory_short", "/training/batch_size", text + _gigabytes(max(sizes)), f"{what} would fit")]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _warned(examined: Examined, spec: JobSpec, more: list[WarningItem]) -> Examined:
    """Return the examination with more warnings; a strict spec is refused for them."""
    if not more:
        return examined
    warnings = [*examined.warnings, *more]
    if spec.strict and (refused := refused_if_strict(warnings)):
        return replace(examined, faults=warning_faults(refused), resolved=None, warnings=warnings)
    return replace(examined, warnings=warnings)


def _teacher_parameters(spec: JobSpec, known: Known) -> int | None:
    """Return the parameters of all teachers together; None without a teacher, or if one is not downloaded yet."""
    counts = [
        known.teachers[at].parameters if at in known.teachers else _parameters(teacher.architecture, known)
        for at, teacher in each_teacher(vars(spec))
    ]
    return None if not counts or None in counts else sum(filter(None, counts))


def _parameters(name: str | None, known: Known) -> int | None:
    network = known.network(name)
    if network is None or known.dataset is None:
        return None
    return network.parameters(known.dataset.num_classes, known.dataset.channels)
