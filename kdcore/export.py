"""The deliverable: the student's network alone, as safetensors that plain PyTorch loads, and all that its use needs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kdcore.catalog import DatasetFacts
from kdcore.files import Written, write_whole
from kdcore.spec import JobSpec


def student(
    path: Path,
    weights: Mapping[str, Tensor],
    spec: JobSpec,
    dataset: DatasetFacts,
    metrics: Mapping[str, Any],
) -> Written:
    """Write weights under the network's own names; the metadata's `distillery` is JSON that says how to use them."""
    preprocessing = spec.student.preprocessing
    assert preprocessing is not None, "resolve() gives every student its normalisation"
    metadata = {
        "architecture": spec.student.architecture,
        "num_classes": dataset.num_classes,
        "channels": dataset.channels,
        "image_size": dataset.image_size,
        "class_names": dataset.class_names,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "metrics": dict(metrics),
        "spec": spec.as_json(),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return write_whole(path, lambda to: save_file(tensors, to, {"distillery": json.dumps(metadata), "format": "pt"}))
