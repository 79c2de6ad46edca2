import math

import pytest
import torch

from kdcore.data import views
from kdcore.data.images import Images, TrainingSet
from kdcore.data.views import Batches, Views, order
from kdcore.spec import CachedViews, CropFlip, Cutmix, Mixup, NoAugmentation, RandomResizedCrop, Training

AUGMENTATIONS = [NoAugmentation(), CropFlip(), CropFlip(padding=2, flip=False), RandomResizedCrop()]


def noise(n: int = 300, channels: int = 3, side: int = 8) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 5)


def test_order_is_a_permutation_and_another_one_each_epoch():
    first, second = order(1000, seed=1, epoch=0), order(1000, seed=1, epoch=1)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, order(1000, seed=1, epoch=0))
    assert not torch.equal(first, second)
    assert not torch.equal(first, order(1000, seed=2, epoch=0))
    assert order(0, 0, 0).tolist() == [] and order(1, 0, 0).tolist() == [0]


def test_order_never_changes():
    """Resumed jobs rely on it: these numbers are part of the format."""
    assert order(8, seed=7, epoch=3).tolist() == [5, 1, 6, 0, 4, 7, 2, 3]


def batches(epoch: int, first_step: int = 0) -> Batches:
    """Of 22 rows that are trained on, in batches of 5."""
    recipe = Training(epochs=4, batch_size=5, augmentation="crop_flip", seed=3)
    training_set = TrainingSet(noise(30), torch.arange(4, 26), noise(4))
    return Batches(training_set, recipe, Views.of(recipe, 5), epoch, first_step)


def test_batches_are_complete_in_the_order_of_the_epoch_and_leave_a_remainder_out():
    whole = batches(2)
    expected = torch.arange(4, 26)[order(22, seed=3, epoch=2)][:20]
    assert torch.equal(whole.rows(), expected)
    made = list(whole)
    assert torch.equal(torch.stack([batch.index for batch in made]), expected.view(4, 5))
    for batch in made:
        own = whole.views.batch(whole.training_set.images, batch.index, seed=3, epoch=2)
        assert torch.equal(batch.inputs, own.inputs) and batch.epoch == own.epoch == 2
        assert torch.equal(whole.of(batch.index).inputs, batch.inputs)
    assert not torch.equal(batches(3).rows(), expected)


@pytest.mark.parametrize("first", [0, 3, 4])
def test_batches_from_a_step_on_are_the_rest_and_the_rows_are_expected_in_their_order(first, monkeypatch):
    whole, announced = list(batches(1)), []
    monkeypatch.setattr(Images, "expect", lambda _, rows: announced.append(rows.tolist()))
    rest = batches(1, first)
    assert torch.equal(rest.rows(), batches(1).rows())
    made = list(rest)
    assert [batch.index.tolist() for batch in made] == [batch.index.tolist() for batch in whole[first:]]
    assert announced == [[row for batch in whole[first:] for row in batch.index.tolist()]]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: a.name)
def test_views_a_view_does_not_depend_on_the_batch_around_it(augmentation):
    images, seen = noise(), Views(augmentation, None, 5)
    whole = seen.batch(images, torch.arange(300), seed=3, epoch=2)
    for index in (torch.tensor([17]), torch.tensor([250, 17, 17, 3]), torch.arange(299, -1, -1)):
        part = seen.batch(images, index, seed=3, epoch=2)
        assert torch.equal(part.inputs, whole.inputs[index]) and torch.equal(part.labels, whole.labels[index])
    pixels = whole.inputs
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and pixels.shape == images.pixels.shape


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:], ids=lambda a: a.name)
def test_views_differ_by_epoch_and_by_seed(augmentation):
    images, seen, index = noise(), Views(augmentation, None, 5), torch.arange(300)
    first = seen.batch(images, index, seed=0, epoch=0).inputs
    assert not torch.equal(first, seen.batch(images, index, seed=0, epoch=1).inputs)
    assert not torch.equal(first, seen.batch(images, index, seed=1, epoch=0).inputs)


def test_views_no_augmentation_is_the_images_themselves():
    images = noise()
    batch = Views(NoAugmentation(), None, 5).batch(images, torch.tensor([5, 0]), seed=0, epoch=0)
    assert torch.equal(batch.inputs, images.pixels[[5, 0]])


