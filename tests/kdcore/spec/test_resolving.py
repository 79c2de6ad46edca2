"""Nothing is left to guess: weights, stages and taps of every method, and what each model is normalised by."""

from dataclasses import replace
from typing import Any

import pytest

from kdcore.catalog import StartFacts, architecture
from kdcore.spec import (
    METHODS,
    AdamW,
    Cosine,
    CropFlip,
    JobSpec,
    Known,
    NoAugmentation,
    RandomResizedCrop,
    Sgd,
    parse,
    read,
    resolve,
)
from kdcore.spec.methods.features import Ofd
from tests.kdcore.spec.specs import DATA, ONE, OTHER, PROGRAM, TEACHER, body, fit_faults, known, resolved

PAIRS = [
    ("resnet56", "resnet20"),
    ("resnet56", "vgg8"),
    ("vgg13", "mobilenetv2_x0_5"),
    ("wrn_40_2", "shufflenetv1"),
    ("torchvision/resnet50", "torchvision/mobilenet_v2"),
]


def alone(name: str, student: str) -> dict[str, Any]:
    """A job of one method with whatever it needs, and nothing else."""
    teacher = None if METHODS[name].facts.teacher == "none" else {"checkpoint": "model:big"}
    return {"method": name, "teacher": teacher, "student": [student, student] if name == "dml" else student}


SHORT, LONG = DATA.model_copy(update={"train": 862}), DATA.model_copy(update={"train": 867})
"""One epoch shows 259 images of each class, and 260: a tenth is held out."""


@pytest.mark.parametrize(
    ("changes", "data", "weights"),
    [
        ({}, SHORT, (1.0, 0.25, 4.0)),
        ({}, LONG, (0.1, 0.9, 4.0)),
        ({"method": {"name": "kd", "form": "cross_entropy"}}, SHORT, (0.1, 0.9, 4.0)),
        ({"method": {"name": "kd", "standardize": True}}, SHORT, (0.1, 9.0, 2.0)),
        ({"alpha": 0.5}, SHORT, (0.5, 0.9, 4.0)),
        ({"beta": 0.5}, SHORT, (0.1, 0.5, 4.0)),
        ({"temperature": 2.0}, SHORT, (0.1, 0.9, 2.0)),
        ({"method": ["kd", "nst"]}, SHORT, (0.1, 1.0, 4.0)),
        ({"student": {"architecture": "resnet20", "checkpoint": "model:start"}}, SHORT, (0.1, 0.9, 4.0)),
        ({"method": "dkd"}, SHORT, (1.0, 1.0, 4.0)),
    ],
)
def test_resolve_weighs_the_labels_of_a_short_kd_more_unless_the_spec_gives_a_weight(changes, data, weights):
    changes = {"training": {"epochs": 1}, **changes}
    spec = resolved(more={"dataset": data}, **changes)
    assert (spec.alpha, spec.beta, spec.temperature) == weights
    assert resolve(spec, known(body(**changes), dataset=LONG)) == spec, "what was written out stays"


def test_resolve_weighs_labels_as_published_where_images_without_labels_are_used():
    spec = resolved(more={"dataset": SHORT}, training={"epochs": 1}, unlabelled="pool")
    assert (spec.alpha, spec.beta) == (0.1, 0.9)


@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=[" to ".join(pair) for pair in PAIRS])
@pytest.mark.parametrize("name", METHODS)
def test_resolve_writes_out_every_default_of_every_method(name: str, teacher: str, student: str):
    if name == "one" and architecture(student).source != "kdcore":
        return
    changes = alone(name, student)
    widths_differ = name == "fsp" and student != "resnet20"
    assert [pointer for pointer, _, _ in fit_faults(network=teacher, **changes)] == ["/method"] * widths_differ
    spec = resolved(network=teacher, **changes)
    facts, (method,) = METHODS[name].facts, spec.methods
    assert (spec.alpha, spec.beta, spec.temperature) == (facts.alpha, facts.beta, facts.temperature)
    assert bool(method.pairs) == method.compares_taps
    left = {option for option, value in method.model_dump().items() if value is None}
    assert left <= {"weight"} | ({"pretraining_epochs"} if name == "fitnet" else set())
    again = parse(spec.as_json())
    assert again == spec, "the engine reads what was accepted"
    assert resolve(again, known(body(**changes), teacher)) == spec
    if isinstance(method, Ofd):
        assert len(method.margins or ()) == len(method.pairs)


