import math

import pytest
import torch

from kdcore.lesson import Needs
from kdcore.objectives import Setting, build
from kdcore.schemes.mutual import Mutual
from kdcore.spec.methods.schemes import Dml
from kdcore.training import label_loss
from tests.kdcore.tiny import batch, constant, linear, named

SETTING = Setting(1.0, num_classes=2, epochs=1, labels=torch.zeros(2).long(), rows=torch.arange(2))


def test_mutual_the_loss_of_two_students_worked_out_by_hand():
    """p is 3/4, 1/4 and 1/2, 1/2; the label is 0. Each student: its cross-entropy, and KL(the other ‖ itself)."""
    done = Mutual([constant(0.75, 0.25), constant(0.5, 0.5)]).run(batch([0, 0]))
    first = -math.log(0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = -math.log(0.5) + 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    objective = build((Dml(),), SETTING)[-1]
    labels = sum(label_loss(view.logits, done.labels) for view in done.views)
    mutual = sum(lesson.share * objective(lesson) for lesson in done.lessons)
    assert (labels + mutual).item() == pytest.approx(first + second, rel=1e-6)


def test_mutual_each_students_gradient_is_that_of_its_own_loss():
    """dKL(p2 ‖ p1)/dz1 = p1 - p2: the other's logits are held fixed."""
    students = [constant(0.75, 0.25), constant(0.5, 0.5)]
    done = Mutual(students).run(batch([0, 0]))
    objective = build((Dml(),), SETTING)[-1]
    sum(lesson.share * objective(lesson) for lesson in done.lessons).backward()
    assert students[0].network.logits.grad.tolist() == pytest.approx([0.25, -0.25], abs=1e-6)
    assert students[1].network.logits.grad.tolist() == pytest.approx([-0.25, 0.25], abs=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_mutual_every_student_learns_from_every_other_in_equal_shares(count):
    students = [linear(seed) for seed in range(count)]
    done = Mutual(students).run(batch([0, 1, 2, 0]))
    assert len(done.views) == count and len(done.lessons) == count * (count - 1)
    assert {lesson.share for lesson in done.lessons} == {1 / (count - 1)}
    for learner in done.views:
        peers = [lesson.teacher.logits for lesson in done.lessons if lesson.student is learner]
        others = [view.logits for view in done.views if view is not learner]
        assert all(torch.equal(one, other) for one, other in zip(peers, others, strict=True))


def test_mutual_peers_are_fixed_while_they_teach_and_run_once():
    students, runs = [linear(0), linear(1), linear(2)], []
    for student in students:
        student.network.register_forward_hook(lambda *_: runs.append(1))
    done = Mutual(students).run(batch([0, 1]))
    assert len(runs) == 3
    assert not any(lesson.teacher.logits.requires_grad for lesson in done.lessons)


def test_mutual_each_student_is_trained_by_itself_and_comes_out():
    students = [linear(0), linear(1)]
    scheme = Mutual(students)
    assert scheme.learners() == students and scheme.models == {"student": students[0], "student-2": students[1]}


def test_mutual_peers_show_each_other_what_an_objective_compares():
    students = [named("convnet4", 0), named("convnet4", 1)]
    done = Mutual(students, Needs(("layer2",), ("layer3",))).run(batch([0, 1], side=8))
    for lesson in done.lessons:
        assert lesson.student.taps["layer2"].requires_grad and not lesson.teacher.taps["layer3"].requires_grad
