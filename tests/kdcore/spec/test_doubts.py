import pytest

from kdcore.spec import dataset_warnings, model_warnings, parse, spec_warnings
from tests.kdcore.spec.specs import DATA, ONE, OTHER, TEACHER, body, known

NORMALIZED = TEACHER.model_copy(update={"mean": [0.5] * 3, "std": [0.25] * 3})
STATED = {"checkpoint": "model:big", "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3}}


def codes(warnings):
    return [(one.code, one.pointer) for one in warnings]


def test_model_warnings_only_without_a_normalization():
    assert codes(model_warnings(TEACHER)) == [("normalization_guessed", "/preprocessing")]
    assert codes(model_warnings(NORMALIZED)) == []


def test_dataset_warnings_give_the_number_of_images_set_aside():
    assert codes(dataset_warnings(DATA)) == []
    (warning,) = dataset_warnings(DATA.model_copy(update={"test_carved": True, "train": 90, "test": 10}))
    assert (warning.code, warning.pointer) == ("test_split_carved", "/blob")
    assert "10 of its 100 images" in warning.message


@pytest.mark.parametrize(
    ("changes", "network", "expected"),
    [
        ({}, TEACHER, [("normalization_guessed", "/teacher/preprocessing")]),
        ({}, NORMALIZED, []),
        ({"teacher": STATED}, TEACHER, []),
    ],
    ids=["guessed", "of the file", "of the spec"],
)
def test_spec_warnings_about_a_teachers_normalization(changes, network, expected):
    spec = body(**changes)
    assert codes(spec_warnings(parse(spec), known(spec, network))) == expected


def test_spec_warnings_know_nothing_about_a_teacher_that_is_not_downloaded():
    assert spec_warnings(parse(body()), known(body(), teachers={})) == []


def test_spec_warnings_name_each_teacher_of_a_list():
    spec = body(teacher=[ONE, OTHER])
    facts = known(spec, teachers={"/teacher/0": NORMALIZED, "/teacher/1": TEACHER})
    assert codes(spec_warnings(parse(spec), facts)) == [("normalization_guessed", "/teacher/1/preprocessing")]


def test_spec_warnings_about_a_test_split_that_was_set_aside():
    spec = body(teacher=STATED)
    carved = known(spec, dataset=DATA.model_copy(update={"test_carved": True}))
    assert codes(spec_warnings(parse(spec), carved)) == [("test_split_carved", "/dataset")]
