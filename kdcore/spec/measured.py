"""What is kept of a job's result: keys for later jobs, a digest of everything that decides the result; the figures of
its files, and those that its sentence states."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from base.references import FILE
from base.text import STORED
from kdcore.spec.inputs import Dataset

TEACHER_CHECK_VERSION = 3
"""Increase it when `kdcore/measure/teacher_check.py` would answer otherwise than before."""
BENCHMARK_VERSION = 1
"""Increase it when `kdcore/measure/benchmark.py` would measure otherwise than before."""
_DECIDING = (
    "checkpoint", "program", "architecture", "part", "averaged", "preprocessing", "class_names", "class_map",
    "image_size", "weight",
)  # fmt: skip


def teacher_check_key(resolved: Mapping[str, Any]) -> str | None:
    """Return the key of the check of a job's teacher (sha256, hex), from its resolved spec as JSON.

    None if the job has no teacher, or one of stored logits, or if a file is named by its path: its bytes may change.
    """
    given = resolved.get("teacher")
    if not given:
        return None
    each = given if isinstance(given, list) else [given]
    if any(one.get("logits") for one in each):
        return None  # Nothing is computed for it that could be saved.
    # Fields that are not set are left out, so that a spec which an earlier version resolved has the same key.
    teachers = [{name: one[name] for name in _DECIDING if one.get(name) is not None} for one in each]
    dataset = resolved["dataset"]
    references = [dataset["source"], *(one.get("program") or one.get("checkpoint") or "" for one in each)]
    if any(reference.startswith(FILE) for reference in references):
        return None
    decides = {
        "version": TEACHER_CHECK_VERSION,
        "dataset": {
            "source": dataset["source"],
            "image_size": None,
            **Dataset.model_validate(dataset, context=STORED).deciding(),
        },
        "teachers": teachers,
        # Several teachers answer as one at the job's temperature.
        "temperature": resolved.get("temperature") if len(each) > 1 else None,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def benchmark_key(asked: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Return the key of a benchmark (sha256, hex): of the network, the shape of its images, the sizes of batches, the
    device and the threads that were asked for, and the versions of what runs it."""
    network = {"weights": asked["weights"]} if asked.get("weights") else {"architecture": asked["architecture"]}
    shape = ("num_classes", "channels", "image_size", "batch_size", "device", "threads")
    decides = {
        "version": BENCHMARK_VERSION,
        **network,
        **{name: asked[name] for name in shape},
        "export": sorted(asked["export"]),
        "versions": dict(versions),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ruling(proof: Mapping[str, Any]) -> tuple[dict[str, float] | None, dict[str, float] | None, str]:
    """Return the gap closed and the gain that a report's sentence is about (`kdcore/measure/verdict.py`), given its
    `proof`, and what their intervals are for: of several seeds their means, unless the images leave it open."""
    gap, gain, over = proof.get("gap_closed"), proof.get("gain"), proof.get("over_seeds")
    if not over or not gain or not over["gain"]:
        return gap, gain, ""
    if over["gain_on_other_images"]:
        return over["gap_closed_on_other_images"], over["gain_on_other_images"], "for other seeds and images"
    if gain["low"] <= 0 <= gain["high"]:
        return gap, gain, "for other images, with the delivered seed"
    return over["gap_closed"], over["gain"], "for other seeds"


def files_row(job_id: str, resolved: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a job has measured of the files of its student, with the network and the shape of its images. None if
    it has measured none."""
    files = [one for one in report.get("files") or () if one.get("latency")]
    if not files or resolved.get("kind") == "benchmark":
        return None
    student, dataset = report.get("student") or report["measured"], report["dataset"]
    trained = resolved.get("distillation") or resolved
    return {
        "job": job_id,
        **{name: student.get(name) for name in ("architecture", "parameters", "accuracy")},
        **{name: dataset[name] for name in ("num_classes", "channels", "image_size")},
        "dataset": trained["dataset"]["source"],
        "device": {"kind": "cpu", "name": files[0].get("cpu")},
        "files": files,
    }
