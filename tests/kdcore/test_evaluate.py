import math

import pytest
import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.evaluate import agreement, logits_on, score


def test_score_worked_out_by_hand():
    """Six classes; the right one comes first, second, and last."""
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 3)
    result = score(logits, torch.tensor([0, 1, 5]))
    assert (result.accuracy, result.accuracy_top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    log_sum = math.log(sum(math.exp(z) for z in range(6)))
    assert result.loss == pytest.approx(((log_sum - 5) + (log_sum - 4) + (log_sum - 0)) / 3)


def test_two_classes_have_no_top_five_but_a_score():
    assert score(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).accuracy_top5 == 1


def test_agreement_counts_equal_first_choices():
    one, other = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([[9.0, 0], [0, 9], [0, 9]])
    assert agreement(one, other) == pytest.approx(2 / 3)


def test_logits_on_every_image_is_seen_once_in_order_and_the_mode_is_left_alone():
    images = Images(torch.arange(600).remainder(256).to(torch.uint8).view(600, 1, 1, 1), torch.zeros(600).long())
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), [0.0], [1.0], bf16=True).train()
    logits = logits_on(classifier, images)
    assert torch.equal(logits[:, 0], images.pixels.flatten().float() / 255)
    assert classifier.training and classifier.bf16 and not logits.requires_grad