def test_crop_flip_crop_worked_out_by_hand():
    """2 × 2 image, padding 1: cut at (0, 0), at (2, 1), and at (1, 0) mirrored."""
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(3, 1, 2, 2)
    cut = views.crop_flip(image, torch.tensor([0, 2, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), padding=1)
    assert cut[:, 0].tolist() == [[[0, 0], [0, 1]], [[3, 4], [0, 0]], [[1, 0], [3, 0]]]


def test_crop_flip_crops_are_what_padding_cutting_and_mirroring_one_by_one_gives():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (50, 3, 7, 9), generator=generator, dtype=torch.uint8)
    top, left = torch.randint(0, 9, (2, 50), generator=generator)
    flipped = torch.randint(0, 2, (50,), generator=generator)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    one_by_one = []
    for image, y, x, mirror in zip(padded, top, left, flipped, strict=True):
        cut = image[:, y : y + 7, x : x + 9]
        one_by_one.append(cut.flip(-1) if mirror else cut)
    assert torch.equal(views.crop_flip(pixels, top, left, flipped, 4), torch.stack(one_by_one))


def view_ids(views: Views, index: torch.Tensor, epoch: int = 0) -> torch.Tensor:
    images = noise(len(index), side=4)
    ids = views.batch(images, index, seed=0, epoch=epoch).view_ids
    assert ids is not None
    return ids


def test_view_ids_count_162_views_all_of_them_evenly():
    """Rows × columns × mirroring; χ² with 161 degrees of freedom stays below 230 but once in 3,000 seeds."""
    ids = view_ids(Views(CropFlip(), None, 5), torch.arange(16_200))
    counts = ids.bincount(minlength=162).double()
    assert len(counts) == 162
    assert ((counts - 100) ** 2 / 100).sum() < 230
    assert (ids % 2).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_views_equal_view_ids_are_equal_bytes_and_different_ones_differ():
    images, seen = noise(2), Views(CropFlip(padding=1), None, 5)
    by_id: dict[int, torch.Tensor] = {}
    for epoch in range(200):
        batch = seen.batch(images, torch.tensor([1]), seed=0, epoch=epoch)
        assert torch.equal(by_id.setdefault(int(batch.view_ids), batch.inputs), batch.inputs)
    assert sorted(by_id) == list(range(18))
    assert len({pixels.numpy().tobytes() for pixels in by_id.values()}) == 18


@pytest.mark.parametrize(
    ("augmentation", "most"), [(NoAugmentation(), 0), (CropFlip(padding=0, flip=False), 0), (CropFlip(padding=0), 1)]
)
def test_view_ids_are_below_the_number_of_views(augmentation, most):
    assert view_ids(Views(augmentation, None, 5), torch.arange(50)).max() == most


@pytest.mark.parametrize("views", [Views(RandomResizedCrop(), None, 5), Views(CropFlip(), Mixup(), 5)])
def test_view_ids_are_absent_where_views_are_not_numbered(views):
    assert views.batch(noise(), torch.arange(8), seed=0, epoch=0).view_ids is None


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("most", [None, 3])
def test_view_ids_without_a_batch_are_those_of_the_batch(augmentation, most):
    seen, index = Views(augmentation, None, 5, most), torch.tensor([7, 290, 2])
    of_batch, alone = seen.batch(noise(), index, seed=1, epoch=4).view_ids, seen.ids(index, seed=1, epoch=4)
    assert (of_batch is None) == (alone is None) == (most is None and isinstance(augmentation, RandomResizedCrop))
    assert of_batch is None or torch.equal(of_batch, alone)
    assert Views(augmentation, Mixup(), 5, most).ids(index, seed=1, epoch=4) is None


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:], ids=lambda a: a.name)
def test_few_views_are_taken_in_turn(augmentation):
    """The first epochs are those without the limit; each row has views of its own."""
    images, free, few = noise(), Views(augmentation, None, 5), Views(augmentation, None, 5, 3)
    index = torch.arange(300)
    epochs = [few.batch(images, index, seed=2, epoch=epoch) for epoch in range(7)]
    for epoch, batch in enumerate(epochs):
        assert torch.equal(batch.inputs, free.batch(images, index, seed=2, epoch=epoch % 3).inputs)
        assert batch.epoch == epoch and torch.equal(batch.view_ids, epochs[epoch % 3].view_ids)
    assert not torch.equal(epochs[0].inputs, epochs[1].inputs)


def test_views_of_a_recipe_are_as_many_as_it_says():
    recipe = Training(augmentation=CropFlip(), teacher_cache=CachedViews(views=2))
    assert (
        Views.of(recipe, 5).most == 2 and Views.of(recipe.model_copy(update={"teacher_cache": "off"}), 5).most is None
    )


def test_views_a_batch_has_the_rows_and_the_epoch_from_one_on():
    batch = Views(CropFlip(), None, 5).batch(noise(), torch.tensor([7, 2]), seed=0, epoch=3)
    assert batch.index.tolist() == [7, 2] and batch.epoch == 3


