import math

import pytest
import torch

from kdcore.objectives.labels import hits, known, label_loss

LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])


def test_label_loss_equals_a_value_computed_by_hand():
    """p of the right class: 3/4 and 1/2."""
    by_hand = -(math.log(0.75) + math.log(0.5)) / 2
    assert label_loss(LOGITS, torch.tensor([0, 1])).item() == pytest.approx(by_hand)


def test_label_loss_with_smoothing_moves_its_share_to_all_classes():
    """s = 0.2 on two classes: targets 0.9 and 0.1."""
    by_hand = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert label_loss(LOGITS[:1], torch.tensor([0]), smoothing=0.2).item() == pytest.approx(by_hand)


def test_label_loss_of_mixed_labels_weighs_both_classes():
    by_hand = -(0.3 * math.log(0.75) + 0.7 * math.log(0.25))
    assert label_loss(LOGITS[:1], torch.tensor([[0.3, 0.7]])).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_loss_leaves_unknown_labels_out_of_sum_and_count(smoothing):
    """The mean is over the known ones, as if the others were not in the batch; those get no gradient."""
    logits = torch.cat([LOGITS, torch.tensor([[5.0, -5.0]])]).requires_grad_()
    loss = label_loss(logits, torch.tensor([0, 1, -1]), smoothing=smoothing)
    assert loss.item() == pytest.approx(label_loss(LOGITS, torch.tensor([0, 1]), smoothing=smoothing).item())
    loss.backward()
    assert logits.grad[2].abs().sum() == 0 and (logits.grad[:2].abs().sum(1) > 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_loss_of_unknown_labels_only_is_zero_without_gradient(smoothing):
    logits = LOGITS.clone().requires_grad_()
    loss = label_loss(logits, torch.tensor([-1, -1]), smoothing=smoothing)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_known_counts_the_known_labels():
    assert known(torch.tensor([0, -1, 1])).item() == 2
    assert known(torch.tensor([-1, -1])).item() == 1
    assert known(torch.tensor([[0.3, 0.7], [0.5, 0.5]])).item() == 2


def test_hits_counts_the_heavier_of_two_mixed_labels():
    assert hits(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])).item() == 1
    assert hits(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.6, 0.4]])).item() == 1


def test_hits_counts_no_answer_to_an_unknown_label():
    assert hits(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([-1, 1])).item() == 1
