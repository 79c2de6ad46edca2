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
from api.schemas import Json, iso
from base.text import Text
from base.wire import Suggestions, SuggestionView, UnmeasuredView
from kdcore.catalog import ARCHITECTURES
from kdcore.spec import INT8, ExportFormat
from store import speeds
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
        description="Accuracies on this data set rank the students: as resolved specs name it (digits, or "
        "blob:sha256:<hex>). Default: the one on which students of this shape were measured, if there is only one.",
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

    def read(connection: Connection) -> tuple[list[Speed], list[Speed]]:
        found = (speeds.newest(connection, caller.project, kind, LOOKED_AT) for kind in ("benchmark", "files"))
        benchmarks, files = found
        return benchmarks, files

    return Json(suggested(budget, *await db.scan(read)))


def suggested(budget: Budget, benchmarks: Sequence[Speed], files: Sequence[Speed]) -> Suggestions:
    """Return the answer, given what was measured, the newest first."""
    candidates = list(_candidates(budget, [*benchmarks, *files]))
    accuracies, why = _accuracies(budget, [one for one in files if _has_shape(one, budget)])
    fitting = [one for one in candidates if _fits(one, budget)]
    known = [one for one in fitting if (one.architecture, one.format) in accuracies]
    if fitting and not known and accuracies:
        why = "no job has measured the accuracy of a network that fits: ranked by parameters, the most first"
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


def _accuracies(budget: Budget, files: Sequence[Speed]) -> tuple[dict[tuple[str, str], Accuracy], str]:
    """Return the best accuracy of each network and format on one data set, and the sentence that says how students are
    ranked. Accuracies on different data sets cannot be compared: of several, one must be named."""
    sets = sorted({str(one.figures["dataset"]) for one in files})
    dataset = budget.dataset
    if dataset is None and len(sets) > 1:
        return {}, (
            f"students of this shape were measured on {len(sets)} data sets, whose accuracies cannot be compared: "
            f"ranked by parameters, the most first; `dataset` names one of {', '.join(sets)}"
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
    if found:
        return found, f"ranked by the best accuracy that jobs of this project have measured on {dataset}"
    return {}, "no job of this project has measured an accuracy at this shape: ranked by parameters, the most first"


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
