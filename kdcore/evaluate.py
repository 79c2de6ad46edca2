"""The measurement of a model on images: its logits, accuracy, loss and size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from base.errors import TeacherMismatch
from kdcore import data, models, weights
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.spec import Dataset

if TYPE_CHECKING:
    from kdcore.prepare import Workspace

BATCH = 256


@dataclass(frozen=True)
class Score:
    """Fractions of 1 over the split; the loss is cross-entropy in nats at temperature 1."""

    accuracy: float
    accuracy_top5: float
    loss: float


@torch.no_grad()
def logits_on(classifier: Classifier, images: Images) -> Tensor:
    """Return the logits of every image in order, on the CPU: n × K, in float32, as for the exported file.

    The classifier keeps its mode and precision.
    """
    was_training, was_bf16 = classifier.training, classifier.bf16
    classifier.train(False)
    classifier.bf16 = False
    parts = [
        classifier(images.pixels[at : at + BATCH].to(classifier.mean.device)).logits
        for at in range(0, len(images), BATCH)
    ]
    classifier.train(was_training)
    classifier.bf16 = was_bf16
    return torch.cat(parts).cpu()


def score(logits_nK: Tensor, labels_n: Tensor) -> Score:
    labels_n = labels_n.cpu()
    top = logits_nK.topk(min(5, logits_nK.shape[1]), dim=1).indices
    right = top == labels_n.unsqueeze(1)
    return Score(
        accuracy=right[:, 0].double().mean().item(),
        accuracy_top5=right.any(1).double().mean().item(),
        loss=cross_entropy(logits_nK.double(), labels_n).item(),
    )


def agreement(logits_nK: Tensor, teacher_nK: Tensor) -> float:
    """Return the fraction of images whose most likely class is the same for both."""
    return (logits_nK.argmax(1) == teacher_nK.argmax(1)).double().mean().item()


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def size_bytes(network: nn.Module) -> int:
    """Return the bytes of all tensors in a checkpoint of the network, buffers included; shared tensors count once."""
    tensors = {(value.data_ptr(), value.shape): value for value in network.state_dict().values()}
    return sum(value.numel() * value.element_size() for value in tensors.values())


def evaluate_checkpoint(path: Path, architecture: str | None, dataset: str, workspace: Workspace) -> dict[str, Any]:
    """Return accuracy (fractions of 1), loss in nats and parameter count of the checkpoint at `path`, on test images.

    Images are normalised by the checkpoint's mean and std, if it has them, or else by the data's own.
    """
    loaded = data.load(Dataset(source=dataset), workspace.source(dataset), workspace.cache)
    file = weights.open_teacher(path, architecture, loaded.facts.channels)
    if file.facts.num_classes != loaded.facts.num_classes:
        given, needed = file.facts.num_classes, loaded.facts.num_classes
        raise TeacherMismatch(f"the checkpoint has {given} classes, the data set has {needed}")
    network = models.build(file.facts.architecture, file.facts.num_classes, file.facts.channels)
    weights.load_into(network, file.state, str(path))
    mean, std = file.facts.mean or loaded.facts.mean, file.facts.std or loaded.facts.std
    measured = score(logits_on(Classifier(network, mean, std), loaded.test), loaded.test.labels)
    return {
        "architecture": file.facts.architecture,
        "parameters": parameters(network),
        "accuracy": measured.accuracy,
        "accuracy_top5": measured.accuracy_top5,
        "loss": measured.loss,
        "test_samples": len(loaded.test),
    }


def write_test_images(path: Path, dataset: str, workspace: Workspace) -> dict[str, Any]:
    """Write a data set's test images to a safetensors file, as a network gets them before its normalization.

    `images`: N x channels x height x width, uint8; `labels`: N, int64. Returns the number of images.
    """
    loaded = data.load(Dataset(source=dataset), workspace.source(dataset), workspace.cache)
    save_file({"images": loaded.test.pixels[:].contiguous(), "labels": loaded.test.labels.contiguous()}, path)
    return {"test_samples": len(loaded.test)}
