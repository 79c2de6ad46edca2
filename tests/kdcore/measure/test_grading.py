"""The grading of models after an epoch, without a training where none is needed."""

import math

import pytest
import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.data.images import Images, TrainingSet
from kdcore.measure.grading import Grading
from kdcore.optimizer import Average
from kdcore.spec import Training
from tests.kdcore.engine import copied, same
from tests.kdcore.test_training import recomputed, training, with_batch_norm

STATISTICS = {"1.running_mean", "1.running_var"}
RECIPE = Training(epochs=3, batch_size=4, augmentation="none", batch_norm="measured")


def dark_and_bright(count: int = 12) -> TrainingSet:
    """Black images are of class 0 and white ones of class 1; the last four are held out."""
    labels = torch.arange(count) % 2
    images = Images((labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), labels)
    return TrainingSet(images, torch.arange(count - 4), images.take(torch.arange(count - 4, count)))


def linear(*weights: float) -> Classifier:
    """The logit of a class is its weight times the sum of the pixels, which are -1 or 1."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)), [0.5], [0.5])
    set_weights(model, *weights)
    return model


def set_weights(model: Classifier, *weights: float) -> None:
    with torch.no_grad():
        model.network[1].weight.copy_(torch.tensor(weights)[:, None].expand(2, 4))


def grading(model: Classifier, averages: dict | None = None, **models: Classifier) -> Grading:
    return Grading({"student": model, **models}, averages or {}, dark_and_bright(), RECIPE, RECIPE.epochs)


def test_grade_measures_each_model_on_the_held_out_images_by_its_name():
    """Pixels of 1 and -1 give logits of 4 and 0, or 0 and -4: each loss is log(1 + e^-4) if right."""
    seen = []
    one = grading(linear(0, 1), peer=linear(1, 0))
    figures = one.grade(0, seen.append)
    right = math.log1p(math.exp(-4))
    assert figures == pytest.approx({
        "validation/accuracy": 1.0, "validation/loss": right,
        "validation/peer/accuracy": 0.0, "validation/peer/loss": right + 4,
    })  # fmt: skip
    assert seen == [4, 4], "the held-out images, once for each model"


def test_grade_keeps_the_first_of_the_best_epochs():
    model = linear(1, 0)
    one = grading(model)
    for epoch, weights in enumerate([(1, 0), (0, 1), (0, 2)]):
        set_weights(model, *weights)
        one.grade(epoch)
    best, outcome = one.best["student"], one.outcomes()["student"]
    assert (best.epoch, best.accuracy) == (2, 1.0) and best.weights["1.weight"][1].tolist() == [1.0] * 4
    assert same(outcome.best, best.weights) and outcome.last["1.weight"][1].tolist() == [2.0] * 4
    assert (outcome.best_epoch, outcome.best_accuracy, outcome.epochs) == (2, 1.0, 3)


def test_grade_takes_the_average_and_leaves_the_network_as_it_was():
    model = linear(0, 1)
    average = Average(model.network, 0.5)
    set_weights(model, 3, 0)
    own = copied(model.network.state_dict())
    one = grading(model, {"student": average})
    assert one.grade(0)["validation/accuracy"] == 1
    assert same(one.best["student"].weights, average.state) and same(model.network.state_dict(), own)


def test_begin_again_goes_on_from_the_average_and_forgets_the_best_epoch():
    """Two models that share a layer: both are graded before the first one changes it."""
    model = linear(0, 1)
    peer = Classifier(model.network, [0.5], [0.5])
    averages = {"student": Average(model.network, 0.5)}
    set_weights(model, 5, 6)
    one = grading(model, averages, peer=peer)
    one.grade(0)
    one.begin_again()
    assert {name: best.epoch for name, best in one.best.items()} == {"student": 0, "peer": 0}
    assert one.before["student"]["1.weight"][:, 0].tolist() == [0, 1]
    assert one.before["peer"]["1.weight"][:, 0].tolist() == [5, 6]
    assert model.network[1].weight[:, 0].tolist() == [5, 6], "the network has what was loaded last"


def test_outcomes_grade_the_last_epoch_again_where_it_was_not_graded_here():
    """As in a stage that was resumed after its last epoch."""
    model = linear(0, 1)
    one, resumed = grading(model), grading(model)
    for epoch in range(3):
        one.grade(epoch)
    resumed.best = one.best
    assert same(resumed.outcomes()["student"].last, one.outcomes()["student"].last)


@pytest.mark.parametrize(("kind", "replaced"), [("measured", STATISTICS), ("running", set())])
def test_graded_replaces_the_running_averages_by_measured_statistics_unless_the_recipe_keeps_them(kind, replaced):
    one = training(**with_batch_norm(0), recipe={"batch_norm": kind})
    own = copied(one.scheme.models["student"].network.state_dict())
    weights, running = one.grading.graded("student")
    assert {name for name, value in weights.items() if not torch.equal(value, own[name])} == replaced == set(running)
    assert all(torch.equal(value, own[name]) for name, value in running.items())
    if replaced:
        assert torch.allclose(weights["1.running_mean"], recomputed(one, own), atol=1e-6)


def bright_or_dark() -> TrainingSet:
    """Two classes that one place tells apart; 100 images are held out."""
    labels = torch.arange(300) % 2
    pixels = torch.randint(0, 40, (300, 1, 4, 4), generator=torch.Generator().manual_seed(0)) + 120
    pixels[labels == 1] += 60
    images = Images(pixels.to(torch.uint8), labels)
    return TrainingSet(images, torch.arange(200), images.take(torch.arange(200, 300)))


@pytest.mark.parametrize(("kind", "kept"), [("measured", STATISTICS), ("running", set())])
def test_grading_compare_statistics_finds_averages_that_have_not_converged(kind, kept):
    one = training(**with_batch_norm(0, 1e-6), recipe={"epochs": 4, "batch_norm": kind}, training_set=bright_or_dark())
    outcome = one.run()["student"]
    weights = copied(one.learners.state_dict())
    measured, running = one.grading.compare_statistics("student", outcome)
    assert measured > running + 0.2
    assert outcome.best_accuracy == (measured if kind == "measured" else running)
    assert set(outcome.running) == kept
    assert same(one.learners.state_dict(), weights)


def test_grading_compare_statistics_is_content_with_averages_that_have_converged():
    recipe = {"epochs": 8, "optimizer": {"name": "sgd", "lr": 1e-3}}
    one = training(**with_batch_norm(0, 0.1), recipe=recipe, training_set=bright_or_dark())
    outcome = one.run()["student"]
    assert one.grading.compare_statistics("student", outcome) is None and outcome.running == {}
