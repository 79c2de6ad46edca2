import pytest

from kdcore.spec import dataset_warnings, model_warnings, parse, resolve, spec_warnings
from tests.kdcore.spec.specs import DATA, ONE, OTHER, PROGRAM, TEACHER, TRACED, body, known

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


def named(*names):
    return NORMALIZED.model_copy(update={"class_names": list(names)})


def test_spec_warnings_about_classes_in_another_order_in_the_same_words_for_the_resolved_spec():
    spec = body()
    facts = known(spec, named("c", "a", "b"))
    (warning,) = spec_warnings(parse(spec), facts)
    assert (warning.code, warning.pointer) == ("class_order_changed", "/teacher/class_names")
    assert "(c, a, b and not a, b, c)" in warning.message
    bare = known(spec, NORMALIZED)  # The engine reads the file, which does not say what was registered.
    assert spec_warnings(resolve(parse(spec), facts), bare) == [warning]


@pytest.mark.parametrize(
    ("stated", "file", "expected"),
    [
        (["a", "b", "c"], None, []),
        (["b", "a", "c"], None, [("class_order_changed", "/teacher/class_names")]),
        (["a", "b", "c"], ("c", "b", "a"), []),  # The spec knows better than the file.
        (None, ("a", "b", "c"), []),
    ],
)
def test_spec_warnings_about_class_names_of_the_spec_and_the_file(stated, file, expected):
    spec = body(teacher={"checkpoint": "model:big", "class_names": stated})
    network = named(*file) if file else NORMALIZED
    assert codes(spec_warnings(parse(spec), known(spec, network))) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), []),
        (None, []),
        ((64, 64), [("image_size_differs", "/dataset/image_size")]),
        ((32, 64), [("image_size_differs", "/dataset/image_size")]),
    ],
)
def test_spec_warnings_about_the_size_of_the_images_that_a_teacher_learned_from(size, expected):
    network = NORMALIZED.model_copy(update={"image_size": size})
    warnings = spec_warnings(parse(body()), known(body(), network))
    assert codes(warnings) == expected
    if warnings:
        assert "pixels, the data set has 32 x 32" in warnings[0].message


def test_spec_warnings_say_nothing_about_a_program_of_another_size():
    """fit() refuses it."""
    spec = body(teacher=PROGRAM)
    program = TRACED.model_copy(update={"image_size": (64, 64), "mean": [0.5] * 3, "std": [0.5] * 3})
    assert spec_warnings(parse(spec), known(spec, teachers={"/teacher": program})) == []
