import math
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn

from base.errors import LossDiverged
from kdcore.classifier import Classifier, FrozenTeacher
from kdcore.data.images import Images, TrainingSet
from kdcore.lesson import Lesson, Needs, Scheme
from kdcore.measure import batch_norm
from kdcore.objectives import Objective, Setting, build
from kdcore.schemes.mutual import Mutual
from kdcore.schemes.offline import Alone, Offline, Preparation, TeacherAhead
from kdcore.spec import Training
from kdcore.spec.methods.relations import Crd
from kdcore.spec.methods.response import Kd
from kdcore.spec.vocabulary import Pair
from kdcore.training import Observer, StageTraining, hits, known, label_loss
from tests.kdcore.engine import copied, same

RECIPE = {"epochs": 1, "batch_size": 18, "augmentation": "none"}


def classifier(seed: int, dropout: float = 0.0) -> Classifier:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, 2)]
    return Classifier(nn.Sequential(*layers), [0.5], [0.5])


def images(count: int = 40) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 2)


def all_images(recipe: Training) -> TrainingSet:
    return TrainingSet.of(images(), recipe)


def training(
    scheme: Scheme,
    recipe: dict | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    objective: Objective | None = None,
    training_set: TrainingSet | None = None,
    **observe,
) -> StageTraining:
    observer = Observer(**{"metric": lambda *_: None, "after_step": lambda _: None, **observe})
    spec = Training(**{**RECIPE, **(recipe or {})})
    training_set = training_set or all_images(spec)
    return StageTraining(scheme, objective, alpha, beta, 0.0, spec.epochs, spec, training_set, 2, observer)


def setting(temperature: float | None = 4.0) -> Setting:
    return Setting(temperature, num_classes=2, epochs=1, labels=images().labels, rows=torch.arange(40))


def kd_objective() -> Objective:
    return build((Kd(),), setting())[-1]


class Regressor(Objective):
    """Owns a layer between the logits of both."""

    def build(self, lesson: Lesson) -> None:
        self.layer = nn.Linear(2, 2)

    def forward(self, lesson: Lesson) -> Tensor:
        return (self.layer(lesson.student.logits) - lesson.teacher.logits).square().mean()


def test_stage_training_two_steps_change_every_weight_of_the_student_and_none_of_the_teacher():
    student, teacher = classifier(0), FrozenTeacher(classifier(1))
    before, frozen = copied(student.state_dict()), copied(teacher.state_dict())
    training(Offline(student, teacher), {}, 0.1, 0.9, kd_objective()).run()
    assert all(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert same(teacher.state_dict(), frozen)


def test_stage_training_the_loss_is_alpha_labels_plus_beta_distillation():
    points = []
    scheme = Offline(classifier(0), FrozenTeacher(classifier(1)))
    training(scheme, {}, 0.3, 0.7, kd_objective(), metric=lambda *point: points.append(point)).run()
    ((step, epoch, values),) = points
    assert (step, epoch) == (2, 1)
    by_hand = 0.3 * values["train/label_loss"] + 0.7 * values["train/distillation_loss"]
    assert values["train/loss"] == pytest.approx(by_hand, rel=1e-5)


def test_stage_training_one_sgd_step_as_worked_out_with_autograd():
    """One batch of all 36 training rows: w - lr · (gradient + decay · w)."""
    student = classifier(0)
    one = training(Alone(student), {"batch_size": 36, "optimizer": {"name": "sgd", "lr": 0.5, "weight_decay": 0.1}})
    rows = one.training_set.images.take(one.training_set.rows)
    loss = nn.functional.cross_entropy(student(rows.pixels).logits, rows.labels)
    weight = student.network[1].weight
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = (weight - 0.5 * (gradient + 0.1 * weight)).detach().clone()
    one.run()
    assert torch.allclose(weight, expected, atol=1e-6)


def moved(model: nn.Module, start: list[Tensor]) -> float:
    return torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start, strict=True)]).norm().item()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stage_training_a_teacher_that_runs_ahead_teaches_the_same_bits_and_resumes_at_any_step(steps):
    """Two epochs of two steps; it is stopped after some of them, and goes on from its state."""

    class Stop(Exception):
        pass

    def taught(teacher, **fields):
        return training(Offline(classifier(0, 0.5), teacher), {"epochs": 2}, 0.1, 0.9, kd_objective(), **fields)

    in_turn, states = taught(FrozenTeacher(classifier(1))), []
    in_turn.run()

    def stop(one: StageTraining) -> None:
        states.append(copied(one.state()))
        if len(states) == steps:
            raise Stop

    with closing(TeacherAhead(FrozenTeacher(classifier(1)), 1)) as ahead:
        stopped = taught(ahead, after_step=stop)
        with pytest.raises(Stop):
            stopped.run()
    with closing(TeacherAhead(FrozenTeacher(classifier(1)), 1)) as ahead:
        resumed = taught(ahead)
        resumed.restore(states[-1])
        resumed.run()
    assert same(resumed.learners.state_dict(), in_turn.learners.state_dict())
    assert same(resumed.grading.best["student"].weights, in_turn.grading.best["student"].weights)


