"""Batch-norm statistics, measured anew for fixed weights ("precise batch norm").

Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576, section 3.

In training a layer keeps a running average of its batches' statistics, while the weights change. Where its momentum is
small (0.01 in torchvision's MobileNetV3) or the training short, the average still holds the statistics of old weights,
and a good network gives bad answers in eval mode. Here the statistics are those of one set of weights:

    mean     = 1/B Σ_b mean_b          over B batches of equal size, each layer normalising by its own batch,
    variance = 1/B Σ_b variance_b      as in training; the variance of a batch is the unbiased one

This is algorithm 2 of Ioffe & Szegedy (2015, arXiv:1502.03167) and `torch.optim.swa_utils.update_bn`, so that anybody
can repeat it with PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.classifier import Classifier
from kdcore.data.images import TrainingSet
from kdcore.data.views import Views, order
from kdcore.spec import Training

IMAGES = 2048
"""The images that are measured, or all if there are fewer. The paper finds 10^3 to 10^4 enough. With 50,000 training
images this is 1.5 % of the forward and backward passes of an epoch."""
STATISTICS = ("running_mean", "running_var")
TENSORS = (*STATISTICS, "num_batches_tracked")


def batches_in(training_images: int, batch_size: int) -> int:
    """Return the number of batches to measure on: whole ones, at least one."""
    return max(1, min(training_images, IMAGES) // batch_size)


def of_recipe(training_set: TrainingSet, recipe: Training) -> Iterator[Tensor]:
    """Yield the images of a recipe's `batch_norm`: as they are, or ("views") as augmented for its first epoch.

    Images are not mixed: the images that are evaluated are not, either.
    """
    assert recipe.augmentation is not None, "resolve() names the augmentation"
    views = Views(recipe.augmentation, None, num_classes=0) if recipe.batch_norm == "views" else None
    return batches(training_set, recipe.batch_size, views, recipe.seed)


def batches(training_set: TrainingSet, batch_size: int, views: Views | None = None, seed: int = 0) -> Iterator[Tensor]:
    """Yield training images, or views of them, the same in every call: uint8 N × C × H × W.

    They are spread over the set by a hash, because data sets are often sorted by class. The batches have the size of
    those in training: so large are the batches by which the layers before have normalised.
    """
    rows, count = training_set.rows, batches_in(len(training_set.rows), batch_size)
    chosen = rows[order(len(rows), 0, 0)[: count * batch_size].to(rows.device)]
    for index in torch.split(chosen, batch_size):
        if views is None:
            yield training_set.images.pixels.index_select(0, index)
        else:
            yield views.batch(training_set.images, index, seed, epoch=0).inputs


@torch.no_grad()
def measured(
    classifier: Classifier, batches: Iterable[Tensor], on_images: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """Return the statistics of the network's batch norms on these images, by their names in its state.

    Measured are the layers that learn: those in train mode when the network is. A frozen layer keeps its averages, and
    so does one that the network does not call. Everything else is in eval mode (no dropout) and the precision is
    float32, as in an evaluation. Afterwards the classifier is as it was, to the last bit. `on_images` is called after
    each batch with its number of images.
    """
    modes = {module: module.training for module in classifier.modules()}
    classifier.train()
    layers = {
        path: layer
        for path, layer in classifier.network.named_modules(remove_duplicate=False)  # as in its state
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    }
    was_bf16, classifier.bf16 = classifier.bf16, False
    try:
        classifier.eval()
        if not layers:
            return {}
        with _counting_anew(set(layers.values())):
            for pixels in batches:
                classifier(pixels.to(classifier.mean.device))
                if on_images is not None:
                    on_images(len(pixels))
            return {
                f"{path}.{name}": getattr(layer, name)
                for path, layer in layers.items()
                if layer.num_batches_tracked
                for name in STATISTICS
            }
    finally:
        classifier.bf16 = was_bf16
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _counting_anew(layers: set[_BatchNorm]) -> Iterator[None]:
    """Let layers average anew, in tensors of their own; afterwards they have their former ones."""
    former = [(layer, layer.momentum, {name: getattr(layer, name) for name in TENSORS}) for layer in layers]
    try:
        for layer, _, tensors in former:
            for name, tensor in tensors.items():
                setattr(layer, name, torch.zeros_like(tensor))
            layer.momentum = None  # PyTorch's way to say that every batch has the same weight in the average.
            layer.training = True
        yield
    finally:
        for layer, momentum, tensors in former:
            layer.momentum = momentum
            for name, tensor in tensors.items():
                setattr(layer, name, tensor)
