"""What decides the outputs of a job's teacher, as JSON: the key under which they are kept (`teacher.py`)."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from base.files import sha256_of
from base.references import FILE
from kdcore.catalog.facts import DATASET_READING
from kdcore.kernels import building
from kdcore.prepare import PreparedJob, Workspace
from kdcore.programs import Program
from kdcore.spec import each_teacher

FORMAT = 1
"""Increase it when equal keys would mean other numbers than before."""


def decides(job: PreparedJob, workspace: Workspace) -> dict[str, Any]:
    """Return all that determines what the teacher answers for a row and a number of its view, as JSON. The layout of
    its views, the size of a piece and what a stage chooses come to it later."""
    spec, computing, facts = job.spec, job.computing, job.data.facts
    teachers = []
    for pointer, teacher in each_teacher({"teacher": spec.teacher}):
        stated = teacher.model_dump(mode="json", exclude={"checkpoint", "program"})
        teachers.append({**stated, "digest": job.known.teachers[pointer].digest})
    members = job.teacher.members if job.teacher is not None else ()
    pool = None
    if spec.unlabelled is not None:
        source = spec.unlabelled.source
        is_path = source.startswith(FILE)
        options = spec.dataset.for_unlabelled().deciding()
        pool = [f"sha256:{sha256_of(workspace.file(source))}" if is_path else source, options]
    augmentation = spec.training.augmentation
    return {
        "format": FORMAT,
        "teachers": teachers,
        # Several teachers answer as one at the job's temperature.
        "temperature": spec.temperature if len(teachers) > 1 else None,
        "dataset": [
            *(facts.digest or spec.dataset.source, DATASET_READING),
            *(spec.dataset.deciding(), facts.model_dump(mode="json")),
        ],
        "unlabelled": pool,
        "augmentation": None if augmentation is None else augmentation.model_dump(mode="json"),
        # Without what is not used, so that entries of earlier versions are found.
        "computing": {"bf16": computing.bf16, "folded": computing.folded}
        | ({"convolutions": building.entry_of(building.kind())} if computing.convolutions else {}),
        # A program has threads of its own from its opening on: the trial on one thread does not reach them.
        "threads": computing.threads if any(isinstance(one.network, Program) for one in members) else None,
        "versions": [torch.__version__, *map(_version, ("torchvision", "timm", "onnxruntime", "pillow"))],
        "cpu": cpu_kind(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_kind() -> list[str]:
    """Return what tells this CPU from others, as far as it changes the bits of a result."""
    limits = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ]
    try:
        described = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:  # Absent on macOS.
        described = []
    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags", "Features")
    lines = [line for line in described if line.partition("\t")[0].strip() in kept]
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), *limits, *lines]
