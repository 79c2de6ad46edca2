"""The specs of jobs that train nothing: what all have, and those of the kinds `export`, `benchmark` and `prediction`.

A kind has a class of its fields here or in a module of its own (`evaluation.py`), a line in `PARSERS` and one in
`_runner` of `kdcore/__main__.py`, and a route that makes its jobs. Worker, queue and database treat all kinds alike.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from base.errors import Fault, SpecFaults
from base.text import STORED, Text
from kdcore.catalog import DatasetFacts
from kdcore.spec.inputs import Reference
from kdcore.spec.job import JobSpec, Labels, Scheduling
from kdcore.spec.shipping import ExportOptions, Formats
from kdcore.spec.vocabulary import Vocabulary

Which = Literal["best", "last"]
TOP = 5
"""The classes that a prediction names for each model, the most probable first."""


class KindSpec(Vocabulary):
    """What a job has that trains nothing. `kind`, a field of every subclass, tells it from a distillation."""

    kind: str
    name: Annotated[str, Text(200)] | None = Field(default=None, description="A name for people.")
    labels: Labels = Field(default={})
    strict: bool = Field(default=False, description="True: a warning is an error, warning_refused.")
    scheduling: Scheduling = Field(default=Scheduling(), description="The scheduling of the job by the service.")

    @property
    def method_name(self) -> str:
        return self.kind

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def parse(cls, body: dict[str, Any], *, stored: bool = False) -> Self:
        """Return the spec. Raises SpecFaults with every fault. `stored`: an earlier version may have accepted it."""
        try:
            return cls.model_validate(body, context=STORED if stored else None)
        except ValidationError as error:
            faults = (
                Fault("".join(f"/{step}" for step in detail["loc"]), detail["msg"], detail["type"], got=detail["input"])
                for detail in error.errors(include_url=False)
            )
            raise SpecFaults(list(faults)) from error

    def metric_faults(self) -> list[Fault]:
        """Return the faults of alerts on metrics: a job that trains nothing has none."""
        metrics = [number for number, alert in enumerate(self.scheduling.alerts) if alert.metric is not None]
        text = f"a job of the kind {self.kind} trains nothing and has no metrics; its only alert is no_progress_s"
        places = [f"/scheduling/alerts/{number}/metric" for number in metrics]
        return [Fault(place, text, "unused", "no_progress_s") for place in places]


class ExportSpec(KindSpec):
    """A job of the kind `export`: it writes and measures files of the student that a job has trained."""

    kind: Literal["export"] = "export"
    job: Annotated[str, Text(40)] | None = Field(default=None, description="The id of the job, for people.")
    distillation: dict[str, Any] = Field(description="The resolved spec of the job that trained the student.")
    weights: Annotated[str, Text(1000)] = Field(
        description="The student's file, or a checkpoint of the job: blob:sha256:<hex>, or file:<path>."
    )
    weights_format: Literal["checkpoint", "safetensors"] = Field(description="Which of the two `weights` is.")
    checkpoint: Which = Field(
        default="best",
        description="best: the weights of the best epoch on held-out images so far. last: those of the last step.",
    )
    step: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="The step of the checkpoint; null for the file of a job that has succeeded."
    )
    export: Formats = Field(default=("safetensors",), description="The files to write.")
    export_options: ExportOptions = Field(default=ExportOptions(), description="How they are made and measured.")


class BenchmarkSpec(KindSpec):
    """A job of the kind `benchmark`: the size and the speed of a network, on the device of the worker that runs it.

    Weights do not change the speed: without `weights`, those of a listed architecture are drawn.
    """

    kind: Literal["benchmark"] = "benchmark"
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="The digest under which the figures are kept: `benchmark_key`."
    )
    job: Annotated[str, Text(40)] | None = Field(default=None, description="The job whose student it is, for people.")
    model: Annotated[str, Text(300)] | None = Field(default=None, description="The registered model, for people.")
    architecture: Annotated[str, Text(200)] | None = Field(
        default=None, description="Null for a program, which is its own network."
    )
    weights: Annotated[str, Text(1000)] | None = Field(
        default=None, description="A checkpoint or a program: blob:sha256:<hex>, or file:<path>. Null to draw weights."
    )
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] = Field(description="Of the network's outputs.")
    channels: Annotated[int, Field(ge=1, le=64)] = Field(description="Of the images.")
    image_size: tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]] = Field(
        description="Height and width of the images."
    )
    batch_size: Annotated[int, Field(ge=2, le=1024)] = Field(
        default=32, description="The latency is measured with one image, and with so many."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one.")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads. Default: those that are free, at most the slot's share of the cores."
    )
    export: Formats = Field(
        default=("safetensors",),
        description="What is measured: safetensors is the network in PyTorch, on the device; the other formats are "
        "files, which their own runtimes run on the CPU.",
    )


class PredictionSpec(KindSpec):
    """What `python -m kdcore run` accepts beside a `JobSpec` to run a job's models on one image."""

    kind: Literal["prediction"] = Field(default="prediction", description="Tells it from the spec of a distillation.")
    image: Reference = Field(description="The file of a picture: PNG, JPEG, WebP, BMP, GIF, PPM or TIFF.")
    job: JobSpec = Field(description="The job's resolved spec: its teacher, its student, and how its images are read.")
    dataset: DatasetFacts = Field(description="The facts of the job's data set, as its report has them.")
    student: Reference = Field(description="The job's student.safetensors.")
    alone: Reference | None = Field(default=None, description="The same student without a teacher, if the job has one.")
