"""A student that has learned something, and the data that it learned from."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from base.files import Written, write_whole
from kdcore import models
from kdcore.data.images import Data, Images
from kdcore.exports import Deliverable
from kdcore.exports.exporter import Exporter
from kdcore.spec import ExportOptions, parse

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra distillery[onnx] is absent",
)
SIDE = 16
OPTIONS = ExportOptions()


def student(architecture: str, channels: int = 1, classes: int = 3, members: int = 1, **fields: Any) -> Deliverable:
    """An untrained network whose batch norms have the statistics of noise, so that its logits differ."""
    torch.manual_seed(0)
    spec = parse({"dataset": "digits", "student": "convnet4", "method": "supervised"})
    states = [settled(models.build(architecture, classes, channels), channels) for _ in range(members)]
    weights = {
        f"{number}.{name}" if members > 1 else name: value
        for number, state in enumerate(states)
        for name, value in state.items()
    }
    return Deliverable(
        architecture=architecture,
        weights=weights,
        members=members,
        mean=[0.4] * channels,
        std=[0.3] * channels,
        class_names=[f"class {number}" for number in range(classes)],
        image_size=fields.pop("image_size", (SIDE, SIDE)),
        channels=channels,
        metrics={"accuracy": 0.5},
        spec=fields.pop("spec", spec),
        **fields,
    )


def settled(network: torch.nn.Module, channels: int) -> Mapping[str, Tensor]:
    """The state of a network after a pass in train mode, without dropout."""
    for module in network.modules():
        module.train(isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    with torch.no_grad():
        network(torch.rand(8, channels, SIDE, SIDE))
    return {name: value.clone() for name, value in network.state_dict().items()}


def images(count: int = 24, channels: int = 1, side: int = SIDE) -> Tensor:
    """uint8 N × C × H × W: blotches of four places."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, channels, 2, 2, generator=generator)
    noise = torch.rand(count, channels, side, side, generator=generator)
    return (200 * torch.nn.functional.interpolate(small, (side, side)) + 55 * noise).to(torch.uint8)


def answered(one: Deliverable, pixels: Tensor) -> Tensor:
    """What the student answers in PyTorch: logits N × K."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (one.mean, one.std))
    with torch.no_grad():
        return one.network((pixels.float() / 255 - mean) / std)


def data(one: Deliverable, pixels: Tensor) -> Data:
    """Data of which the student is right on every image."""
    split = Images(pixels, answered(one, pixels).argmax(1))
    facts: Any = None  # No exporter reads them.
    return Data(split, split, tuple(one.class_names), facts)


def write(exporter: Exporter, one: Deliverable, path: Any, options: ExportOptions = OPTIONS) -> Written:
    pixels = Images(images(channels=one.channels), torch.zeros(24, dtype=torch.long))
    return write_whole(path, lambda to: exporter.write(one, to, options, pixels))
