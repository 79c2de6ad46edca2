import pytest

from kdcore.errors import Fault, SpecFaults
from kdcore.spec import JobSpec, Kd, Supervised, as_typed, parse, read

SOUND = {
    "dataset": "cifar100",
    "teacher": {"architecture": "resnet56", "checkpoint": "model:big"},
    "student": {"architecture": "resnet20"},
    "method": "kd",
}


def faults(**changes) -> dict[str, str]:
    """Messages by pointer; a change to None leaves the field out."""
    body = {name: value for name, value in {**SOUND, **changes}.items() if value is not None}
    spec, _, found = read(body)
    assert (spec is None) == bool(found)
    return {fault.pointer: fault.message for fault in found}


def test_a_plain_name_stands_for_an_object():
    spec = parse({**SOUND, "student": "resnet8", "training": {"optimizer": "adamw", "augmentation": "none"}})
    assert spec.method == Kd() and spec.dataset.source == "cifar100"
    assert spec.student.architecture == "resnet8"
    assert spec.training.optimizer.name == "adamw" and spec.training.augmentation.name == "none"


def test_what_was_read_reads_back():
    spec = parse({**SOUND, "training": {"mix": {"name": "cutmix", "alpha": 0.5}, "schedule": "cosine"}})
    assert parse(spec.as_json()) == spec


def test_many_mistakes_of_many_kinds_come_back_together():
    found = faults(
        temprature=4,
        student={"architecture": "resnet21"},
        method={"name": "kd", "form": "kld"},
        alpha=-1,
        training={"epochs": "many", "optimizer": {"name": "sgd", "lr": 0, "momentun": 1}, "augmentation": "flip"},
        baseline="yes",
    )
    assert set(found) == {
        "/temprature",
        "/student/architecture",
        "/method/form",
        "/alpha",
        "/training/epochs",
        "/training/optimizer/lr",
        "/training/optimizer/momentun",
        "/training/augmentation",
        "/baseline",
    }
    assert "did you mean 'temperature'" in found["/temprature"]
    assert "did you mean 'momentum'" in found["/training/optimizer/momentun"]


def test_a_bad_field_hides_no_contradiction_between_good_ones():
    found = faults(method="supervised", temperature=3, student="nonsense")
    assert set(found) == {"/student", "/teacher", "/temperature"}


def test_required_fields_are_named():
    assert set(faults(dataset=None, student=None, method=None)) == {"/dataset", "/student", "/method"}
    assert set(faults(teacher={})) == {"/teacher/checkpoint"}


def test_unknown_names_offer_the_nearest():
    _, _, (fault,) = read({**SOUND, "student": "resnet21"})
    assert fault.got == "resnet21" and "resnet20" in fault.allowed
    _, _, (fault,) = read({**SOUND, "method": {"name": "kdd"}})
    assert fault.pointer == "/method/name" and fault.allowed == ["supervised", "kd"]
    assert "did you mean 'kd'" in fault.message


@pytest.mark.parametrize("body", [None, [], "kd", 3], ids=str)
def test_a_body_that_is_no_object(body):
    spec, partial, (fault,) = read(body)
    assert spec is None and partial == {} and fault.pointer == ""


def test_numbers_that_are_none_are_refused():
    assert set(faults(alpha=float("nan"))) == {"/alpha"}
    assert set(faults(temperature=0)) == {"/temperature"}


def test_a_spec_is_frozen_and_parse_raises_with_all_faults():
    spec = parse({**SOUND, "method": "supervised", "teacher": None})
    assert isinstance(spec.method, Supervised)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"
    with pytest.raises(SpecFaults) as caught:
        parse({**SOUND, "alpha": -1, "beta": -1})
    assert [fault.pointer for fault in caught.value.faults] == ["/alpha", "/beta"]


def test_every_field_but_the_obvious_says_what_it_means():
    described = JobSpec.model_json_schema()
    assert "T²" in described["description"]
    assert all("description" in described["properties"][name] for name in ("temperature", "alpha", "beta", "baseline"))


def test_faults_point_at_what_was_typed():
    """A plain name is one value; inside a real object, or at a field that is missing, the pointer stays."""
    body = {"student": "resnet8", "teacher": {"checkpoint": "x"}, "training": {"schedule": "cosine"}}
    asked = [
        "/student/architecture",
        "/teacher/architecture",
        "/teacher/checkpoint",
        "/training/schedule/warmup_epochs",
    ]
    pointed = as_typed([Fault(pointer, "", "") for pointer in [*asked, "/method/name", ""]], body)
    assert [fault.pointer for fault in pointed] == [
        "/student", "/teacher/architecture", "/teacher/checkpoint", "/training/schedule", "/method/name", "",
    ]  # fmt: skip
