"""A job of the kind `benchmark`: parameters, size, multiplications and latency of one network on this machine.

In PyTorch the network runs in this process, in float32 and eval mode, as plain PyTorch runs it: no kernels of ours.
Files of other formats are written and run as those of a job's student are (`kdcore/exports`).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from base.errors import TeacherMismatch
from base.files import write_text
from kdcore import device as devices
from kdcore import kernels, models, programs, weights
from kdcore.catalog import DatasetFacts
from kdcore.data.images import Data, Images
from kdcore.exports import EXPORTERS, Deliverable, child, make, student_source
from kdcore.exports.measuring import cpu_name
from kdcore.measure import evaluate
from kdcore.measure.cost import device_name
from kdcore.prepare import Workspace
from kdcore.programs import Program
from kdcore.protocol import EXIT_STOPPED
from kdcore.spec import BenchmarkSpec, ExportOptions, Preprocessing, Student, Training, parse

log = logging.getLogger("kdcore")

IMAGES = 64
"""Random images with which files of other formats are calibrated and tried."""
PLAIN = "safetensors"


def run_benchmark(spec: BenchmarkSpec, workspace: Workspace) -> dict[str, Any]:
    """Run a job of the kind `benchmark`. Returns its report, which is also in `report.json`.

    Raises TeacherMismatch if the weights are of another network, or take other images.
    """
    started = time.monotonic()
    workspace.lines.phase("preparing")
    where = devices.choose(Training(device=spec.device))
    threads, _ = devices.choose_threads(spec.threads)
    torch.set_num_threads(threads)
    devices.make_exact(0)
    network = _network(spec, workspace).requires_grad_(False).eval()
    workspace.lines.phase("evaluating")
    report: dict[str, Any] = {
        "architecture": spec.architecture or "program",
        "parameters": evaluate.parameters(network),
        "bytes": evaluate.size_bytes(network),
        "macs": multiplications(network, spec.channels, spec.image_size),
        "num_classes": spec.num_classes,
        "channels": spec.channels,
        "image_size": list(spec.image_size),
        "batch_size": spec.batch_size,
        "device": {"kind": where.type, "name": name_of(where)},
        "threads": threads,
    }
    files = []
    for number, name in enumerate(spec.export):
        if workspace.stop_requested:
            sys.exit(EXIT_STOPPED)
        workspace.lines.progress(
            step=number,
            total_steps=len(spec.export),
            percent=round(100 * number / len(spec.export), 2),
            seconds_remaining=None,
        )
        if name == PLAIN:
            files.append(_in_this_process(spec, network, where, threads, report["bytes"], workspace))
        else:
            files.append(_as_file(spec, name, network, workspace))
    report["files"] = files
    report["warnings"] = [warning.as_dict() for warning in workspace.warnings]
    report["seconds"] = round(time.monotonic() - started, 3)
    written = write_text(workspace.out / "report.json", json.dumps(report, indent=2) + "\n")
    workspace.announce("artifact", written, name="report.json", media_type="application/json")
    return report


def _network(spec: BenchmarkSpec, workspace: Workspace) -> nn.Module:
    """Return the network on the CPU. A program is a module, too."""
    if spec.weights is None:
        assert spec.architecture is not None, "a benchmark names its network or its weights"
        return models.build(spec.architecture, spec.num_classes, spec.channels)
    path = workspace.file(spec.weights)
    if programs.is_program(path):
        return programs.open_program(path, _facts(spec))
    file = weights.open_teacher(path, spec.architecture, spec.channels)
    if file.facts.num_classes != spec.num_classes:
        raise TeacherMismatch(f"the file has {file.facts.num_classes} outputs, and {spec.num_classes} are asked for")
    network = models.build(file.facts.architecture, spec.num_classes, spec.channels)
    weights.load_into(network, file.state, "the file")
    return network


def multiplications(network: nn.Module, channels: int, image_size: tuple[int, int]) -> int | None:
    """Return the multiply-accumulates of convolutions, linear layers and attention for one image: half of what PyTorch
    counts as floating-point operations. None for a program that PyTorch does not run itself."""
    if isinstance(network, Program) and not network.holds_tensors:
        return None
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), kernels.paused(), counter:
        network(torch.zeros(1, channels, *image_size))
    return counter.get_total_flops() // 2


@torch.no_grad()
def _in_this_process(
    spec: BenchmarkSpec, network: nn.Module, where: torch.device, threads: int, size: int, workspace: Workspace
) -> dict[str, Any]:
    """Return the row of the network as PyTorch runs it on the device."""
    network = network.to(where)

    def after_run(runs: int) -> None:
        if workspace.stop_requested:
            sys.exit(EXIT_STOPPED)
        workspace.lines.working(runs, child.MOST_RUNS)

    with kernels.paused():
        latency = [
            latency_of(network, _random(spec, batch).to(where), where, after_run) for batch in (1, spec.batch_size)
        ]
    network.cpu()
    return {
        "name": None,
        "format": PLAIN,
        "runtime": f"torch {torch.__version__}",
        "bytes": size,
        "latency": latency,
        "threads": threads if where.type == "cpu" else None,
        "cpu": name_of(where) if where.type == "cpu" else None,
        "device": {"kind": where.type, "name": name_of(where)},
        "peak_memory_bytes": None,
        "quantization": None,
        "refused": None,
    }


def latency_of(
    run: Callable[[Tensor], object],
    images: Tensor,
    where: torch.device,
    after_run: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Return the percentiles of the time of one run in ms, of images that are on the device already: as `child.py`
    takes them of a file."""

    def to_end() -> None:
        run(images)
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    return child.percentiles(to_end, len(images), after_run)


