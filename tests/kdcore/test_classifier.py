import pytest
import torch
from torch import Tensor, nn

from kdcore.classifier import Classifier, answered


def test_pixels_are_normalised_channel_by_channel():
    """Pixel 255 is 1: (1 - 0.5) / 0.25 = 2; pixel 0: (0 - 0.2) / 0.1 = -2."""
    classifier = Classifier(nn.Flatten(), [0.5, 0.2], [0.25, 0.1])
    pixels = torch.tensor([255, 0], dtype=torch.uint8).view(1, 2, 1, 1)
    assert classifier(pixels).logits.tolist()[0] == pytest.approx([2, -2])


def test_mixed_float_pixels_mean_the_same_as_bytes():
    classifier = Classifier(nn.Flatten(), [0.5], [0.5])
    pixels = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8)
    assert torch.equal(classifier(pixels).logits, classifier(pixels.float()).logits)


def test_the_network_computes_in_bf16_and_hands_over_fp32():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    classifier = Classifier(network, [0.5], [0.5], taps=["1"], bf16=True)
    seen = []
    network[1].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    view = classifier(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert seen == [torch.bfloat16]
    assert view.logits.dtype == view.taps["1"].dtype == torch.float32


def test_normalisation_is_no_part_of_the_exported_state():
    assert set(Classifier(nn.Linear(1, 1), [0.5], [0.5]).state_dict()) == {"network.weight", "network.bias"}


def linear() -> tuple[Classifier, Tensor]:
    """Two pixels, three classes, and four images."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (4, 1, 1, 2), dtype=torch.uint8)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(2, 3)), [0.4], [0.5]), pixels


def test_the_input_gradient_is_that_of_the_summed_loss_at_the_normalised_images():
    """Of a linear classifier: (p - onehot) · W, an image at a time; a mean would have divided it by four."""
    classifier, pixels = linear()
    labels = torch.tensor([0, 1, 2, 0])
    view = classifier(pixels, labels)
    p = view.logits.softmax(1) - nn.functional.one_hot(labels, 3)
    by_hand = (p @ classifier.network[1].weight).view(4, 1, 1, 2)
    assert torch.allclose(view.input_gradient, by_hand, atol=1e-6)


def test_the_input_gradient_can_be_learned_from_where_gradients_are_on():
    classifier, pixels = linear()
    labels = torch.tensor([0, 1, 2, 0])
    classifier(pixels, labels).input_gradient.square().sum().backward()
    assert classifier.network[1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        fixed = classifier(pixels, labels)
    assert not fixed.input_gradient.requires_grad and fixed.input_gradient.abs().sum() > 0


def test_an_unknown_label_is_taken_to_be_the_views_own_answer():
    classifier, pixels = linear()
    own = classifier(pixels).logits.argmax(1)
    unknown = torch.where(torch.tensor([True, False, False, True]), -1, own)
    assert torch.equal(classifier(pixels, unknown).input_gradient, classifier(pixels, own).input_gradient)


def test_known_labels_are_never_answered():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert answered(torch.tensor([0, -1, -1]), logits).tolist() == [0, 1, 0]
    mixed = torch.full((3, 2), 0.5)
    assert answered(mixed, logits) is mixed


def test_watching_other_places_forgets_the_ones_before():
    classifier, pixels = linear()
    classifier.watch(["1", "1@in", "1"])
    assert set(classifier(pixels).taps) == {"1", "1@in"}
    classifier.watch(["0"])
    assert set(classifier(pixels).taps) == {"0"}
    classifier.watch([])
    assert classifier(pixels).taps == {}


def test_another_network_like_it_sees_the_same_normalised_images():
    classifier, pixels = linear()
    other = classifier.like(nn.Flatten())
    assert torch.equal(other(pixels).logits, ((pixels / 255 - 0.4) / 0.5).flatten(1))
    assert other.bf16 == classifier.bf16


def test_images_that_are_normalised_already_are_only_looked_at():
    classifier, pixels = linear()
    images = (pixels / 255 - 0.4) / 0.5
    assert torch.equal(classifier.look(images).logits, classifier(pixels).logits)