@pytest.mark.parametrize(
    ("epochs", "warmup", "rampup", "pretraining"), [(240, 20, 64, 30), (60, 5, 16, 8), (8, 1, 2, 1), (2, 0, 1, 1)]
)
def test_resolve_scales_stages_and_warm_ups_with_the_epochs(epochs, warmup, rampup, pretraining):
    """20 and 30 of 240 epochs, 80 of 300; a stage has one epoch at least, a warm-up may be none."""
    training = {"training": {"epochs": epochs}}
    for name in ("dkd", "reviewkd"):
        assert resolved(method=name, **training).methods[0].warmup_epochs == warmup
    assert resolved(**alone("one", "resnet20"), **training).methods[0].rampup_epochs == rampup
    two_stages = {"name": "fitnet", "stages": "two"}
    for method in (two_stages, "factor_transfer", "activation_boundary", "fsp"):
        staged = resolved(method=method, **training).methods[0]
        assert staged.first_stage is not None and staged.pretraining_epochs == pretraining
    assert resolved(method="fitnet", **training).methods[0].pretraining_epochs is None


def test_resolve_keeps_given_values():
    spec = resolved(temperature=1.5, alpha=0.0, beta=2.0)
    assert (spec.temperature, spec.alpha, spec.beta) == (1.5, 0.0, 2.0)
    method = {"name": "dkd", "warmup_epochs": 0}
    assert resolved(method=method).methods[0].warmup_epochs == 0
    named = {"name": "attention", "taps": [{"student": "layer1.0", "teacher": "layer1"}]}
    assert [pair.student for pair in resolved(method=named).methods[0].pairs] == ["layer1.0"]


def test_resolve_kd_has_crds_weights_and_standardized_its_papers():
    spec = resolved()
    assert (spec.temperature, spec.alpha, spec.beta) == (4.0, 0.1, 0.9)
    spec = resolved(method={"name": "kd", "standardize": True})
    assert (spec.temperature, spec.alpha, spec.beta) == (2.0, 0.1, 9.0)


def test_resolve_gives_a_sum_own_weights_and_beta_1():
    spec = resolved(method=["kd", "attention", {"name": "crd", "weight": 0.5}])
    assert [method.weight for method in spec.methods] == [0.9, 1000.0, 0.5]
    assert (spec.temperature, spec.alpha, spec.beta) == (4.0, 0.1, 1.0)
    assert [bool(method.pairs) for method in spec.methods] == [False, True, True]
    spec = resolved(method=["attention", "kd"], beta=0.5)
    assert (spec.alpha, spec.beta) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("method", "beta", "resolved_beta"),
    [(["kd"], None, 0.9), (["kd"], 2.0, 2.0), ([{"name": "kd", "weight": 0.5}], None, 1.0)],
    ids=str,
)
def test_resolve_treats_a_list_of_one_as_that_method(method, beta, resolved_beta):
    spec = resolved(method=method, beta=beta)
    assert isinstance(spec.method, tuple) and spec.beta == resolved_beta
    assert spec.methods[0].weight == (None if method == ["kd"] else 0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": ["kd", "attention"], "assistants": []},
        {"method": ["kd"]},
        {"teacher": [ONE, {**OTHER, "weight": 3}]},
        {"teacher": [ONE, PROGRAM]},
        {"teacher": PROGRAM},
        {"method": ["dml", "sp"], "teacher": None, "student": ["resnet20", "resnet20"]},
        {"method": ["born_again", "crd"]},
        {"method": ["born_again", "attention"], "teacher": None},
        {"assistants": ["resnet32", "resnet32"]},
        {"unlabelled": "theirs"},
        {"training": {"mix": "cutmix", "schedule": "cosine", "optimizer": "adamw"}},
    ],
    ids=str,
)
def test_resolve_is_idempotent(changes):
    spec = resolved(**changes)
    found = known(body(**changes))
    assert resolve(spec, found) == spec == resolve(parse(spec.as_json()), found)
    assert read(spec.as_json())[2] == []


