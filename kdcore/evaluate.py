"""How good a classifier is: its logits on a split, and what follows from them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdcore.classifier import Classifier
from kdcore.data import Images

BATCH = 256


@dataclass(frozen=True)
class Score:
    """Fractions of 1 over the split; the loss is cross-entropy in nats at temperature 1."""

    accuracy: float
    accuracy_top5: float
    loss: float


@torch.no_grad()
def logits_on(classifier: Classifier, images: Images) -> Tensor:
    """Logits of every image in order, on the CPU: n × K, in float32 as the exported file will be used.

    The classifier is left as it was found.
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
    """The fraction of images on which both name the same class first."""
    return (logits_nK.argmax(1) == teacher_nK.argmax(1)).double().mean().item()