def test_stage_training_clipping_bounds_the_step_of_each_student_by_itself():
    """Were the gradients of both clipped as one, the two ways would only together be as long as that."""
    recipe = {"batch_size": 36, "clip_norm": 1e-3, "optimizer": {"name": "sgd", "lr": 1.0, "weight_decay": 0}}
    for students in ([classifier(0)], [classifier(0), classifier(1)]):
        starts = [[p.detach().clone() for p in student.parameters()] for student in students]
        scheme = Alone(students[0]) if len(students) == 1 else Mutual(students)
        training(scheme, recipe).run()
        ways = [moved(student, start) for student, start in zip(students, starts, strict=True)]
        assert ways == pytest.approx([1e-3] * len(students), rel=1e-3)


def test_stage_training_every_student_has_an_optimizer_of_its_own_and_what_an_objective_owns_joins_the_first():
    students = [classifier(0), classifier(1)]
    one = training(Mutual(students), {}, 1.0, 1.0, Regressor())
    held = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in one.optimizers]
    assert [len(parameters) for parameters in held] == [4 + 2, 4]
    assert {id(p) for p in students[1].parameters()} == {id(p) for p in held[1]}
    assert {id(p) for p in one.objective.parameters()} <= {id(p) for p in held[0]}


def test_stage_training_peers_that_ignore_each_other_learn_as_if_alone():
    """With beta 0 nothing of one student reaches the other."""
    together, alone = [classifier(0), classifier(1)], classifier(1)
    training(Mutual(together), {}, 1.0, 0.0).run()
    training(Alone(alone)).run()
    assert same(together[1].state_dict(), alone.state_dict())


def test_stage_training_what_weighs_nothing_is_not_even_decayed():
    """A stage that only compares hidden features leaves the classifier above them as it found it."""

    class Hidden(Objective):
        needs = Needs(("2",), ("2",))

        def forward(self, lesson: Lesson) -> Tensor:
            return (lesson.student.taps["2"] - lesson.teacher.taps["2"]).square().mean()

    student, objective = classifier(0), Hidden()
    before = copied(student.state_dict())
    scheme = Offline(student, FrozenTeacher(classifier(1)), objective.needs)
    training(scheme, {"optimizer": {"name": "sgd", "weight_decay": 0.1}}, 0.0, 1.0, objective).run()
    same_names = {name for name, value in student.state_dict().items() if torch.equal(value, before[name])}
    assert same_names == {"network.4.weight", "network.4.bias"}


