import pytest

from base.errors import DatasetUnreadable
from kdcore.data.splits import by_role, class_and_split, held_out, split_role, split_roles


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "train") for name in ("train", "Training", "TRAIN_SET", "trainset", "seg_train", "train-images")),
        *((name, "train") for name in ("train2017", "01_train", "Training Data", "train_val", "trainval", "x_train")),
        *((name, "val") for name in ("val", "Valid", "validation", "val_images", "validset", "val2012")),
        *((name, "test") for name in ("test", "Testing", "test_set", "testdata", "Test Images")),
        *((name, "test") for name in ("PrivateTest", "private_test", "test-private")),
        *((name, "dev") for name in ("PublicTest", "public test", "test_public")),
        *((name, "holdout") for name in ("holdout", "hold-out", "held_out", "Hold out set")),
        *(
            (name, role)
            for name, role in (("dev", "dev"), ("dev_set", "dev"), ("eval", "eval"), ("Evaluation", "eval"))
        ),
    ],
)
def test_split_role_usual_names(name, role):
    assert split_role(name) == (role, ())


@pytest.mark.parametrize(
    "name", ["cat", "trains", "restrain", "contest", "train_test_split", "valley", "testament", ""]
)
def test_split_role_other_names_are_no_splits(name):
    assert split_role(name) is None


def test_split_roles_other_words_must_be_the_same_in_two_splits():
    assert split_roles(["flowers_train", "flowers_test"]) == {"flowers_train": "train", "flowers_test": "test"}
    assert split_roles(["train station", "bus station", "test tube"]) == {}
    assert split_roles(["freight train", "passenger train"]) == {}
    assert split_roles(["public_train", "public_test"]) == {"public_train": "train", "public_test": "dev"}
    assert split_role("republic test") == ("test", ("republic",))
    assert split_roles(["train", "freight train"]) == {"train": "train"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pos_train", ("pos", "train")),
        ("Golden Retriever-Test", ("Golden Retriever", "Test")),
        ("train_dog (1)", ("dog (1)", "train")),
        ("class_1_val", ("class_1", "val")),
        ("dog__train", ("dog", "train")),
        *(
            (name, None)
            for name in ("train", "train_1", "1_test", "images_train", "dog", "dogtrain", "a_train_b", "_train")
        ),
    ],
)
def test_class_and_split_takes_a_name_apart(name, parts):
    assert class_and_split(name) == parts


def test_by_role_refuses_two_names_for_one_split():
    assert by_role({"Training": "train", "val": "val"}) == {"train": "Training", "val": "val"}
    with pytest.raises(DatasetUnreadable, match="Both 'val' and 'Valid' are named like the split 'val'"):
        by_role({"val": "val", "Valid": "val"})


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["train"], (None, None)),
        (["train", "val"], ("val", None)),
        (["train", "dev"], ("dev", None)),
        (["train", "val", "test"], ("test", "val")),
        (["train", "val", "dev"], ("val", "dev")),
        (["train", "eval", "val"], ("eval", "val")),
        (["train", "holdout", "test"], ("test", "holdout")),
        (["train", "eval", "dev", "val", "test"], ("test", "val")),
    ],
)
def test_held_out_test_measures_and_val_chooses(roles, expected):
    assert held_out(roles) == expected
