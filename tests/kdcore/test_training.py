import pytest
import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.data import Images
from kdcore.objectives import build
from kdcore.schemes.alone import Alone
from kdcore.schemes.offline import Offline
from kdcore.spec import JobSpec
from kdcore.spec import Training as Recipe
from kdcore.teacher import FrozenTeacher
from kdcore.training import Loss, Observer, Training


def classifier(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2)), [0.5], [0.5])


def images(count: int = 40) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 2)


def training(scheme, recipe: dict, alpha: float = 1.0, beta: float = 0.0, objective=None, **observe) -> Training:
    observer = Observer(**{"metric": lambda *_: None, "after_step": lambda _: None, **observe})
    spec = Recipe(**{"epochs": 1, "batch_size": 18, "augmentation": "none", **recipe})
    return Training(scheme, Loss(alpha, beta, 0.0, objective), spec, images(), 2, observer)


def kd_objective():
    body = {"dataset": "x", "teacher": {"checkpoint": "file:t"}, "student": "resnet8", "method": "kd"}
    return build(JobSpec.model_validate({**body, "temperature": 4.0, "alpha": 0.1, "beta": 0.9}))


def test_two_steps_change_every_weight_of_the_student_and_none_of_the_teacher():
    student, teacher = classifier(0), FrozenTeacher(classifier(1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    training(Offline(student, teacher), {}, 0.1, 0.9, kd_objective()).run()
    assert all(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


def test_the_loss_is_alpha_labels_plus_beta_distillation():
    points = []
    scheme = Offline(classifier(0), FrozenTeacher(classifier(1)))
    training(scheme, {}, 0.3, 0.7, kd_objective(), metric=lambda *point: points.append(point)).run()
    ((step, epoch, values),) = points
    assert (step, epoch) == (2, 1)
    by_hand = 0.3 * values["train/label_loss"] + 0.7 * values["train/distillation_loss"]
    assert values["train/loss"] == pytest.approx(by_hand, rel=1e-5)


def test_one_sgd_step_as_worked_out_with_autograd():
    """One batch of all 36 training rows: w - lr · (gradient + decay · w)."""
    student = classifier(0)
    one = training(Alone(student), {"batch_size": 36, "optimizer": {"name": "sgd", "lr": 0.5, "weight_decay": 0.1}})
    rows = one.images.take(one.index)
    loss = nn.functional.cross_entropy(student(rows.pixels).logits, rows.labels)
    weight = student.network[1].weight
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = (weight - 0.5 * (gradient + 0.1 * weight)).detach().clone()
    one.run()
    assert torch.allclose(weight, expected, atol=1e-6)


def test_clipping_bounds_the_step():
    student = classifier(0)
    start = [p.detach().clone() for p in student.parameters()]
    recipe = {"batch_size": 36, "clip_norm": 1e-3, "optimizer": {"name": "sgd", "lr": 1.0, "weight_decay": 0}}
    training(Alone(student), recipe).run()
    moved = torch.cat([(p - q).flatten() for p, q in zip(student.parameters(), start, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_average_is_exported_and_the_network_trains_on_undisturbed():
    plain, averaged = classifier(0), classifier(0)
    one = training(Alone(plain), {"epochs": 3}).run()
    other = training(Alone(averaged), {"epochs": 3, "ema": 0.5}).run()
    name = "1.weight"
    assert torch.equal(plain.network[1].weight, averaged.network[1].weight)
    assert not torch.equal(one.last[name], other.last[name])


def test_the_best_epoch_on_the_held_out_part_is_kept():
    accuracies = []
    done = training(
        Alone(classifier(0)), {"epochs": 5}, metric=lambda *point: accuracies.append(point[2]["validation/accuracy"])
    ).run()
    assert done.best_accuracy == max(accuracies) and accuracies[done.best_epoch - 1] == max(accuracies)
    assert done.best_epoch == accuracies.index(max(accuracies)) + 1


def test_no_held_out_image_is_trained_on():
    seen = set()
    one = training(Alone(classifier(0)), {"epochs": 4, "validation_fraction": 0.25, "batch_size": 5})
    batch = one._batch
    one._batch = lambda index: (seen.update(index.tolist()), batch(index))[1]
    one.run()
    assert len(seen) == 30 and len(one.held_out) == 10


def test_a_state_restored_anywhere_goes_on_to_the_same_weights():
    states = []
    whole = training(
        Alone(classifier(0)), {"epochs": 3, "ema": 0.9}, after_step=lambda t: states.append(_copied(t.state()))
    ).run()
    for state in states:
        again = training(Alone(classifier(5)), {"epochs": 3, "ema": 0.9})
        again.restore(state)
        done = again.run()
        assert all(torch.equal(done.last[name], whole.last[name]) for name in whole.last)
        assert all(torch.equal(done.best[name], whole.best[name]) for name in whole.best)


def _copied(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state
