import pytest

from kdcore.spec import parse
from kdcore.spec.measured import teacher_check_key
from tests.kdcore.spec.specs import body

BLOB = "blob:sha256:" + "a" * 64
ONE = {"checkpoint": BLOB, "architecture": "resnet56", "preprocessing": {"mean": [0.5], "std": [0.5]}}
RESOLVED = {"dataset": {"source": "digits", "image_size": None}, "teacher": ONE, "temperature": 4.0}


def key(**changes):
    return teacher_check_key({**RESOLVED, **changes})


def test_teacher_check_key_is_a_digest_of_what_decides_the_result():
    assert len(key()) == 64
    for change in (
        {"dataset": {"source": "digits", "image_size": 32}},
        {"dataset": {"source": "cifar10", "image_size": None}},
        {"dataset": {"source": "digits", "image_size": None, "channels": 3}},
        {"teacher": {**ONE, "checkpoint": BLOB.replace("a", "b")}},
        {"teacher": {**ONE, "architecture": "resnet32"}},
        {"teacher": {**ONE, "preprocessing": {"mean": [0.4], "std": [0.5]}}},
        {"teacher": {**ONE, "class_names": ["a", "b"]}},
        {"teacher": [ONE, ONE]},
    ):
        assert key(**change) != key()


def test_teacher_check_key_leaves_out_what_decides_nothing():
    assert key(temperature=1.0, student={"architecture": "resnet20"}, training={"seed": 7}) == key()
    assert key(teacher={**ONE, "class_names": None, "weight": None, "program": None}) == key()


def test_teacher_check_key_does_not_depend_on_defaults_that_are_written_out():
    written_out = parse(body(dataset="digits")).dataset.resolved().model_dump(mode="json")
    assert key(dataset=written_out) == key(dataset={"source": "digits"}) == key()


def test_teacher_check_key_of_several_teachers_depends_on_their_weights_and_the_temperature():
    two = [{**ONE, "weight": 1.0}, {**ONE, "weight": 2.0}]
    assert key(teacher=two) != key(teacher=two, temperature=1.0)
    assert key(teacher=two) != key(teacher=[two[0], {**ONE, "weight": 3.0}])


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": None},
        {"teacher": {**ONE, "checkpoint": "file:/tmp/teacher.pth"}},
        {"teacher": {"program": "file:/tmp/teacher.pt2"}},
        {"dataset": {"source": "file:/tmp/data.npz"}},
    ],
)
def test_teacher_check_key_is_none_without_a_teacher_and_for_files_by_path(changes):
    assert key(**changes) is None


def test_teacher_check_key_of_a_spec_read_again_is_the_same():
    resolved = parse(body(teacher=ONE)).as_json()
    assert teacher_check_key(resolved) == teacher_check_key(parse(resolved).as_json())
