import math

import pytest
import torch
from torch import nn

from kdcore import evaluate, models
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.evaluate import agreement, batch_size, logits_on, paired_p, score


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


def test_logits_on_counts_the_images_of_each_batch():
    images, counts = Images(torch.zeros(600, 1, 1, 1, dtype=torch.uint8), torch.zeros(600).long()), []
    logits_on(Classifier(nn.Flatten(), [0.0], [1.0]), images, counts.append)
    assert counts == [256, 256, 88]


@pytest.mark.parametrize(
    ("height", "width", "images"),
    [(8, 8, 256), (64, 64, 256), (64, 128, 128), (128, 128, 64), (224, 224, 20), (2000, 2000, 1)],
)
def test_batch_size_falls_with_the_pixels_of_an_image(height, width, images):
    assert batch_size(height, width) == images


def test_logits_on_do_not_depend_on_the_batch_size(monkeypatch):
    torch.manual_seed(0)
    model = Classifier(models.build("convnet8", 3, 1), [0.5], [0.25])
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(40).long())
    whole = logits_on(model, images)
    monkeypatch.setattr(evaluate, "BATCH_PIXELS", 3 * 64)
    assert torch.allclose(logits_on(model, images), whole, atol=1e-5)


def answers(*right: bool) -> torch.Tensor:
    """Logits of two classes; the right one is the first."""
    return torch.tensor([[float(one), float(not one)] for one in right])


def test_paired_p_worked_out_by_hand():
    """Of 12 images both are right on one and both wrong on two: 1 against 8 decide. 2 · (1 + 9) / 2⁹."""
    one = answers(True, False, False, *[True] * 1, *[False] * 8)
    other = answers(True, False, False, *[False] * 1, *[True] * 8)
    labels = torch.zeros(12).long()
    assert paired_p(one, other, labels) == pytest.approx(20 / 512)
    assert paired_p(other, one, labels) == pytest.approx(20 / 512)


def test_paired_p_of_the_same_answers_is_one():
    assert paired_p(answers(True, False), answers(True, False), torch.zeros(2).long()) == 1


def test_paired_p_of_equal_counts_is_one_and_of_many_images_a_number():
    assert paired_p(answers(True, False), answers(False, True), torch.zeros(2).long()) == 1
    many = torch.zeros(100_000).long()
    one = torch.eye(2).repeat(50_000, 1)
    assert paired_p(one, one.flip(1), many) == 1
    assert paired_p(answers(*[True] * 2000), answers(*[False] * 2000), many[:2000]) == 0
