"""One stage of a trial: batch → scheme → losses → optimizer step, epoch after epoch; and its state, at any step.

Read `StageTraining._epoch` first. Shapes: N batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from base.errors import LossDiverged
from kdcore.data.images import TrainingSet
from kdcore.data.views import Batches, Views
from kdcore.graph_step import GraphStep
from kdcore.lesson import Batch, Scheme, StepOutput
from kdcore.measure import batch_norm
from kdcore.measure.alarms import Alarms
from kdcore.measure.grading import Best, Grading, Outcome
from kdcore.objectives import Objective
from kdcore.optimizer import Average, learning_rate, optimizer_for, set_rate
from kdcore.spec import Training

POINT_EVERY_STEPS = 200
"""The number of steps in a metric point; the end of an epoch also makes a point."""
UNKNOWN = -1
"""The label of an image whose class is unknown."""


@dataclass
class Position:
    """The position of a stage, from 0. `step` counts within the epoch, `summed` the steps since the last point."""

    epoch: int = 0
    step: int = 0
    summed: int = 0


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
        self.grading = Grading(self.scheme.models, self.averages, self.training_set, recipe, self.epochs)
        self.sums: dict[str, Tensor] = {}

    def _build_objective(self) -> None:
        """Give the objective a first lesson, in eval mode and without gradients, from which it builds its modules."""
        if self.objective is None:
            return
        self.learners.eval()
        with torch.no_grad():
            output = self.scheme.run(self.batches.of(self.training_set.rows[:2]))
        self.objective.build(output.lessons[0])
        self.objective.to(self.training_set.rows.device)
        if self.scheme.teacher is not None:
            self.scheme.teacher.show(self.objective.needs)  # The lesson may have shown that less is enough.

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

    @property
    def global_step(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def ended(self) -> bool:
        return self.position.epoch >= self.epochs

    @property
    def batches(self) -> Batches:
        """The batches of the present epoch, from the present step on. They do not change with the position, because a
        teacher that runs ahead takes the next one before a step is made."""
        return Batches(self.training_set, self.recipe, self.views, self.position.epoch, self.position.step)

    def run(self) -> dict[str, Outcome]:
        """Train to the end and return each model's outcome."""
        while not self.ended:
            self._epoch()
            self.position.epoch, self.position.step = self.position.epoch + 1, 0
            self.observer.after_step(self)
        return self.grading.outcomes(self.evaluated)

    def _epoch(self) -> None:
        position, teacher, batches = self.position, self.scheme.teacher, self.batches
        if position.epoch == self.epochs - self.aware_epochs and position.step == 0:
            self._begin_rounding()
        self.learners.train()  # The networks of students that round stay in eval mode: see `keep_in_eval`.
        if self.objective is not None:
            self.objective.train()
        for batch in batches if teacher is None else teacher.through(batches):
            self._step(batch)
            position.step += 1
            if position.step < self.steps_per_epoch:
                if position.step % POINT_EVERY_STEPS == 0:
                    self._point({})
                self.observer.after_step(self)
        self._end_epoch()

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
        """Grade the models on the held-out images, and report the epoch."""
        self.observer.before_evaluation(self)
        self._point(self.grading.grade(self.position.epoch, self.evaluated))

    def evaluated(self, images: int) -> None:
        """Report that a model has been run on so many images between two steps."""
        self.observer.evaluated(self, images)

    def _begin_rounding(self) -> None:
        """Let students compute as int8 would from here on. They go on from the weights that would be delivered now, and
        the best epoch is one of those to come: the best float weights need not be good ones in int8."""
        self.grading.begin_again(self.evaluated)
        for name, average in self.averages.items():
            average.begin(self.scheme.models[name].network)
        for name, model in self.scheme.models.items():
            if name == "student" or name.startswith("student-"):  # What is delivered: no exits of a student.
                model.begin_rounding(batch_norm.of_recipe(self.training_set, self.recipe), self.evaluated)
        self.graph_step = None  # What was captured does not round; these epochs are few, and their steps eager.

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
            "best": {name: vars(best).copy() for name, best in self.grading.best.items()},
            "sums": dict(self.sums),
            "alarms": dict(self.alarms.state),
            "random": _random_state(),
            **({"quantization": self._rounding_state()} if self.grading.before else {}),
        }

    def _rounding_state(self) -> dict[str, Any]:
        models = self.scheme.models.items()
        ranges = {name: model.rounding.ranges() for name, model in models if model.rounding is not None}
        return {"ranges": ranges, "before": dict(self.grading.before)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.adopt(state)
        self.position = Position(**state["position"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, average in self.averages.items():
            average.state = dict(state["averages"][name])
        self.grading.best = {name: Best(**saved) for name, saved in state["best"].items()}
        self.sums = dict(state["sums"])
        if "alarms" in state:  # Absent in a checkpoint of an earlier version.
            self.alarms.restore(state["alarms"])
        if "quantization" in state:
            self.grading.before = dict(state["quantization"]["before"])
            for name, ranges in state["quantization"]["ranges"].items():
                self.scheme.models[name].continue_rounding(ranges)
            self.graph_step = None
        _restore_random_state(state["random"])


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
