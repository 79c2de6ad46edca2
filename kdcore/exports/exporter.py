"""What becomes a file (`Deliverable`), what makes one (`Exporter`), and what is said of it (`FileRow`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from kdcore import models
from kdcore.catalog import DatasetFacts
from kdcore.data.images import Images
from kdcore.exports.plain_layers import Ensemble
from kdcore.quantization import Range
from kdcore.spec import ExportFormat, ExportOptions, JobSpec, Student

Quantized = Literal["after_training", "aware"]


@dataclass(frozen=True, eq=False)
class Deliverable:
    """A trained student with all facts that its files carry."""

    architecture: str
    weights: Mapping[str, Tensor]
    """Under the network's own names; of several members with the prefix `<number>.`."""
    members: int
    """Several are an ensemble: the output is the log of the mean of their probabilities."""
    mean: Sequence[float]
    std: Sequence[float]
    """Per channel, of pixels in 0..1."""
    class_names: Sequence[str]
    image_size: tuple[int, int]
    """Height and width."""
    channels: int
    metrics: Mapping[str, Any]
    spec: JobSpec
    """Resolved: its `dataset` says how pictures become images of this size."""
    activation_ranges: Sequence[Range] | None = None
    """Of quantisation-aware training (`kdcore/quantization.py`, where `of_tensors` finds the tensors of an ONNX model).
    None if the student was trained without."""
    made: dict[str, Any] = field(default_factory=dict, repr=False)
    """What one file is made of and another one, too, so that it is made once."""

    @classmethod
    def of(
        cls,
        spec: JobSpec,
        facts: DatasetFacts,
        weights: Mapping[str, Tensor],
        metrics: Mapping[str, Any],
        members: int = 1,
        student: Student | None = None,
        activation_ranges: Sequence[Range] | None = None,
    ) -> Deliverable:
        """Return the deliverable of a job's weights, given its resolved spec and its data's facts. `student`: which of
        several students it is; None for the first."""
        student = student or spec.students[0]
        assert student.preprocessing is not None, "resolve() gives every student its normalisation"
        return cls(
            architecture=student.architecture,
            weights=weights,
            members=members,
            mean=student.preprocessing.mean,
            std=student.preprocessing.std,
            class_names=facts.class_names,
            image_size=facts.image_size,
            channels=facts.channels,
            metrics=metrics,
            spec=spec,
            activation_ranges=activation_ranges,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Return the facts that stand in each file's metadata, as JSON."""
        return {
            "architecture": self.architecture,
            "members": self.members,
            "num_classes": len(self.class_names),
            "channels": self.channels,
            "image_size": self.image_size,
            "class_names": self.class_names,
            "mean": self.mean,
            "std": self.std,
            "metrics": dict(self.metrics),
            "spec": self.spec.as_json(),
            # With them, int8 can be made of the file later, as it was trained for.
            **({"activation_ranges": list(self.activation_ranges)} if self.activation_ranges else {}),
        }

    def facts_of(self, options: ExportOptions) -> dict[str, Any]:
        """Return the facts in a file that has operations: whether it normalises its input is one more."""
        return self.facts | {"normalization": options.normalization}

    @cached_property
    def network(self) -> nn.Module:
        """The network on the CPU, in eval mode: normalised images N × C × H × W to logits N × K."""
        with torch.random.fork_rng(devices=[]):
            one = [models.build(self.architecture, len(self.class_names), self.channels) for _ in range(self.members)]
        network = one[0] if self.members == 1 else Ensemble(one)
        network.load_state_dict({name: value.detach().cpu() for name, value in self.weights.items()})
        return network.requires_grad_(False).eval()

    def network_of(self, options: ExportOptions) -> nn.Module:
        """Return the network that a file has: with `normalization` "inside", of pixels in 0..1."""
        if options.normalization == "outside":
            return self.network
        return Normalized(self.mean, self.std, self.network).requires_grad_(False).eval()


class Normalized(nn.Module):
    """A network behind its normalisation: pixels in 0..1 to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.network = network

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.network((pixels_NCHW - self.mean) / self.std)
        return logits


class Exporter(Protocol):
    """What makes the file of one format. To add a format: a module with such an object, its name and its packages in
    `kdcore/spec/shipping.py`, a line in EXPORTERS, and its runtime in `child.py`."""

    @property
    def format(self) -> ExportFormat: ...

    @property
    def file(self) -> str:
        """The artifact's name."""
        ...

    @property
    def media_type(self) -> str: ...

    @property
    def runtime(self) -> str:
        """What runs the file, as `child.py` calls it."""
        ...

    def write(self, student: Deliverable, path: Path, options: ExportOptions, images: Images) -> None:
        """Write the file: the same bytes for the same student. `images`: the job's training images; beside `path` there
        may be files of its own while it runs. Raises CannotExport."""
        ...


class CannotExport(Exception):
    """A student's network has no form in a format."""


@dataclass(frozen=True)
class FileRow:
    """One file in figures: a row of the report's `files`."""

    name: str
    format: ExportFormat
    runtime: str
    """Library and version that ran the file."""
    bytes: int | None = None
    sha256: str | None = None
    accuracy: float | None = None
    accuracy_without_overflow: float | None = None
    """Of an int8 file on a CPU where sums can overflow: its accuracy on CPUs where they cannot."""
    agreement: float | None = None
    """The fraction of images for which file and float student name the same class."""
    images: int = 0
    """Test images on which both were measured."""
    latency: Sequence[Mapping[str, float]] = ()
    """For each batch size: `batch`, `p50_ms`, `p95_ms`, `cpu_share`."""
    batches_left_out: Sequence[int] = ()
    """Batch sizes that need more memory than a measurement may take. Test images were run in smaller ones, too."""
    threads: int | None = None
    cpu: str | None = None
    peak_memory_bytes: int | None = None
    """Resident, of a process that loads the file and runs these batches, with Python and the runtime."""
    quantization: Quantized | None = None
    refused: Mapping[str, str] | None = None
    """`code`, `message` and `hint` if the file is not delivered."""

    @property
    def judged_accuracy(self) -> float | None:
        """The accuracy by which the file is delivered or refused: what rounding leaves, not this CPU's overflow."""
        return self.accuracy if self.accuracy_without_overflow is None else self.accuracy_without_overflow

    def but_refused(self, code: str, message: str, hint: str) -> FileRow:
        """Return the row of a file that is not delivered."""
        return replace(self, refused={"code": code, "message": message, "hint": hint})

    def as_dict(self) -> dict[str, Any]:
        latency, left_out = [dict(one) for one in self.latency], list(self.batches_left_out)
        return asdict(self) | {"latency": latency, "batches_left_out": left_out}
