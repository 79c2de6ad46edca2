from pathlib import Path

import pytest

from kdcore.catalog.facts import LeftOut
from kdcore.spec import (
    METHODS,
    DataOptions,
    dataset_warnings,
    grey_as_colour,
    model_warnings,
    parse,
    resolve,
    spec_warnings,
)
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


def test_dataset_warnings_name_all_that_is_left_out_and_merged():
    left = [
        LeftOut(what="extra", count=1200, why="it is beside the splits"),
        LeftOut(what="x_val", count=9, why="no y"),
    ]
    found = list(
        dataset_warnings(
            DATA.model_copy(update={"left_out": left, "merged": ["train/é"], "repeated": ["a", "b"]}), "/dataset"
        )
    )
    more = [("folders_merged", "/dataset"), ("folders_repeated", "/dataset")]
    assert codes(found) == [("files_left_out", "/dataset")] * 2 + more
    assert [one.message for one in found[:2]] == [
        "left out: extra (1,200): it is beside the splits",
        "left out: x_val (9): no y",
    ]
    assert "train/é" in found[2].message


def pictures(options=None, **facts):
    """Codes and messages about a data set of 100 pictures."""
    counts = {"colour": 100, **facts.pop("pictures", {})}
    data = DATA.model_copy(update={"pictures": counts, **facts})
    given = None if options is None else DataOptions.model_validate(options)
    return {one.code: one.message for one in dataset_warnings(data, options=given)}


def test_dataset_warnings_about_pictures_have_their_counts():
    found = pictures(
        pictures={"alpha": 3, "oriented": 50, "sixteen_bit": 7, "animated": 2, "palette": 9, "cmyk": 4},
        pixels_cut=0.667,
        skipped=6,
        skipped_names=["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"],
    )
    starts = {
        "pictures_skipped": "6 image files cannot be read and were left out: a.jpg, b.jpg, c.jpg, d.jpg, …",
        "pictures_cut": "the crop to a square leaves out 67% of the pixels",
        "alpha_over_white": "3 pictures have transparent parts",
        "orientation_ignored": "50 pictures have a camera's tag",
        "sixteen_bit_scaled": "7 pictures have more than 8 bits",
        "frames_left_out": "2 pictures are animated",
    }
    assert list(found) == list(starts) and all(found[code].startswith(text) for code, text in starts.items())
    assert pictures() == {}


@pytest.mark.parametrize(
    ("largest", "hint"), [(1, "of 0 and 1 by 255"), (16, "(x * (255 / 16))"), (31, "(255 / 31)"), (32, ""), (None, "")]
)
def test_dataset_warnings_images_nearly_black(largest, hint):
    found = list(dataset_warnings(DATA.model_copy(update={"largest": largest}), "/dataset"))
    assert codes(found) == [("pixels_dark", "/dataset")] * bool(hint)
    assert not hint or (f"above {largest} of 255" in found[0].message and hint in str(found[0].hint))


@pytest.mark.parametrize(
    ("options", "facts", "warned"),
    [
        ({}, {"pixels_cut": 0.1}, False),
        ({}, {"pixels_cut": 0.11}, True),
        ({"resize": "crop"}, {"pixels_cut": 0.6}, False),
        ({"image_size": 224, "resize_to": 256}, {"pixels_cut": 0.24}, False),
        ({"image_size": 224, "resize_to": 256}, {"pixels_cut": 0.5}, True),
        ({}, {"pictures": {"oriented": 1}}, False),
        ({}, {"pictures": {"oriented": 2}}, True),
        ({"orientation": "ignore"}, {"pictures": {"oriented": 100}}, False),
        ({"orientation": "apply"}, {"pictures": {"oriented": 100}}, False),
    ],
)
def test_dataset_warnings_are_not_about_what_was_chosen(options, facts, warned):
    assert bool(pictures(options, **facts)) == warned


def test_dataset_warnings_about_classes_too_small_to_be_measured():
    facts = {"class_names": ["a", "b", "c"], "num_classes": 3}
    enough = {"train": [10, 10, 10], "test": [5, 5, 5]}
    assert pictures(class_counts=enough, **facts) == {}
    found = pictures(class_counts={"train": [10, 9, 10], "test": [5, 4, 3]}, **facts)
    assert found["class_too_small"].startswith(
        "2 of 3 classes have fewer than 10 train or 5 test images (b: 9 train, 4 test; c: 3 test)"
    )


def test_grey_as_colour_names_the_field():
    assert "channels: 3" in (grey_as_colour().hint or "")


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


