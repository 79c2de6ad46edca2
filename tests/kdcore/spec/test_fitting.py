"""Each fault of a spec beside the facts of what it names, and a near miss that fits."""

from typing import Any

import pytest

from kdcore.catalog import ArchitectureFacts, DatasetFacts
from kdcore.spec import Known, Training, Unlabelled, fit, read
from kdcore.spec.fitting import images_held_out, images_to_train_on
from tests.kdcore.spec.specs import (
    DATA,
    LOGITS,
    ONE,
    OTHER,
    POOL,
    PROGRAM,
    STORED,
    TEACHER,
    TRACED,
    as_tuples,
    body,
    fit_faults,
)

GREY = {"channels": 1, "mean": [0.5], "std": [0.2]}


BY_NUMBERS = (
    '; class_map says which of its outputs answer each class, such as {"a": 0, "b": 1} (numbers of outputs, because '
    "the names of its classes are not known)"
)


def data(**update: Any) -> dict[str, DatasetFacts]:
    return {"dataset": DATA.model_copy(update=update)}


def other(**update: Any) -> dict[str, Any]:
    return {"network": TEACHER.model_copy(update=update)}


def shapes(**of: list[int]) -> dict[str, Any]:
    """Of places in resnet20, as an inspection found them."""
    return {"more": {"shapes": {("resnet20", path): shape for path, shape in of.items()}}}


def tapped(name: str, *paths: str, **options: Any) -> dict[str, Any]:
    """A method that looks at named places of two resnet20."""
    taps = {"taps": list(paths)} if len(paths) > 1 or name in ("attention", "reviewkd", "ofd") else {"tap": paths[0]}
    return {"method": {"name": name, **taps, **options}, "network": "resnet20"}


PLAIN = {"training": {"augmentation": "none"}}


def stored(**update: Any) -> dict[str, Any]:
    """A file of logits, as an inspection found it."""
    return {"more": {"teachers": {"/teacher": STORED.model_copy(update=update)}}}


