import pytest

from kdcore.catalog import named_facts
from kdcore.spec import (
    JobSpec,
    Known,
    alone,
    baseline_key,
    data_differences,
    differences,
    offered_key,
    parse,
    resolve,
)

DIGITS = named_facts("digits", None)


def resolved(**fields) -> JobSpec:
    spec = parse({"dataset": "digits", "student": "convnet4", "method": "supervised", **fields})
    return resolve(spec, Known(dataset=DIGITS))


def texts(spec: JobSpec, other: JobSpec) -> list[str]:
    return [str(one) for one in differences(spec, other.as_json())]


def test_differences_of_equal_recipes_are_none():
    mine = resolved(training={"epochs": 4, "seed": 2}, name="mine")
    free = {"device": "cpu", "checkpoint_every_s": 1}
    theirs = resolved(training={"epochs": 4, "seed": 2, **free}, name="theirs", scheduling={"priority": 3}, strict=True)
    assert differences(mine, theirs.as_json()) == []


def test_differences_compare_defaults_that_are_written_out():
    """The default milestones depend on the epochs: naming the same ones is no difference."""
    named = {"name": "multistep", "milestones": [5, 6, 7]}
    assert texts(resolved(training={"epochs": 8}), resolved(training={"epochs": 8, "schedule": named})) == []


def test_data_differences_are_those_of_a_file_that_an_earlier_version_read_otherwise():
    file = DIGITS.model_copy(update={"kind": "folders"})
    stored = file.model_dump(mode="json", exclude={"validation"})
    assert data_differences(file, stored) == [] and data_differences(file, {}) == []
    now = file.model_copy(update={"validation": 30, "train": 1500})
    assert [str(one) for one in data_differences(now, stored)] == [
        "dataset.train is 1500 here and 1437 there",
        "dataset.validation is 30 here and 0 there",
    ]


@pytest.mark.parametrize(
    ("training", "field", "here", "there"),
    [
        ({"epochs": 241}, "training.epochs", 240, 241),
        ({"batch_size": 32}, "training.batch_size", 64, 32),
        ({"seed": 1}, "training.seed", 0, 1),
        ({"optimizer": {"name": "sgd", "lr": 0.1}}, "training.optimizer.lr", 0.05, 0.1),
        ({"optimizer": {"name": "adamw"}}, "training.optimizer", "sgd", "adamw"),
        ({"schedule": {"name": "cosine"}}, "training.schedule", "multistep", "cosine"),
        ({"augmentation": {"name": "crop_flip"}}, "training.augmentation", "none", "crop_flip"),
        ({"label_smoothing": 0.1}, "training.label_smoothing", 0.0, 0.1),
        ({"ema": 0.9}, "training.ema", None, 0.9),
        ({"clip_norm": 5}, "training.clip_norm", None, 5.0),
        ({"precision": "bf16"}, "training.precision", "auto", "bf16"),
        ({"validation_fraction": 0.2}, "training.validation_fraction", 0.1, 0.2),
    ],
)
def test_differences_name_each_field_of_the_recipe(training, field, here, there):
    first = differences(resolved(), resolved(training=training).as_json())[0]
    assert (first.field, first.here, first.there) == (field, here, there)


def test_differences_in_mixing_name_the_method():
    (found,) = differences(resolved(), resolved(training={"mix": {"name": "mixup"}}).as_json())
    assert str(found) == "training.mix is none here and mixup there"


def test_differences_in_network_normalisation_and_data():
    other = resolved(student={"architecture": "convnet8", "preprocessing": {"mean": [0.5], "std": [0.5]}}).as_json()
    other["dataset"]["source"] = "blob:sha256:" + "5" * 64
    fields = [one.field for one in differences(resolved(), other)]
    assert fields == [
        "student.architecture", "student.preprocessing.mean", "student.preprocessing.std", "dataset.source",
    ]  # fmt: skip


def test_differences_read_the_student_alone_of_a_distilled_job():
    """Its own alpha weighs the labels beside the teacher; its baseline has the labels' loss alone."""
    distilled = {
        **resolved().as_json(),
        "method": {"name": "kd"},
        "alpha": 0.1,
        "student": [resolved().as_json()["student"]],
    }
    assert differences(resolved(), distilled) == []
    assert texts(resolved(), resolved(alpha=0.5)) == ["alpha is 1.0 here and 0.5 there"]


def test_differences_of_a_job_that_an_earlier_version_ran():
    """A field that its spec lacks is a difference, unless it is not set here either."""
    stored = resolved().as_json()
    del stored["training"]["precision"], stored["training"]["ema"]
    assert [str(one) for one in differences(resolved(), stored)] == [
        "training.precision is auto here and not recorded there"
    ]


