from kdcore.lesson import Needs
from kdcore.schemes.preparation import Preparation
from kdcore.teacher import FrozenTeacher
from tests.kdcore.tiny import batch, named


def test_the_teacher_is_seen_on_both_sides_and_nothing_is_graded():
    teacher = FrozenTeacher(named("convnet4"))
    seen = batch([0, 1], side=8)
    done = Preparation(teacher, Needs(teacher_taps=("layer3",))).round(seen)
    (lesson,) = done.lessons
    assert done.views == () and done.labels is seen.labels
    assert lesson.student is lesson.teacher and lesson.teacher.taps["layer3"].shape == (2, 8, 4, 4)
    assert not lesson.student.logits.requires_grad


def test_no_network_learns_and_none_comes_out():
    scheme = Preparation(FrozenTeacher(named("convnet4")), Needs())
    assert scheme.learners() == [] and scheme.models == {}
