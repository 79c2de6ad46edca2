import pytest

from kdcore.catalog import DatasetFacts, ModelFacts
from kdcore.spec import CropFlip, NoAugmentation, RandomResizedCrop, parse, resolve

DATA = DatasetFacts(
    kind="arrays", num_classes=10, class_names=[str(k) for k in range(10)], channels=3, image_size=(32, 32),
    train=1000, test=100, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3],
)  # fmt: skip
TEACHER = ModelFacts(architecture="resnet56", num_classes=10, channels=3, parameters=1, bytes=4, format="pytorch")


def resolved(data: DatasetFacts = DATA, teacher: ModelFacts | None = TEACHER, **changes):
    body = {"dataset": "x", "teacher": {"checkpoint": "model:t"}, "student": "resnet20", "method": "kd", **changes}
    return resolve(parse(body), data, teacher)


def test_kd_gets_crds_weights():
    spec = resolved()
    assert (spec.temperature, spec.alpha, spec.beta) == (4.0, 0.1, 0.9)


def test_standardized_kd_gets_the_weights_of_its_paper():
    spec = resolved(method={"name": "kd", "standardize": True})
    assert (spec.temperature, spec.alpha, spec.beta) == (2.0, 0.1, 9.0)


def test_what_was_given_stays():
    spec = resolved(temperature=1.5, alpha=0.0, beta=2.0)
    assert (spec.temperature, spec.alpha, spec.beta) == (1.5, 0.0, 2.0)


def test_a_form_without_temperature_gets_none():
    assert resolved(method={"name": "kd", "form": "logits_l2"}).temperature is None


def test_supervised_has_one_weight():
    spec = resolve(parse({"dataset": "x", "student": "resnet20", "method": "supervised"}), DATA, None)
    assert (spec.temperature, spec.alpha, spec.beta, spec.teacher) == (None, 1.0, None, None)


def test_each_model_is_normalised_its_own_way():
    own = TEACHER.model_copy(update={"mean": [0.1] * 3, "std": [0.9] * 3})
    spec = resolved(teacher=own)
    assert spec.teacher.preprocessing.mean == (0.1, 0.1, 0.1)
    assert spec.student.preprocessing.std == (0.1, 0.2, 0.3)
    assert resolved().teacher.preprocessing.mean == (0.4, 0.5, 0.6)
    assert spec.teacher.architecture == "resnet56"


@pytest.mark.parametrize(("epochs", "milestones"), [(240, (150, 180, 210)), (60, (38, 45, 52)), (2, (1,)), (1, ())])
def test_milestones_scale_with_the_epochs(epochs, milestones):
    assert resolved(training={"epochs": epochs}).training.schedule.milestones == milestones


def test_augmentation_follows_the_images():
    assert resolved().training.augmentation == CropFlip(padding=4)
    large = DATA.model_copy(update={"image_size": (128, 128)})
    assert isinstance(resolved(large).training.augmentation, RandomResizedCrop)
    digits = DATA.model_copy(update={"kind": "named", "channels": 1, "image_size": (8, 8)})
    assert isinstance(resolved(digits).training.augmentation, NoAugmentation)


def test_resolving_twice_changes_nothing_and_nothing_is_left_to_guess():
    spec = resolved()
    assert resolve(spec, DATA, TEACHER) == spec
    left = [name for name, value in spec.as_json().items() if value is None and name != "name"]
    assert left == []
