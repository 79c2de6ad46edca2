"""Programs made on the spot, and changed by hand."""

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def exported(network: nn.Module, path: Path, *images: torch.Tensor, shapes: Any = ..., plainer: bool = False) -> Path:
    """The network as torch.export saves it, for any batch unless other shapes are given; plainer: decomposed to the
    core operators."""
    if shapes is ...:
        shapes = ({0: Dim("batch")},)  # not before it is needed: it imports sympy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's of itself.
        program = torch.export.export(network, images, dynamic_shapes=shapes)
        torch.export.save(program.run_decompositions() if plainer else program, path)
    return path


def rewritten(program: Path, to: Path, changes: Mapping[str, bytes | Callable[[Any], object] | None]) -> Path:
    """The same archive, but for some members: other bytes, none at all, or JSON that a function has changed in place.

    A member that was not there is added.
    """
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(to, "w") as new:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            if callable(change):
                content = json.loads(members[name])
                change(content)
                members[name] = json.dumps(content).encode()
            elif change is None:
                del members[name]
            else:
                members[name] = change
        for name, blob in members.items():
            new.writestr(f"teacher/{name}", blob)
    return to


def nodes(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model["graph_module"]["graph"]["nodes"]
    return found