def test_boxes_have_the_areas_and_ratios_that_were_asked_for():
    how = RandomResizedCrop(scale=(0.25, 0.5), ratio=(0.5, 2.0))
    draws = list(views.counter_rng.draws(views.counter_rng.streams(9, torch.arange(5000)), 4))
    top, left, tall, wide = views._boxes(how, draws, 400, 400)
    assert (top >= 0).all() and (left >= 0).all() and (top + tall <= 400).all() and (left + wide <= 400).all()
    area, ratio = (tall * wide / 400**2).double(), (wide / tall).double()
    assert area.min() > 0.245 and area.max() < 0.505 and area.mean().item() == pytest.approx(0.375, abs=0.01)
    assert ratio.min() > 0.49 and ratio.max() < 2.05 and ratio.log().mean().item() == pytest.approx(0, abs=0.02)


def test_resized_crop_a_box_never_leaves_a_narrow_image():
    how = RandomResizedCrop(scale=(1.0, 1.0), ratio=(3.0, 4.0))
    draws = list(views.counter_rng.draws(views.counter_rng.streams(9, torch.arange(100)), 4))
    top, left, tall, wide = views._boxes(how, draws, 50, 10)
    assert (wide == 10).all() and (left == 0).all() and (tall >= 1).all() and (top + tall <= 50).all()


@pytest.mark.parametrize("mix", [Mixup(), Cutmix()], ids=lambda m: m.name)
def test_mixed_batches_depend_on_seed_epoch_and_rows_but_not_on_their_order(mix):
    images, seen, index = noise(), Views(CropFlip(), mix, 5), torch.tensor([4, 9, 2, 77, 130, 8, 41, 5])
    batch = seen.batch(images, index, seed=0, epoch=0)
    inputs, labels = batch.inputs, batch.labels
    assert inputs.dtype == torch.float32 and labels.shape == (8, 5)
    assert inputs.min() >= 0 and inputs.max() <= 255
    assert torch.allclose(labels.sum(1), torch.ones(8))
    again = seen.batch(images, index.flip(0), seed=0, epoch=0)
    assert torch.equal(again.inputs.flip(0), inputs)
    others = [seen.batch(images, index, 1, 0), seen.batch(images, index, 0, 1), seen.batch(images, index + 1, 0, 0)]
    assert not any(torch.equal(other.inputs, inputs) for other in others)


def test_views_a_batch_of_one_is_mixed_with_itself():
    batch = Views(NoAugmentation(), Mixup(), 5).batch(noise(), torch.tensor([3]), 0, 0)
    assert torch.equal(batch.inputs[0], noise().pixels[3].float())
    assert batch.labels.tolist() == [[0, 0, 0, 1, 0]]


@pytest.mark.parametrize("mix", [Mixup(), Cutmix()], ids=lambda m: m.name)
def test_views_an_image_without_a_label_weighs_nothing_in_a_mixed_batch(mix):
    images = noise()
    half = Images(images.pixels, torch.where(torch.arange(len(images)) % 2 == 0, images.labels, -1))
    labels = Views(CropFlip(), mix, 5).batch(half, torch.arange(8), seed=0, epoch=0).labels
    known = Views(CropFlip(), mix, 5).batch(images, torch.arange(8), seed=0, epoch=0).labels
    assert labels.sum().item() == pytest.approx(4) and (labels <= known).all()


def test_draws_for_views_order_and_mixing_are_unrelated():
    ids = view_ids(Views(CropFlip(padding=0), None, 5), torch.arange(4000)).double()
    places = order(4000, 0, 0).argsort().double()
    assert abs(torch.corrcoef(torch.stack([ids, places]))[0, 1].item()) < 4 / math.sqrt(4000)


