from kdcore.schemes.alone import Alone
from tests.kdcore.tiny import batch, linear


def test_alone_there_is_no_lesson():
    scheme = Alone(linear(0))
    seen = batch([0, 1, 2, 0])
    done = scheme.round(seen)
    assert done.lessons == () and done.labels is seen.labels
    assert len(done.views) == 1 and done.views[0].logits.shape == (4, 3)


def test_the_student_is_what_learns_and_what_comes_out():
    scheme = Alone(student := linear(0))
    assert scheme.learners() == [student] and scheme.models == {"student": student}
