import threading
from contextlib import closing

import pytest
import torch
from torch import nn

from base.errors import SpecInvalid
from kdcore.classifier import FrozenTeacher, TeacherEnsemble
from kdcore.lesson import Needs, Teacher
from kdcore.schemes.offline import Alone, Offline, Preparation, TeacherAhead
from kdcore.training import label_loss
from tests.kdcore.tiny import batch, constant, linear, named

KNOWN = batch([0, 1, 2, 0])
PARTLY = batch([0, -1, 2, -1])


def count(teacher: FrozenTeacher) -> list[int]:
    """Grows by one whenever the teacher's network is run."""
    runs = []
    teacher.classifier.network.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_offline_student_and_teacher_see_the_same_batch_and_only_the_student_learns():
    student, teacher = linear(0), FrozenTeacher(linear(1))
    done = Offline(student, teacher).run(KNOWN)
    (lesson,) = done.lessons
    assert done.views == (lesson.student,) and lesson.share == 1
    assert torch.equal(lesson.teacher.logits, teacher.classifier(KNOWN.inputs).logits)
    (lesson.student.logits - lesson.teacher.logits).square().sum().backward()
    assert student.network[1].weight.grad.abs().sum() > 0
    assert not lesson.teacher.logits.requires_grad and teacher.classifier.network[1].weight.grad is None


def test_offline_only_the_student_is_trained_and_comes_out():
    scheme = Offline(linear(0), FrozenTeacher(linear(1)))
    assert scheme.learners() == [scheme.student] and scheme.models == {"student": scheme.student}


def test_offline_the_teachers_answers_stand_in_for_labels_that_nobody_knows():
    """The teacher finds class 1 most likely, whatever it sees."""
    scheme = Offline(linear(0), FrozenTeacher(constant(0.2, 0.5, 0.3)), answers=True)
    done = scheme.run(PARTLY)
    (lesson,) = done.lessons
    assert done.labels.tolist() == lesson.batch.labels.tolist() == [0, 1, 2, 1]
    assert PARTLY.labels.tolist() == [0, -1, 2, -1]


def test_offline_several_teachers_answer_as_one():
    """0.9 and 0.1 on one side, 0.3 and 0.7 on the other: 0.6 for the first class, though both do not agree."""
    teacher = TeacherEnsemble([FrozenTeacher(constant(0.9, 0.1)), FrozenTeacher(constant(0.3, 0.7))], [1, 1], 4.0)
    done = Offline(constant(0.5, 0.5), teacher, answers=True).run(batch([-1, 1]))
    assert done.labels.tolist() == [0, 1]


def test_offline_without_answers_an_unknown_label_stays_unknown_and_is_not_graded():
    done = Offline(linear(0), FrozenTeacher(linear(1))).run(PARTLY)
    assert done.labels.tolist() == done.lessons[0].batch.labels.tolist() == [0, -1, 2, -1]
    known = done.views[0].logits[[0, 2]]
    assert torch.equal(label_loss(done.views[0].logits, done.labels), label_loss(known, torch.tensor([0, 2])))


@pytest.mark.parametrize("needs", [Needs(), Needs(input_gradient=True)], ids=["logits", "input gradient"])
@pytest.mark.parametrize("answers", [False, True], ids=["labels known", "teacher answers"])
def test_offline_student_and_teacher_run_once_a_step(needs, answers):
    student, teacher = linear(0), FrozenTeacher(linear(1))
    runs, learned = count(teacher), []
    student.network.register_forward_hook(lambda *_: learned.append(1))
    Offline(student, teacher, needs, answers).run(PARTLY if answers else KNOWN)
    assert len(runs) == len(learned) == 1