def test_resolve_leaves_no_default_open():
    left = [name for name, value in resolved().as_json().items() if value is None]
    assert left == ["name", "unlabelled", "quantization"]


def test_resolve_leaves_taps_open_until_the_teacher_is_known():
    changes = {"method": ["kd", "attention"], "teacher": {"checkpoint": "weights:resnet50"}}
    spec = resolve(parse(body(**changes)), Known(dataset=DATA))
    assert spec.methods[1].pairs == () and spec.methods[1].weight == 1000
    found = Known(dataset=DATA, teachers={"/teacher": TEACHER})
    assert len(resolve(spec, found).methods[1].pairs) == 3


START = StartFacts(
    num_classes=7, channels=3, mean=[0.1] * 3, std=[0.9] * 3, parameters=1000, taken=900, classifier_taken=0,
    fresh=["fc.weight"], classifier=["fc.weight"],
)  # fmt: skip


def started(student: Any = None, facts: StartFacts = START, **changes: Any) -> JobSpec:
    """The resolved spec of a job whose student starts from weights."""
    student = {"architecture": "resnet20", "checkpoint": "model:small", **(student or {})}
    spec = parse(body(teacher=None, method="supervised", student=student, **changes))
    return resolve(spec, Known(dataset=DATA, starts={"/student": facts}))


def test_resolve_a_student_with_a_checkpoint_gets_the_recipe_of_fine_tuning():
    training = started(training={"epochs": 20}).training
    assert training.optimizer == Sgd(lr=0.01, momentum=0.9, weight_decay=1e-4)
    assert training.schedule == Cosine(warmup_epochs=1)
    assert started(training={"epochs": 1}).training.schedule.warmup_epochs == 0.1
    assert resolved(training={"epochs": 20}).training.optimizer == Sgd()


def test_resolve_fine_tuning_changes_nothing_that_was_given():
    given = {"optimizer": {"name": "sgd", "lr": 0.05}, "schedule": "multistep", "epochs": 20}
    training = started(training=given).training
    assert (training.optimizer.lr, training.optimizer.weight_decay) == (0.05, 1e-4)
    assert training.schedule.name == "multistep"
    assert started(training={"optimizer": "adamw"}).training.optimizer == AdamW(lr=1e-4, weight_decay=1e-2)


def test_resolve_fine_tuning_cuts_boxes_from_larger_pictures_as_any_training():
    data = DATA.model_copy(update={"kind": "folders", "image_size": (128, 128), "own_side": 500})
    boxes = {"augmentation": {"name": "random_resized_crop", "scale": (0.25, 1.0)}, "epochs": 20}
    student = {"architecture": "resnet20", "checkpoint": "model:small"}
    spec = parse(body(teacher=None, method="supervised", student=student, training=boxes))
    training = resolve(spec, Known(dataset=data, starts={"/student": START})).training
    assert (training.augmentation.store_size, training.optimizer.lr) == (256, 0.01)
    assert training.schedule == Cosine(warmup_epochs=1)


def test_resolve_fine_tuning_is_resolved_once():
    spec = started({"class_names": ["x", "y", "z"]})
    found = Known(dataset=DATA, starts={"/student": START})
    assert resolve(spec, found) == spec == resolve(parse(spec.as_json()), found)
    assert spec.students[0].head_lr == 1 and spec.students[0].class_names == ("x", "y", "z")
    assert spec.students[0].preprocessing.mean == (0.1, 0.1, 0.1)


def test_resolve_names_of_as_many_classes_as_the_data_has_are_written_out():
    for names, kept in ((["c", "b", "a"], ("c", "b", "a")), (["a", "b", "c"], None), (["a", "b"], None)):
        facts = START.model_copy(update={"num_classes": len(names), "class_names": names})
        assert started(facts=facts).students[0].class_names == kept


