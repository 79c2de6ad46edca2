import pytest

from kdcore.catalog import DatasetFacts, ModelFacts, architecture
from kdcore.spec import fit, read, references

SOUND = {"dataset": "cifar100", "teacher": {"checkpoint": "model:big"}, "student": "resnet20", "method": "kd"}
CIFAR = DatasetFacts(
    kind="arrays", num_classes=3, class_names=["a", "b", "c"], channels=3, image_size=(32, 32), train=1000, test=100,
    mean=[0.5] * 3, std=[0.2] * 3,
)  # fmt: skip
TEACHER = ModelFacts(architecture="resnet56", num_classes=3, channels=3, parameters=1, bytes=4, format="pytorch")


def schedule(**options) -> dict:
    return {"training": {"epochs": 9, "schedule": options}}


def pointers(**changes) -> set[str]:
    return {fault.pointer for fault in read({**SOUND, **changes})[2]}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"teacher": None}, "/teacher"),
        ({"method": "supervised"}, "/teacher"),
        ({"method": "supervised", "teacher": None, "beta": 1}, "/beta"),
        ({"method": "supervised", "teacher": None, "alpha": 0}, "/alpha"),
        ({"method": "supervised", "teacher": None, "baseline": "train"}, "/baseline"),
        ({"method": {"name": "kd", "form": "logits_l2"}, "temperature": 4}, "/temperature"),
        ({"alpha": 0, "beta": 0}, "/beta"),
        ({"teacher": {"checkpoint": "blob:sha256:00"}}, "/teacher/architecture"),
        (schedule(name="cosine", warmup_epochs=9), "/training/schedule/warmup_epochs"),
        (schedule(name="multistep", milestones=[5, 4]), "/training/schedule/milestones"),
        (schedule(name="multistep", milestones=[9]), "/training/schedule/milestones"),
        (
            {"training": {"augmentation": {"name": "random_resized_crop", "scale": [0.9, 0.1]}}},
            "/training/augmentation/scale",
        ),
    ],
)
def test_a_contradiction_is_named(changes, pointer):
    assert pointers(**changes) == {pointer}


def test_a_sound_spec_has_no_faults_and_says_what_to_look_up():
    spec, partial, faults = read({**SOUND, "baseline": "job:job_1"})
    assert not faults and spec is not None
    assert [(one.pointer, one.text) for one in references(partial)] == [
        ("/dataset", "cifar100"),
        ("/teacher/checkpoint", "model:big"),
        ("/baseline", "job:job_1"),
    ]


def misfits(teacher: ModelFacts | None = TEACHER, data: DatasetFacts | None = CIFAR, **changes) -> dict[str, str]:
    _, partial, _ = read({**SOUND, **changes})
    student = architecture(partial["student"].architecture)
    return {fault.pointer: fault.code for fault in fit(partial, data, teacher, student)}


def test_what_fits_is_not_complained_about():
    assert misfits() == {}
    assert misfits(data=None) == {}


@pytest.mark.parametrize(
    "other",
    [{"num_classes": 10}, {"channels": 1}, {"class_names": ["c", "b", "a"]}],
    ids=["classes", "channels", "class order"],
)
def test_a_teacher_that_does_not_fit_the_data(other):
    assert misfits(TEACHER.model_copy(update=other)) == {"/teacher/checkpoint": "teacher_mismatch"}


def test_a_teacher_that_is_another_network_than_said():
    _, partial, _ = read({**SOUND, "teacher": {"checkpoint": "model:big", "architecture": "resnet110"}})
    (fault,) = fit(partial, CIFAR, TEACHER, None)
    assert (fault.pointer, fault.allowed, fault.got) == ("/teacher/architecture", "resnet56", "resnet110")


def test_a_student_that_does_not_fit_the_data():
    grey = CIFAR.model_copy(update={"channels": 1})
    assert misfits(None, grey, student="torchvision/resnet18") == {"/student/architecture": "not_allowed"}
    tiny = CIFAR.model_copy(update={"image_size": (8, 8)})
    assert misfits(None, tiny, student="mobilenetv2_x0_5") == {"/student/architecture": "not_allowed"}


def test_preprocessing_has_one_number_a_channel():
    student = {"architecture": "resnet20", "preprocessing": {"mean": [0.5], "std": [0.5]}}
    assert set(misfits(student=student)) == {"/student/preprocessing/mean", "/student/preprocessing/std"}


def test_a_batch_must_not_be_larger_than_what_is_left_to_train_on():
    assert misfits(training={"batch_size": 900}) == {}
    assert set(misfits(training={"batch_size": 901})) == {"/training/batch_size"}