def with_sides(images: Images, *sides: int) -> Images:
    """Each picture also as squares of whole multiples of its side: every pixel becomes a square of equal ones."""
    own = images.pixels.shape[2]
    sized = {side: images.pixels.repeat_interleave(side // own, 2).repeat_interleave(side // own, 3) for side in sides}
    return Images(images.pixels, images.labels, sized)


@pytest.mark.parametrize("mix", [None, Mixup(), Cutmix()], ids=["plain", "mixup", "cutmix"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: a.name)
def test_views_another_size_changes_nothing_about_the_datas_own(augmentation, mix):
    images, index = noise(40), torch.arange(5, 25)
    alone = Views(augmentation, mix, 5).batch(images, index, seed=3, epoch=2)
    beside = Views(augmentation, mix, 5).batch(with_sides(images, 16), index, seed=3, epoch=2)
    assert torch.equal(alone.inputs, beside.inputs) and torch.equal(alone.labels, beside.labels)
    assert beside.at(None) is beside.inputs and beside.at(16).shape == (20, 3, 16, 16)
    assert (alone.view_ids is None) == (beside.view_ids is None)


@pytest.mark.parametrize("mix", [None, Mixup(), Cutmix()], ids=["plain", "mixup", "cutmix"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS[:3], ids=lambda a: a.name)
def test_views_of_two_sizes_show_the_same_part(augmentation, mix):
    """The larger picture has each pixel four times; so has the larger view: place, padding, mirroring and partner."""
    images, index = with_sides(noise(40), 16), torch.arange(5, 25)
    batch = Views(augmentation, mix, 5).batch(images, index, seed=3, epoch=2)
    assert torch.equal(batch.at(16), batch.inputs.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_views_of_two_sizes_cut_the_same_boxes():
    """A slope from 0 to 240: its height in a view says from where the view was cut, to a pixel of the picture."""
    slope = (torch.arange(120) * 2).view(1, 1, 1, 120).expand(50, 1, 120, 120).to(torch.uint8)
    images = Images(
        slope.reshape(50, 1, 120, 60, 2).float().mean(4).byte()[:, :, ::2], torch.zeros(50).long(), {120: slope}
    )
    how = RandomResizedCrop(scale=(0.2, 0.9), flip=True)
    batch = Views(how, None, 5).batch(images, torch.arange(50), seed=0, epoch=0)
    halves = batch.at(120).float().view(50, 1, 60, 2, 60, 2).mean((3, 5))
    assert (halves - batch.inputs.float()).abs().max() <= 4
    assert len(batch.inputs[:, 0, 0, 0].unique()) > 20


def test_views_padding_is_in_pixels_of_the_datas_own_size():
    """4 pixels of 8 are 6 of 12. What a view shows of the picture is the same part, to half a pixel."""
    images = Images(noise(30).pixels, torch.arange(30) % 5, {12: torch.full((30, 3, 12, 12), 9, dtype=torch.uint8)})
    batch = Views(CropFlip(padding=4, flip=False), None, 5).batch(images, torch.arange(30), seed=1, epoch=0)
    for small, large in zip(batch.inputs, batch.at(12), strict=True):
        for axis in (0, 1):
            shown = [(one[0] > 0).any(axis).sum().item() for one in (small, large)]
            assert abs(shown[1] - shown[0] * 12 / 8) <= 0.5 and shown[1] >= 6


def test_views_boxes_are_cut_from_a_larger_store_for_every_size():
    """The store has two pixels for one of the images, so that a box in it has twice the numbers."""
    images, large, index = noise(30), noise(30, side=16).pixels, torch.arange(30)
    wide = Images(images.pixels, images.labels, {12: torch.zeros(30, 3, 12, 12, dtype=torch.uint8)}, large)
    how = RandomResizedCrop(flip=False)
    batch = Views(how, None, 5).batch(wide, index, seed=1, epoch=4)
    states = views.counter_rng.streams(views.counter_rng.key(views._VIEW, 1, 4), index)
    boxes = views.Boxes(*(2 * side for side in views._boxes(how, list(views.counter_rng.draws(states, 4)), 8, 8)))
    for size, seen in ((8, batch.inputs), (12, batch.at(12))):
        assert torch.equal(seen, views.resized_crop(large, boxes, torch.zeros(30).long(), size=(size, size)))
    assert not torch.equal(batch.inputs, Views(how, None, 5).batch(images, index, seed=1, epoch=4).inputs)


def test_views_a_smaller_size_is_cut_from_its_own_pictures():
    images = Images(noise(30).pixels, torch.arange(30) % 5, {4: torch.full((30, 3, 4, 4), 9, dtype=torch.uint8)})
    for augmentation in AUGMENTATIONS:
        batch = Views(augmentation, None, 5).batch(images, torch.arange(30), seed=1, epoch=0)
        assert batch.at(4).shape == (30, 3, 4, 4) and set(batch.at(4).unique().tolist()) <= {0, 9}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: a.name)
def test_views_a_gpu_sees_the_same_bytes(augmentation):
    images, seen, index = noise(), Views(augmentation, None, 5), torch.arange(300)
    here = seen.batch(images, index, seed=3, epoch=2)
    there = seen.batch(images.to("cuda"), index, seed=3, epoch=2)
    assert torch.equal(here.inputs, there.inputs.cpu())
    assert torch.equal(order(999, 1, 2), order(999, 1, 2, device="cuda").cpu())