SMALL_DATA = DATA.model_copy(update={"train": 90, "test": 30})
"""81 images to train on: 27 of each class in an epoch."""


def short(epochs, **changes):
    training = {"epochs": epochs, "batch_size": 27}
    spec = body(**{"teacher": STATED, **changes, "training": {**training, **changes.get("training", {})}})
    return list(spec_warnings(parse(spec), known(spec, NORMALIZED, dataset=SMALL_DATA)))


def test_budget_short_until_the_longest_training_that_was_measured_not_to_help():
    """kd: 216 images of each class are 8 epochs of 27; it was measured to help at 259, which are 10 epochs."""
    (warning,) = short(8)
    assert (warning.code, warning.pointer) == ("budget_short", "/training/epochs")
    assert "+0.1 points with 216 images for each class; here the student sees 216" in warning.message
    assert "at least 10 epochs" in warning.hint and "nst" in warning.hint
    assert short(9) == []


def test_budget_short_of_kd_has_the_figure_of_its_numbers():
    """The published numbers lost up to 259 images of each class, which are 9 epochs of 27, and helped at 647."""
    (warning,) = short(9, alpha=0.1, beta=0.9)
    assert "-9.7 points with 259 images" in warning.message and "at least 24 epochs" in warning.hint
    assert short(10, alpha=0.1, beta=0.9) == []
    (warning,) = short(8, method={"name": "kd", "standardize": True})
    assert "-0.2 points with 216 images" in warning.message
    assert short(1, method={"name": "kd", "form": "logits_l2"}) == []


@pytest.mark.parametrize("method", ["supervised", "nst", "dkd", ["kd", "nst"]])
def test_budget_short_is_silent_where_nothing_was_measured_against_the_method(method):
    teacher = {"teacher": None} if method == "supervised" else {}
    assert short(1, method=method, **teacher) == []


def test_budget_short_of_a_sum_needs_all_of_its_methods_to_be_too_short():
    """attention: up to 216 images of each class, 8 epochs; kd with its published numbers: 9."""
    (warning,) = short(8, method=["kd", "attention"])
    assert "kd+attention was measured" in warning.message and "more than 8 epochs" in warning.hint
    assert short(9, method=["kd", "attention"]) == []


def test_budget_short_of_a_first_stage_names_its_epochs():
    """30 of 240 epochs, scaled to 6 of 48: 18 steps of 27 images."""
    (warning,) = short(48, method="activation_boundary")
    assert (warning.code, warning.pointer) == ("budget_short", "/method/pretraining_epochs")
    assert "has 18 steps" in warning.message
    assert short(48, method={"name": "activation_boundary", "pretraining_epochs": 29}) == []


def test_budget_short_counts_unlabelled_images():
    spec = body(teacher=STATED, unlabelled="pool", training={"epochs": 2, "batch_size": 27})
    facts = known(spec, NORMALIZED, dataset=SMALL_DATA)
    assert spec_warnings(parse(spec), facts) == []  # 581 images in an epoch


def test_budget_short_never_warns_of_the_published_recipe_nor_of_the_demo():
    cifar = DATA.model_copy(update={"num_classes": 100, "train": 50_000, "test": 10_000})
    digits = DATA.model_copy(update={"num_classes": 10, "train": 1437, "test": 360})
    for method, options in METHODS.items():
        if options.short_budget is not None and options.facts.teacher == "required":
            spec = body(teacher=STATED, method=method)
            hundred = NORMALIZED.model_copy(update={"num_classes": 100})
            assert spec_warnings(parse(spec), known(spec, hundred, dataset=cifar)) == []
    demo = body(teacher=STATED, training={"epochs": 10})
    assert spec_warnings(parse(demo), known(demo, NORMALIZED, dataset=digits)) == []


def table(page, width):
    """The rows of a page's tables of this width: cells by the first one."""
    lines = (Path(__file__).parents[3] / "docs" / page).read_text().splitlines()
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
    return {row[0]: row[1:] for row in rows if len(row) == width}


