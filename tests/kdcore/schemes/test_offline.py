import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch
from kdcore.schemes.alone import Alone
from kdcore.schemes.offline import Offline
from kdcore.teacher import FrozenTeacher


def classifier(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [0.5] * 3, [0.25] * 3)


BATCH = Batch(torch.full((4, 3, 2, 2), 200, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), torch.arange(4))


def test_student_and_teacher_see_the_same_batch_and_only_the_student_learns():
    student, teacher = classifier(0), FrozenTeacher(classifier(1))
    done = Offline(student, teacher).round(BATCH)
    (lesson,) = done.lessons
    assert done.views == (lesson.student,) and lesson.share == 1
    assert torch.equal(lesson.teacher.logits, teacher.classifier(BATCH.inputs).logits)
    (lesson.student.logits - lesson.teacher.logits).square().sum().backward()
    assert student.network[1].weight.grad.abs().sum() > 0
    assert not lesson.teacher.logits.requires_grad and teacher.classifier.network[1].weight.grad is None


def test_the_optimizer_gets_the_student_alone():
    scheme = Offline(classifier(0), FrozenTeacher(classifier(1)))
    assert scheme.trained() is scheme.student


def test_alone_there_is_no_lesson():
    done = Alone(classifier(0)).round(BATCH)
    assert done.lessons == () and done.views[0].logits.shape == (4, 3)