def test_stage_training_a_stage_that_weighs_nothing_at_all_changes_nothing():
    student = classifier(0)
    before = copied(student.state_dict())
    training(Offline(student, FrozenTeacher(classifier(1))), {}, 0.0, 0.0, kd_objective()).run()
    assert same(student.state_dict(), before)


def test_stage_training_without_a_student_only_the_objective_learns_and_nothing_comes_out():
    teacher, objective, points = FrozenTeacher(classifier(1)), Regressor(), []
    frozen = copied(teacher.state_dict())
    one = training(
        Preparation(teacher, objective.needs), {}, 0.0, 1.0, objective, metric=lambda *point: points.append(point[2])
    )
    before = copied(objective.state_dict())
    assert one.run() == {}
    assert all(not torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert same(teacher.state_dict(), frozen)
    assert set(points[0]) == {"train/loss", "train/label_loss", "train/distillation_loss", "train/lr"}


def test_known_unknown_labels_are_counted_neither_in_the_loss_nor_in_the_accuracy():
    """Images of row 20 and later have lost their labels."""
    labelled = all_images(Training(**RECIPE))
    rows = labelled.rows
    unknown = Images(labelled.images.pixels, torch.where(torch.arange(40) < 20, labelled.images.labels, -1))
    student, points = classifier(0), []
    known = unknown.take(rows[rows < 20])
    expected = nn.functional.cross_entropy(student(known.pixels).logits, known.labels).item()
    right = (student(known.pixels).logits.argmax(1) == known.labels).float().mean().item()
    training(
        Alone(student), {"batch_size": 36}, training_set=TrainingSet(unknown, rows, labelled.held_out),
        metric=lambda *point: points.append(point[2]),
    ).run()  # fmt: skip
    assert points[0]["train/label_loss"] == pytest.approx(expected, rel=1e-5)
    assert points[0]["train/accuracy"] == pytest.approx(right)


def test_stage_training_the_average_is_exported_and_the_network_trains_on_undisturbed():
    plain, averaged = classifier(0), classifier(0)
    one = training(Alone(plain), {"epochs": 3}).run()["student"]
    other = training(Alone(averaged), {"epochs": 3, "ema": 0.5}).run()["student"]
    name = "1.weight"
    assert torch.equal(plain.network[1].weight, averaged.network[1].weight)
    assert torch.equal(one.last[name], plain.network[1].weight) and not torch.equal(one.last[name], other.last[name])


def test_stage_training_statistics_are_measured_once_an_epoch_and_after_its_end_only_where_it_was_resumed(monkeypatch):
    """So small a rate changes no answer: the first epoch stays the best."""
    measured, states, of = [], [], batch_norm.measured
    monkeypatch.setattr(batch_norm, "measured", lambda *args: measured.append(1) or of(*args))
    recipe = {"epochs": 3, "optimizer": {"name": "sgd", "lr": 1e-9}}
    one = training(**with_batch_norm(0), recipe=recipe, after_step=lambda one: states.append(copied(one.state())))
    done = one.run()["student"]
    assert done.best_epoch == 1 and len(measured) == 3
    resumed = training(**with_batch_norm(0), recipe=recipe)
    resumed.restore(states[-1])
    again = resumed.run()["student"]
    assert len(measured) == 4 and same(again.last, done.last) and same(again.best, done.best)


def test_the_best_epoch_on_the_held_out_part_is_kept():
    accuracies = []
    done = training(
        Alone(classifier(0)), {"epochs": 5}, metric=lambda *point: accuracies.append(point[2]["validation/accuracy"])
    ).run()["student"]
    assert done.best_accuracy == max(accuracies) and accuracies[done.best_epoch - 1] == max(accuracies)
    assert done.best_epoch == accuracies.index(max(accuracies)) + 1


def test_each_model_that_comes_out_is_graded_and_kept_at_its_own_best():
    points = []
    done = training(
        Mutual([classifier(0), classifier(1)]), {"epochs": 4}, metric=lambda *point: points.append(point[2])
    ).run()
    assert list(done) == ["student", "student-2"]
    for name, key in (("student", "validation/accuracy"), ("student-2", "validation/student-2/accuracy")):
        accuracies = [values[key] for values in points]
        assert done[name].best_accuracy == max(accuracies)
        assert done[name].best_epoch == accuracies.index(max(accuracies)) + 1
    assert not same(done["student"].last, done["student-2"].last)


def test_stage_training_no_held_out_image_is_trained_on():
    seen = set()
    one = training(Alone(classifier(0)), {"epochs": 4, "validation_fraction": 0.25, "batch_size": 5})
    run = one.scheme.run
    one.scheme.run = lambda batch: (seen.update(batch.index.tolist()), run(batch))[1]
    one.run()
    assert len(seen) == 30 and len(one.training_set.held_out) == 10


def test_stage_training_a_batch_knows_its_epoch():
    epochs = []
    one = training(Alone(classifier(0)), {"epochs": 3})
    run = one.scheme.run
    one.scheme.run = lambda batch: (epochs.append(batch.epoch), run(batch))[1]
    one.run()
    assert epochs == [0, 0, 1, 1, 2, 2]


def test_stage_training_an_objective_is_built_from_a_lesson_that_moves_nothing():
    student = Classifier(nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2), nn.Flatten()), [0.5], [0.5])
    before, modes = copied(student.state_dict()), []

    class Watching(Regressor):
        def build(self, lesson: Lesson) -> None:
            super().build(lesson)
            modes.append((student.training, lesson.student.logits.requires_grad))

    training(Offline(student, FrozenTeacher(classifier(1))), {}, 1.0, 1.0, Watching())
    assert modes == [(False, False)] and same(student.state_dict(), before)


