"""A small data set and small jobs for the engine's tests: three kinds of blobs that a network can tell apart."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kdcore import models
from kdcore.prepare import Workspace
from kdcore.protocol import Lines
from kdcore.spec import METHODS, JobSpec, parse


def write_arrays(
    path: Path, train: int = 120, test: int = 30, classes: int = 3, side: int = 8, validation: int = 0
) -> Path:
    """Class k is bright in its own corner, under noise."""
    rng = np.random.default_rng(0)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        pixels = rng.integers(0, 160, (count, side, side, 1))
        corners = [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(4, 8)), (slice(0, 4), slice(4, 8))]
        for row, label in enumerate(labels):
            pixels[row][corners[label]] += 60
        return pixels.astype(np.uint8), labels

    x_train, y_train = images(train)
    x_test, y_test = images(test)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    if validation:
        arrays["x_val"], arrays["y_val"] = images(validation)
    np.savez(path, **arrays)
    return path


def write_pool(path: Path, count: int = 60, side: int = 8) -> Path:
    """Unlabelled images."""
    pixels = np.random.default_rng(1).integers(0, 220, (count, side, side, 1))
    np.savez(path, x_train=pixels.astype(np.uint8))
    return path


def write_teacher(path: Path, architecture: str = "convnet8", seed: int = 1, classes: int = 3) -> Path:
    """An untrained network in a file that names its architecture."""
    torch.manual_seed(seed)
    network = models.build(architecture, classes, 1)
    save_file(network.state_dict(), path, {"distillery": json.dumps({"architecture": architecture})})
    return path


def workspace(folder: Path, cache: Path | None = None) -> tuple[Workspace, io.StringIO]:
    """A place in `folder`, and the stream that its lines go to."""
    stream = io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    return Workspace(folder, {}, cache or folder / "cache", Lines(stream)), stream


def events(stream: io.StringIO, event: str) -> list[dict]:
    return [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == event]


def job(data: Path, teacher: Path | list[dict] | None = None, **fields: Any) -> JobSpec:
    """Two epochs of three steps each, but for what `fields` say."""
    recipe = {"epochs": 2, "batch_size": 36, "augmentation": {"name": "crop_flip", "padding": 1}}
    recipe |= {"precision": "fp32"}  # The same bits on machines with and without bf16.
    body = {"dataset": f"file:{data}", "student": "convnet4", "method": "supervised", **fields}
    # A process for each file: tests of these ask for it.
    body["export_options"] = {"measure": False, **fields.get("export_options", {})}
    if teacher is not None:
        body["teacher"] = {"checkpoint": f"file:{teacher}"} if isinstance(teacher, Path) else teacher
    return parse({**body, "training": {**recipe, **fields.get("training", {})}})


def supervised(data: Path, **training: Any) -> JobSpec:
    """Two epochs of six steps each."""
    return job(data, training={"batch_size": 16, **training})


def distilled(data: Path, teacher: Path, baseline: str = "train", method: object = "kd", **training: Any) -> JobSpec:
    return job(data, teacher, method=method, baseline=baseline, training={"batch_size": 16, **training})


# What a job of each method needs beyond its name: small options, and a teacher or peers.
SMALL = {"crd": {"negatives": 8}, "reviewkd": {"mid_channels": 8}, "born_again": {"generations": 2}}


def method_job(name: str, data: Path, teacher: Path, **fields: Any) -> JobSpec:
    """A job of a method of the catalogue, as small as can be."""
    fields = {"method": {"name": name, **SMALL.get(name, {})}, **fields}
    if name == "dml":
        fields = {"student": ["convnet4", "convnet4"], **fields}
    return job(data, teacher if METHODS[name].facts.teacher == "required" else None, **fields)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return True if two states hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(state: Any) -> Any:
    """A state as it is now, whatever becomes of its tensors."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, Mapping):
        return {name: copied(value) for name, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


def as_by_the_version_before(path: Path) -> None:
    """Write a checkpoint as it was before formats had a number."""
    state = torch.load(path, weights_only=True)
    for name in ("format", "batch_norm", "reading", "has_sizes", "computing", "warnings", "used"):
        del state[name]
    for outcomes in state["finished"].values():
        for outcome in outcomes.values():
            del outcome["running"]
    for best in (state["training"] or {}).get("best", {}).values():
        del best["running"]
    torch.save(state, path)


def int8_session(path: Path) -> Any:
    """Open an int8 model with operators that onnxruntime does not fuse: it rounds as the file says, in sums of float32.
    Fused ones add products of 8 bits in 16 bits on x86 CPUs without VNNI, which overflow."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(path, options)
