"""The measurement of a model on images: its logits, accuracy, loss and size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from base.errors import TeacherMismatch
from kdcore import data, models, weights
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.spec import Dataset

if TYPE_CHECKING:
    from kdcore.prepare import Workspace

LARGEST_BATCH = 256
BATCH_PIXELS = 2**20
"""Height x width of all images in a batch: 256 images up to 64 pixels wide, 64 of 128, 20 of 224."""


@dataclass(frozen=True)
class Score:
    """Fractions of 1 over the split; the loss is cross-entropy in nats at temperature 1."""

    accuracy: float
    accuracy_top5: float
    loss: float


def batch_size(height: int, width: int) -> int:
    """Return the number of images in a batch of an evaluation, so that it needs less memory than a training step."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // (height * width)))


@torch.no_grad()
def logits_on(classifier: Classifier, images: Images, on_images: Callable[[int], None] | None = None) -> Tensor:
    """Return the logits of every image in order, on the CPU: n × K, in float32, as for the exported file.

    The classifier keeps its mode and precision. `on_images` is called after each batch with its number of images.
    """
    was_training, was_bf16 = classifier.training, classifier.bf16
    classifier.train(False)
    classifier.bf16 = False
    parts, size = [], batch_size(*images.pixels.shape[2:])
    for at in range(0, len(images), size):
        pixels = images.pixels[at : at + size].to(classifier.mean.device)
        parts.append(classifier(pixels).logits)
        if on_images is not None:
            on_images(len(pixels))
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


def paired_p(one_nK: Tensor, other_nK: Tensor, labels_n: Tensor) -> float:
    """Return the two-sided p-value of McNemar's exact test: that two models are right equally often on these images.

    Only images on which one model is right and the other one wrong count. If the models are equally good, each of
    these m images is a fair coin: p = 2 · P(Binomial(m, 1/2) ≤ the smaller count), at most 1.
    """
    labels_n = labels_n.cpu()
    one, other = (logits_nK.argmax(1) == labels_n for logits_nK in (one_nK, other_nK))
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    count = only_one + only_other
    log_half = count * math.log(0.5)
    tail = sum(
        math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) + log_half)
        for k in range(min(only_one, only_other) + 1)
    )
    return min(1.0, 2 * tail)


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
