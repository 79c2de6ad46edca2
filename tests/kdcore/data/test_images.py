import numpy as np
import pytest
import torch

from kdcore.catalog import named_facts
from kdcore.data.images import Data, Images, Resized, TrainingSet, set_aside, split
from kdcore.spec import Training, Unlabelled


def images(n: int = 4) -> Images:
    return Images(torch.arange(n * 12, dtype=torch.uint8).view(n, 3, 2, 2), torch.arange(n))


def test_images_length_and_rows():
    taken = images().take(torch.tensor([2, 0, 2]))
    assert len(images()) == 4 and len(taken) == 3
    assert taken.labels.tolist() == [2, 0, 2]
    assert torch.equal(taken.pixels[0], images().pixels[2])


def test_images_no_rows():
    assert len(images().take(torch.tensor([], dtype=torch.int64))) == 0


def test_moving_a_data_set_keeps_what_is_known_of_it():
    data = Data(images(), images(2), ("a", "b"), named_facts("digits"))
    moved = data.to("meta")
    assert moved.train.pixels.device.type == "meta" and moved.test.labels.device.type == "meta"
    assert moved.facts == data.facts and moved.class_names == data.class_names


def test_images_joined_rows_stand_one_after_the_other():
    pool = Images(images(3).pixels + 100, torch.full((3,), -1))
    both = images().joined(pool)
    whole = torch.cat([images().pixels, pool.pixels])
    assert len(both) == 7 and both.labels.tolist() == [0, 1, 2, 3, -1, -1, -1]
    for index in ([6, 0, 4, 3, 3], [1, 2], [5], []):
        rows = torch.tensor(index, dtype=torch.int64)
        assert torch.equal(both.take(rows).pixels, whole[rows])
    assert torch.equal(both.pixels[2:6], whole[2:6]) and torch.equal(both.pixels[5:99], whole[5:])


def test_images_three_may_be_joined():
    thrice = images(2).joined(images(3)).joined(images(1))
    assert torch.equal(thrice.pixels[:], torch.cat([images(2).pixels, images(3).pixels, images(1).pixels]))


def test_images_joining_copies_no_pixels():
    one, other = images(), images(3)
    both = one.joined(other)
    other.pixels[1] = 7
    assert (both.take(torch.tensor([5])).pixels == 7).all()
    assert both.to("cpu").pixels is both.pixels


def test_on_another_device_joined_images_are_one_tensor():
    moved = images().joined(images(3)).to("meta")
    assert isinstance(moved.pixels, torch.Tensor) and moved.pixels.shape == (7, 3, 2, 2)
    assert moved.pixels.device.type == moved.labels.device.type == "meta"


RECIPE = Training(validation_fraction=0.2, seed=3)


def labelled() -> Images:
    """Twenty images of two classes; each is filled with its own number."""
    return Images(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20) % 2)


def pool(count: int = 5) -> Images:
    return Images(torch.arange(100, 100 + count, dtype=torch.uint8).view(count, 1, 1, 1), torch.full((count,), -1))


def values(images: Images) -> list[int]:
    return images.pixels[0 : len(images)].flatten().tolist()


def test_training_set_each_image_is_either_trained_on_or_held_out():
    found = TrainingSet.of(labelled(), RECIPE)
    trained = values(found.images.take(found.rows))
    assert sorted([*trained, *values(found.held_out)]) == list(range(20))
    assert len(found.held_out) == 4 and found.held_out.labels.sum() == 2


def test_split_the_held_out_part_is_that_of_the_recipe():
    rows, held_out = split(labelled(), 0.2, 3)
    found = TrainingSet.of(labelled(), RECIPE)
    assert torch.equal(found.rows, rows) and values(found.held_out) == held_out.tolist()


def test_training_set_with_a_validation_split_trains_on_every_training_image():
    found = TrainingSet.of(labelled(), RECIPE, images(2))
    assert found.rows.tolist() == list(range(20)) and found.held_out.labels.tolist() == [0, 1]
    with_pool = found.with_unlabelled(pool(), Unlabelled(source="pool"))
    assert len(with_pool.rows) == 25 and len(with_pool.held_out) == 2


def test_data_without_validation_has_no_validation_split():
    facts = named_facts("digits").model_copy(update={"validation": 2})
    data = Data(images(), images(3), ("a", "b"), facts, images(2))
    assert data.to("meta").val is not None and data.to("meta").val.labels.device.type == "meta"
    assert data.without_validation().val is None and data.without_validation().facts == named_facts("digits")


def test_unlabelled_images_stand_behind_the_labelled_ones_and_none_is_held_out():
    before = TrainingSet.of(labelled(), RECIPE)
    found = before.with_unlabelled(pool(), Unlabelled(source="pool"))
    assert found.rows.tolist() == [*before.rows.tolist(), 20, 21, 22, 23, 24]
    assert values(found.images) == [*range(20), *range(100, 105)]
    assert found.images.labels.tolist() == [*labelled().labels.tolist(), -1, -1, -1, -1, -1]
    assert found.held_out is before.held_out and (found.held_out.labels >= 0).all()


def test_the_pool_alone_is_trained_on_where_labelled_images_are_not_wanted():
    found = TrainingSet.of(labelled(), RECIPE).with_unlabelled(pool(), Unlabelled(source="pool", labelled_too=False))
    assert values(found.images.take(found.rows)) == [100, 101, 102, 103, 104]
    assert len(found.held_out) == 4