CASES: dict[str, tuple[dict[str, Any], tuple[str, str, str], dict[str, Any]]] = {
    # The data.
    "data without labels": (
        {"more": data(labelled=False, num_classes=0, class_names=[])},
        ("/dataset", "not_allowed", "the data set has no labels, and a student is measured on labelled images"),
        {"more": data(class_names=["a", "b", "c"])},
    ),
    "a pool of other channels": (
        {"unlabelled": "theirs", "more": {"unlabelled": POOL.model_copy(update=GREY)}},
        ("/unlabelled", "not_allowed", "the data set's images have channels 3, these have 1"),
        {"unlabelled": "theirs"},
    ),
    "a pool of another size": (
        {"unlabelled": {"source": "theirs"}, "more": {"unlabelled": POOL.model_copy(update={"image_size": (64, 32)})}},
        (
            "/unlabelled/source",
            "not_allowed",
            "the data set's images have height and width [32, 32], these have [64, 32]",
        ),
        {"unlabelled": {"source": "theirs"}, "more": {"unlabelled": POOL.model_copy(update={"train": 5})}},
    ),
    "less than a batch": (
        {"training": {"batch_size": 901}},
        ("/training/batch_size", "not_allowed", "900 training images are left after validation, fewer than one batch"),
        {"training": {"batch_size": 900}},
    ),
    "less than a batch for the baseline": (
        {"training": {"batch_size": 901}, "unlabelled": "theirs", "baseline": "train"},
        (
            "/training/batch_size",
            "not_allowed",
            "900 labelled training images are left after validation, fewer than one batch",
        ),
        {"training": {"batch_size": 901}, "unlabelled": "theirs"},
    ),
    # The teacher.
    "a teacher of other classes": (
        other(num_classes=10),
        (
            "/teacher/checkpoint",
            "teacher_mismatch",
            f"the teacher has 10 classes, the data set has 3{BY_NUMBERS}",
        ),
        other(class_names=["a", "b", "c"]),
    ),
    "a teacher of other class names": (
        other(class_names=["c", "b", "z"]),
        (
            "/teacher/checkpoint",
            "teacher_mismatch",
            "the teacher's class names differ from the data set's; class_map says which of its outputs answer each "
            'class, such as {"a": "c", "b": "b"}; 1 of 3 classes have no one output of their name, first \'a\'',
        ),
        other(class_names=["c", "b", "a"]),
    ),
    "a teacher of grey images": (
        other(channels=1),
        (
            "/teacher/checkpoint",
            "teacher_mismatch",
            "the teacher takes images of 1 channels, the data set has 3; dataset.channels: 1 reads colour images "
            "as grey",
        ),
        other(channels=3),
    ),
    "a teacher that is another network than said": (
        {"teacher": {**ONE, "architecture": "resnet110"}},
        ("/teacher/architecture", "teacher_mismatch", "the checkpoint is a resnet56"),
        {"teacher": {**ONE, "architecture": "resnet56"}},
    ),
    "a teacher of large images": (
        {"network": "torchvision/vit_b_16"},
        (
            "/teacher/checkpoint",
            "not_allowed",
            "torchvision/vit_b_16 needs images of at least 224 pixels, the data set has 32 x 32; "
            "teacher.image_size: 224 gives it images of that size",
        ),
        {"network": "torchvision/vit_b_16", "teacher": {**ONE, "image_size": 224}},
    ),
    "a teacher's size that its network does not take": (
        {"network": "torchvision/vit_b_16", "teacher": {**ONE, "image_size": 256}},
        (
            "/teacher/image_size",
            "not_allowed",
            "torchvision/vit_b_16 takes images of 224 pixels at most, and its image_size is 256 x 256",
        ),
        {"network": "torchvision/vit_b_16", "more": data(image_size=(224, 224))},
    ),
    "a teacher's size beside images that are no squares": (
        {"teacher": {**ONE, "image_size": 64}, "more": data(image_size=(32, 64))},
        (
            "/teacher/image_size",
            "not_allowed",
            "the data set's images are 32 x 64, no squares: give a dataset.image_size, too",
        ),
        {"more": data(image_size=(32, 64))},
    ),
    "a store of pictures that is smaller than the images": (
        {"training": {"augmentation": {"name": "random_resized_crop", "store_size": 31}}},
        (
            "/training/augmentation/store_size",
            "not_allowed",
            "images of 32 pixels are cut from it: give as much or more, or 32 for none",
        ),
        {"training": {"augmentation": {"name": "random_resized_crop", "store_size": 32}}},
    ),
    "a store of pictures that is smaller than the teacher's images": (
        {
            "teacher": {**ONE, "image_size": 64},
            "training": {"augmentation": {"name": "random_resized_crop", "store_size": 48}},
        },
        (
            "/training/augmentation/store_size",
            "not_allowed",
            "images of 64 pixels are cut from it: give as much or more, or 32 for none",
        ),
        {"training": {"augmentation": {"name": "random_resized_crop", "store_size": 48}}},
    ),
    "a store of pictures that are no squares": (
        {
            "training": {"augmentation": {"name": "random_resized_crop", "store_size": 64}},
            "more": data(image_size=(32, 64)),
        },
        (
            "/training/augmentation/store_size",
            "not_allowed",
            "the data set's images are 32 x 64, no squares: give a dataset.image_size, too",
        ),
        {"training": {"augmentation": {"name": "random_resized_crop", "store_size": 64}}},
    ),
    "a teacher's size where gradients at the images are compared": (
        {"teacher": {**ONE, "image_size": 64}, "method": {"name": "attention", "mapping": "gradient"}},
        (
            "/teacher/image_size",
            "not_allowed",
            "'attention' compares gradients at the images, which must then have one size",
        ),
        {"teacher": {**ONE, "image_size": 32}, "method": {"name": "attention", "mapping": "gradient"}},
    ),
    "a teacher of small images, known by its name alone": (
        {
            "teacher": {"checkpoint": "weights:it", "architecture": "torchvision/vit_b_16"},
            "more": {**data(image_size=(256, 224)), "teachers": {}},
        },
        (
            "/teacher/architecture",
            "not_allowed",
            "torchvision/vit_b_16 takes images of 224 pixels at most, the data set has 256 x 224",
        ),
        {
            "teacher": {"checkpoint": "weights:it", "architecture": "torchvision/vit_b_16"},
            "more": {**data(image_size=(224, 224)), "teachers": {}},
        },
    ),
    "logits and a default augmentation": (
        {"teacher": LOGITS},
        (
            "/training/augmentation",
            "not_allowed",
            "the file has logits of images without augmentation, and crop_flip, the default here, changes them: use "
            "none, or send the logits of all its views, 0 to 161, with the array views",
        ),
        {"teacher": LOGITS, **PLAIN},
    ),
    "logits of fewer views": (
        {"teacher": LOGITS, **stored(views=81), "training": {"augmentation": "crop_flip"}},
        (
            "/training/augmentation",
            "not_allowed",
            "the file has logits of the views 0 to 80 of crop_flip, and crop_flip draws views 0 to 161: all of these "
            "are needed and no others, (2 x padding + 1)^2, and twice as many with flip",
        ),
        {"teacher": LOGITS, **stored(views=81), "training": {"augmentation": {"name": "crop_flip", "flip": False}}},
    ),
    "logits of views and no augmentation": (
        {"teacher": LOGITS, **stored(views=162), **PLAIN},
        (
            "/training/augmentation",
            "not_allowed",
            "the file has logits of the views 0 to 161 of crop_flip, and none has no views of these numbers",
        ),
        {"teacher": LOGITS, **stored(views=162)},
    ),
    "logits of other training images": (
        {"teacher": LOGITS, **PLAIN, **stored(train=999)},
        (
            "/teacher/logits",
            "teacher_mismatch",
            "the file has 999 rows of logits, the data set has 1000 training images, and each needs one, in its order",
        ),
        {"teacher": LOGITS, **PLAIN, **stored(test=100)},
    ),
    "logits of other test images": (
        {"teacher": LOGITS, **PLAIN, **stored(test=99)},
        (
            "/teacher/logits",
            "teacher_mismatch",
            "the file has 99 rows of test_logits, the data set has 100 test images, and each needs one, in its order",
        ),
        {"teacher": LOGITS, **PLAIN, **stored(test=100)},
    ),
    "logits of other classes": (
        {"teacher": LOGITS, **PLAIN, **stored(num_classes=10)},
        (
            "/teacher/logits",
            "teacher_mismatch",
            "the file has 10 columns, one a class, the data set has 3 classes, and each needs one, in its order; of a "
            "teacher of other classes, send the columns of the data's classes",
        ),
        {"teacher": LOGITS, **PLAIN},
    ),
    "a program of other images": (
        {"teacher": PROGRAM, "more": data(image_size=(48, 32))},
        (
            "/teacher/program",
            "teacher_mismatch",
            "the program takes images of 32 x 32 pixels, the data set has 48 x 32",
        ),
        {
            "teacher": PROGRAM,
            "more": {
                **data(image_size=(48, 32)),
                "teachers": {"/teacher": TRACED.model_copy(update={"image_size": (None, 32)})},
            },
        },
    ),
    "one teacher of several": (
        {
            "teacher": [ONE, OTHER],
            "more": {"teachers": {"/teacher/0": TEACHER, "/teacher/1": TEACHER.model_copy(update={"num_classes": 9})}},
        },
        ("/teacher/1/checkpoint", "teacher_mismatch", f"the teacher has 9 classes, the data set has 3{BY_NUMBERS}"),
        {"teacher": [ONE, OTHER]},
    ),
    "a teacher's normalisation": (
        {"teacher": {**ONE, "preprocessing": {"mean": [0.5], "std": [0.5, 0.5, 0.5]}}},
        ("/teacher/preprocessing/mean", "not_allowed", "one number for each of the data set's 3 channels"),
        {"teacher": {**ONE, "preprocessing": {"mean": [0.5] * 3, "std": [0.5, 0.5, 0.5]}}},
    ),
    # Students.
    "a student of colour images": (
        {"student": {"architecture": "torchvision/resnet18"}, **other(channels=1), "more": data(**GREY)},
        (
            "/student/architecture",
            "not_allowed",
            "torchvision/resnet18 takes images of 3 channels, the data set has 1; dataset.channels: 3 reads grey "
            "images as colour",
        ),
        {"student": {"architecture": "torchvision/resnet18"}},
    ),
    "a student of larger images": (
        {"student": "mobilenetv2_x0_5", "more": data(image_size=(8, 32))},
        (
            "/student",
            "not_allowed",
            "mobilenetv2_x0_5 needs images of at least 16 pixels, the data set has 8 x 32",
        ),
        {"student": "mobilenetv2_x0_5", "more": data(image_size=(16, 32))},
    ),
    "the second of several students": (
        {"teacher": None, "method": "dml", "student": ["resnet20", "vgg8"], "more": data(image_size=(4, 4))},
        ("/student/1", "not_allowed", "vgg8 needs images of at least 8 pixels, the data set has 4 x 4"),
        {"teacher": None, "method": "dml", "student": ["resnet20", "vgg8"]},
    ),
    "an assistant": (
        {"assistants": ["resnet32", "torchvision/alexnet"]},
        (
            "/assistants/1",
            "not_allowed",
            "torchvision/alexnet needs images of at least 63 pixels, the data set has 32 x 32",
        ),
        {"assistants": ["resnet32", "torchvision/alexnet"], "more": data(image_size=(64, 64))},
    ),
    "a student's normalisation": (
        {"student": {"architecture": "resnet20", "preprocessing": {"mean": [0.5] * 3, "std": [0.5]}}},
        ("/student/preprocessing/std", "not_allowed", "one number for each of the data set's 3 channels"),
        {"student": {"architecture": "resnet20", "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}},
    ),
    # Where methods look.
    "no embedding": (
        {"method": ["kd", "crd"], "network": "torchvision/squeezenet1_0"},
        (
            "/method/1",
            "missing",
            "'crd' has no default places to compare resnet20 with torchvision/squeezenet1_0: name its tap",
        ),
        {
            "method": ["kd", {"name": "crd", "tap": {"student": "fc@in", "teacher": "features.12"}}],
            "network": "torchvision/squeezenet1_0",
        },
    ),
    "nothing before a ReLU": (
        {"method": {"name": "activation_boundary"}, "network": "shufflenetv2"},
        (
            "/method/taps",
            "missing",
            "'activation_boundary' has no default places to compare resnet20 with shufflenetv2: name its taps",
        ),
        {"method": {"name": "activation_boundary"}, "network": "shufflenetv1"},
    ),
    "no batch norm before a ReLU": (
        {"method": "ofd", "network": "torchvision/vgg11", "more": data(image_size=(64, 64))},
        (
            "/method",
            "missing",
            "'ofd' has no default places to compare resnet20 with torchvision/vgg11: name its taps (the teacher's "
            "taps need a batch norm directly before their ReLU)",
        ),
        {"method": "ofd", "network": "torchvision/vgg11_bn", "more": data(image_size=(64, 64))},
    ),
    "flows of unequal width": (
        {"method": "fsp", "network": "resnet8x4"},
        (
            "/method",
            "not_allowed",
            "'fsp' compares channel with channel: resnet20 has 16 at layer1, resnet8x4 64 at layer1",
        ),
        {"method": "fsp", "network": "resnet8"},
    ),
    "named flows of unequal width": (
        {
            "method": {"name": "fsp", "taps": ["conv1", {"student": "layer2", "teacher": "layer1"}]},
            "more": {"shapes": {("resnet20", "conv1"): [16, 32, 32], ("resnet56", "conv1"): [16, 32, 32]}},
        },
        (
            "/method/taps",
            "not_allowed",
            "'fsp' compares channel with channel: resnet20 has 32 at layer2, resnet56 16 at layer1",
        ),
        {"method": {"name": "fsp", "taps": ["conv1", "layer2"]}},
    ),
    "a margin of another width": (
        {
            "method": {"name": "ofd", "taps": ["layer1", "layer2"], "margins": ["layer1.8.bn2", "layer1.8.bn1"]},
            "more": {"shapes": {("resnet56", "layer1.8.bn1"): [16, 32, 32]}},
        },
        ("/method/margins/1", "not_allowed", "layer1.8.bn1 of resnet56 has 16 channels, the tap layer2 has 32"),
        {
            "method": {"name": "ofd", "taps": ["layer1", "layer2"], "margins": ["layer1.8.bn2", "layer2.8.bn2"]},
            "more": {"shapes": {("resnet56", "layer2.8.bn2"): [32, 16, 16]}},
        },
    ),
    "a map that is a vector": (
        {**tapped("attention", "layer1", "fc@in"), **shapes(**{"layer1": [16, 32, 32], "fc@in": [64]})},
        ("/method/taps/1", "not_allowed", "fc@in of resnet20 gives 64 for each image; 'attention' needs a map"),
        {**tapped("attention", "layer1", "layer2"), **shapes(layer1=[16, 32, 32], layer2=[32, 16, 16])},
    ),
    "a map or a vector that is neither": (
        {
            "method": {"name": "feature", "tap": {"student": "layer1", "teacher": "layer2"}},
            "more": {"shapes": {("resnet56", "layer2"): [16, 64]}},
        },
        (
            "/method/tap/teacher",
            "not_allowed",
            "layer2 of resnet56 gives 16 x 64 for each image; 'feature' needs a map or a vector",
        ),
        {**tapped("feature", "fc@in"), **shapes(**{"fc@in": [64]})},
    ),
    "a convolution of tokens": (
        {**tapped("fitnet", "layer1"), **shapes(layer1=[16, 64])},
        (
            "/method/tap",
            "not_allowed",
            "layer1 of resnet20 gives 16 x 64 for each image; 'fitnet' needs a map or a vector",
        ),
        {**tapped("fitnet", "layer1", regressor="linear"), **shapes(layer1=[16, 64])},
    ),
    "an exit at a vector": (
        {"teacher": None, "method": {"name": "byot", "exits": ["layer1", "fc@in"]}, **shapes(**{"fc@in": [64]})},
        ("/method/exits/1", "not_allowed", "fc@in of resnet20 gives 64 for each image; an exit of 'byot' needs a map"),
        {"teacher": None, "method": {"name": "byot", "exits": ["layer1"]}, **shapes(layer1=[16, 32, 32])},
    ),
    "unknown features": (
        {"teacher": None, "method": "byot", "student": "torchvision/squeezenet1_0"},
        (
            "/method",
            "not_allowed",
            "'byot' compares the input of the classifier, and its place in torchvision/squeezenet1_0 is not known",
        ),
        {"teacher": None, "method": "byot", "student": "torchvision/resnet18"},
    ),
    "unknown stages": (
        {
            "teacher": None,
            "method": {"name": "byot"},
            "student": "timm/plain",
            "more": {
                "inspected": {
                    "timm/plain": ArchitectureFacts(
                        name="timm/plain",
                        source="timm",
                        family="timm",
                        min_image=1,
                        channels="any",
                        embedding="head@in",
                    )
                }
            },
        },
        ("/method/exits", "missing", "timm/plain has no known places for exits: name the exits"),
        {"teacher": None, "method": {"name": "byot"}, "student": "timm/plain"},
    ),
}


@pytest.mark.parametrize(("wrong", "fault", "near_miss"), CASES.values(), ids=CASES)
def test_fit_returns_one_fault_and_none_for_a_near_miss(wrong, fault, near_miss):
    """The last near miss is a network of timm that was not built: unknown facts are no fault."""
    assert fit_faults(**wrong) == [fault]
    assert fit_faults(**near_miss) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"more": {"dataset": None}},
        {"more": {"teachers": {}}},
        {"method": ["kd", "crd"], "student": "timm/any"},
        {"method": "attention", "network": "timm/any"},
        {"method": ["born_again", "attention"], "teacher": None},
        {"method": ["dml", "nst"], "teacher": None, "student": ["vgg8", "vgg8"]},
        {"method": ["attention", "fsp", "ofd", "reviewkd", "vid"]},
        {"method": "sp", "network": "torchvision/resnet50", "student": "torchvision/mobilenet_v2"},
    ],
    ids=str,
)
def test_fit_accepts_what_fits_or_is_not_known(changes):
    assert fit_faults(**changes) == []


