"""One training: batch → round → loss → step, epoch after epoch, and a state to resume it from at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from base.errors import LossDiverged
from kdcore import checkpoint, evaluate
from kdcore.average import Average
from kdcore.classifier import Classifier
from kdcore.data import Material, Views, order
from kdcore.lesson import Batch, Round
from kdcore.objectives import Objective
from kdcore.objectives.labels import hits, known, label_loss
from kdcore.optim import learning_rate, optimizer_for, set_learning_rate
from kdcore.spec import Recipe

POINT_EVERY_STEPS = 200
"""Within an epoch a metric point covers this many steps; another one ends the epoch."""

Weights = Mapping[str, Tensor]


class Scheme(Protocol):
    """Who teaches whom."""

    @property
    def models(self) -> Mapping[str, Classifier]:
        """What comes out of it, the student first: each is graded, averaged and kept at its best."""

    def learners(self) -> Sequence[nn.Module]:
        """What is trained, each by an optimizer of its own."""

    def round(self, batch: Batch) -> Round: ...


@dataclass(frozen=True)
class Stage:
    """What is minimised, and for how long: alpha · labels + beta · distillation."""

    epochs: int
    alpha: float
    beta: float
    objective: Objective | None
    smoothing: float = 0.0


@dataclass
class Position:
    """Where a training is. `step` counts within the epoch, `summed` the steps since the last point."""

    epoch: int = 0
    step: int = 0
    summed: int = 0


@dataclass
class Best:
    """A model at its best on the held-out part; epochs count from 1."""

    weights: Weights
    epoch: int = 0
    accuracy: float = -1.0


@dataclass
class Outcome:
    """What a finished training leaves of a model: its weights at its best and at its last epoch."""

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
    stage: Stage
    recipe: Recipe
    material: Material
    num_classes: int
    observer: Observer
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.steps_per_epoch = len(self.material.rows) // recipe.batch_size
        assert recipe.augmentation is not None, "resolve() names the augmentation"
        self.views = Views(recipe.augmentation, recipe.mix, self.num_classes)
        self.learners = nn.ModuleList(self.scheme.learners())
        self._rehearse()
        self.trained = self._trained()
        self.optimizers = [optimizer_for(recipe.optimizer, parameters) for parameters in self.trained]
        networks = {name: model.network for name, model in self.scheme.models.items()}
        self.averages = {name: Average(network, recipe.ema) for name, network in networks.items() if recipe.ema}
        self.best = {name: Best(self._weights(name)) for name in networks}
        self.sums: dict[str, Tensor] = {}

    @property
    def global_step(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def ended(self) -> bool:
        return self.position.epoch >= self.stage.epochs

    def run(self) -> dict[str, Outcome]:
        """Train to the end and hand over each model's weights."""
        while not self.ended:
            self._epoch()
            self.position.epoch, self.position.step = self.position.epoch + 1, 0
            self.observer.after_step(self)
        return {
            name: Outcome(best.weights, self._weights(name), best.epoch, best.accuracy, self.stage.epochs)
            for name, best in self.best.items()
        }

    def _rehearse(self) -> None:
        """Show the objective a first lesson, so that it can make what it owns. Nothing is learned from it."""
        if self.stage.objective is None:
            return
        self.learners.eval()
        with torch.no_grad():
            done = self.scheme.round(self._batch(self.material.rows[:2]))
        self.stage.objective.build(done.lessons[0])
        self.stage.objective.to(self.material.rows.device)

    def _trained(self) -> list[list[nn.Parameter]]:
        """Each learner's parameters; the objective's own join the first, as in the recipes of the field."""
        groups = [[p for p in learner.parameters() if p.requires_grad] for learner in self.learners] or [[]]
        if self.stage.objective is not None:
            groups[0] += [p for p in self.stage.objective.parameters() if p.requires_grad]
        return groups

    def _epoch(self) -> None:
        position, size, rows = self.position, self.recipe.batch_size, self.material.rows
        self.learners.train()
        if self.stage.objective is not None:
            self.stage.objective.train()
        shuffled = rows[order(len(rows), self.recipe.seed, position.epoch).to(rows.device)]
        while position.step < self.steps_per_epoch:
            self._step(self._batch(shuffled[position.step * size :][:size]))
            position.step += 1
            if position.step == self.steps_per_epoch:
                self._end_epoch()
            else:
                if position.step % POINT_EVERY_STEPS == 0:
                    self._point({})
                self.observer.after_step(self)

    def _batch(self, index: Tensor) -> Batch:
        epoch = self.position.epoch
        inputs, labels = self.views.batch(self.material.images, index, self.recipe.seed, epoch)
        return Batch(inputs, labels, index, epoch + 1)

    def _step(self, batch: Batch) -> None:
        recipe = self.recipe
        rate = learning_rate(
            recipe.optimizer.lr, recipe.schedule, self.global_step, self.steps_per_epoch, self.stage.epochs
        )
        done = self.scheme.round(batch)
        label, distillation = self._losses(done)
        # What weighs nothing sends no gradient, not even zeros: they would let weight decay at what is not trained.
        weighed = ((self.stage.alpha, label), (self.stage.beta, distillation))
        loss = sum((weight * value for weight, value in weighed if weight > 0), torch.zeros_like(label))
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # In a first stage that weighs nothing, nothing is learned.
            loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, parameters in zip(self.optimizers, self.trained, strict=True):
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            optimizer.step()
        for name, average in self.averages.items():
            average.update(self.scheme.models[name].network)
        self._sum(done, {"loss": loss, "label_loss": label, "distillation_loss": distillation})

    def _losses(self, done: Round) -> tuple[Tensor, Tensor]:
        smoothing, objective = self.stage.smoothing, self.stage.objective
        zero = torch.zeros((), device=done.labels.device)
        label = sum((label_loss(view.logits, done.labels, smoothing=smoothing) for view in done.views), zero)
        if objective is None:
            return label, zero
        return label, sum((lesson.share * objective(lesson) for lesson in done.lessons), zero)

    def _sum(self, done: Round, losses: Mapping[str, Tensor]) -> None:
        """Add up what the next point tells. Tensors stay tensors: no host waits for the device."""
        figures = {name: value.detach() for name, value in losses.items()}
        if done.views:
            figures["accuracy"] = hits(done.views[0].logits, done.labels) / known(done.labels)
        if self.stage.objective is not None:
            figures |= self.stage.objective.observed
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.position.summed += 1

    def _end_epoch(self) -> None:
        """Grade each model on the held-out part, remember its best weights, and report the epoch."""
        graded: dict[str, float] = {}
        for name, model in self.scheme.models.items():
            weights = self._weights(name)
            with _borrowed(model.network, weights if self.averages else None):
                score = evaluate.score(evaluate.logits_on(model, self.material.held_out), self.material.held_out.labels)
            if score.accuracy > self.best[name].accuracy:
                self.best[name] = Best(weights, self.position.epoch + 1, score.accuracy)
            prefix = "validation" if name == "student" else f"validation/{name}"
            graded |= {f"{prefix}/accuracy": score.accuracy, f"{prefix}/loss": score.loss}
        self._point(graded)

    def _point(self, graded: Mapping[str, float]) -> None:
        """Read the sums, the only place where the host waits for the device, and report their means."""
        values = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        steps = self.position.summed
        self.sums, self.position.summed = {}, 0
        if not all(map(math.isfinite, (values["loss"], *graded.values()))):
            raise LossDiverged(
                f"the loss left the real numbers in epoch {self.position.epoch + 1}",
                hint="lower training.optimizer.lr, or set training.clip_norm",
            )
        if self.stage.objective is None:
            del values["distillation_loss"]
        means = {f"train/{name}": value / steps for name, value in values.items()}
        means["train/lr"] = float(self.optimizers[0].param_groups[0]["lr"])
        self.observer.metric(self.global_step, self.position.epoch + 1, {**means, **graded})

    def learned(self) -> dict[str, Any]:
        """What a stage leaves for the next one of its trial."""
        return {"learners": dict(self.learners.state_dict()), "objective": self._objective_state()}

    def adopt(self, learned: Mapping[str, Any]) -> None:
        """Be as this stage left it."""
        self.learners.load_state_dict(learned["learners"])
        if self.stage.objective is not None:
            self.stage.objective.load_state_dict(learned["objective"])

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on bit for bit."""
        return {
            **self.learned(),
            "position": vars(self.position).copy(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": {name: average.state for name, average in self.averages.items()},
            "best": {name: vars(best).copy() for name, best in self.best.items()},
            "sums": dict(self.sums),
            "random": checkpoint.random_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.adopt(state)
        self.position = Position(**state["position"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, average in self.averages.items():
            average.state = dict(state["averages"][name])
        self.best = {name: Best(**saved) for name, saved in state["best"].items()}
        self.sums = dict(state["sums"])
        checkpoint.restore_random_state(state["random"])

    def _objective_state(self) -> dict[str, Any]:
        return dict(self.stage.objective.state_dict()) if self.stage.objective is not None else {}

    def _weights(self, name: str) -> Weights:
        average = self.averages.get(name)
        source = average.state if average is not None else self.scheme.models[name].network.state_dict()
        return {name: value.detach().clone() for name, value in source.items()}


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