def test_short_budgets_are_those_of_the_tables_in_the_docs():
    """Those of kd and attention stand in docs/measured.md, the others in docs/methods.md."""
    cited = {name: options.short_budget for name, options in METHODS.items() if options.short_budget}
    gains = {name: row[1].split("±")[0].strip() for name, row in table("methods.md", 4).items()}
    others = {"fsp", "rkd", "sp", "cc", "crd", "one", "ttm", "activation_boundary"}
    assert set(cited) == {"kd", "attention", *others}
    for name in others:
        assert (cited[name].images_per_class, f"{cited[name].gain:+.2f}") == (5400 * 4 // 100, gains[name])
    measured = table("measured.md", 6)
    kd, standardized = (METHODS["kd"](name="kd", standardize=one) for one in (False, True))
    digits, cifar = 0, 1
    for row, column, budget in (
        ("`kd`, 0.1 + 0.9, T 4 (published)", digits, kd.short_budget),
        ("`kd`, 1 + 0.25, T 4", cifar, kd.short_budget_with(kd.short_weights)),
        ("`kd`, standardized", cifar, standardized.short_budget_with(kd.short_weights)),
        ("`attention`", cifar, cited["attention"]),
    ):
        assert measured[row][column].startswith(f"{budget.gain:+.1f} "), row
        assert budget.images_per_class == (1293 * 2 // 10, 5400 * 4 // 100)[column] + (column == digits), row


def small(method, student="convnet4", **changes):
    spec = body(**{"teacher": STATED, "method": method, "student": student, "training": {"epochs": 200}, **changes})
    grey = DATA.model_copy(update={"channels": 1, "mean": [0.4], "std": [0.1]})
    found = spec_warnings(parse(spec), known(spec, NORMALIZED, dataset=grey))
    return [one for one in found if one.code == "student_small"]


def test_student_small_up_to_the_size_at_which_the_method_was_measured_to_harm():
    (warning,) = small("nst")
    assert warning.pointer == "/method" and "-13.5 points with 3,778 parameters" in warning.message
    assert "a smaller beta than 50" in warning.hint
    assert [len(small("nst", student)) for student in ("convnet8", "convnet16", "resnet20")] == [1, 0, 0]
    assert [len(small("attention", student)) for student in ("convnet8", "convnet16", "convnet32")] == [1, 1, 0]


def test_student_small_names_the_method_of_a_list_and_its_weight():
    (warning,) = small(["dist", "attention"])
    assert warning.pointer == "/method/1" and "a smaller weight than 1000" in warning.hint


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dist", {}),
        ("nst", {"beta": 5}),
        (["kd", {"name": "nst", "weight": 5}], {}),
        ({"name": "attention", "reduction": "norms"}, {}),
    ],
)
def test_student_small_is_silent_where_nothing_was_measured(method, changes):
    assert small(method, **changes) == []


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
        ((64, 64), []),  # It gets images of that size.
        ((32, 64), [("image_size_differs", "/dataset/image_size")]),
    ],
)
def test_spec_warnings_about_the_size_of_the_images_that_a_teacher_learned_from(size, expected):
    network = NORMALIZED.model_copy(update={"image_size": size})
    warnings = spec_warnings(parse(body()), known(body(), network))
    assert codes(warnings) == expected
    if warnings:
        assert "pixels, the data set has 32 x 32" in warnings[0].message
    assert spec_warnings(resolve(parse(body()), known(body(), network)), known(body(), network)) == warnings


def test_spec_warnings_about_the_size_where_a_method_compares_gradients_at_images_of_one_size():
    spec = body(method={"name": "attention", "mapping": "gradient"})
    network = NORMALIZED.model_copy(update={"image_size": (64, 64)})
    assert codes(spec_warnings(parse(spec), known(spec, network))) == [("image_size_differs", "/dataset/image_size")]
    assert resolve(parse(spec), known(spec, network)).teachers[0].image_size is None


def test_spec_warnings_say_nothing_about_a_size_that_is_given_for_the_teacher():
    spec = body(teacher={"checkpoint": "model:big", "image_size": 32})
    network = NORMALIZED.model_copy(update={"image_size": (64, 64)})
    assert spec_warnings(parse(spec), known(spec, network)) == []


def test_spec_warnings_say_nothing_about_a_program_of_another_size():
    """fit() refuses it."""
    spec = body(teacher=PROGRAM)
    program = TRACED.model_copy(update={"image_size": (64, 64), "mean": [0.5] * 3, "std": [0.5] * 3})
    assert spec_warnings(parse(spec), known(spec, teachers={"/teacher": program})) == []


@pytest.mark.parametrize(
    ("quantization", "export", "expected"),
    [
        ({}, ["safetensors"], [("int8_not_exported", "/export")]),
        ({"epochs": 3}, ["onnx", "torch_export"], [("int8_not_exported", "/export")]),
        ({}, ["onnx_int8"], []),
        ({"aware": False}, ["onnx"], []),
        (None, ["onnx"], []),
    ],
)
def test_spec_warnings_about_a_training_for_int8_without_an_int8_file(quantization, export, expected):
    spec = body(quantization=quantization, export=export)
    assert codes(spec_warnings(parse(spec), known(spec, NORMALIZED))) == expected