def test_offline_both_views_hold_the_input_gradient_and_only_the_students_can_be_learned_from():
    student, teacher = linear(0), FrozenTeacher(linear(1))
    (lesson,) = Offline(student, teacher, Needs(input_gradient=True)).run(KNOWN).lessons
    assert lesson.student.input_gradient.shape == lesson.teacher.input_gradient.shape == (4, 1, 4, 4)
    assert torch.equal(lesson.teacher.input_gradient, teacher.classifier(KNOWN.inputs, KNOWN.labels).input_gradient)
    assert not lesson.teacher.input_gradient.requires_grad
    (lesson.student.input_gradient - lesson.teacher.input_gradient).square().sum().backward()
    assert student.network[1].weight.grad.abs().sum() > 0 and teacher.classifier.network[1].weight.grad is None


def test_offline_the_input_gradients_of_both_are_taken_at_the_teachers_answers():
    student, teacher = linear(0), FrozenTeacher(linear(1))
    done = Offline(student, teacher, Needs(input_gradient=True), answers=True).run(PARTLY)
    (lesson,) = done.lessons
    for view, classifier in ((lesson.student, student), (lesson.teacher, teacher.classifier)):
        assert torch.equal(view.input_gradient, classifier(PARTLY.inputs, done.labels).input_gradient)


def test_offline_views_hold_what_an_objective_asks_of_each_side():
    student, teacher = named("convnet4"), FrozenTeacher(named("convnet8", 1))
    needs = Needs(("layer1", "fc@in"), ("layer2",), ("layer2.1", "layer3.1"))
    (lesson,) = Offline(student, teacher, needs).run(batch([0, 1], side=8)).lessons
    assert {path: tap.shape for path, tap in lesson.student.taps.items()} == {
        "layer1": (2, 4, 8, 8),
        "fc@in": (2, 8),
    }
    assert {path: tap.shape for path, tap in lesson.teacher.taps.items()} == {"layer2": (2, 16, 4, 4)}
    network = teacher.classifier.network
    assert lesson.teacher.layers == {"layer2.1": network.layer2[1], "layer3.1": network.layer3[1]}
    assert isinstance(network.layer2[1], nn.BatchNorm2d) and lesson.student.layers == {}
    assert lesson.student.taps["layer1"].requires_grad and not lesson.teacher.taps["layer2"].requires_grad


def test_another_scheme_over_the_same_networks_sees_what_it_asks_for_alone():
    """As the stages of a method follow each other."""
    student, teacher = named("convnet4"), FrozenTeacher(named("convnet4", 1))
    Offline(student, teacher, Needs(("layer1",), ("layer1",), (), input_gradient=True))
    (lesson,) = Offline(student, teacher).run(batch([0, 1], side=8)).lessons
    assert lesson.student.taps == {} and lesson.teacher.taps == {} and lesson.teacher.input_gradient is None


def test_offline_a_place_that_a_network_has_not_is_named_before_anything_runs():
    with pytest.raises(SpecInvalid, match="layer4"):
        Offline(named("convnet4"), FrozenTeacher(named("convnet4")), Needs(teacher_taps=("layer4",)))


def test_alone_there_is_no_lesson():
    scheme = Alone(linear(0))
    seen = batch([0, 1, 2, 0])
    done = scheme.run(seen)
    assert done.lessons == () and done.labels is seen.labels
    assert len(done.views) == 1 and done.views[0].logits.shape == (4, 3)


def test_alone_the_student_is_what_learns_and_what_comes_out():
    scheme = Alone(student := linear(0))
    assert scheme.learners() == [student] and scheme.models == {"student": student}


def test_preparation_the_teacher_is_seen_on_both_sides_and_nothing_is_graded():
    teacher = FrozenTeacher(named("convnet4"))
    seen = batch([0, 1], side=8)
    done = Preparation(teacher, Needs(teacher_taps=("layer3",))).run(seen)
    (lesson,) = done.lessons
    assert done.views == () and done.labels is seen.labels
    assert lesson.student is lesson.teacher and lesson.teacher.taps["layer3"].shape == (2, 8, 4, 4)
    assert not lesson.student.logits.requires_grad


def test_preparation_no_network_learns_and_none_comes_out():
    scheme = Preparation(FrozenTeacher(named("convnet4")), Needs())
    assert scheme.learners() == [] and scheme.models == {}