def _random(spec: BenchmarkSpec, batch: int) -> Tensor:
    return torch.randn(batch, spec.channels, *spec.image_size)


def _as_file(spec: BenchmarkSpec, name: Any, network: nn.Module, workspace: Workspace) -> dict[str, Any]:
    """Return the row of a file of another format, as that of a student. It is no artifact."""
    if isinstance(network, Program):
        text = "a program is a file already: it is measured as PyTorch or its own runtime runs it, with safetensors"
        refused = {"code": "export_unavailable", "message": text}
        return {"name": None, "format": name, "latency": [], "refused": refused}
    student = _deliverable(spec, network)
    source = workspace.out / student_source.NAME
    source.write_text(student_source.student_source(student))
    # The images are noise: nothing is right or wrong on them, and int8 may answer otherwise.
    options = ExportOptions(batch_size=spec.batch_size, tolerance=1.0)
    row = make(EXPORTERS[name], student, options, _noise(spec), workspace).as_dict()
    for path in (source, workspace.out / row["name"]):
        path.unlink(missing_ok=True)
    row |= {"accuracy": None, "agreement": None, "images": 0, "sha256": None}
    return {**row, "device": {"kind": "cpu", "name": row["cpu"]}}


def _deliverable(spec: BenchmarkSpec, network: nn.Module) -> Deliverable:
    """Return the network as a student without a job, whose data has this shape."""
    normal = Preprocessing(mean=(0.5,) * spec.channels, std=(0.25,) * spec.channels)
    assert spec.architecture is not None, "only a program has no architecture"
    job = parse({"dataset": "digits", "student": spec.architecture, "method": "supervised"}, stored=True)
    student = Student(architecture=spec.architecture, preprocessing=normal)
    job = job.model_copy(update={"student": student})
    state: Mapping[str, Tensor] = network.state_dict()
    return Deliverable.of(job, _facts(spec), state, {})


def _facts(spec: BenchmarkSpec) -> DatasetFacts:
    return DatasetFacts(
        kind="arrays",
        num_classes=spec.num_classes,
        class_names=[str(number) for number in range(spec.num_classes)],
        channels=spec.channels,
        image_size=spec.image_size,
        train=IMAGES,
        test=IMAGES,
        mean=[0.5] * spec.channels,
        std=[0.25] * spec.channels,
    )


def _noise(spec: BenchmarkSpec) -> Data:
    """Return random images, the same in every run."""
    drawn = torch.Generator().manual_seed(0)
    shape = (IMAGES, spec.channels, *spec.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn)
    images = Images(pixels, torch.zeros(IMAGES, dtype=torch.int64))
    facts = _facts(spec)
    return Data(images, images, tuple(facts.class_names), facts)


def name_of(where: torch.device) -> str:
    """Return the model of a GPU, or of this machine's CPU."""
    return device_name(where) if where.type == "cuda" else cpu_name()