def test_stage_training_figures_that_an_objective_observes_are_averaged_over_the_steps_of_a_point():
    class Counting(Regressor):
        steps = 0

        def forward(self, lesson: Lesson) -> Tensor:
            self.steps += self.training
            self.observed["steps"] = torch.tensor(float(self.steps))
            return super().forward(lesson)

    points = []
    scheme = Offline(classifier(0), FrozenTeacher(classifier(1)))
    training(scheme, {"epochs": 2}, 1.0, 1.0, Counting(), metric=lambda *point: points.append(point[2])).run()
    assert [values["train/steps"] for values in points] == [1.5, 3.5]


def test_stage_training_a_loss_that_is_no_number_ends_the_training():
    class Broken(Regressor):
        def forward(self, lesson: Lesson) -> Tensor:
            return super().forward(lesson) * float("nan")

    with pytest.raises(LossDiverged, match="epoch 1"):
        training(Offline(classifier(0), FrozenTeacher(classifier(1))), {}, 1.0, 1.0, Broken()).run()


def test_stage_training_a_student_that_a_last_step_broke_ends_the_training_too():
    """The step itself sees a loss that is a number; weight decay of 10 at a rate of 100 makes weights of 1e39."""
    student = classifier(0)
    with torch.no_grad():
        student.network[4].weight.fill_(1e36)
    recipe = {"batch_size": 36, "optimizer": {"name": "sgd", "lr": 100, "weight_decay": 10}}
    with pytest.raises(LossDiverged, match="epoch 1"):
        training(Alone(student), recipe).run()


def alone(seed: int) -> dict:
    return {"scheme": Alone(classifier(seed))}


def with_dropout(seed: int) -> dict:
    """Dropout draws from torch's generator at every step."""
    return {"scheme": Alone(classifier(seed, dropout=0.5))}