class Noting(Teacher):
    """A teacher that notes what it sees, and in which thread."""

    def __init__(self) -> None:
        self.members = []
        self.seen: list[tuple[int, str, int]] = []

    def __call__(self, batch):
        self.seen.append((batch.epoch, threading.current_thread().name, torch.get_num_threads()))
        if batch.epoch == 13:
            raise RuntimeError("thirteen")
        return batch.epoch


def batches(*epochs: int):
    return [batch([0, 1], epoch=epoch) for epoch in epochs]


def test_teacher_ahead_has_begun_with_the_next_batch_when_one_is_passed_on():
    teacher = Noting()
    with closing(TeacherAhead(teacher, 1)) as ahead:
        made = []
        taken = ahead.through(made.append(one.epoch) or one for one in batches(1, 2, 3))
        first = next(taken)
        assert made == [1, 2] and ahead(first) == 1
        assert [ahead(one) for one in taken] == [2, 3]
        assert list(ahead.through([])) == []
    assert [epoch for epoch, *_ in teacher.seen] == [1, 2, 3]


def test_teacher_ahead_threads_are_counted_for_each_thread_and_its_own_ends_with_it():
    teacher, own, alive = Noting(), torch.get_num_threads(), threading.active_count()
    with closing(TeacherAhead(teacher, own + 1)) as ahead:
        assert ahead(batch([0])) == 0 and torch.get_num_threads() == own
        torch.set_num_threads(own)  # Changes nothing for the other thread.
        ahead(batch([0]))
    assert {(name.split("_")[0], threads) for _, name, threads in teacher.seen} == {("teacher", own + 1)}
    assert threading.active_count() == alive


def test_teacher_ahead_an_error_is_raised_at_its_own_batch():
    with closing(TeacherAhead(Noting(), 1)) as ahead:
        taken = ahead.through(batches(1, 13))
        assert ahead(next(taken)) == 1
        with pytest.raises(RuntimeError, match="thirteen"):
            ahead(next(taken))


def test_teacher_ahead_views_that_nobody_asked_for_are_dropped_at_the_end():
    alive = threading.active_count()
    ahead = TeacherAhead(Noting(), 1)
    next(ahead.through(batches(1, 13, 3)))
    ahead.close()
    assert threading.active_count() == alive


def test_teacher_ahead_the_teacher_sees_the_batches_of_the_epoch_first():
    teacher, announced = Noting(), []
    teacher.through = lambda given: announced.append(given) or given[1:]
    given = batches(1, 2, 3)
    with closing(TeacherAhead(teacher, 1)) as ahead:
        assert list(ahead.through(given)) == given[1:] and announced == [given]
    assert Teacher.through(teacher, given) is given


def test_teacher_ahead_answers_as_the_teacher_that_it_runs():
    teacher = TeacherEnsemble([FrozenTeacher(linear(1)), FrozenTeacher(linear(2))], [1, 3], 4.0)
    logits = [member(KNOWN.inputs).logits for member in teacher.members]
    with closing(TeacherAhead(teacher, 1)) as ahead:
        ahead.show(Needs())
        assert torch.equal(ahead(KNOWN).logits, teacher(KNOWN).logits) and ahead.members == teacher.members
        assert torch.equal(ahead.combined(logits), teacher.combined(logits))
        assert torch.equal(ahead.soft_targets(logits, 2.0), teacher.soft_targets(logits, 2.0))


def test_teacher_ahead_leaves_the_students_store_of_cast_weights_alone():
    """A student's weight that is used twice is cast once, whatever bfloat16 teacher ends meanwhile."""
    weight = nn.Parameter(torch.ones(2, 2))
    teacher = FrozenTeacher(linear(1))
    teacher.classifier.bf16 = True
    with closing(TeacherAhead(teacher, 1)) as ahead, torch.autocast("cpu", dtype=torch.bfloat16):
        first = torch.ones(2, 2) @ weight
        ahead(KNOWN)
        second = torch.ones(2, 2) @ weight
    casts = [made.grad_fn.next_functions[1][0] for made in (first, second)]
    assert casts[0] is casts[1]