def test_training_set_what_was_made_for_labels_alone_is_left_as_it_was():
    before = TrainingSet.of(labelled(), RECIPE)
    before.with_unlabelled(pool(), Unlabelled(source="pool"))
    assert len(before.images) == 20 and len(before.rows) == 16


def test_training_set_all_of_it_goes_to_a_device():
    found = (
        TrainingSet.of(labelled(), RECIPE).with_unlabelled(pool(), Unlabelled(source="pool")).to(torch.device("cpu"))
    )
    assert {found.rows.device.type, found.images.labels.device.type, found.held_out.pixels.device.type} == {"cpu"}


def test_set_aside_each_class_gives_its_share():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    aside = set_aside(labels, 0.1, seed=0)
    assert np.bincount(labels[aside]).tolist() == [10, 5, 1]


def test_set_aside_what_is_left_over_goes_to_the_largest_remainders():
    """13, 13 and 14 at a tenth: 1.3 + 1.3 + 1.4 = 4 in all, and the fourth falls to the third class."""
    labels = np.repeat([0, 1, 2], [13, 13, 14])
    assert np.bincount(labels[set_aside(labels, 0.1, seed=0)]).tolist() == [1, 1, 2]


def test_set_aside_the_same_part_every_time_and_another_by_seed():
    labels = np.arange(1000) % 7
    assert (set_aside(labels, 0.2, 5) == set_aside(labels, 0.2, 5)).all()
    assert (set_aside(labels, 0.2, 5) != set_aside(labels, 0.2, 6)).any()


def test_set_aside_a_class_keeps_its_last_sample():
    assert set_aside(np.arange(5), 0.5, seed=0).sum() == 0
    assert np.bincount(np.array([0, 1, 1])[set_aside(np.array([0, 1, 1]), 0.9, seed=0)]).tolist() == [0, 1]


def test_set_aside_a_small_fraction_of_few_samples_is_still_one():
    assert set_aside(np.zeros(4, dtype=np.int64), 0.05, seed=0).sum() == 1


def test_split_rows_without_a_label_stay_in_training_and_change_nothing_for_the_others():
    labels = torch.arange(90) % 3
    pixels = torch.zeros(120, 1, 2, 2, dtype=torch.uint8)
    train, validation = split(Images(pixels, torch.cat([labels, torch.full((30,), -1)])), 0.1, seed=1)
    assert torch.equal(validation, split(Images(pixels[:90], labels), 0.1, seed=1)[1])
    assert len(train) == 111 and set(range(90, 120)) <= set(train.tolist())


def test_nothing_is_set_aside_where_nothing_is_asked():
    assert not set_aside(np.zeros(100, dtype=np.int64), 0, seed=0).any()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_split_covers_every_row_once_in_rising_order(fraction):
    labels = torch.arange(90) % 3
    train, validation = split(Images(torch.zeros(90, 1, 2, 2, dtype=torch.uint8), labels), fraction, seed=1)
    assert len(validation) == round(90 * fraction)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(90))
    assert (train.diff() > 0).all() and train.dtype == torch.int64


def wide_images(count: int, first: int = 0) -> Images:
    """With a store for boxes, and two sizes that are made of it and of the pixels."""
    pixels = torch.arange(first, first + count * 16, dtype=torch.uint8).view(count, 1, 4, 4)
    wide = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    sized = {6: Resized(pixels, 6), 7: Resized(wide, 7)}
    return Images(pixels, torch.arange(count), sized, wide)


def test_images_another_device_gets_no_second_copy_of_pixels_that_are_resized():
    moved = wide_images(3).to("meta")
    assert moved.wide is not None and moved.wide.device.type == moved.pixels.device.type == "meta"
    assert moved.sized[6].stored is moved.pixels and moved.sized[7].stored is moved.wide


def test_images_joined_are_resized_from_the_joined_ones():
    first, second = wide_images(3), wide_images(2, 100)
    both = first.joined(second)
    assert both.sized[6].stored is both.pixels and both.sized[7].stored is both.wide
    rows = torch.tensor([4, 0, 3])
    for side in (6, 7):
        apart = torch.cat([second.sized[side][1:2], first.sized[side][:1], second.sized[side][:1]])
        assert torch.equal(both.sized[side].index_select(0, rows), apart)
    assert torch.equal(both.wide.index_select(0, rows)[0], second.wide[1])


def test_images_at_a_size_and_for_training():
    images = wide_images(3)
    assert torch.equal(images.at(None).pixels, images.pixels) and not images.at(None).sized
    assert images.at(7).pixels.shape == (3, 1, 7, 7) and images.take(torch.tensor([1])).sized[6].shape == (1, 1, 6, 6)
    index = torch.tensor([2, 0])
    own, six, seven = images.read(index)
    assert torch.equal(own, images.pixels[[2, 0]]) and torch.equal(six, images.sized[6].index_select(0, index))
    assert torch.equal(seven, images.sized[7].index_select(0, index))
    trained = images.for_training([6])
    assert list(trained.sized) == [6] and trained.sized[6].stored is images.wide
    plain = Images(images.pixels, images.labels, images.sized).for_training([6])
    assert plain.sized[6] is images.sized[6]
