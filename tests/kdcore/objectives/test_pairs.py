import pytest
import torch
from torch import nn

from base.errors import SpecInvalid, TeacherMismatch
from kdcore.objectives.pairs import BatchNorm, embeddings, map_or_embedding, maps, same_size, unit
from kdcore.spec.vocabulary import Pair
from tests.kdcore.objectives.lessons import lesson, normal

PAIR, OTHER = Pair(student="fc@in", teacher="head@in"), Pair(student="layer1", teacher="block1")


def test_lesson_logits_of_unequal_shapes_are_refused():
    with pytest.raises(TeacherMismatch, match="the student's logits are 4 x 3, the teacher's 4 x 10"):
        _ = lesson(normal(4, 3), normal(4, 10)).logits


@pytest.mark.parametrize("read", [map_or_embedding, embeddings, lambda seen, pair: maps(seen, [pair])])
def test_taps_of_unequal_length_are_refused_by_name(read):
    """For example a layer that works on windows of an image."""
    seen = lesson({"fc@in": normal(4, 3, 2, 2)}, {"head@in": normal(16, 3, 2, 2)})
    text = "different numbers of rows for one batch: student's 'fc@in' 4, teacher's 'head@in' 16"
    with pytest.raises(SpecInvalid, match=text) as refusal:
        read(seen, PAIR)
    assert "one row for each image" in refusal.value.hint


def test_maps_of_unequal_length_are_refused_across_pairs():
    sides = {"fc@in": normal(4, 3, 2, 2), "layer1": normal(1, 3, 2, 2)}
    teacher = {"head@in": sides["fc@in"], "block1": sides["layer1"]}
    with pytest.raises(SpecInvalid, match="student's 'layer1' 1, teacher's 'block1' 1"):
        maps(lesson(sides, teacher), [PAIR, OTHER])


def test_maps_refuse_an_embedding_by_name():
    seen = lesson({"fc@in": normal(4, 3)}, {"head@in": normal(4, 5, 2, 2)})
    with pytest.raises(SpecInvalid, match="tap 'fc@in' gives 3 for each image, where a map of channels x height"):
        maps(seen, [PAIR])
    student, teacher = map_or_embedding(seen, PAIR)
    assert student.shape == (4, 3, 1, 1) and teacher.shape == (4, 5, 2, 2)
    student, teacher = embeddings(seen, PAIR)
    assert student.shape == (4, 3) and teacher.shape == (4, 20)


@pytest.mark.parametrize("sizes", [((6, 4), (3, 2)), ((7, 2), (3, 5)), ((4, 4), (4, 4))], ids=str)
def test_same_size_averages_down_to_the_smaller_height_and_width(sizes):
    both = [normal(2, 3, *size, seed=seed) for seed, size in enumerate(sizes)]
    smaller = [min(pair) for pair in zip(*sizes, strict=True)]
    for pooled, whole in zip(same_size(*both), both, strict=True):
        assert torch.allclose(pooled, nn.functional.adaptive_avg_pool2d(whole, smaller))


def test_unit_scales_to_length_one_and_sends_no_gradient_to_zeros():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    scaled = unit(vectors, dim=1)
    assert scaled.tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]
    scaled.sum().backward()
    assert vectors.grad[0].any() and not vectors.grad[1].any()


def test_batch_norm_of_one_value_uses_the_running_statistics_and_keeps_them():
    """nn.BatchNorm2d refuses it. With statistics of mean 0 and variance 1 the value stays, but for epsilon."""
    norm, value = BatchNorm(2), torch.tensor([3.0, -5.0]).reshape(1, 2, 1, 1)
    assert norm(value).flatten().tolist() == pytest.approx([3, -5], rel=1e-4)
    assert norm.running_mean.tolist() == [0, 0] and norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        nn.BatchNorm2d(2)(value)


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (1, 2, 3, 3)], ids=str)
def test_batch_norm_of_several_values_is_torchs(shape):
    norm, torchs, values = BatchNorm(2), nn.BatchNorm2d(2), normal(*shape, dtype=torch.float32)
    assert torch.equal(norm(values), torchs(values)) and norm.state_dict().keys() == torchs.state_dict().keys()
    assert torch.equal(norm.running_var, torchs.running_var)