def test_fit_returns_all_faults_together():
    spec = body(teacher=[ONE, PROGRAM], student={"architecture": "torchvision/resnet18"}, assistants=["vgg8"])
    tiny = DATA.model_copy(update={"image_size": (4, 4), **GREY})
    found = Known(
        dataset=tiny,
        unlabelled=POOL,
        teachers={"/teacher/0": TEACHER.model_copy(update={"num_classes": 9}), "/teacher/1": TRACED},
    )
    assert [(pointer, code) for pointer, code, _ in as_tuples(fit(read(spec)[1], found))] == [
        ("/unlabelled/source", "not_allowed"),
        ("/unlabelled/source", "not_allowed"),
        ("/teacher/0/checkpoint", "teacher_mismatch"),
        ("/teacher/0/checkpoint", "teacher_mismatch"),
        ("/teacher/1/program", "teacher_mismatch"),
        ("/assistants/0/architecture", "not_allowed"),
        ("/student/architecture", "not_allowed"),
        ("/student/architecture", "not_allowed"),
    ]


@pytest.mark.parametrize(
    ("train", "fraction", "pool", "labelled_too", "left"),
    [
        (1000, 0.1, None, True, 900),
        (1000, 0.1, 500, True, 1400),
        (1000, 0.1, 500, False, 500),
        (45, 0.1, None, True, 41),
        (4, 0.1, None, True, 3),
    ],
)
def test_images_to_train_on_excludes_held_out_images(train, fraction, pool, labelled_too, left):
    """Of 45 a tenth is 4.5, rounded to the even 4; of 4 one is held out, though a tenth would be none."""
    dataset = DATA.model_copy(update={"train": train})
    images = None if pool is None else POOL.model_copy(update={"train": pool})
    unlabelled = Unlabelled(source="theirs", labelled_too=labelled_too)
    assert images_to_train_on(dataset, images, unlabelled, Training(validation_fraction=fraction)) == left


