import torch

from kdcore.data import Images, split
from kdcore.data.material import material, with_unlabelled
from kdcore.spec import Recipe, Unlabelled

RECIPE = Recipe(validation_fraction=0.2, seed=3)


def labelled() -> Images:
    """Twenty images of two classes; each is filled with its own number."""
    return Images(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20) % 2)


def pool(count: int = 5) -> Images:
    return Images(torch.arange(100, 100 + count, dtype=torch.uint8).view(count, 1, 1, 1), torch.full((count,), -1))


def seen(images: Images) -> list[int]:
    return images.pixels[0 : len(images)].flatten().tolist()


def test_each_image_is_either_trained_on_or_held_out():
    found = material(labelled(), RECIPE)
    trained = seen(found.images.take(found.rows))
    assert sorted([*trained, *seen(found.held_out)]) == list(range(20))
    assert len(found.held_out) == 4 and found.held_out.labels.sum() == 2


def test_the_held_out_part_is_that_of_the_recipe():
    rows, held_out = split(labelled(), 0.2, 3)
    found = material(labelled(), RECIPE)
    assert torch.equal(found.rows, rows) and seen(found.held_out) == held_out.tolist()


def test_unlabelled_images_stand_behind_the_labelled_ones_and_none_is_held_out():
    before = material(labelled(), RECIPE)
    found = with_unlabelled(before, pool(), Unlabelled(source="pool"))
    assert found.rows.tolist() == [*before.rows.tolist(), 20, 21, 22, 23, 24]
    assert seen(found.images) == [*range(20), *range(100, 105)]
    assert found.images.labels.tolist() == [*labelled().labels.tolist(), -1, -1, -1, -1, -1]
    assert found.held_out is before.held_out and (found.held_out.labels >= 0).all()


def test_the_pool_alone_is_trained_on_where_labelled_images_are_not_wanted():
    found = with_unlabelled(material(labelled(), RECIPE), pool(), Unlabelled(source="pool", labelled_too=False))
    assert seen(found.images.take(found.rows)) == [100, 101, 102, 103, 104]
    assert len(found.held_out) == 4


def test_what_was_made_for_labels_alone_is_left_as_it_was():
    before = material(labelled(), RECIPE)
    with_unlabelled(before, pool(), Unlabelled(source="pool"))
    assert len(before.images) == 20 and len(before.rows) == 16


def test_all_of_it_goes_to_a_device():
    found = with_unlabelled(material(labelled(), RECIPE), pool(), Unlabelled(source="pool")).to(torch.device("cpu"))
    assert {found.rows.device.type, found.images.labels.device.type, found.held_out.pixels.device.type} == {"cpu"}