def test_resolve_a_peer_from_random_weights_keeps_the_recipe_of_the_tables():
    peers = [{"architecture": "resnet20", "checkpoint": "model:small"}, "resnet20"]
    spec = parse(body(teacher=None, method="dml", student=peers))
    assert resolve(spec, Known(dataset=DATA, starts={"/student/0": START})).training.optimizer == Sgd()


def test_resolve_supervised_has_only_alpha():
    spec = resolved(method="supervised", teacher=None)
    assert (spec.temperature, spec.alpha, spec.beta, spec.teacher) == (None, 1.0, None, None)


def test_resolve_normalises_each_model_its_own_way():
    own = TEACHER.model_copy(update={"mean": [0.1] * 3, "std": [0.9] * 3})
    spec = resolved(network=own, assistants=["resnet32"])
    assert spec.teachers[0].preprocessing.mean == (0.1, 0.1, 0.1)
    assert spec.students[0].preprocessing.std == spec.assistants[0].preprocessing.std == (0.1, 0.2, 0.3)
    assert resolved().teachers[0].preprocessing.mean == (0.4, 0.5, 0.6)
    assert spec.teachers[0].architecture == "resnet56"


def test_resolve_weighs_several_teachers_equally():
    teachers = resolved(teacher=[ONE, {**PROGRAM, "weight": 3}]).teachers
    assert [(one.weight, one.architecture) for one in teachers] == [(1.0, "resnet56"), (3.0, None)]
    assert all(one.preprocessing is not None for one in teachers)
    assert resolved(teacher=[ONE]).teachers[0].weight is None


@pytest.mark.parametrize(("epochs", "milestones"), [(240, (150, 180, 210)), (60, (38, 45, 52)), (2, (1,)), (1, ())])
def test_resolve_scales_milestones_with_the_epochs(epochs, milestones):
    assert resolved(training={"epochs": epochs}).training.schedule.milestones == milestones


def test_resolve_chooses_augmentation_by_the_images():
    def of(**update: Any) -> JobSpec:
        return resolved(more={"dataset": DATA.model_copy(update=update)})

    assert resolved().training.augmentation == CropFlip(padding=4)
    assert (resolved().training.batch_norm, of(image_size=(128, 128)).training.batch_norm) == ("views", "measured")
    assert isinstance(of(image_size=(128, 128)).training.augmentation, RandomResizedCrop)
    grey = of(kind="named", channels=1, image_size=(8, 8), mean=[0.5], std=[0.2])
    assert isinstance(grey.training.augmentation, NoAugmentation)


@pytest.mark.parametrize("facts", [{"channels": 1}, {"channels": 3, "grey": True}], ids=["grey", "grey as colour"])
@pytest.mark.parametrize("kind", ["arrays", "folders"])
def test_resolve_does_not_mirror_grey_images_of_any_origin(kind, facts):
    """A mirrored digit is none. Colour images are mirrored as before."""
    store_size = 96 if kind == "folders" else None
    boxes = RandomResizedCrop(flip=False, store_size=store_size)
    for side, augmentation in ((28, CropFlip(padding=3, flip=False)), (96, boxes)):
        data = DATA.model_copy(update={"kind": kind, "image_size": (side, side), "mean": [0.5], "std": [0.2], **facts})
        spec = parse(body(method="supervised", teacher=None))
        assert resolve(spec, Known(dataset=data)).training.augmentation == augmentation
        colour = data.model_copy(update={"channels": 3, "grey": False})
        mirrored = resolve(spec, Known(dataset=colour)).training.augmentation
        assert mirrored == augmentation.model_copy(update={"flip": True})


@pytest.mark.parametrize(
    ("stated", "registered", "written"),
    [
        (None, None, None),
        (None, ["a", "b", "c"], None),
        (None, ["c", "a", "b"], ("c", "a", "b")),
        (["b", "c", "a"], ["c", "a", "b"], ("b", "c", "a")),
        (["a", "b", "c"], ["c", "a", "b"], None),
    ],
)
def test_resolve_writes_out_class_names_only_in_another_order(stated, registered, written):
    """The engine gets the file by its digest, and not what was registered with it."""
    spec = body(teacher={"checkpoint": "model:big", "class_names": stated})
    facts = known(spec, TEACHER.model_copy(update={"class_names": registered}))
    once = resolve(parse(spec), facts)
    assert once.teachers[0].class_names == written
    assert resolve(once, known(spec)).teachers[0].class_names == written


