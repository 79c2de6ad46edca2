import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcore import data
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.evaluate import agreement, logits_on, score, write_test_images
from kdcore.prepare import Workspace
from kdcore.protocol import Lines
from kdcore.spec import Dataset


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


def test_write_test_images_writes_the_images_that_a_report_is_measured_on(tmp_path):
    workspace = Workspace(tmp_path, {}, tmp_path / "cache", Lines(sys.stderr))
    assert write_test_images(tmp_path / "test.safetensors", "digits", workspace) == {"test_samples": 360}
    written = load_file(tmp_path / "test.safetensors")
    split = data.load(Dataset(source="digits"), None, tmp_path / "cache").test
    assert written["images"].shape == (360, 1, 8, 8)
    assert torch.equal(written["images"], split.pixels) and torch.equal(written["labels"], split.labels)
