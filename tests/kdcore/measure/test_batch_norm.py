import pytest
import torch
from torch import Tensor, nn

from kdcore.classifier import Classifier
from kdcore.data.images import Images, TrainingSet
from kdcore.data.views import Views
from kdcore.measure import batch_norm
from kdcore.spec import CropFlip, Mixup, Training
from tests.kdcore.engine import copied, same


def classifier(*layers: nn.Module) -> Classifier:
    """Of images of one place, whose value is that of their byte."""
    return Classifier(nn.Sequential(nn.Flatten(), *layers), [0.0], [1 / 255])


def pixels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)


def training_set(labels: list[int]) -> TrainingSet:
    """Images whose byte is their label."""
    images = Images(pixels(*labels), torch.tensor(labels))
    return TrainingSet(images, torch.arange(len(labels)), images)


def test_measured_averages_of_two_batches_by_hand():
    """Means 1 and 7; unbiased variances (1 + 1) / 1 = 2 and (9 + 9) / 1 = 18. The variance of all four is 18.7."""
    found = batch_norm.measured(classifier(nn.BatchNorm1d(1, momentum=0.01)), [pixels(0, 2), pixels(4, 10)])
    assert list(found) == ["1.running_mean", "1.running_var"]
    assert found["1.running_mean"].tolist() == pytest.approx([4])
    assert found["1.running_var"].tolist() == pytest.approx([10])


def test_measured_a_layer_gets_what_the_layers_before_normalised_by_their_batch_as_in_training():
    """Both batches become -1 and +1, of mean 0 and unbiased variance 2; by the averages they would be others."""
    found = batch_norm.measured(
        classifier(nn.BatchNorm1d(1, eps=1e-12), nn.BatchNorm1d(1)), [pixels(0, 2), pixels(4, 10)]
    )
    assert found["2.running_mean"].tolist() == pytest.approx([0], abs=1e-6)
    assert found["2.running_var"].tolist() == pytest.approx([2])


def test_measured_leaves_the_classifier_and_the_generator_as_they_were():
    model = classifier(nn.BatchNorm1d(1, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm1d(1))
    model.bf16 = True
    model.train()
    model(pixels(3, 9))
    model.network[2].eval()
    before, modes, state = copied(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    batch_norm.measured(model, [pixels(0, 200)])
    assert same(model.state_dict(), before) and model.network[1].num_batches_tracked.item() == 1
    assert [module.training for module in model.modules()] == modes
    assert model.bf16 and model.network[1].momentum == 0.3
    assert torch.equal(torch.get_rng_state(), state)


def test_measured_leaves_the_classifier_as_it_was_after_an_error_too():
    model = classifier(nn.BatchNorm1d(1))
    before = copied(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm.measured(model, [pixels(1, 2), pixels(1)])
    assert same(model.state_dict(), before) and model.training and model.network[1].momentum == 0.1


@pytest.mark.parametrize("training", [True, False])
def test_measured_has_no_dropout_and_does_not_depend_on_the_mode(training):
    with_dropout = classifier(nn.Dropout(0.9), nn.BatchNorm1d(1)).train(training)
    found = batch_norm.measured(with_dropout, [pixels(0, 2), pixels(4, 10)])
    assert found["2.running_mean"].tolist() == pytest.approx([4])


class Frozen(nn.BatchNorm1d):
    """A layer that stays in eval mode, as in fine-tuning."""

    def train(self, mode: bool = True) -> nn.BatchNorm1d:
        return super().train(False)


def test_measured_only_layers_that_learn_and_are_called_and_keep_averages():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learns = self.under_another_name = nn.BatchNorm1d(1, affine=False)
            self.frozen, self.unused = Frozen(1), nn.BatchNorm1d(1)
            self.keeps_none = nn.BatchNorm1d(1, track_running_stats=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.keeps_none(self.frozen(self.learns(images.flatten(1))))

    network = Network()
    found = batch_norm.measured(Classifier(network, [0.0], [1.0]), [pixels(0, 2)])
    assert set(found) == {
        f"{name}.{value}" for name in ("learns", "under_another_name") for value in ("running_mean", "running_var")
    }
    assert found.keys() <= network.state_dict().keys()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_measured_every_kind_of_batch_norm(kind):
    places = {nn.BatchNorm1d: (1,), nn.BatchNorm3d: (1, 1, 1, 1)}.get(kind, (1, 1, 1))
    found = batch_norm.measured(classifier(nn.Unflatten(1, places), kind(1)), [pixels(0, 2), pixels(4, 10)])
    assert found["2.running_mean"].tolist() == pytest.approx([4])
    assert found["2.running_var"].tolist() == pytest.approx([10])


def test_measured_a_network_without_batch_norm_reads_no_image():
    read = iter([pixels(0, 2)])
    assert batch_norm.measured(classifier(nn.Linear(1, 2), nn.GroupNorm(1, 2)), read) == {}
    assert len(list(read)) == 1


def test_measured_counts_the_images():
    counts = []
    batch_norm.measured(classifier(nn.BatchNorm1d(1)), [pixels(0, 2), pixels(1, 2, 3)], counts.append)
    assert counts == [2, 3]


def test_batches_are_whole_the_same_each_time_and_spread_over_a_sorted_set():
    images = training_set([label for label in range(10) for _ in range(30)])
    first, again = (list(batch_norm.batches(images, 64)) for _ in range(2))
    assert [len(batch) for batch in first] == [64] * 4
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(len(batch.unique()) == 10 for batch in first)


def test_batches_are_taken_from_the_rows_that_are_trained_on():
    one = training_set([1, 2, 3, 4, 5, 6])
    one = TrainingSet(one.images, torch.tensor([1, 3, 5]), one.held_out)
    (batch,) = batch_norm.batches(one, 3)
    assert sorted(batch.flatten().tolist()) == [2, 4, 6]


@pytest.mark.parametrize("kind", ["views", "measured"])
def test_of_recipe_yields_views_of_the_first_epoch_or_the_images_themselves(kind):
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    images = Images(image.repeat(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64))
    augmentation = CropFlip(padding=1)
    recipe = Training(augmentation=augmentation, mix=Mixup(), batch_norm=kind, batch_size=3, seed=7)
    one = TrainingSet(images, torch.arange(6), images)
    found = torch.cat(list(batch_norm.of_recipe(one, recipe)))
    rows = torch.cat(
        list(batch_norm.batches(TrainingSet(Images(pixels(*range(6)), images.labels), one.rows, images), 3))
    )
    shown = Views(augmentation, None, 1).batch(images, rows.flatten().long(), 7, epoch=0).inputs
    assert torch.equal(found, shown if kind == "views" else images.pixels)
    assert not torch.equal(shown, images.pixels), "a view is not the image"


@pytest.mark.parametrize(
    ("images", "size", "count"), [(45_000, 64, 32), (100, 18, 5), (5000, 4096, 1), (2048, 2048, 1), (64, 64, 1)]
)
def test_batches_in_counts_whole_batches_of_at_most_2048_images(images, size, count):
    assert batch_norm.batches_in(images, size) == count
