"""Load the demo's student in plain PyTorch and measure it. It needs torch and safetensors, and nothing of Distillery.

    python use_student.py student.safetensors digits-test.safetensors

The metadata of a student's file has all facts for its use: the network's name, the numbers of classes and channels,
the class names, and the mean and std by which its images are normalized. `ConvNet` is the demo's network, `convnet4`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions, the second with stride 2, then the average over the image and one linear layer."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.layer1 = layer(channels, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 2 * width, 1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.layer3(self.layer2(self.layer1(images)))
        logits: Tensor = self.fc(maps.mean((2, 3)))
        return logits


def layer(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU())


def load(path: str | Path) -> tuple[ConvNet, dict[str, Any]]:
    """Return the network with its weights, ready to predict, and the facts of the file's metadata."""
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["distillery"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    width = int(facts["architecture"].removeprefix("convnet"))
    network = ConvNet(width, facts["channels"], facts["num_classes"])
    network.load_state_dict(weights)
    return network.eval(), facts


@torch.no_grad()
def predict(network: nn.Module, facts: dict[str, Any], pixels: Tensor) -> Tensor:
    """Return the class of each image. `pixels`: N x channels x height x width, values 0 to 255."""
    mean = torch.tensor(facts["mean"]).view(1, -1, 1, 1)
    std = torch.tensor(facts["std"]).view(1, -1, 1, 1)
    logits: Tensor = network((pixels.float() / 255 - mean) / std)
    return logits.argmax(1)


def main(student: str, test_images: str) -> None:
    network, facts = load(student)
    with safe_open(test_images, framework="pt") as file:
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
    correct = int((predict(network, facts, images) == labels).sum())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(json.dumps({"parameters": parameters, "correct": correct, "test_samples": len(labels)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