def with_batch_norm(seed: int, momentum: float | None = 0.01) -> dict:
    """Its running averages are far from its statistics after a few steps."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    return {"scheme": Alone(Classifier(nn.Sequential(*layers, nn.Linear(16, 2)), [0.5], [0.5]))}


def peers(seed: int) -> dict:
    return {"scheme": Mutual([classifier(seed, 0.2), classifier(seed + 1)]), "beta": 1.0, "objective": kd_objective()}


def contrastive(seed: int) -> dict:
    """Negatives are drawn at every step; memories and normalisers are remembered."""
    tap = Pair(student="4@in", teacher="4@in")
    objective = build((Crd(tap=tap, negatives=4, width=8),), setting(None))[-1]
    scheme = Offline(classifier(seed), FrozenTeacher(classifier(9)), objective.needs)
    return {"scheme": scheme, "beta": 1.0, "objective": objective}


STATISTICS = {"1.running_mean", "1.running_var"}


def test_stage_training_delivers_measured_statistics_and_trains_on_with_its_own():
    """The two kinds of statistics make the same training: the same points of it, and the same weights."""
    ended, points = {}, {}
    for kind in ("measured", "running"):
        one = training(
            **with_batch_norm(0), recipe={"epochs": 3, "batch_norm": kind},
            metric=lambda *point: points.setdefault(kind, []).append(point[2]),  # noqa: B023
        )  # fmt: skip
        ended[kind] = one, one.run()["student"]
    measured, running = (one for one, _ in ended.values())
    assert same(measured.learners.state_dict(), running.learners.state_dict())
    own = measured.scheme.models["student"].network.state_dict()
    assert own["1.num_batches_tracked"].item() == 6
    for one, other in zip(*points.values(), strict=True):
        assert {k for k in one if one[k] != other[k]} <= {"validation/accuracy", "validation/loss"}
        assert one["validation/loss"] != other["validation/loss"]
    deliver = ended["measured"][1].last
    assert {name for name, value in deliver.items() if not torch.equal(value, own[name])} == STATISTICS
    assert same(ended["running"][1].last, own)


def recomputed(one: StageTraining, weights: dict) -> Tensor:
    """The mean of the first layer, by hand: its batches have equal size, so it is the mean over all their images."""
    chosen = torch.cat(list(batch_norm.batches(one.training_set, one.recipe.batch_size)))
    images = (chosen.float() / 255 - 0.5) / 0.5
    return nn.functional.conv2d(images, weights["0.weight"], weights["0.bias"]).mean((0, 2, 3))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_stage_training_the_statistics_are_those_of_the_delivered_weights_averaged_or_not(ema):
    one = training(**with_batch_norm(0), recipe={"epochs": 4, "ema": ema})
    outcome = one.run()["student"]
    for weights in (outcome.best, outcome.last):
        assert torch.allclose(weights["1.running_mean"], recomputed(one, weights), atol=1e-6)
    network = one.scheme.models["student"].network
    assert torch.equal(outcome.last["0.weight"], network[0].weight) == (ema is None)


def test_stage_training_draws_nothing_for_the_measurement():
    one = training(**with_batch_norm(0))
    state = torch.get_rng_state()
    one._end_epoch = lambda: None
    one.run()
    assert torch.equal(torch.get_rng_state(), state) is False, "the dropout of the steps draws"
    state = torch.get_rng_state()
    one.grading.graded("student")
    assert torch.equal(torch.get_rng_state(), state)


def test_stage_training_without_batch_norm_both_kinds_of_statistics_are_the_same_bits():
    made = [training(**with_dropout(0), recipe={"epochs": 2, "batch_norm": kind}) for kind in ("measured", "running")]
    states = []
    for one in made:
        torch.manual_seed(1)
        outcome = one.run()["student"]
        assert one.grading.compare_statistics("student", outcome) is None
        states.append((outcome.best, outcome.last))
    assert same(states[0][0], states[1][0]) and same(states[0][1], states[1][1])


def prepared(seed: int) -> dict:
    torch.manual_seed(seed)
    return {"scheme": Preparation(FrozenTeacher(classifier(9)), Regressor().needs), "alpha": 0.0, "beta": 1.0,
            "objective": Regressor()}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("made", [alone, with_dropout, with_batch_norm, peers, contrastive, prepared])
def test_stage_training_a_state_restored_anywhere_goes_on_to_the_same_bits(made, optimizer):
    """Restored into a training that began otherwise, after every step of three epochs."""
    recipe, states, points = {"epochs": 3, "ema": 0.9, "optimizer": optimizer}, [], []
    whole = training(
        **made(0), recipe=recipe, metric=lambda *point: points.append(point),
        after_step=lambda t: states.append((copied(t.state()), len(points))),
    ).run()  # fmt: skip
    assert len(states) == 6
    for state, count in states:
        later = []
        again = training(**made(5), recipe=recipe, metric=lambda *point: later.append(point))  # noqa: B023
        again.restore(state)
        done = again.run()
        assert points[:count] + later == points
        assert done.keys() == whole.keys()
        for name, outcome in whole.items():
            assert same(done[name].last, outcome.last) and same(done[name].best, outcome.best)
            assert (done[name].best_epoch, done[name].best_accuracy) == (outcome.best_epoch, outcome.best_accuracy)
        assert same(again.state()["objective"], states[-1][0]["objective"])


def test_stage_training_what_a_stage_learned_is_adopted_without_its_optimizer():
    one = training(**contrastive(0))
    one.run()
    other = training(**contrastive(5))
    other.adopt(one.learned())
    assert same(other.learners.state_dict(), one.learners.state_dict())
    assert same(other.objective.state_dict(), one.objective.state_dict())
    assert other.position.epoch == 0 and not other.optimizers[0].state


LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])


def test_label_loss_value_worked_out_by_hand():
    """p of the right class: 3/4 and 1/2."""
    by_hand = -(math.log(0.75) + math.log(0.5)) / 2
    assert label_loss(LOGITS, torch.tensor([0, 1])).item() == pytest.approx(by_hand)


def test_label_loss_smoothing_moves_its_share_to_all_classes():
    """s = 0.2 on two classes: targets 0.9 and 0.1."""
    by_hand = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert label_loss(LOGITS[:1], torch.tensor([0]), smoothing=0.2).item() == pytest.approx(by_hand)


def test_label_loss_mixed_labels_weigh_both_classes():
    by_hand = -(0.3 * math.log(0.75) + 0.7 * math.log(0.25))
    assert label_loss(LOGITS[:1], torch.tensor([[0.3, 0.7]])).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_loss_an_unknown_label_is_left_out_of_sum_and_count(smoothing):
    """The mean is over the known ones: as if the others were not in the batch, and with no gradient for them."""
    logits = torch.cat([LOGITS, torch.tensor([[5.0, -5.0]])]).requires_grad_()
    loss = label_loss(logits, torch.tensor([0, 1, -1]), smoothing=smoothing)
    assert loss.item() == pytest.approx(label_loss(LOGITS, torch.tensor([0, 1]), smoothing=smoothing).item())
    loss.backward()
    assert logits.grad[2].abs().sum() == 0 and (logits.grad[:2].abs().sum(1) > 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_loss_a_batch_of_unknown_labels_costs_nothing_and_teaches_nothing(smoothing):
    logits = LOGITS.clone().requires_grad_()
    loss = label_loss(logits, torch.tensor([-1, -1]), smoothing=smoothing)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_known_counts_what_hits_are_a_share_of():
    assert known(torch.tensor([0, -1, 1])).item() == 2
    assert known(torch.tensor([-1, -1])).item() == 1
    assert known(torch.tensor([[0.3, 0.7], [0.5, 0.5]])).item() == 2


def test_hits_count_the_heavier_of_two_mixed_labels():
    assert hits(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])).item() == 1
    assert hits(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.6, 0.4]])).item() == 1


def test_hits_an_answer_to_an_unknown_label_is_no_hit():
    assert hits(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([-1, 1])).item() == 1
