"""The grading of a stage's models: each on the held-out images after every epoch; its best weights are kept.

What is graded, kept and delivered has batch-norm statistics that are measured anew (`batch_norm.py`), unless the recipe
says otherwise. The training keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from kdcore.classifier import Classifier
from kdcore.data.images import TrainingSet
from kdcore.measure import batch_norm, evaluate
from kdcore.optimizer import Average
from kdcore.quantization import Range
from kdcore.spec import Training

NOISE_P = 0.01
"""Two accuracies on the same images differ by more than noise if a paired test gives a smaller p."""

Weights = Mapping[str, Tensor]
OnImages = Callable[[int], None]
"""Called after each batch of a measurement with its number of images."""


@dataclass
class Best:
    """A model at its best epoch on the held-out images; epochs count from 1."""

    weights: Weights
    epoch: int = 0
    accuracy: float = -1.0
    running: Weights = field(default_factory=dict)
    """The running averages of its batch norms, which measured statistics have replaced in `weights`."""
    ranges: Sequence[Range] = ()
    """Those of its activations at this epoch, if it trains for int8."""


@dataclass
class Outcome:
    """The result of a finished stage for one model: its weights at its best and last epochs."""

    best: Weights
    last: Weights
    best_epoch: int
    best_accuracy: float
    epochs: int
    running: Weights = field(default_factory=dict)
    """The running averages of the best epoch's batch norms, if they give another accuracy than measured statistics,
    by more than noise."""
    ranges: Sequence[Range] = ()
    """Those of the best epoch's activations, if the last epochs trained for int8: the best is one of these then."""
    before: Weights = field(default_factory=dict)
    """The best weights of the epochs before those, which trained in float."""


class Grading:
    """The grading of models, by name. Where a model has an average of its weights, the average is graded; the training
    updates it."""

    def __init__(
        self,
        models: Mapping[str, Classifier],
        averages: Mapping[str, Average],
        training_set: TrainingSet,
        recipe: Training,
        epochs: int,
    ) -> None:
        self.models, self.averages, self.epochs = models, averages, epochs
        self.training_set, self.recipe = training_set, recipe
        self.best = {name: Best(self._weights(name)) for name in models}
        self.before: dict[str, Weights] = {}
        """The best weights of the epochs that train in float, once those that train for int8 have begun."""
        self._last: dict[str, Weights] = {}
        """As graded at the end of the last epoch. A stage that is resumed there grades them again."""

    def grade(self, epoch: int, on_images: OnImages | None = None) -> dict[str, float]:
        """Grade each model after an epoch, counted from 0, and keep its best weights. Returns the figures by metric."""
        figures: dict[str, float] = {}
        held_out = self.training_set.held_out
        for name, model in self.models.items():
            weights, running = self.graded(name, on_images)
            with _loaded(model.network, weights):
                score = evaluate.score(evaluate.logits_on(model, held_out, on_images), held_out.labels)
            if score.accuracy > self.best[name].accuracy:
                ranges = () if model.rounding is None else model.rounding.ranges()
                self.best[name] = Best(weights, epoch + 1, score.accuracy, running, ranges)
            if epoch + 1 == self.epochs:
                self._last[name] = weights
            prefix = "validation" if name == "student" else f"validation/{name}"
            figures |= {f"{prefix}/accuracy": score.accuracy, f"{prefix}/loss": score.loss}
        return figures

    def graded(self, name: str, on_images: OnImages | None = None) -> tuple[Weights, Weights]:
        """Return a model's weights as they are graded, kept and delivered; and the running averages that measured
        batch-norm statistics have replaced in them."""
        weights = self._weights(name)
        if not self._measures:
            return weights, {}
        statistics = self._statistics(name, weights, on_images)
        return {**weights, **statistics}, {path: weights[path] for path in statistics}

    def begin_again(self, on_images: OnImages | None = None) -> None:
        """Let the models go on from the weights that would be delivered now. The best epoch is one of those to come."""
        graded = {name: self.graded(name, on_images)[0] for name in self.models}
        for name, model in self.models.items():
            model.network.load_state_dict(graded[name])
        self.before = {name: best.weights if best.epoch else graded[name] for name, best in self.best.items()}
        self.best = {name: Best(weights) for name, weights in graded.items()}

    def outcomes(self, on_images: OnImages | None = None) -> dict[str, Outcome]:
        """Return each model's outcome of the whole stage."""
        return {name: self._outcome(name, best, on_images) for name, best in self.best.items()}

    def _outcome(self, name: str, best: Best, on_images: OnImages | None = None) -> Outcome:
        last = best.weights if best.epoch == self.epochs else self._last.get(name)
        if last is None:
            last = self.graded(name, on_images)[0]
        before = self.before.get(name, {})
        return Outcome(best.weights, last, best.epoch, best.accuracy, self.epochs, ranges=best.ranges, before=before)

    def compare_statistics(
        self, name: str, outcome: Outcome, on_images: OnImages | None = None
    ) -> tuple[float, float] | None:
        """Return the accuracies on held-out images, at the best epoch, by measured batch-norm statistics and by running
        averages, if they differ by more than noise: then the outcome gets the averages, too. Else None."""
        model, held_out = self.models[name], self.training_set.held_out
        other = self.best[name].running if self._measures else self._statistics(name, outcome.best, on_images)
        if not other:
            return None
        logits = []
        for weights in (outcome.best, {**outcome.best, **other}):
            with _loaded(model.network, weights):
                logits.append(evaluate.logits_on(model, held_out, on_images))
        if evaluate.paired_p(logits[0], logits[1], held_out.labels) >= NOISE_P:
            return None
        used, unused = (evaluate.score(each, held_out.labels).accuracy for each in logits)
        if not self._measures:
            return unused, used
        outcome.running = other
        return used, unused

    @property
    def _measures(self) -> bool:
        return self.recipe.batch_norm != "running"

    def _statistics(self, name: str, weights: Weights, on_images: OnImages | None) -> Weights:
        """Return the batch-norm statistics of a model with these weights, measured on images of the training."""
        model = self.models[name]
        with _loaded(model.network, weights):
            return batch_norm.measured(model, batch_norm.of_recipe(self.training_set, self.recipe), on_images)

    def _weights(self, name: str) -> Weights:
        """Return a copy of what the training has made of a model: its average, if it has one."""
        average = self.averages.get(name)
        source = average.state if average is not None else self.models[name].network.state_dict()
        return {path: value.detach().clone() for path, value in source.items()}


@contextmanager
def _loaded(network: nn.Module, weights: Weights) -> Iterator[None]:
    """Load weights into a network during a `with` block."""
    own = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(weights)
    try:
        yield
    finally:
        network.load_state_dict(own)