def test_images_held_out_are_the_validation_split_or_a_part_of_the_training_images():
    having = DATA.model_copy(update={"validation": 70})
    assert (images_held_out(having, Training()), images_to_train_on(having, None, None, Training())) == (70, 1000)
    assert (images_held_out(DATA, Training()), images_to_train_on(DATA, None, None, Training())) == (100, 900)
    assert images_held_out(DATA.model_copy(update={"train": 4}), Training()) == 1


@pytest.mark.parametrize(
    ("names", "pointer", "said"),
    [
        (["a", "b"], "/teacher/class_names", "2 class names, and the teacher has 3 classes"),
        (["a", "b", "x"], "/teacher/class_names", "the teacher's class names differ from the data set's"),
    ],
)
def test_fit_refuses_class_names_of_a_spec_that_are_not_the_datas(names, pointer, said):
    given = {"teacher": {"checkpoint": "model:big", "class_names": names}}
    ((at, code, text),) = fit_faults(**given)
    assert (at, code) == (pointer, "teacher_mismatch") and text.startswith(said)


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5] * 3, [0.0, 0.2, 0.2], "Input should be greater than 0"),
        ([float("nan")] * 3, [0.2] * 3, "Input should be a finite number"),
        ([123.0] * 3, [58.0] * 3, "[123.0, 123.0, 123.0] are not of pixels in 0..1: divide by 255"),
    ],
)
def test_fit_refuses_a_normalization_that_was_registered_before_it_was_checked(mean, std, said):
    network = TEACHER.model_copy(update={"mean": mean, "std": std})
    text = f"the model's own mean and std cannot be used: {said}"
    assert fit_faults(network=network) == [("/teacher/preprocessing", "teacher_mismatch", text)]
    stated = {"checkpoint": "model:big", "preprocessing": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    assert fit_faults(network=network, teacher=stated) == []
