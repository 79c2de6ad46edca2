"""Suggestions: which students fit into a budget of latency or size, from what was measured and nothing else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import Caller, Db
from api.problems import Invalid, summary
from api.schemas import Json, iso
from base.errors import Fault
from base.references import BLOB
from base.text import Text
from base.wire import Suggestions, SuggestionView, UnmeasuredView
from kdcore.catalog import ARCHITECTURES, DATASETS
from kdcore.spec import INT8, ExportFormat
from kdcore.spec.reading import nearest
from store import registry, speeds
from store.errors import NotFound
from store.speeds import Speed

router = APIRouter(prefix="/v1/suggestions", tags=["benchmarks"])

LOOKED_AT = 2_000
"""The newest benchmarks, and the newest jobs with files, among which is searched."""
SHOWN = 100
UNMEASURED = 50


class Budget(BaseModel):
    """What a student may take, and what it is to be run on."""

    budget_ms: float | None = Field(default=None, gt=0, le=1e6, description="The most that the p50 latency may be.")
    budget_bytes: int | None = Field(default=None, ge=1, le=1 << 50, description="The most bytes that it may have.")
    image_size: int = Field(default=32, ge=4, le=1024, description="Height and width of the images.")
    channels: int = Field(default=3, ge=1, le=4)
    classes: int = Field(default=10, ge=2, le=100_000)
    batch: int = Field(default=1, ge=1, le=1024, description="The latency is that of so many images at once.")
    runtime: Annotated[str, Text(40)] | None = Field(
        default=None, description="torch, onnxruntime, torch.export or openvino. Default: all."
    )
    device: Literal["cpu", "cuda"] | None = Field(default=None, description="Default: both.")
    threads: int | None = Field(default=None, ge=1, le=1024, description="Of the CPU. Default: any number.")
    dataset: Annotated[str, Text(300)] | None = Field(
        default=None,
        description="Accuracies on this data set rank the students: a registered or built-in name, or the "
        "blob:sha256:<hex> of a resolved spec. Default: the one on which students of this shape were measured, if "
        "there is only one.",
    )

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.budget_ms is None and self.budget_bytes is None:
            context = {"parameter": "budget_ms"}
            raise PydanticCustomError("no_budget", "give `budget_ms`, `budget_bytes`, or both", context)
        return self


@dataclass(frozen=True)
class Candidate:
    """One file of a network, as it was measured."""

    row: Mapping[str, Any]
    figures: Mapping[str, Any]
    measured_at: float

    @property
    def architecture(self) -> str:
        return str(self.figures["architecture"])

    @property
    def format(self) -> str:
        return str(self.row["format"])

    @property
    def device(self) -> dict[str, Any]:
        return dict(self.row.get("device") or self.figures["device"])

    def latency(self, batch: int) -> Mapping[str, float] | None:
        return next((one for one in self.row["latency"] if one["batch"] == batch), None)


@dataclass(frozen=True)
class Accuracy:
    value: float
    job: str
    of: Literal["file", "student"]


@router.get("", response_model=Suggestions)
async def listing(caller: Caller, db: Db, budget: Annotated[Budget, Query()]) -> Response:
    """Students that fit into a budget of milliseconds or bytes, from benchmarks and from the measured files of jobs.

    Ranked by the best accuracy that jobs of this project have measured for the same architecture and format at this
    shape, else by parameters: `why` says which, and why. What was not measured is no part of the answer, but is listed
    with the body that measures it.
    """

    def read(connection: Connection) -> Suggestions:
        benchmarks = speeds.newest(connection, caller.project, "benchmark", LOOKED_AT)
        files = speeds.newest(connection, caller.project, "files", LOOKED_AT)
        used = {str(one.figures["dataset"]).removeprefix(BLOB) for one in files}
        names = {f"{BLOB}{digest}": name for digest, name in registry.datasets.names(connection, caller.project, used)}
        asked = budget.model_copy(update={"dataset": _source(connection, caller.project, budget.dataset, names)})
        return suggested(asked, benchmarks, files, names)

    return Json(await db.scan(read))


def _source(connection: Connection, project: str, dataset: str | None, names: Mapping[str, str]) -> str | None:
    """Return the name of a data set as resolved specs have it. Raises Invalid."""
    if dataset is None or dataset.startswith("blob:"):
        return dataset
    try:
        return f"{BLOB}{registry.datasets.get(connection, project, dataset).sha256}"
    except NotFound:
        if dataset in DATASETS:
            return dataset
    known = sorted({*names.values(), *DATASETS})
    text = f"there is no data set {dataset!r}{nearest(dataset, known)}"
    faults = [Fault("?dataset", text, "not_found", known, dataset)]
    raise Invalid(summary(faults), faults)


def suggested(
    budget: Budget, benchmarks: Sequence[Speed], files: Sequence[Speed], names: Mapping[str, str] | None = None
) -> Suggestions:
    """Return the answer, given what was measured, the newest first. `names`: of data sets, as resolved specs have them,
    those under which they are registered."""
    candidates = list(_candidates(budget, [*benchmarks, *files]))
    accuracies, why = _accuracies(budget, [one for one in files if _has_shape(one, budget)], names or {})
    fitting = [one for one in candidates if _fits(one, budget)]
    known = [one for one in fitting if (one.architecture, one.format) in accuracies]
    if fitting and not known and accuracies:
        why = "no job has measured the accuracy of a network that fits: ranked by parameters, the most first"
    if not fitting:
        count = f"{len(candidates)} file{'s' * (len(candidates) != 1)}"
        why = f"{count} measured at this shape, and none is within the budget"
    by_accuracy = bool(known)

    def rank(one: Candidate) -> tuple[float, int, float]:
        accuracy = accuracies.get((one.architecture, one.format)) if by_accuracy else None
        latency = one.latency(budget.batch) or {"p50_ms": float("inf")}
        return (-accuracy.value if accuracy else 1.0, -int(one.figures["parameters"]), latency["p50_ms"])

    measured = {one.architecture for one in candidates}
    missing = list(_not_measured(budget, measured))
    return {
        "ranked_by": "accuracy" if by_accuracy else "parameters",
        "why": why,
        "data": [_view(one, budget, accuracies) for one in sorted(fitting, key=rank)[:SHOWN]],
        "measured": len(candidates),
        "not_measured": missing[:UNMEASURED],
        "not_measured_count": len(missing),
    }


def _has_shape(one: Speed, budget: Budget) -> bool:
    figures, side = one.figures, budget.image_size
    shape = (figures["num_classes"], figures["channels"], tuple(figures["image_size"]))
    return shape == (budget.classes, budget.channels, (side, side))


def _candidates(budget: Budget, rows: Iterable[Speed]) -> Iterator[Candidate]:
    """Yield the newest figures of each network, format, runtime, device and number of threads that were asked for."""
    seen = set()
    for one in sorted((one for one in rows if _has_shape(one, budget)), key=lambda one: -one.measured_at):
        for row in one.figures["files"]:
            found = Candidate(row, one.figures, one.measured_at)
            if row.get("refused") is not None or not row.get("bytes") or not row.get("latency"):
                continue
            runtime, device, threads = str(row["runtime"]), found.device, row.get("threads")
            if budget.runtime not in (None, runtime.partition(" ")[0]):
                continue
            if budget.device not in (None, device["kind"]) or budget.threads not in (None, threads):
                continue
            if budget.budget_ms is not None and found.latency(budget.batch) is None:
                continue
            key = (found.architecture, found.format, runtime.partition(" ")[0], device["kind"], device["name"], threads)
            if key not in seen:
                seen.add(key)
                yield found


def _fits(one: Candidate, budget: Budget) -> bool:
    latency = one.latency(budget.batch)
    in_time = budget.budget_ms is None or (latency is not None and latency["p50_ms"] <= budget.budget_ms)
    return in_time and (budget.budget_bytes is None or one.row["bytes"] <= budget.budget_bytes)


def _accuracies(
    budget: Budget, files: Sequence[Speed], names: Mapping[str, str]
) -> tuple[dict[tuple[str, str], Accuracy], str]:
    """Return the best accuracy of each network and format on one data set, and the sentence that says how students are
    ranked. Accuracies on different data sets cannot be compared: of several, one must be named."""
    sets = sorted({str(one.figures["dataset"]) for one in files})
    dataset = budget.dataset
    if dataset is None and len(sets) > 1:
        return {}, (
            f"students of this shape were measured on {len(sets)} data sets, whose accuracies cannot be compared: "
            "ranked by parameters, the most first; `dataset` names one of "
            + ", ".join(names.get(one, one) for one in sets)
        )
    dataset = dataset or (sets[0] if sets else None)
    found: dict[tuple[str, str], Accuracy] = {}
    for one in files:
        if one.figures["dataset"] != dataset:
            continue
        figures, job = one.figures, str(one.figures["job"])
        of_files = {str(row["format"]): row for row in figures["files"]}
        for format in get_args(ExportFormat):
            own = of_files.get(format, {}).get("accuracy")
            # Rounding to int8 may cost accuracy, so that only the file itself says what is left.
            value = own if own is not None or format in INT8 else figures["accuracy"]
            key = (str(figures["architecture"]), format)
            if value is not None and (key not in found or value > found[key].value):
                found[key] = Accuracy(float(value), job, "file" if own is not None else "student")
    named = "" if dataset is None else f" on {names.get(dataset, dataset)}"
    if found:
        return found, f"ranked by the best accuracy that jobs of this project have measured{named}"
    return {}, (
        f"no job of this project has measured an accuracy{named} at this shape: ranked by parameters, the most first"
    )


def _view(one: Candidate, budget: Budget, accuracies: Mapping[tuple[str, str], Accuracy]) -> SuggestionView:
    latency, accuracy = one.latency(budget.batch), accuracies.get((one.architecture, one.format))
    return {
        "architecture": one.architecture,
        "format": one.format,
        "runtime": str(one.row["runtime"]),
        "device": one.device,  # type: ignore[typeddict-item]
        "threads": one.row.get("threads"),
        "bytes": one.row["bytes"],
        "p50_ms": None if latency is None else latency["p50_ms"],
        "p95_ms": None if latency is None else latency["p95_ms"],
        "batch": budget.batch,
        "parameters": one.figures["parameters"],
        "macs": one.figures.get("macs"),
        "accuracy": None if accuracy is None else accuracy.value,
        "accuracy_job": None if accuracy is None else accuracy.job,
        "accuracy_of": None if accuracy is None else accuracy.of,
        "measured_by": one.figures["job"],
        "measured_at": iso(one.measured_at) or "",
    }


def _not_measured(budget: Budget, measured: set[str]) -> Iterator[UnmeasuredView]:
    """Yield the listed networks for such images without figures, the smallest first."""
    shape = {"num_classes": budget.classes, "channels": budget.channels, "image_size": budget.image_size}
    batch = {"batch_size": budget.batch} if budget.batch > 1 else {}
    device = {"device": budget.device} if budget.device else {}
    threads = {"threads": budget.threads} if budget.threads else {}
    fitting = [
        (facts.parameters(budget.classes, budget.channels), name)
        for name, facts in ARCHITECTURES.items()
        if name not in measured
        and facts.channels in ("any", budget.channels)
        and facts.min_image <= budget.image_size
        and (facts.max_image is None or budget.image_size <= facts.max_image)
    ]
    for parameters, name in sorted(fitting, key=lambda one: (one[0] is None, one[0] or 0, one[1])):
        body = {"architecture": name, **shape, **batch, **device, **threads}
        yield {"architecture": name, "parameters": parameters, "body": body}
