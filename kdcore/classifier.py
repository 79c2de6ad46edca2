"""Classifiers (a network with its normalisation) and teachers, which are classifiers that never change.

Shapes: N batch, K classes, k members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from kdcore import kernels
from kdcore.lesson import NOTHING, Batch, Needs, Teacher, View
from kdcore.models.layers import fold, folded_precision
from kdcore.models.taps import Taps
from kdcore.quantization import FakeQuantization, Range, keep_in_eval


class Classifier(nn.Module):
    """Normalises pixels in 0..255 by `mean` and `std` (per channel, of pixels in 0..1) and runs the network.

    The network computes in bfloat16 if `bf16` is set, a folded one in its own precision. Its outputs are at least
    float32, so that losses need no casts.
    `order` says, for each class of the data, which of the network's outputs is its logit; None if they agree.
    `outputs` says, for each class, which outputs answer it: their probabilities are added, by the logsumexp of their
    logits, and outputs that no class has are left out.
    `image_size` is the side of its images; None for the data's own size.
    `rounding`, if it is set, rounds what the network computes as int8 would; see `begin_rounding`.
    """

    network: nn.Module
    mean: Tensor
    std: Tensor
    order: Tensor | None
    merged: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        taps: Sequence[str] = (),
        bf16: bool = False,
        order: Sequence[int] | None = None,
        image_size: int | None = None,
        outputs: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent in torch's stub
        self.bf16 = bf16
        self.image_size = image_size
        self.rounding: FakeQuantization | None = None
        self._taps = Taps(network, taps)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)
        self.register_buffer("merged", None if outputs is None else _padded(outputs), persistent=False)

    def like(self, network: nn.Module) -> Classifier:
        """Return a classifier of another network, with this one's device, normalisation and precision."""
        other = Classifier(network, (), (), bf16=self.bf16)
        other.mean, other.std = self.mean, self.std  # The tensors themselves: the host need not read their values.
        return other.to(self.mean.device)

    def watch(self, paths: Sequence[str]) -> None:
        """Tap only these places from now on."""
        self._taps.close()
        self._taps = Taps(self.network, dict.fromkeys(paths))

    def begin_rounding(self, images: Iterable[Tensor], on_images: Callable[[int], None]) -> None:
        """Compute as int8 would from now on, in float32, the network for good in eval mode, with ranges measured on
        images (pixels N × C × H × W). `on_images` is called after each batch with its number of images."""
        self.continue_rounding(())
        assert self.rounding is not None
        with torch.no_grad(), self.rounding.measuring():
            for pixels in images:
                self(pixels.to(self.mean.device))
                on_images(len(pixels))

    def continue_rounding(self, ranges: Sequence[Range]) -> None:
        """Compute as int8 would from now on, with ranges that were measured before."""
        self.rounding = FakeQuantization(ranges, self.mean.device)
        keep_in_eval(self.network)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> View:
        """Return a view. With `labels` it contains the input gradient, which can be differentiated if gradients are on;
        for an unknown label, the gradient is that of the network's own answer."""
        images = ((pixels.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if labels is None:
            return self._view_in_own_precision(images)
        learning = torch.is_grad_enabled()
        # The kernels' gradients cannot be differentiated.
        with torch.enable_grad(), kernels.paused():
            view = self._view_in_own_precision(images.requires_grad_())
            # The sum, because a mean would scale each image's gradient by the batch size.
            loss = cross_entropy(view.logits, answered(labels, view.logits), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images, create_graph=learning)
        return View(view.logits, view.taps, gradient if learning else gradient.detach())

    def _view_in_own_precision(self, images: Tensor) -> View:
        folded = folded_precision(self.network)
        bf16 = (self.bf16 if folded is None else folded == torch.bfloat16) and self.rounding is None
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.view(images)

    def view(self, images: Tensor) -> View:
        """Return a view of images that are normalised already, in the precision of the caller."""
        if self.rounding is None:
            outputs = self.network(images)
        else:
            outputs = self.rounding.run(self.network, images, follows=self.training)
        logits = self.of_classes(outputs)
        return View(_lifted(logits), {path: _lifted(tap) for path, tap in self._taps.read().items()})

    def of_classes(self, logits: Tensor) -> Tensor:
        """Return the logits of the data's classes, N × K, given those of the network's outputs."""
        if self.order is not None:
            logits = logits.index_select(1, self.order)
        if self.merged is not None:
            classes, most = self.merged.shape
            chosen = _lifted(logits).index_select(1, self.merged.clamp(min=0).flatten()).view(-1, classes, most)
            # A missing output is one of probability 0. Of one output alone, logsumexp is the logit itself.
            logits = chosen.masked_fill(self.merged < 0, -torch.inf).logsumexp(2) if most > 1 else chosen.squeeze(2)
        return logits

    def with_all_outputs(self) -> Classifier:
        """Return a classifier of the same network, in eval mode, whose logits are those of the network's outputs."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        same = Classifier(self.network, mean, std, bf16=self.bf16, image_size=self.image_size)
        return same.to(self.mean.device).eval()


def _padded(outputs: Sequence[Sequence[int]]) -> Tensor:
    """Return the outputs of each class, int64 K × most, filled up with -1."""
    most = max(len(own) for own in outputs)
    return torch.tensor([[*own, *[-1] * (most - len(own))] for own in outputs])


def answered(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the labels; the most likely class of these logits replaces an unknown one (-1). Mixed ones are known."""
    return labels if labels.is_floating_point() else torch.where(labels < 0, logits.argmax(1), labels)


def _lifted(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class FrozenTeacher(nn.Module, Teacher):
    """A teacher of one network: always in eval mode, without gradients.

    `folded`: its batch norms are folded into its convolutions, in the classifier's precision, on a CPU (see `fold`).
    Every pass without an input gradient is computed so, those that measure the teacher included. The network's weights
    must not change any more.
    """

    def __init__(self, classifier: Classifier, folded: bool = False) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        if folded:
            fold(classifier.network, classifier.bf16)
        self.members = [self.classifier]
        self.needs = NOTHING
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode for any `mode`: batch norm in train mode would make other logits."""
        return super().train(False)

    def show(self, needs: Needs) -> None:
        self.needs = needs
        self.classifier.watch([*needs.teacher_taps, *(tap for one in needs.reduced for tap in one.taps)])

    @torch.no_grad()
    def forward(self, batch: Batch) -> View:
        images = batch.at(self.classifier.image_size)
        view: View = self.classifier(images, batch.labels if self.needs.input_gradient else None)
        taps = {path: view.taps[path].detach() for path in self.needs.teacher_taps}
        reduced = {one: one.from_taps(view.taps) for one in self.needs.reduced}
        layers = {path: self.classifier.network.get_submodule(path) for path in self.needs.teacher_layers}
        return View(view.logits.detach(), taps, view.input_gradient, layers, reduced)

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        (logits_NK,) = logits_kNK
        return logits_NK

    def soft_targets(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        """Return the probabilities at a temperature: N × K, given the logits of each member."""
        return (self.combined(logits_kNK) / temperature).softmax(1)


class TeacherEnsemble(nn.Module, Teacher):
    """A teacher of several networks, whose probabilities are averaged by weight.

    p = Σ_k w_k softmax(z_k / T), Σ w = 1: the arithmetic mean (the mean of logits would be a geometric one). The view's
    logits are T · log p, so that softening them by T gives p.
    """

    def __init__(self, teachers: Sequence[FrozenTeacher], weights: Sequence[float], temperature: float) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.members = [teacher.classifier for teacher in teachers]
        self.log_weights = [float(torch.tensor(weight / sum(weights), dtype=torch.float64).log()) for weight in weights]
        self.temperature = temperature

    def show(self, needs: Needs) -> None:
        """Accept logits only: the networks' activations have no common places."""
        assert not needs.teacher_taps and not needs.reduced, (
            "rules refuse several teachers where activations are compared"
        )

    @torch.no_grad()
    def forward(self, batch: Batch) -> View:
        return View(self.combined([teacher(batch).logits for teacher in self.teachers]))

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        """T · log of the averaged probabilities: N × K."""
        return self.temperature * self._log_mean(logits_kNK, self.temperature)

    def soft_targets(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        """Return the averaged probabilities at a temperature: N × K, given the logits of each member."""
        return self._log_mean(logits_kNK, temperature).exp()

    def _log_mean(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        logs = zip(self.log_weights, logits_kNK, strict=True)
        terms = [log_weight + log_softmax(z_NK / temperature, dim=1) for log_weight, z_NK in logs]
        return torch.stack(terms).logsumexp(0)
