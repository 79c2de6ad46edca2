"""One stage of a trial: batch → scheme → losses → optimizer step, epoch after epoch; and its state, at any step.

Read `StageTraining._step` first. Shapes: N batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from base.errors import LossDiverged
from kdcore.classifier import Classifier
from kdcore.data.images import TrainingSet
from kdcore.data.views import Views, order
from kdcore.graph_step import GraphStep
from kdcore.lesson import Batch, Scheme, StepOutput
from kdcore.measure import batch_norm, evaluate
from kdcore.measure.alarms import Alarms
from kdcore.objectives import Objective
from kdcore.optimizer import Average, learning_rate, optimizer_for, set_rate
from kdcore.quantization import FakeQuantization, Range, keep_in_eval
from kdcore.spec import Training

POINT_EVERY_STEPS = 200
"""The number of steps in a metric point; the end of an epoch also makes a point."""
NOISE_P = 0.01
"""Two accuracies on the same images differ by more than noise if a paired test gives a smaller p."""
UNKNOWN = -1
"""The label of an image whose class is unknown."""

Weights = Mapping[str, Tensor]


@dataclass
class Position:
    """The position of a stage. `step` counts within the epoch, `summed` the steps since the last point."""

    epoch: int = 0
    step: int = 0
    summed: int = 0


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


@dataclass
class Observer:
    """Callbacks of a stage. `after_step` runs between steps, when the state is consistent; it may raise to stop.
    `before_evaluation` runs after the last step of an epoch, before the models are measured."""

    metric: Callable[[int, int, Mapping[str, float]], None]
    after_step: Callable[[StageTraining], None]
    before_evaluation: Callable[[StageTraining], None] = lambda _: None
    evaluated: Callable[[StageTraining, int], None] = lambda *_: None
    """Called during an evaluation with the number of images that a model has just been run on."""


@dataclass
class StageTraining:
    """Minimises alpha · label loss + beta · distillation loss. `run` continues from `position`, which is the start, or
    was set by `restore`."""

    scheme: Scheme
    objective: Objective | None
    alpha: float
    beta: float
    smoothing: float
    epochs: int
    recipe: Training
    training_set: TrainingSet
    num_classes: int
    observer: Observer
    rate_factors: Mapping[nn.Parameter, float] = field(default_factory=dict)
    """Factors of the learning rate, for the parameters that have one."""
    graph: bool = False
    """Capture a step as a CUDA graph, and replay it."""
    alarms: Alarms = field(default_factory=Alarms)
    aware_epochs: int = 0
    """The last epochs, in which students compute as int8 would (`kdcore/quantization.py`)."""
    through: Callable[[Iterable[Batch]], Iterable[Batch]] = iter
    """Passes the batches of an epoch on. A teacher that runs ahead sees the next one first."""
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.steps_per_epoch = len(self.training_set.rows) // recipe.batch_size
        self.views = Views.of(recipe, self.num_classes)
        self.learners = nn.ModuleList(self.scheme.learners())
        self._build_objective()
        self.trained = self._trained()
        self.graph_step = GraphStep() if self.graph else None
        self.optimizers, self.factors = [], []
        for parameters in self.trained:
            groups = self._by_factor(parameters)
            self.optimizers.append(
                optimizer_for(recipe.optimizer, [{"params": one} for one in groups.values()], self.graph)
            )
            self.factors.append(list(groups))
        networks = {name: model.network for name, model in self.scheme.models.items()}
        self.averages = {name: Average(network, recipe.ema) for name, network in networks.items() if recipe.ema}
        self.best = {name: Best(self._weights(name)) for name in networks}
        self.last: dict[str, Weights] = {}
        """The models as graded at the end of the last epoch. A stage that is resumed there makes them again."""
        self.sums: dict[str, Tensor] = {}
        self.before: dict[str, Weights] = {}
        """The best weights of the epochs that train in float, once those that train for int8 have begun."""

    @property
    def global_step(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def ended(self) -> bool:
        return self.position.epoch >= self.epochs

    def run(self) -> dict[str, Outcome]:
        """Train to the end and return each model's outcome."""
        while not self.ended:
            self._epoch()
            self.position.epoch, self.position.step = self.position.epoch + 1, 0
            self.observer.after_step(self)
        return {name: self._outcome(name, best) for name, best in self.best.items()}

    def _outcome(self, name: str, best: Best) -> Outcome:
        last = best.weights if best.epoch == self.epochs else self.last.get(name) or self._graded(name)[0]
        outcome = Outcome(best.weights, last, best.epoch, best.accuracy, self.epochs)
        outcome.ranges, outcome.before = best.ranges, self.before.get(name, {})
        return outcome

    def compare_statistics(self, name: str, outcome: Outcome) -> tuple[float, float] | None:
        """Return the accuracies on held-out images, at the best epoch, by measured batch-norm statistics and by running
        averages, if they differ by more than noise: then the outcome gets the averages, too. Else None."""
        model, held_out, measures = self.scheme.models[name], self.training_set.held_out, self._measures
        other = self.best[name].running
        if not measures:
            with _loaded(model.network, outcome.best):
                other = self._statistics(model)
        if not other:
            return None
        logits = []
        for weights in (outcome.best, {**outcome.best, **other}):
            with _loaded(model.network, weights):
                logits.append(evaluate.logits_on(model, held_out, self._evaluated))
        if evaluate.paired_p(logits[0], logits[1], held_out.labels) >= NOISE_P:
            return None
        used, unused = (evaluate.score(each, held_out.labels).accuracy for each in logits)
        if not measures:
            return unused, used
        outcome.running = other
        return used, unused

    def _build_objective(self) -> None:
        """Give the objective a first lesson, in eval mode and without gradients, from which it builds its modules."""
        if self.objective is None:
            return
        self.learners.eval()
        with torch.no_grad():
            output = self.scheme.run(self._batch(self.training_set.rows[:2]))
        self.objective.build(output.lessons[0])
        self.objective.to(self.training_set.rows.device)

    def _trained(self) -> list[list[nn.Parameter]]:
        """Return each learner's parameters; the objective's own join the first, as in the published recipes."""
        groups = [[p for p in learner.parameters() if p.requires_grad] for learner in self.learners] or [[]]
        if self.objective is not None:
            groups[0] += [p for p in self.objective.parameters() if p.requires_grad]
        return groups

    def _by_factor(self, parameters: Iterable[nn.Parameter]) -> dict[float, list[nn.Parameter]]:
        """Return the parameters by the factor of their learning rate, those without one first."""
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in parameters:
            groups.setdefault(self.rate_factors.get(parameter, 1.0), []).append(parameter)
        if not groups[1.0] and len(groups) > 1:
            del groups[1.0]
        return groups

    def _epoch(self) -> None:
        position, size, rows = self.position, self.recipe.batch_size, self.training_set.rows
        if self.aware_epochs and position.epoch == self.epochs - self.aware_epochs and position.step == 0:
            self._begin_rounding()
        self.learners.train()
        if self.objective is not None:
            self.objective.train()
        shuffled = rows[order(len(rows), self.recipe.seed, position.epoch).to(rows.device)]
        self.training_set.images.expect(shuffled[position.step * size : self.steps_per_epoch * size])
        to_come = range(position.step, self.steps_per_epoch)
        for batch in self.through(self._batch(shuffled[step * size :][:size]) for step in to_come):
            self._step(batch)
            position.step += 1
            if position.step == self.steps_per_epoch:
                self._end_epoch()
            else:
                if position.step % POINT_EVERY_STEPS == 0:
                    self._point({})
                self.observer.after_step(self)

    def _batch(self, index: Tensor) -> Batch:
        return self.views.batch(self.training_set.images, index, self.recipe.seed, self.position.epoch)

    def _step(self, batch: Batch) -> None:
        """Make one step. The host sets the learning rate; `_learn` is the device's part, eagerly or as a graph."""
        recipe = self.recipe
        rate = learning_rate(recipe.optimizer.lr, recipe.schedule, self.global_step, self.steps_per_epoch, self.epochs)
        for optimizer, factors in zip(self.optimizers, self.factors, strict=True):
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                set_rate(group, rate * factor)
        self._sum(self._learn(batch) if self.graph_step is None else self.graph_step(self._learn, batch))

    def _learn(self, batch: Batch) -> dict[str, Tensor]:
        """Change the weights by one batch, and return the figures of the step. No value is read on the host."""
        output = self.scheme.run(batch)
        label, distillation = self._losses(output)
        # Leave out a term of weight 0: with its zero gradients, weight decay would change untrained parameters.
        weighed = ((self.alpha, label), (self.beta, distillation))
        loss = sum((weight * value for weight, value in weighed if weight > 0), torch.zeros_like(label))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # False in a first stage of weight 0.
            loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, parameters in zip(self.optimizers, self.trained, strict=True):
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
            optimizer.step()
        for name, average in self.averages.items():
            average.update(self.scheme.models[name].network)
        return self._figures(output, {"loss": loss, "label_loss": label, "distillation_loss": distillation})

    def _losses(self, output: StepOutput) -> tuple[Tensor, Tensor]:
        """Return the label loss of all views, and the distillation loss of all lessons."""
        zero = torch.zeros((), device=output.labels.device)
        label = sum((label_loss(view.logits, output.labels, smoothing=self.smoothing) for view in output.views), zero)
        if self.objective is None:
            return label, zero
        return label, sum((lesson.share * self.objective(lesson) for lesson in output.lessons), zero)

    def _figures(self, output: StepOutput, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        figures = {name: value.detach() for name, value in losses.items()}
        if output.views:
            figures["accuracy"] = hits(output.views[0].logits, output.labels) / known(output.labels)
        if self.objective is not None:
            figures |= self.objective.observed
        return figures

    def _sum(self, figures: Mapping[str, Tensor]) -> None:
        """Add up the figures of the next point as tensors, so that the host does not wait for the device."""
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.position.summed += 1

    def _end_epoch(self) -> None:
        """Measure each model on the held-out images, keep its best weights, and report the epoch."""
        self.observer.before_evaluation(self)
        validation: dict[str, float] = {}
        held_out = self.training_set.held_out
        for name, model in self.scheme.models.items():
            weights, running = self._graded(name)
            with _loaded(model.network, weights if self.averages or running else None):
                score = evaluate.score(evaluate.logits_on(model, held_out, self._evaluated), held_out.labels)
            if score.accuracy > self.best[name].accuracy:
                ranges = () if model.rounding is None else model.rounding.ranges()
                self.best[name] = Best(weights, self.position.epoch + 1, score.accuracy, running, ranges)
            if self.position.epoch + 1 == self.epochs:
                self.last[name] = weights
            prefix = "validation" if name == "student" else f"validation/{name}"
            validation |= {f"{prefix}/accuracy": score.accuracy, f"{prefix}/loss": score.loss}
        self._point(validation)

    def _begin_rounding(self) -> None:
        """Let students compute as int8 would from here on. They go on from the weights that would be delivered now, and
        the best epoch is one of those to come: the best float weights need not be good ones in int8."""
        models = self.scheme.models
        graded = {name: self._graded(name)[0] for name in models}
        for name, model in models.items():
            model.network.load_state_dict(graded[name])
        self.averages = {name: Average(models[name].network, average.decay) for name, average in self.averages.items()}
        self.before = {name: best.weights if best.epoch else graded[name] for name, best in self.best.items()}
        self.learners.eval()
        for name in self._delivered():
            rounding = FakeQuantization(device=self.training_set.rows.device)
            self._round(models[name], rounding)
            with torch.no_grad(), rounding.measuring():
                for pixels in batch_norm.of_recipe(self.training_set, self.recipe):
                    models[name](pixels.to(self.training_set.rows.device))
                    self._evaluated(len(pixels))
        self.best = {name: Best(self._weights(name)) for name in models}

    def _delivered(self) -> list[str]:
        """Return the names of the models that are delivered: students, but no exits of theirs."""
        return [name for name in self.scheme.models if name == "student" or name.startswith("student-")]

    def _round(self, model: Classifier, rounding: FakeQuantization) -> None:
        model.rounding = rounding
        keep_in_eval(model.network)
        self.graph_step = None  # What was captured does not round; these epochs are few, and their steps eager.

    def _graded(self, name: str) -> tuple[Weights, Weights]:
        """Return a model's weights as they are graded, kept and delivered: with measured batch-norm statistics, unless
        the recipe says otherwise; and the running averages in whose place these are. The training keeps its own."""
        weights = self._weights(name)
        if not self._measures:
            return weights, {}
        model = self.scheme.models[name]
        with _loaded(model.network, weights if self.averages else None):
            statistics = self._statistics(model)
        return {**weights, **statistics}, {name: weights[name] for name in statistics}

    @property
    def _measures(self) -> bool:
        return self.recipe.batch_norm != "running"

    def _statistics(self, model: Classifier) -> Weights:
        return batch_norm.measured(model, batch_norm.of_recipe(self.training_set, self.recipe), self._evaluated)

    def _evaluated(self, images: int) -> None:
        self.observer.evaluated(self, images)

    def _point(self, validation: Mapping[str, float]) -> None:
        """Read the sums, the only place where the host waits for the device, and report their means."""
        values = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        steps = self.position.summed
        self.sums, self.position.summed = {}, 0
        if not all(map(math.isfinite, (values["loss"], *validation.values()))):
            raise LossDiverged(
                f"the loss is no longer a finite number in epoch {self.position.epoch + 1}",
                hint="lower training.optimizer.lr, or set training.clip_norm",
            )
        if self.objective is None:
            del values["distillation_loss"]
        means = {f"train/{name}": value / steps for name, value in values.items()}
        means["train/lr"] = float(self.optimizers[0].param_groups[0]["lr"])
        self.observer.metric(self.global_step, self.position.epoch + 1, {**means, **validation})
        in_all = self.epochs * self.steps_per_epoch
        self.alarms.see(self.global_step, in_all, {**means, **validation}, steps * self.recipe.batch_size)

    def learned(self) -> dict[str, Any]:
        """Return the weights from which the next stage of the trial starts."""
        objective = self.objective.state_dict() if self.objective is not None else {}
        return {"learners": dict(self.learners.state_dict()), "objective": dict(objective)}

    def adopt(self, learned: Mapping[str, Any]) -> None:
        """Load what `learned` returned."""
        self.learners.load_state_dict(learned["learners"])
        if self.objective is not None:
            self.objective.load_state_dict(learned["objective"])

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs to continue bit for bit."""
        return {
            **self.learned(),
            "position": vars(self.position).copy(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": {name: average.state for name, average in self.averages.items()},
            "best": {name: vars(best).copy() for name, best in self.best.items()},
            "sums": dict(self.sums),
            "alarms": dict(self.alarms.state),
            "random": _random_state(),
            **({"quantization": self._rounding_state()} if self.before else {}),
        }

    def _rounding_state(self) -> dict[str, Any]:
        models = self.scheme.models.items()
        ranges = {name: model.rounding.ranges() for name, model in models if model.rounding is not None}
        return {"ranges": ranges, "before": dict(self.before)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.adopt(state)
        self.position = Position(**state["position"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, average in self.averages.items():
            average.state = dict(state["averages"][name])
        self.best = {name: Best(**saved) for name, saved in state["best"].items()}
        self.sums = dict(state["sums"])
        if "alarms" in state:  # Absent in a checkpoint of an earlier version.
            self.alarms.restore(state["alarms"])
        if "quantization" in state:
            self.before = dict(state["quantization"]["before"])
            for name, ranges in state["quantization"]["ranges"].items():
                self._round(self.scheme.models[name], FakeQuantization(ranges, self.training_set.rows.device))
        _restore_random_state(state["random"])

    def _weights(self, name: str) -> Weights:
        average = self.averages.get(name)
        source = average.state if average is not None else self.scheme.models[name].network.state_dict()
        return {name: value.detach().clone() for name, value in source.items()}


def label_loss(logits_NK: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with hard or soft labels: -1/N Σ_n Σ_k y_nk · log softmax(z_n)_k, y = (1 - s) · label + s / K.

    A mean over the batch; `labels` are int64 N, or float N × K for mixed images. Rows of label -1 are left out
    of sum and count; a batch of only such rows gives 0. Smoothing s: Szegedy et al., CVPR 2016, arXiv:1512.00567.
    """
    if labels.is_floating_point():
        return cross_entropy(logits_NK, labels, label_smoothing=smoothing)
    total = cross_entropy(logits_NK, labels, label_smoothing=smoothing, ignore_index=UNKNOWN, reduction="sum")
    return total / known(labels)


def known(labels: Tensor) -> Tensor:
    """Return the number of known labels, at least 1: a tensor, so that the host does not wait."""
    if labels.is_floating_point():
        return labels.new_full((), len(labels))
    return (labels != UNKNOWN).sum().clamp(min=1)


def hits(logits_NK: Tensor, labels: Tensor) -> Tensor:
    """Return the number of correct predictions as a tensor, like `known`; of mixed labels the heavier counts."""
    hard_N = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits_NK.argmax(1) == hard_N).sum(dtype=torch.float32)


@contextmanager
def _loaded(network: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Load weights into a network during a `with` block; None changes nothing."""
    if weights is None:
        yield
        return
    own = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(weights)
    try:
        yield
    finally:
        network.load_state_dict(own)


def _random_state() -> dict[str, Any]:
    """Return the states of the generators for dropout and initialisation; views and order need none."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
