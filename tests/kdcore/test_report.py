import math

import pytest
import torch
from torch import nn

from kdcore import report
from kdcore.training import Outcome

LABELS = torch.tensor([0, 1, 2, 0])
# Right, right, wrong, wrong; the right class of the third is its second choice.
LOGITS = torch.tensor([[3.0, 0, 0], [0, 3, 0], [2, 0, 1], [0, 0, 1]])


def test_answers_are_counted_against_labels_and_against_the_teacher():
    teacher = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    told = report.of_logits(LOGITS, LABELS, teacher)
    assert told["accuracy"] == 0.5 and told["accuracy_top5"] == 1 and told["agreement"] == 0.5
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(LOGITS.tolist(), LABELS, strict=True)
    ]
    assert told["loss"] == pytest.approx(sum(by_hand) / 4)


def test_without_a_teacher_there_is_none_to_agree_with():
    assert report.of_logits(LOGITS, LABELS)["agreement"] is None


def test_parameters_and_bytes_are_those_of_the_network():
    """A convolution of 2 x 1 x 3 x 3, a batch norm of 2: weight, bias, mean, variance in fp32 and a count in int64."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
    assert report.parameters(network) == 18 + 4
    assert report.size_bytes(network) == 4 * (18 + 8) + 8
    row = report.of_model("tiny", network, LOGITS, LABELS)
    assert (row["architecture"], row["parameters"], row["bytes"]) == ("tiny", 22, 112)


def test_what_two_parts_share_counts_once():
    layer = nn.Linear(3, 3)
    network = nn.ModuleList([layer, nn.Sequential(layer)])
    assert report.parameters(network) == 12 and report.size_bytes(network) == 48


def test_a_training_is_told_by_its_best_epoch_and_its_last():
    outcome = Outcome(best={}, last={}, best_epoch=3, best_accuracy=0.75, epochs=5)
    assert report.of_training(outcome, LOGITS, LABELS) == {
        "best": {"epoch": 3, "validation_accuracy": 0.75},
        "last": {"epoch": 5, "accuracy": 0.5},
    }