@pytest.mark.parametrize(
    ("given", "noted", "data", "expected"),
    [
        (None, None, (32, 32), None),
        (None, (64, 64), (32, 32), 64),
        (None, (32, 32), (32, 32), 32),
        (48, (64, 64), (32, 32), 48),
        (32, (64, 64), (32, 32), 32),
        (48, None, (32, 32), 48),
        (None, (64, 48), (32, 32), None),
        (None, (64, 64), (32, 48), None),
    ],
)
def test_resolve_writes_out_the_size_of_the_teachers_images_if_it_is_known(given, noted, data, expected):
    """A teacher without a size gets the data's, as in specs of earlier versions."""
    changes = {"teacher": {**ONE, "image_size": given}}
    facts = known(body(**changes))
    facts = replace(
        facts,
        dataset=DATA.model_copy(update={"image_size": data}),
        teachers={"/teacher": TEACHER.model_copy(update={"image_size": noted})},
    )
    spec = resolve(parse(body(**changes)), facts)
    assert spec.teachers[0].image_size == expected
    assert resolve(spec, facts) == spec


@pytest.mark.parametrize(
    ("facts", "scale", "teacher", "expected"),
    [
        ({"own_side": 500}, (0.25, 1.0), None, 256),  # 128 / sqrt(1/4): the smallest box has 128 pixels.
        ({"own_side": 500}, (0.35, 1.0), None, 217),  # 128 / 0.5916 = 216.4
        ({"own_side": 500}, (0.01, 1.0), None, 256),  # At most twice the side.
        ({"own_side": 150}, (0.25, 1.0), None, 150),  # The pictures have no more.
        ({"own_side": 128}, (0.25, 1.0), None, 128),
        ({"own_side": 90}, (0.25, 1.0), None, 128),
        ({"own_side": None}, (0.25, 1.0), None, 128),  # Inspected by an earlier version.
        ({"own_side": 500}, (1.0, 1.0), None, 128),
        ({"own_side": 500}, (0.25, 1.0), 160, 320),
        ({"own_side": 150}, (0.25, 1.0), 160, 128),  # A teacher's pictures are larger: each size has its own.
        ({"own_side": 500, "train": 50_000}, (0.25, 1.0), None, 169),  # 50,000 x 3 x 169^2 is below 4 GiB.
        ({"own_side": 500, "train": 1_000_000}, (0.25, 1.0), None, 128),
        ({"own_side": 500, "image_size": (128, 96)}, (0.25, 1.0), None, None),
        ({"own_side": None, "kind": "arrays"}, (0.25, 1.0), None, None),
        ({"own_side": 200, "kind": "arrays"}, (0.25, 1.0), None, 200),
    ],
)
def test_resolve_stores_pictures_larger_where_boxes_are_cut(facts, scale, teacher, expected):
    changes = {"training": {"augmentation": {"name": "random_resized_crop", "scale": scale}}}
    changes |= {"teacher": {**ONE, "image_size": teacher}} if teacher else {}
    found = known(body(**changes))
    data = DATA.model_copy(update={"kind": "folders", "image_size": (128, 128), **facts})
    found = replace(found, dataset=data)
    spec = resolve(parse(body(**changes)), found)
    assert spec.training.augmentation.store_size == expected
    assert resolve(spec, found) == spec


def test_resolve_leaves_a_given_store_size_and_other_augmentations_alone():
    data = DATA.model_copy(update={"kind": "folders", "image_size": (32, 32), "own_side": 500})
    how = {"name": "random_resized_crop", "store_size": 40}
    spec = parse(body(method="supervised", teacher=None, training={"augmentation": how}))
    assert resolve(spec, Known(dataset=data)).training.augmentation.store_size == 40
    spec = parse(body(method="supervised", teacher=None))
    assert resolve(spec, Known(dataset=data)).training.augmentation == CropFlip()