def test_alone_is_a_valid_supervised_job():
    spec = parse({
        "dataset": "digits", "teacher": {"checkpoint": "model:big"}, "student": "convnet4", "method": "kd",
        "assistants": ["convnet8"], "temperature": 3, "alpha": 0.1, "beta": 2, "baseline": "train",
        "unlabelled": "more",
    })  # fmt: skip
    body = resolve(alone(spec), Known(dataset=DIGITS)).as_json()
    assert parse(body).as_json() == body
    assert (body["method"]["name"], body["alpha"]) == ("supervised", 1.0)
    assert body["teacher"] is body["unlabelled"] is body["beta"] is None


def test_differences_of_a_spec_before_the_options_of_data_are_none():
    """Fields of the data set that a stored spec lacks mean their defaults."""
    mine = resolved()
    stored = {**mine.as_json(), "dataset": {"source": "digits", "image_size": None}}
    assert differences(mine, stored) == []
    stored["dataset"] = {"source": "digits", "channels": 3}
    assert [str(one) for one in differences(mine, stored)] == ["dataset.channels is none here and 3 there"]


def test_differences_a_store_of_the_images_own_size_is_that_of_earlier_versions():
    """They cut boxes from the images. Their stored specs have no store_size, or none is written out."""
    folders = DIGITS.model_copy(update={"kind": "folders", "image_size": (96, 96), "own_side": 90})
    body = {"dataset": {"source": "digits", "image_size": 96}, "student": "convnet4", "method": "supervised"}
    mine = resolve(parse({**body, "training": {"augmentation": {"name": "random_resized_crop"}}}), Known(folders))
    assert mine.training.augmentation.store_size == 96
    stored = mine.as_json()
    del stored["training"]["augmentation"]["store_size"]
    assert differences(mine, stored) == []
    larger = resolve(
        parse({**body, "training": {"augmentation": {"name": "random_resized_crop", "store_size": 120}}}),
        Known(folders),
    )
    assert [str(one) for one in differences(larger, stored)] == [
        "training.augmentation.store_size is 120 here and not recorded there"
    ]
    assert [one.field for one in differences(mine, larger.as_json())] == ["training.augmentation.store_size"]


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        (None, None, []),
        ({"aware": False}, None, []),
        ({"epochs": 24}, {}, []),
        ({}, None, ["quantization.epochs is 24 here and none there"]),
        (None, {"epochs": 2}, ["quantization.epochs is none here and 2 there"]),
    ],
    ids=str,
)
def test_differences_compare_the_epochs_that_train_for_int8(here, there, said):
    assert texts(resolved(quantization=here), resolved(quantization=there)) == said


def test_differences_of_a_spec_before_training_for_int8_are_none():
    stored = resolved().as_json()
    del stored["quantization"]
    assert differences(resolved(), stored) == []


def key(**fields) -> str | None:
    return baseline_key(resolved(**fields).as_json())


def test_baseline_key_is_the_same_exactly_if_nothing_differs_that_decides_its_bits():
    mine = key(training={"epochs": 4})
    same = [
        {"name": "x", "labels": {"a": "b"}, "strict": True, "scheduling": {"priority": 3}, "seeds": 3},
        {"training": {"epochs": 4, "checkpoint_every_s": 1, "overlap": True, "teacher_cache": "off"}},
        {"method": "dml", "student": ["convnet4", "convnet8"]},
        {"export": ["onnx"]},
    ]
    other = [
        *({"training": {"epochs": 4, **one}} for one in ({"seed": 1}, {"threads": 2}, {"device": "cpu"})),
        *({"training": {"epochs": 4, **one}} for one in ({"kernels": "eager"}, {"precision": "fp32"})),
        {"training": {"epochs": 4, "teacher_cache": {"views": 3}}},
        {"student": "convnet8"},
        {"dataset": {"source": "digits", "channels": 3}},
        {"quantization": {"aware": True}},
    ]
    assert all(key(**{"training": {"epochs": 4}, **one}) == mine for one in same)
    assert all(key(**{"training": {"epochs": 4}, **one}) != mine for one in other)


def test_baseline_key_is_none_for_a_file_whose_bytes_may_change():
    assert key(dataset="file:/tmp/data.npz") is None


def test_offered_key_is_that_of_a_student_alone_that_the_job_trains():
    supervised = resolved().as_json()
    dml = {"method": "dml", "student": ["convnet4", "convnet8"]}
    assert offered_key(supervised) == offered_key(resolved(**dml, baseline="train").as_json()) == key()
    assert offered_key(resolved(**dml).as_json()) is None
    assert offered_key(resolved(alpha=0.5).as_json()) is None
