"""One training: batch → round → loss → step, epoch after epoch, and a state to resume it from at any step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdcore import checkpoint, evaluate
from kdcore.average import Average
from kdcore.classifier import Classifier
from kdcore.data import Images, Views, order, split
from kdcore.errors import LossDiverged
from kdcore.lesson import Batch, Round
from kdcore.objectives import Objective
from kdcore.objectives.labels import hits, label_loss
from kdcore.optim import learning_rate, optimizer_for, set_learning_rate
from kdcore.spec import Training as Recipe

POINT_EVERY_STEPS = 200
"""Within an epoch a metric point covers this many steps; another one ends the epoch."""

Weights = Mapping[str, Tensor]


class Scheme(Protocol):
    """Who teaches whom."""

    student: Classifier

    def trained(self) -> nn.Module: ...

    def round(self, batch: Batch) -> Round: ...


@dataclass(frozen=True)
class Loss:
    """alpha · labels + beta · distillation, as the spec weighs them."""

    alpha: float
    beta: float
    smoothing: float
    objective: Objective | None


@dataclass
class Position:
    """Where a training is. `step` counts within the epoch, `best_accuracy` is on the held-out part."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_accuracy: float = -1.0


@dataclass
class Trained:
    """What a finished training leaves: the weights of its best and of its last epoch."""

    best: Weights
    last: Weights
    best_epoch: int
    best_accuracy: float
    epochs: int


@dataclass
class Observer:
    """Who watches a training. `after_step` may raise to stop it; it is called between steps, when a state is whole."""

    metric: Callable[[int, int, Mapping[str, float]], None]
    after_step: Callable[[Training], None]


@dataclass
class Training:
    """A scheme under a recipe. `run` goes on from `position`, which is the start or what `restore` put there."""

    scheme: Scheme
    loss: Loss
    recipe: Recipe
    images: Images
    num_classes: int
    observer: Observer
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        recipe, images = self.recipe, self.images
        index, held_out = split(images, recipe.validation_fraction, recipe.seed)
        self.index = index.to(images.pixels.device)
        self.held_out = images.take(held_out)
        self.steps_per_epoch = len(self.index) // recipe.batch_size
        assert recipe.augmentation is not None, "resolve() names the augmentation"
        self.views = Views(recipe.augmentation, recipe.mix, self.num_classes)
        self.parameters = [p for p in self.scheme.trained().parameters() if p.requires_grad]
        self.optimizer = optimizer_for(recipe.optimizer, self.parameters)
        self.average = Average(self.network, recipe.ema) if recipe.ema is not None else None
        self.best = self._weights()
        self.sums = self._no_sums()

    @property
    def network(self) -> nn.Module:
        """The student's own network: what is averaged, checkpointed and exported."""
        return self.scheme.student.network

    @property
    def global_step(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def ended(self) -> bool:
        return self.position.epoch >= self.recipe.epochs

    def run(self) -> Trained:
        """Train to the end and hand over the weights."""
        while not self.ended:
            self._epoch()
            self.position.epoch, self.position.step = self.position.epoch + 1, 0
            self.observer.after_step(self)
        position = self.position
        last = self._weights()
        return Trained(self.best, last, position.best_epoch, position.best_accuracy, self.recipe.epochs)

    def _epoch(self) -> None:
        position, size = self.position, self.recipe.batch_size
        self.scheme.trained().train()
        shuffled = self.index[order(len(self.index), self.recipe.seed, position.epoch).to(self.index.device)]
        while position.step < self.steps_per_epoch:
            batch = self._batch(shuffled[position.step * size :][:size])
            self._step(batch)
            position.step += 1
            if position.step == self.steps_per_epoch:
                self._end_epoch()
            else:
                if position.step % POINT_EVERY_STEPS == 0:
                    self._point({})
                self.observer.after_step(self)

    def _batch(self, index: Tensor) -> Batch:
        inputs, labels = self.views.batch(self.images, index, self.recipe.seed, self.position.epoch)
        return Batch(inputs, labels, index)

    def _step(self, batch: Batch) -> None:
        recipe = self.recipe
        rate = learning_rate(
            recipe.optimizer.lr, recipe.schedule, self.global_step, self.steps_per_epoch, recipe.epochs
        )
        set_learning_rate(self.optimizer, rate)
        done = self.scheme.round(batch)
        label, distillation = self._losses(done, batch)
        loss = self.loss.alpha * label + self.loss.beta * distillation
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network)
        right = hits(done.views[0].logits, batch.labels) / len(batch.index)
        self.sums += torch.stack([loss.detach(), label.detach(), distillation.detach(), right, right.new_ones(())])

    def _losses(self, done: Round, batch: Batch) -> tuple[Tensor, Tensor]:
        smoothing, objective = self.loss.smoothing, self.loss.objective
        label = sum(
            (label_loss(view.logits, batch.labels, smoothing=smoothing) for view in done.views), torch.zeros(())
        )
        distillation = label.new_zeros(())
        if objective is not None:
            distillation = sum((lesson.share * objective(lesson) for lesson in done.lessons), distillation)
        return label, distillation

    def _end_epoch(self) -> None:
        """Measure on the held-out part, remember the best weights, and report the epoch."""
        weights = self._weights()
        with _borrowed(self.network, weights if self.average is not None else None):
            held_out = evaluate.score(evaluate.logits_on(self.scheme.student, self.held_out), self.held_out.labels)
        if held_out.accuracy > self.position.best_accuracy:
            self.best = weights
            self.position.best_epoch, self.position.best_accuracy = self.position.epoch + 1, held_out.accuracy
        self._point({"validation/accuracy": held_out.accuracy, "validation/loss": held_out.loss})

    def _point(self, extra: Mapping[str, float]) -> None:
        """Read the sums, the only place where the host waits for the device, and report their means."""
        loss, label, distillation, right, steps = self.sums.tolist()
        self.sums = self._no_sums()
        if not -float("inf") < loss < float("inf"):
            raise LossDiverged(
                f"the loss left the real numbers in epoch {self.position.epoch + 1}",
                hint="lower training.optimizer.lr, or set training.clip_norm",
            )
        values = {"train/loss": loss / steps, "train/label_loss": label / steps, "train/accuracy": right / steps}
        if self.loss.objective is not None:
            values["train/distillation_loss"] = distillation / steps
        values["train/lr"] = float(self.optimizer.param_groups[0]["lr"])
        self.observer.metric(self.global_step, self.position.epoch + 1, {**values, **extra})

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on bit for bit."""
        return {
            "position": vars(self.position).copy(),
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state if self.average is not None else None,
            "best": dict(self.best),
            "sums": self.sums,
            "random": checkpoint.random_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position = Position(**state["position"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.state = dict(state["average"])
        self.best, self.sums = dict(state["best"]), state["sums"]
        checkpoint.restore_random_state(state["random"])

    def _weights(self) -> Weights:
        source = self.average.state if self.average is not None else self.network.state_dict()
        return {name: value.detach().clone() for name, value in source.items()}

    def _no_sums(self) -> Tensor:
        return torch.zeros(5, device=self.scheme.student.mean.device)


class _borrowed:
    """Lend a network other weights for as long as a `with` block lasts."""

    def __init__(self, network: nn.Module, weights: Weights | None) -> None:
        self.network, self.weights = network, weights

    def __enter__(self) -> None:
        if self.weights is not None:
            self.own = {name: value.clone() for name, value in self.network.state_dict().items()}
            self.network.load_state_dict(self.weights)

    def __exit__(self, *_: object) -> None:
        if self.weights is not None:
            self.network.load_state_dict(self.own)
