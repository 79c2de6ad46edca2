"""Each contradiction between fields, with its text, and a near miss that is valid."""

from typing import Any

import pytest

from kdcore.spec import read
from kdcore.spec.rules import _RULES, scheme_kind
from tests.kdcore.spec.specs import LOGITS, ONE, OTHER, PEERS, PROGRAM, body, rule_faults

ALONE: dict[str, Any] = {"teacher": None, "method": "supervised"}
STARTED: dict[str, Any] = {"architecture": "resnet20", "checkpoint": "blob:sha256:00"}
BY_GRADIENT = {"name": "attention", "mapping": "gradient"}
POOLED = {"source": "theirs"}
UNSEEN = {"source": "theirs", "labels": "none"}


def mixed(name: str = "mixup") -> dict[str, Any]:
    return {"training": {"mix": name}}


def schedule(**options: Any) -> dict[str, Any]:
    return {"training": {"epochs": 9, "schedule": options}}


def cropped(**options: Any) -> dict[str, Any]:
    return {"training": {"augmentation": {"name": "random_resized_crop", **options}}}


STARTED = {"architecture": "resnet20", "checkpoint": "model:small"}

CASES = {
    # Students that start from weights.
    "frozen random weights": (
        {"student": {"architecture": "resnet20", "freeze": ["layer1"]}},
        ("/student/freeze", "unused", "without a checkpoint frozen modules would keep random weights"),
        {"student": {**STARTED, "freeze": ["layer1"]}},
    ),
    "a head among fresh weights": (
        {"student": {"architecture": "resnet20", "head_lr": 10}},
        ("/student/head_lr", "unused", "without a checkpoint all parameters are fresh"),
        {"student": {**STARTED, "head_lr": 10}},
    ),
    "class names of no checkpoint": (
        {"assistants": [{"architecture": "resnet32", "class_names": ["a", "b"]}]},
        ("/assistants/0/class_names", "unused", "without a checkpoint there is no classifier to compare them with"),
        {"assistants": [{**STARTED, "class_names": ["a", "b"]}]},
    ),
    # Sums.
    "labels in a sum": (
        {"method": ["kd", "supervised"]},
        ("/method/1", "not_allowed", "'supervised' has no distillation loss that could be added"),
        {"method": ["kd", "dkd"]},
    ),
    "two schemes": (
        {**PEERS, "method": ["dml", "one"]},
        ("/method/1", "not_allowed", "a job has one scheme, and 'dml' is already one"),
        {**PEERS, "method": ["dml", "kd"]},
    ),
    "parts for each pair of peers": (
        {**PEERS, "method": ["dml", "crd"]},
        ("/method/1", "not_allowed", "'crd' would need parameters of its own for each pair of students"),
        {**PEERS, "method": ["dml", "rkd"]},
    ),
    "a stage among peers": (
        {**PEERS, "method": ["dml", "fsp"]},
        (
            "/method/1",
            "not_allowed",
            "'fsp' has a first stage, in which the students have no teacher yet",
        ),
        {**PEERS, "method": ["dml", "nst"]},
    ),
    "gradients among peers": (
        {**PEERS, "method": ["dml", BY_GRADIENT]},
        ("/method/1/mapping", "not_allowed", "students compare logits and activations with each other, not gradients"),
        {**PEERS, "method": ["dml", {"name": "attention", "mapping": "max_p"}]},
    ),
    "activations of different peers": (
        {**PEERS, "student": ["resnet20", "vgg8"], "method": ["attention", "dml"]},
        (
            "/method/0",
            "not_allowed",
            "'attention' compares activations: among students of different architectures it has no common taps",
        ),
        {**PEERS, "student": ["resnet20", "vgg8"], "method": ["dist", "dml"]},
    ),
    "activations of branches": (
        {"teacher": None, "method": ["one", "attention"]},
        (
            "/method/1",
            "not_allowed",
            "'one' compares parts of one network by their logits; 'attention' needs more than logits",
        ),
        {"teacher": None, "method": ["one", "dkd"]},
    ),
    "activations at exits": (
        {"teacher": None, "method": ["sp", "byot"]},
        (
            "/method/0",
            "not_allowed",
            "'byot' compares parts of one network by their logits; 'sp' needs more than logits",
        ),
        {"teacher": None, "method": ["kd", "byot"]},
    ),
    "margins of generations": (
        {"method": ["born_again", "ofd"]},
        ("/method/1", "not_allowed", "'ofd' reads the margins of one teacher, and each generation has another teacher"),
        {"method": ["born_again", "vid"]},
    ),
    "the same method twice": (
        {"method": ["kd", "attention", "kd"]},
        ("/method/2", "not_allowed", "this method is already in the list"),
        {"method": ["attention", BY_GRADIENT]},
    ),
    "the same method twice, both weighed": (
        {"method": ["kd", {"name": "kd", "weight": 0}]},
        ("/method/1/weight", "greater_than", "Input should be greater than 0, got 0"),
        {"method": [{"name": "kd", "weight": 1}, {"name": "kd", "weight": 1}]},
    ),
    "the weight of a method that stands alone": (
        {"method": {"name": "kd", "weight": 0.5}},
        ("/method/weight", "unused", "a method that stands alone is weighed by beta"),
        {"method": [{"name": "kd", "weight": 0.5}]},
    ),
    "a weight where nothing is distilled": (
        {"teacher": None, "method": [{"name": "supervised", "weight": 2}]},
        ("/method/0/weight", "unused", "the method 'supervised' has no distillation loss"),
        {"teacher": None, "method": ["supervised"]},
    ),
    # Teachers.
    "no teacher": (
        {"teacher": None, "method": ["kd", "attention"]},
        ("/teacher", "missing", "the method 'kd' + 'attention' needs a teacher"),
        {"teacher": None, "method": ["born_again", "attention"]},
    ),
    "a teacher of labels": (
        {"method": "supervised"},
        ("/teacher", "unused", "the method 'supervised' takes no teacher"),
        {**ALONE},
    ),
    "a teacher of peers": (
        {**PEERS, "teacher": ONE, "method": ["dml", "kd"]},
        ("/teacher", "unused", "the method 'dml' + 'kd' takes no teacher"),
        {**PEERS, "method": ["dml", "kd"]},
    ),
    "a teacher without a file": (
        {"teacher": {"architecture": "resnet56"}},
        ("/teacher/checkpoint", "missing", "a teacher is a checkpoint or a program, or a file of its logits"),
        {"teacher": ONE},
    ),
    "a teacher of two files": (
        {"teacher": {**ONE, **PROGRAM}},
        ("/teacher/program", "not_allowed", "a teacher is one file, and checkpoint names one already"),
        {"teacher": [ONE, PROGRAM]},
    ),
    "a teacher of a network and logits": (
        {"teacher": {**PROGRAM, **LOGITS}},
        ("/teacher/logits", "not_allowed", "a teacher is one file, and program names one already"),
        {"teacher": LOGITS},
    ),
    "the classes of logits": (
        {"teacher": {**LOGITS, "class_names": ["a", "b", "c"]}},
        (
            "/teacher/class_names",
            "unused",
            "a file of logits has no network: its rows and columns must be in the data set's order",
        ),
        {"teacher": {**ONE, "class_names": ["a", "b", "c"]}},
    ),
    "logits beside another teacher": (
        {"teacher": [ONE, LOGITS]},
        (
            "/teacher/1/logits",
            "not_allowed",
            "a file of logits is a teacher alone; average the logits of several before saving them",
        ),
        {"teacher": [ONE, OTHER]},
    ),
    "logits and a pool": (
        {"teacher": LOGITS, "unlabelled": "theirs"},
        ("/unlabelled", "not_allowed", "a file of logits has rows for the data set's training images only"),
        {"teacher": ONE, "unlabelled": "theirs"},
    ),
    "logits of mixed images": (
        {"teacher": LOGITS, "training": {"mix": "mixup"}},
        (
            "/training/mix",
            "not_allowed",
            "mixed images are others in each epoch, and a file of logits cannot have them",
        ),
        {"teacher": ONE, "training": {"mix": "mixup"}},
    ),
    "logits of boxes": (
        {"teacher": LOGITS, "training": {"augmentation": {"name": "random_resized_crop"}}},
        (
            "/training/augmentation",
            "not_allowed",
            "random_resized_crop draws other boxes in each epoch, and a file of logits cannot have them",
        ),
        {"teacher": LOGITS, "training": {"augmentation": {"name": "crop_flip"}}},
    ),
    "a program's architecture": (
        {"teacher": {**PROGRAM, "architecture": "resnet56"}},
        ("/teacher/architecture", "unused", "a program holds its own network"),
        {"teacher": PROGRAM},
    ),
    "a part of published weights": (
        {"teacher": [ONE, {"checkpoint": "weights:ResNet18_Weights.DEFAULT", "part": "student"}]},
        ("/teacher/1/part", "unused", "only a checkpoint's file may hold several networks"),
        {"teacher": [ONE, {"checkpoint": "blob:sha256:00", "part": "student", "averaged": False}]},
    ),
    "a part of a job's student to start from": (
        {**ALONE, "student": {**STARTED, "checkpoint": "job:7", "averaged": False}},
        ("/student/averaged", "unused", "only a checkpoint's file may hold several networks"),
        {**ALONE, "student": {**STARTED, "averaged": False}},
    ),
    "the same teacher twice": (
        {"teacher": [ONE, ONE]},
        ("/teacher/1", "not_allowed", "this teacher is already in the list"),
        {"teacher": [ONE, OTHER]},
    ),
    "the weight of one teacher": (
        {"teacher": {**ONE, "weight": 2}},
        ("/teacher/weight", "unused", "there is only one teacher"),
        {"teacher": [{**ONE, "weight": 2}, OTHER]},
    ),
    "the weight of one teacher in a list": (
        {"teacher": [{**ONE, "weight": 2}]},
        ("/teacher/0/weight", "unused", "there is only one teacher"),
        {"teacher": [ONE]},
    ),
    "activations of several teachers": (
        {"teacher": [ONE, OTHER], "method": ["kd", "sp"]},
        (
            "/teacher",
            "not_allowed",
            "of several teachers only the probabilities are averaged; 'sp' looks inside one teacher",
        ),
        {"teacher": [ONE, OTHER], "method": ["kd", "dist"]},
    ),
    "gradients of several teachers": (
        {"teacher": [ONE, OTHER], "method": BY_GRADIENT},
        (
            "/teacher",
            "not_allowed",
            "of several teachers only the probabilities are averaged; 'attention' looks inside one teacher",
        ),
        {"teacher": [ONE], "method": BY_GRADIENT},
    ),
    "logits of several teachers": (
        {"teacher": [ONE, OTHER], "method": {"name": "kd", "form": "logits_l2"}},
        (
            "/method/form",
            "not_allowed",
            "of several teachers only the probabilities are averaged, so there are no logits to match",
        ),
        {"teacher": [ONE, OTHER], "method": {"name": "kd", "form": "probabilities_l2"}},
    ),
    "activations of a program": (
        {"teacher": PROGRAM, "method": ["kd", "crd"]},
        ("/teacher/program", "not_allowed", "a program gives only logits; 'crd' needs its activations"),
        {"teacher": PROGRAM, "method": ["kd", "dkd"]},
    ),
    "activations of logits": (
        {"teacher": LOGITS, "method": "nst"},
        ("/teacher/logits", "not_allowed", "a file of logits gives only logits; 'nst' needs its activations"),
        {"teacher": LOGITS, "method": ["kd", "dkd", "dist"]},
    ),
    "gradients of a program": (
        {"teacher": PROGRAM, "method": BY_GRADIENT},
        (
            "/teacher/program",
            "not_allowed",
            "a program gives only logits; 'attention' needs its gradient at the image",
        ),
        {"teacher": PROGRAM, "method": "nkd"},
    ),
    # Students.
    "mutual learning of one": (
        {"teacher": None, "method": "dml", "student": ["resnet20"]},
        ("/student", "too_short", "'dml' trains several students"),
        {"teacher": None, "method": "dml", "student": ["resnet20", "vgg8", "resnet20"]},
    ),
    "several students of a teacher": (
        {"student": ["resnet20", "vgg8"]},
        ("/student", "not_allowed", "only 'dml' trains several students"),
        {"student": ["resnet20"]},
    ),
    "branches of torchvision's": (
        {"teacher": None, "method": "one", "student": {"architecture": "torchvision/resnet18"}},
        (
            "/student/architecture",
            "not_allowed",
            "'one' branches the student before its last stage, and that place in torchvision/resnet18 is not known",
        ),
        {"teacher": None, "method": "one", "student": {"architecture": "vgg8"}},
    ),
    "one generation without a teacher": (
        {"teacher": None, "method": {"name": "born_again", "generations": 1}},
        (
            "/method/generations",
            "not_allowed",
            "one generation without a teacher is the method 'supervised'",
        ),
        {"teacher": None, "method": {"name": "born_again", "generations": 2}},
    ),
    "an ensemble of one": (
        {"method": {"name": "born_again", "generations": 1, "answer": "ensemble"}},
        ("/method/answer", "unused", "one generation makes no ensemble"),
        {"method": {"name": "born_again", "generations": 1}},
    ),
    # Assistants.
    "assistants of generations": (
        {"method": "born_again", "assistants": ["resnet32"]},
        ("/assistants", "unused", "assistants need a trained teacher and one student"),
        {"method": "born_again", "assistants": []},
    ),
    "taps along a chain": (
        {"method": ["kd", "attention"], "assistants": ["resnet32"]},
        (
            "/method/1",
            "not_allowed",
            "a chain of assistants compares logits: the taps of 'attention' would differ between the networks",
        ),
        {"method": ["kd", BY_GRADIENT], "assistants": ["resnet32"]},
    ),
    # Images without labels.
    "a pool without a teacher": (
        {"method": "born_again", "unlabelled": POOLED},
        (
            "/unlabelled",
            "unused",
            "unlabelled images need a trained teacher during the whole job; 'born_again' has none",
        ),
        {"method": "kd", "unlabelled": POOLED},
    ),
    "a pool that is the data set": (
        {"unlabelled": {"source": "mine", "labelled_too": False}},
        (
            "/unlabelled/source",
            "not_allowed",
            "these are the data set's own training images, and some of them are held out to choose the best epoch",
        ),
        {"unlabelled": {"source": "theirs", "labelled_too": False}},
    ),
    "a pool that is mixed": (
        {"unlabelled": POOLED, **mixed("cutmix")},
        ("/training/mix", "not_allowed", "images without labels cannot be mixed"),
        {**mixed("cutmix")},
    ),
    "no label to compare at": (
        {"method": ["kd", "dkd"], "unlabelled": UNSEEN},
        (
            "/unlabelled/labels",
            "not_allowed",
            "'dkd' needs a label for each image; let the teacher's answers be the labels",
        ),
        {"method": ["kd", "dkd"], "unlabelled": POOLED},
    ),
    "no label to take the gradient at": (
        {"method": BY_GRADIENT, "unlabelled": UNSEEN},
        (
            "/unlabelled/labels",
            "not_allowed",
            "'attention' needs a label for each image; let the teacher's answers be the labels",
        ),
        {"method": "attention", "unlabelled": UNSEEN},
    ),
    "no labels after the first stage": (
        {"method": "fsp", "unlabelled": {**UNSEEN, "labelled_too": False}},
        ("/unlabelled/labels", "not_allowed", "without labels and without a distillation loss nothing is learned"),
        {"method": ["fsp", "kd"], "unlabelled": {**UNSEEN, "labelled_too": False}},
    ),
    "no labels and no distillation": (
        {"beta": 0, "unlabelled": {**UNSEEN, "labelled_too": False}},
        ("/unlabelled/labels", "not_allowed", "without labels and without a distillation loss nothing is learned"),
        {"beta": 0, "unlabelled": UNSEEN},
    ),
    # Mixed images.
    "a graph on a CPU": (
        {"training": {"step": "graph", "device": "cpu"}},
        ("/training/step", "not_allowed", "a step is captured as a graph on a GPU only, and device is 'cpu'"),
        {"training": {"step": "graph"}},
    ),
    "one label of mixed images": (
        {"method": "nkd", **mixed()},
        ("/training/mix", "not_allowed", "'nkd' needs one label for each image; mixed images have two"),
        {"method": "dist", **mixed()},
    ),
    "a gradient at the label of mixed images": (
        {"method": BY_GRADIENT, **mixed()},
        ("/training/mix", "not_allowed", "'attention' needs one label for each image; mixed images have two"),
        {**ALONE, **mixed()},
    ),
    "a memory of mixed images": (
        {"method": "crd", **mixed()},
        (
            "/training/mix",
            "not_allowed",
            "'crd' stores an embedding of each training image, but a mixed image is not a training image",
        ),
        {"method": "cc", **mixed()},
    ),
    # Numbers that nothing uses.
    "a temperature of labels": (
        {**ALONE, "temperature": 4},
        ("/temperature", "unused", "the method 'supervised' has no temperature"),
        {"temperature": 4},
    ),
    "a temperature of activations": (
        {"method": ["sp", "crd"], "temperature": 4},
        ("/temperature", "unused", "the method 'sp' + 'crd' has no temperature"),
        {"method": ["sp", "dkd"], "temperature": 4},
    ),
    "a temperature of bare logits": (
        {"method": {"name": "kd", "form": "logits_l2"}, "temperature": 4},
        ("/temperature", "unused", "the form 'logits_l2' has no temperature"),
        {"method": {"name": "kd", "form": "cross_entropy"}, "temperature": 4},
    ),
    "a temperature of hints": (
        {"method": "fitnet", "temperature": 4},
        ("/temperature", "unused", "'fitnet' has a temperature only in two stages, the second of which is kd"),
        {"method": {"name": "fitnet", "stages": "two"}, "temperature": 4},
    ),
    "a stage of a joint training": (
        {"method": {"name": "fitnet", "pretraining_epochs": 3}},
        ("/method/pretraining_epochs", "unused", "a joint training has no first stage"),
        {"method": {"name": "fitnet", "stages": "two", "pretraining_epochs": 3}},
    ),
    "taps of a gradient": (
        {"method": {**BY_GRADIENT, "taps": ["layer1"]}},
        ("/method/taps", "unused", "the gradient is taken at the image, not at taps"),
        {"method": {"name": "attention", "taps": ["layer1"]}},
    ),
    "taps without margins": (
        {"method": ["kd", {"name": "ofd", "taps": ["layer1", "layer2"]}]},
        ("/method/1/margins", "missing", "named taps need the teacher's batch norms, one for each tap"),
        {"method": ["kd", "ofd"]},
    ),
    "margins without taps": (
        {"method": {"name": "ofd", "margins": ["bn1"]}},
        ("/method/taps", "missing", "margins belong to taps: name both, or neither"),
        {"method": {"name": "ofd", "margins": ["bn1"], "taps": ["layer1"]}},
    ),
    "more taps than margins": (
        {"method": {"name": "ofd", "margins": ["bn1"], "taps": ["layer1", "layer2"]}},
        ("/method/margins", "not_allowed", "one batch norm for each tap"),
        {"method": {"name": "ofd", "margins": ["bn1", "bn2"], "taps": ["layer1", "layer2"]}},
    ),
    "a distillation of labels": (
        {**ALONE, "beta": 1},
        ("/beta", "unused", "the method 'supervised' has no distillation loss"),
        {**ALONE, "alpha": 1},
    ),
    "labels alone, and none of them": (
        {**ALONE, "alpha": 0},
        ("/alpha", "not_allowed", "with alpha 0 there is nothing to learn from"),
        {"alpha": 0},
    ),
    "peers without labels": (
        {**PEERS, "method": "dml", "alpha": 0},
        ("/alpha", "not_allowed", "'dml' has no trained teacher: with alpha 0 nothing is learned from the labels"),
        {"teacher": None, "method": "born_again", "alpha": 0},
    ),
    "a second stage of nothing": (
        {"method": "activation_boundary", "alpha": 0},
        (
            "/alpha",
            "not_allowed",
            "after its first stage 'activation_boundary' learns from the labels alone: with alpha 0 it learns nothing",
        ),
        {"method": ["activation_boundary", "kd"], "alpha": 0},
    ),
    "a first stage of nothing": (
        {"method": ["kd", "fsp"], "beta": 0},
        (
            "/beta",
            "not_allowed",
            "the first stage of 'fsp' minimises beta times its loss: with beta 0 it learns nothing",
        ),
        {"method": {"name": "fitnet", "stages": "two"}, "beta": 0},
    ),
    "no loss at all": (
        {"alpha": 0, "beta": 0},
        ("/beta", "not_allowed", "with alpha and beta both 0 there is nothing to learn from"),
        {"alpha": 0.1, "beta": 0},
    ),
    "no part of a loss": (
        {"method": {"name": "rkd", "distance_weight": 0, "angle_weight": 0}},
        ("/method/angle_weight", "not_allowed", "with distance_weight and angle_weight both 0 'rkd' teaches nothing"),
        {"method": {"name": "rkd", "distance_weight": 0}},
    ),
    "no part of a decoupled loss": (
        {"method": ["kd", {"name": "dkd", "target_weight": 0, "non_target_weight": 0}]},
        (
            "/method/1/non_target_weight",
            "not_allowed",
            "with target_weight and non_target_weight both 0 'dkd' teaches nothing",
        ),
        {"method": ["kd", {"name": "dkd", "target_weight": 0}]},
    ),
    "no part of a correlation": (
        {"method": {"name": "dist", "between_weight": 0, "within_weight": 0}},
        ("/method/within_weight", "not_allowed", "with between_weight and within_weight both 0 'dist' teaches nothing"),
        {"method": {"name": "dist", "between_weight": 0}},
    ),
    "a baseline of labels": (
        {**ALONE, "baseline": "train"},
        ("/baseline", "unused", "a student without a teacher is its own baseline"),
        {**PEERS, "method": "dml", "baseline": "train"},
    ),
    "seeds of generations": (
        {"method": "born_again", "seeds": 2},
        ("/seeds", "not_allowed", "each generation has a seed of its own already, and the last one depends on all"),
        {"method": "born_again", "seeds": 1},
    ),
    "seeds beyond the largest": (
        {"seeds": 2, "training": {"seed": 2**63 - 1}},
        (
            "/training/seed",
            "not_allowed",
            "the seeds are training.seed and those after it, of which the last is at most 2**63 - 1",
        ),
        {"seeds": 2, "training": {"seed": 2**63 - 2}},
    ),
    "seeds beside another job's baseline": (
        {"baseline": "job:job_1", "seeds": 2},
        (
            "/baseline",
            "not_allowed",
            "another job trained one student alone, with one seed: with several seeds, each needs its own",
        ),
        {"baseline": "train", "seeds": 2},
    ),
    # The recipe.
    "a warm-up to the end": (
        schedule(name="cosine", warmup_epochs=9),
        ("/training/schedule/warmup_epochs", "not_allowed", "the warm-up must end before the training"),
        schedule(name="cosine", warmup_epochs=8),
    ),
    "falling milestones": (
        schedule(name="multistep", milestones=[5, 4]),
        ("/training/schedule/milestones", "not_allowed", "milestones must rise and be before the last epoch"),
        schedule(name="multistep", milestones=[4, 5]),
    ),
    "a milestone after the end": (
        schedule(name="multistep", milestones=[9]),
        ("/training/schedule/milestones", "not_allowed", "milestones must rise and be before the last epoch"),
        schedule(name="multistep", milestones=[8]),
    ),
    "a range from large to small": (
        cropped(scale=[0.9, 0.1]),
        ("/training/augmentation/scale", "not_allowed", "the smaller number comes first"),
        cropped(scale=[0.9, 0.9]),
    ),
    # Training for int8.
    "epochs of a training that is not for int8": (
        {"quantization": {"aware": False, "epochs": 3}},
        ("/quantization/epochs", "unused", "without aware no epoch trains for int8"),
        {"quantization": {"aware": False}},
    ),
    "int8 of branches": (
        {"teacher": None, "method": "one", "quantization": {}},
        (
            "/quantization",
            "not_allowed",
            "'one' trains branches on one trunk together, and int8 is trained for one network alone",
        ),
        {**PEERS, "method": "dml", "quantization": {}},
    ),
    "int8 of several generations": (
        {"method": {"name": "born_again", "answer": "ensemble"}, "quantization": {}},
        (
            "/quantization",
            "not_allowed",
            "'born_again' delivers an ensemble of all generations, and int8 is trained for one network alone",
        ),
        {"method": "born_again", "quantization": {}},
    ),
    "more epochs for int8 than in all": (
        {"training": {"epochs": 4}, "quantization": {"epochs": 5}},
        ("/quantization/epochs", "not_allowed", "epochs that train for int8 are among those of the training"),
        {"training": {"epochs": 4}, "quantization": {"epochs": 3}},
    ),
    "int8 of random weights": (
        {"training": {"epochs": 1}, "quantization": {}},
        (
            "/quantization/epochs",
            "not_allowed",
            "a student of random weights trains in float first: training for int8 keeps its batch-norm statistics",
        ),
        {"training": {"epochs": 1}, "quantization": {}, "student": STARTED},
    ),
}


