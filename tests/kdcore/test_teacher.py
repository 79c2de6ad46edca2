import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch
from kdcore.teacher import FrozenTeacher


def frozen() -> FrozenTeacher:
    return FrozenTeacher(Classifier(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten()), [0.5], [0.5]))


BATCH = Batch(torch.randint(0, 256, (8, 1, 1, 1), dtype=torch.uint8), torch.zeros(8).long(), torch.arange(8))


def test_train_mode_does_not_reach_it():
    teacher = frozen()
    nn.ModuleList([teacher]).train()
    statistics = teacher.classifier.network[1].running_mean.clone()
    teacher(BATCH)
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher.classifier.network[1].running_mean, statistics)


def test_it_has_no_parameter_to_train_and_gives_no_gradient():
    teacher = frozen()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(BATCH).logits.requires_grad
