"""The options of a data set: what is given, what decides, and how a registration's and a job's go together."""

import pytest

from base.errors import SpecFaults
from kdcore.spec import DataOptions, Dataset, parse
from tests.kdcore.spec.specs import body


def options(**given):
    return DataOptions.model_validate(given)


def faults_of(**dataset):
    with pytest.raises(SpecFaults) as caught:
        parse(body(dataset={"source": "digits", **dataset}))
    return [(fault.pointer, fault.message) for fault in caught.value.faults]


def test_data_options_that_are_given():
    assert options().given() == {} == options(limit=None).given()
    assert options(class_names=["a", "b"], skip_unreadable=False).given() == {
        "class_names": ["a", "b"],
        "skip_unreadable": False,
    }
    assert Dataset(source="digits", channels=3).given() == {"channels": 3}


def test_data_options_that_decide_are_other_than_the_defaults():
    defaults = {"resize": "crop", "interpolation": "bilinear", "orientation": "ignore", "skip_unreadable": False}
    assert options(**defaults, limit_seed=3).deciding() == {}
    assert options(limit=10, limit_seed=3, resize="pad").deciding() == {"limit": 10, "limit_seed": 3, "resize": "pad"}


def test_dataset_resolved_writes_out_every_default_and_decides_the_same():
    resolved = Dataset(source="x", image_size=8).resolved()
    assert resolved.given() == {
        "image_size": 8,
        "resize": "crop",
        "interpolation": "bilinear",
        "orientation": "ignore",
        "skip_unreadable": False,
        "limit_seed": 0,
    }
    assert resolved.deciding() == {"image_size": 8} and resolved.resolved() == resolved
    assert Dataset.of("x", resolved.options) == resolved


@pytest.mark.parametrize(
    ("registered", "given", "together"),
    [
        ({"channels": 3, "limit": 9}, {"limit": 5}, {"channels": 3, "limit": 5}),
        ({"orientation": "apply"}, {"orientation": "ignore"}, {"orientation": "ignore"}),
        (
            {"image_size": 224, "resize_to": 256},
            {"channels": 1},
            {"image_size": 224, "resize_to": 256, "channels": 1},
        ),
        ({"image_size": 224, "resize_to": 256}, {"image_size": 32}, {"image_size": 32}),
        ({"image_size": 224, "resize_to": 256}, {"resize": "pad"}, {"image_size": 224, "resize": "pad"}),
        (
            {"image_size": 32, "resize": "squash"},
            {"image_size": 28, "resize_to": 32},
            {"image_size": 28, "resize_to": 32},
        ),
    ],
)
def test_data_options_of_a_job_are_over_those_of_the_registration(registered, given, together):
    assert options(**given).over(options(**registered)).given() == together


def test_data_options_for_unlabelled_images_have_nothing_of_classes():
    given = options(channels=3, limit=5, limit_seed=1, class_names=["a", "b"])
    assert given.for_unlabelled().given() == {"channels": 3}


@pytest.mark.parametrize(
    ("dataset", "field", "said"),
    [
        ({"resize_to": 256}, "resize_to", "give an image_size, too"),
        ({"image_size": 64, "resize_to": 32}, "resize_to", "which is not larger"),
        ({"image_size": 64, "resize": "pad", "resize_to": 72}, "resize_to", "only resize: crop has it, not pad"),
        ({"resize": "stretch"}, "resize", "must be one of crop, squash, pad"),
        ({"channels": 2}, "channels", "must be one of 1, 3"),
        ({"encoding": "klingon"}, "encoding", "there is no encoding 'klingon'"),
        ({"encoding": "hex"}, "encoding", "there is no encoding 'hex'"),
        ({"limit": 1}, "limit", "greater than or equal to 2"),
        ({"class_names": ["a", "a"]}, "class_names", "'a' is there twice"),
    ],
)
def test_dataset_options_that_cannot_work_are_named(dataset, field, said):
    ((pointer, message),) = faults_of(**dataset)
    assert pointer == f"/dataset/{field}" and said in message


def test_dataset_size_that_is_wrong_hides_no_other_fault_and_makes_none():
    assert [pointer for pointer, _ in faults_of(image_size=2, resize_to=256)] == ["/dataset/image_size"]