@pytest.mark.parametrize(("wrong", "fault", "near_miss"), CASES.values(), ids=CASES)
def test_rules_return_one_fault_and_none_for_a_near_miss(wrong, fault, near_miss):
    assert rule_faults(**wrong) == [fault]
    assert rule_faults(**near_miss) == []


def test_rules_have_a_case_each():
    fired = {rule for wrong, _, _ in CASES.values() for rule in _RULES if list(rule(read(body(**wrong))[1]))}
    assert fired == set(_RULES)


def test_rules_return_all_faults_together():
    found = rule_faults(
        method=["crd", "crd", {"name": "fsp", "taps": ["layer1", "layer2"]}, "one"],
        teacher=[{**ONE, "weight": 2}, PROGRAM],
        student=["resnet20", "torchvision/resnet18"],
        assistants=["resnet32"],
        unlabelled={"source": "mine", "labels": "none"},
        temperature=2,
        beta=0,
        **mixed(),
    )
    assert {pointer for pointer, _, _ in found} == {
        "/method/0",
        "/method/1",
        "/method/2",
        "/teacher",
        "/teacher/1/program",
        "/student",
        "/assistants",
        "/unlabelled",
        "/unlabelled/source",
        "/training/mix",
        "/beta",
    }


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("kd", "offline"),
        (["attention", "dml"], "mutual"),
        (["supervised", "kd"], "offline"),
        ("supervised", "alone"),
        (3, None),
    ],
    ids=str,
)
def test_scheme_kind_is_that_of_the_one_scheme(method, scheme):
    assert scheme_kind(read(body(method=method))[1]) == scheme
