import pytest
import torch
from torch import nn

from kdcore.classifier import Classifier


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
