import math

import pytest
import torch

from kdcore.objectives.labels import hits, label_loss

LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])


def test_value_worked_out_by_hand():
    """p of the right class: 3/4 and 1/2."""
    by_hand = -(math.log(0.75) + math.log(0.5)) / 2
    assert label_loss(LOGITS, torch.tensor([0, 1])).item() == pytest.approx(by_hand)


def test_smoothing_moves_its_share_to_all_classes():
    """s = 0.2 on two classes: targets 0.9 and 0.1."""
    by_hand = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert label_loss(LOGITS[:1], torch.tensor([0]), smoothing=0.2).item() == pytest.approx(by_hand)


def test_mixed_labels_weigh_both_classes():
    by_hand = -(0.3 * math.log(0.75) + 0.7 * math.log(0.25))
    assert label_loss(LOGITS[:1], torch.tensor([[0.3, 0.7]])).item() == pytest.approx(by_hand)


def test_hits_count_the_heavier_of_two_mixed_labels():
    assert hits(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])).item() == 1
    assert hits(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.6, 0.4]])).item() == 1
