import pytest

from base.errors import Fault, SpecFaults
from kdcore.spec import METHODS, JobSpec, as_typed, parse, read, reading
from kdcore.spec.methods.response import Kd
from kdcore.spec.methods.schemes import Supervised

SOUND = {
    "dataset": "cifar100",
    "teacher": {"architecture": "resnet56", "checkpoint": "model:big"},
    "student": {"architecture": "resnet20"},
    "method": "kd",
}
QUOTED = ", which is text: write it without quotes"


def faults(**changes) -> dict[str, str]:
    """Messages by pointer; a change to None leaves the field out."""
    body = {name: value for name, value in {**SOUND, **changes}.items() if value is not None}
    spec, _, found = read(body)
    assert (spec is None) == bool(found)
    return {fault.pointer: fault.message for fault in found}


def test_parse_reads_a_plain_name_as_an_object():
    spec = parse({**SOUND, "student": "resnet8", "training": {"optimizer": "adamw", "augmentation": "none"}})
    assert spec.method == Kd() and spec.dataset.source == "cifar100"
    assert spec.student.architecture == "resnet8"
    assert spec.training.optimizer.name == "adamw" and spec.training.augmentation.name == "none"


def test_parse_reads_its_own_json():
    spec = parse({**SOUND, "training": {"mix": {"name": "cutmix", "alpha": 0.5}, "schedule": "cosine"}})
    assert parse(spec.as_json()) == spec


def test_read_returns_all_faults_together():
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


def test_read_applies_rules_to_the_valid_fields():
    found = faults(method="supervised", temperature=3, student="nonsense")
    assert set(found) == {"/student", "/teacher", "/temperature"}


def test_read_names_required_fields():
    assert set(faults(dataset=None, student=None, method=None)) == {"/dataset", "/student", "/method"}
    assert set(faults(teacher={})) == {"/teacher/checkpoint"}


def test_read_suggests_similar_names():
    _, _, (fault,) = read({**SOUND, "student": "resnet21"})
    assert fault.got == "resnet21" and "resnet20" in fault.allowed
    _, _, (fault,) = read({**SOUND, "method": {"name": "kdd"}})
    assert fault.pointer == "/method/name" and fault.allowed == list(METHODS)
    assert fault.message == "no such name: 'kdd'; did you mean 'kd'?"


@pytest.mark.parametrize("body", [None, [], "kd", 3], ids=str)
def test_read_refuses_a_body_that_is_no_object(body):
    spec, partial, (fault,) = read(body)
    assert spec is None and partial == {} and fault.pointer == ""


MISTAKES = {
    "an option out of bounds, in a list": (
        {"method": ["kd", {"name": "attention", "p": 99}]},
        ("/method/1/p", "less_than_equal", "Input should be less than or equal to 8, got 99"),
    ),
    "another method's option": (
        {"method": ["kd", {"name": "attention", "tap": "layer1"}]},
        ("/method/1/tap", "unknown_field", "there is no field 'tap' here; did you mean 'taps'?"),
    ),
    "another tool's word": (
        {"student": {"architecture": "resnet8", "pretrained": True}},
        ("/student/pretrained", "unknown_field", "there is no field 'pretrained' here; did you mean 'checkpoint'?"),
    ),
    "an unknown name in a list": (
        {"method": ["kd", "atention"]},
        ("/method/1", "not_allowed", "no such name: 'atention'; did you mean 'attention'?"),
    ),
    "an object with an unknown name in a list": (
        {"method": ["kd", {"name": "atention"}]},
        ("/method/1/name", "not_allowed", "no such name: 'atention'; did you mean 'attention'?"),
    ),
    "options without a name": (
        {"method": {"weight": 1}},
        ("/method", "not_allowed", "an object with a 'name', or a plain name"),
    ),
    "a number for a method": (
        {"method": 3},
        ("/method", "type", "an object with a 'name', or a plain name, belongs here, got 3"),
    ),
    "nothing for a method": (
        {"method": [None]},
        ("/method/0", "type", "an object with a 'name', or a plain name, belongs here, got None"),
    ),
    "no methods": (
        {"method": []},
        ("/method", "too_short", "the list holds 0, which is too short"),
    ),
    "too many methods": (
        {"method": ["kd"] * 9},
        ("/method", "too_long", "the list holds 9, which is too long"),
    ),
    "a weight of nothing": (
        {"method": ["kd", {"name": "sp", "weight": 0}]},
        ("/method/1/weight", "greater_than", "Input should be greater than 0, got 0"),
    ),
    "a module path that is none": (
        {"method": {"name": "attention", "taps": ["layer1", "layer 2"]}},
        (
            "/method/taps/1",
            "string_pattern_mismatch",
            "String should match pattern '^[A-Za-z0-9_.-]+(@(in|nhwc|tokens))?$', got 'layer 2'",
        ),
    ),
    "a map of one class": (
        {"teacher": {"checkpoint": "model:big", "class_map": {"a": 0}}},
        ("/teacher/class_map", "too_short", "the object holds 1, which is too short"),
    ),
    "an alert of nothing": (
        {"scheduling": {"alerts": [{}]}},
        ("/scheduling/alerts/0", "not_allowed", "give a metric with below or above, or no_progress_s"),
    ),
    "an alert of two things": (
        {"scheduling": {"alerts": [{"no_progress_s": 60}, {"metric": "train/loss", "above": 1, "no_progress_s": 60}]}},
        ("/scheduling/alerts/1", "not_allowed", "give a metric with below or above, or no_progress_s"),
    ),
    "an alert without a bound": (
        {"scheduling": {"alerts": [{"metric": "train/loss"}]}},
        (
            "/scheduling/alerts/0",
            "not_allowed",
            "give either below or above with the metric train/loss, a number to compare it with",
        ),
    ),
    "a bound without a metric": (
        {"scheduling": {"alerts": [{"no_progress_s": 60, "below": 1, "from_epoch": 2}]}},
        ("/scheduling/alerts/0", "not_allowed", "only a metric has below and from_epoch"),
    ),
    "a field of training at the top": (
        {"epochs": 2},
        ("/epochs", "unknown_field", "there is no field 'epochs' here; did you mean 'training.epochs'?"),
    ),
    "no form of a baseline": (
        {"baseline": "yes"},
        ("/baseline", "string_pattern_mismatch", "'none', 'train', 'train_anew' or 'job:<id>' belongs here, got 'yes'"),
    ),
    "one side of a tap": (
        {"method": {"name": "attention", "taps": ["layer1", {"student": "layer2"}]}},
        ("/method/taps/1/teacher", "missing", "this field is required"),
    ),
    "one layer of a flow": (
        {"method": {"name": "fsp", "taps": ["layer1"]}},
        ("/method/taps", "too_short", "the list holds 1, which is too short"),
    ),
    "no exits": (
        {"method": {"name": "byot", "exits": []}, "teacher": None},
        ("/method/exits", "too_short", "the list holds 0, which is too short"),
    ),
    "a temperature that ends float32": (
        {"method": {"name": "crd", "temperature": 0.01}},
        ("/method/temperature", "greater_than_equal", "Input should be greater than or equal to 0.02, got 0.01"),
    ),
    "a teacher by its name alone": (
        {"teacher": "model:big"},
        ("/teacher", "type", "an object belongs here, got 'model:big'"),
    ),
    "a teacher of no kind, in a list": (
        {"teacher": [{"checkpoint": "model:a"}, {"checkpoint": "b"}]},
        (
            "/teacher/1/checkpoint",
            "not_allowed",
            "must be model:<name or id>, job:<id>, blob:sha256:<hex>, weights:<published weights> or file:<path>",
        ),
    ),
    "no teachers": (
        {"teacher": []},
        ("/teacher", "too_short", "the list holds 0, which is too short"),
    ),
    "a student of a list, by name": (
        {"teacher": None, "method": "dml", "student": ["resnet20", "q9"]},
        ("/student/1", "not_allowed", "there is no architecture 'q9'"),
    ),
    "a student of a list, as an object": (
        {"teacher": None, "method": "dml", "student": ["resnet20", {"architecture": "q9"}]},
        ("/student/1/architecture", "not_allowed", "there is no architecture 'q9'"),
    ),
    "one assistant without a list": (
        {"assistants": "resnet32"},
        ("/assistants", "type", "a list belongs here, got 'resnet32'"),
    ),
    "an unknown assistant": (
        {"assistants": ["resnet32", "q9"]},
        ("/assistants/1", "not_allowed", "there is no architecture 'q9'"),
    ),
    "unlabelled images with labels": (
        {"unlabelled": {"source": "theirs", "labels": "all"}},
        ("/unlabelled/labels", "not_allowed", "must be one of teacher, none"),
    ),
}


@pytest.mark.parametrize(("changes", "fault"), MISTAKES.values(), ids=MISTAKES)
def test_read_points_to_the_field_as_written(changes, fault):
    _, _, found = read({**SOUND, **changes})
    assert [(one.pointer, one.code, one.message) for one in found] == [fault]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seeds": True}, ("/seeds", "a whole number belongs here, got true", "a whole number", True)),
        ({"alpha": False}, ("/alpha", "a number belongs here, got false", "a number", False)),
        ({"strict": "no"}, ("/strict", 'true or false belongs here, got "no"', "true or false", "no")),
        (
            {"strict": "true"},
            ("/strict", f'true or false belongs here, got "true"{QUOTED}', "true or false", "true"),
        ),
        (
            {"training": {"epochs": "3"}},
            ("/training/epochs", f'a whole number belongs here, got "3"{QUOTED}', "a whole number", "3"),
        ),
        (
            {"training": {"epochs": "1e-3"}},
            ("/training/epochs", 'a whole number belongs here, got "1e-3"', "a whole number", "1e-3"),
        ),
        (
            {"method": [{"name": "kd", "weight": True}, "dkd"]},
            ("/method/0/weight", "a number belongs here, got true", "a number", True),
        ),
    ],
)
def test_read_refuses_a_value_of_another_json_type(changes, fault):
    """Of a top-level field, too, and without a second fault that follows from what it was taken for."""
    _, fields, faults = read({**SOUND, **changes})
    assert [(one.pointer, one.message, one.allowed, one.got) for one in faults] == [fault]
    assert [one.code for one in faults] == ["type"] and not fields.keys() & changes.keys()


def test_read_returns_faults_of_several_lists_together():
    found = faults(
        teacher=[{"checkpoint": "model:a"}, {"checkpoint": "b"}],
        student=["resnet20", {"architecture": "q9"}, "q10"],
        method=["kd", {"name": "attention", "p": 99}, "atention"],
        assistants=["q9"],
    )
    assert set(found) == {
        "/teacher/1/checkpoint",
        "/student/1/architecture",
        "/student/2",
        "/method/1/p",
        "/method/2",
        "/assistants/0",
    }


def test_read_refuses_nan_and_out_of_range_numbers():
    assert set(faults(alpha=float("nan"))) == {"/alpha"}
    assert set(faults(temperature=0)) == {"/temperature"}


def test_read_names_the_metrics_of_an_alert():
    _, _, (fault,) = read({**SOUND, "scheduling": {"alerts": [{"metric": "accuracy", "below": 0.5}]}})
    assert (fault.pointer, fault.code) == ("/scheduling/alerts/0/metric", "not_allowed")
    assert "validation/accuracy" in fault.allowed


def test_parse_returns_a_frozen_spec_or_raises_all_faults():
    spec = parse({**SOUND, "method": "supervised", "teacher": None})
    assert isinstance(spec.method, Supervised)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"
    with pytest.raises(SpecFaults) as caught:
        parse({**SOUND, "alpha": -1, "beta": -1})
    assert [fault.pointer for fault in caught.value.faults] == ["/alpha", "/beta"]


def test_job_spec_schema_has_descriptions_and_bounds():
    schema = JobSpec.model_json_schema()
    assert "T²" in schema["description"]
    words = [*schema["$defs"].items(), ("JobSpec", schema)]
    fields = [(word, name, field) for word, of in words for name, field in of["properties"].items()]
    assert [(word, name) for word, name, field in fields if "description" not in field and not said(field)] == []
    assert [(word, name) for word, name, field in fields if not bounded(field)] == []


def said(field: dict) -> bool:
    """What has one value only, or stands for a side of a pair, needs no words."""
    return "const" in field or field.get("title") in ("Student", "Teacher")


def bounded(field: dict) -> bool:
    numbers = [part for part in (field, *field.get("anyOf", [])) if part.get("type") in ("number", "integer")]
    low, high, known = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}, {"enum"}
    return all((low & set(part) and high & set(part)) or known & set(part) for part in numbers)


@pytest.mark.parametrize(
    ("field", "given", "missing"),
    [("scale", [0.5], [1]), ("ratio", [], [0, 1]), ("scale", [], [0, 1])],
)
def test_read_points_to_what_a_pair_of_numbers_lacks(field: str, given: list[float], missing: list[int]):
    crop = {"name": "random_resized_crop", field: given}
    faults = read({**SOUND, "training": {"augmentation": crop}})[2]
    assert [fault.pointer for fault in faults] == [f"/training/augmentation/{field}/{place}" for place in missing]
    assert {fault.code for fault in faults} == {"missing"}


def test_job_spec_schema_shows_plain_names_and_lists():
    """What a client's own validator refuses because of our schema, it can never send."""
    schema = JobSpec.model_json_schema()
    one, several = schema["properties"]["method"]["oneOf"]
    assert several["type"] == "array" and several["items"] == one
    plain, objects = one["anyOf"]
    assert plain["enum"] == list(METHODS)
    assert set(objects["discriminator"]["mapping"]) == set(METHODS)
    assert all(schema["$defs"][ref.rpartition("/")[2]]["required"] == ["name"] for ref in refs(objects["oneOf"]))
    plain = schema["properties"]["dataset"]["anyOf"][0]
    assert (plain["type"], plain["minLength"], plain["maxLength"]) == ("string", 1, 300)
    assert schema["$defs"]["Crd"]["properties"]["tap"]["anyOf"][0]["type"] == "string"


def refs(parts: list[dict]) -> list[str]:
    return [part["$ref"] for part in parts]


def test_as_typed_points_to_the_plain_name():
    """A plain name is one value; inside a real object, or at a field that is missing, the pointer stays."""
    body = {"student": "resnet8", "teacher": {"checkpoint": "x"}, "training": {"schedule": "cosine"}}
    pointers = [
        "/student/architecture",
        "/teacher/architecture",
        "/teacher/checkpoint",
        "/training/schedule/warmup_epochs",
    ]
    pointed = as_typed([Fault(pointer, "", "") for pointer in [*pointers, "/method/name", ""]], body)
    assert [fault.pointer for fault in pointed] == [
        "/student", "/teacher/architecture", "/teacher/checkpoint", "/training/schedule", "/method/name", "",
    ]  # fmt: skip


MANY = 20_000


@pytest.mark.parametrize(
    ("changes", "described", "more"),
    [
        ({f"k{number}": 0 for number in range(MANY)}, 50, MANY - 50),
        ({"training": {f"k{number}": 0 for number in range(MANY)}}, 50, MANY - 50),
        ({"student": {"architecture": "resnet8", "freeze": [""] * 1000}}, 50, 950),
        ({"method": ["nope"] * MANY}, 1, 0),
        ({"teacher": [{"a": 1}] * MANY}, 1, 0),
        ({"student": [f"nope{number}" for number in range(MANY)]}, 1, 0),
        ({"assistants": ["nope"] * MANY}, 1, 0),
        ({"dataset": {"source": "digits", "class_names": [0] * MANY}}, 1, 0),
        ({"teacher": {"checkpoint": "model:x", "class_map": {str(n): [-1] for n in range(MANY)}}}, 1, 0),
        ({"training": {"schedule": {"name": "multistep", "milestones": ["x"] * MANY}}}, 1, 0),
        ({"method": {"name": "fitnet", "taps": [{"x": 1}] * MANY}}, 1, 0),
        ({"method": {"name": "ofd", "margins": [""] * MANY}}, 1, 0),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_read_describes_the_first_faults_and_counts_the_others(changes: dict, described: int, more: int):
    """Of a long list, no entry is looked at: its length is the fault."""
    spec, _, found = read({**SOUND, **changes})
    assert spec is None
    last = found[-1].message if more else ""
    assert len(found) - bool(more) >= described <= 50
    assert last == (f"and {more} more faults; the first 50 are described" if more else "")


def test_read_work_grows_no_faster_than_the_body(monkeypatch: pytest.MonkeyPatch):
    """The suggestions compare names with each other: of many faults, the first are described at all."""
    compared = []
    monkeypatch.setattr(reading.difflib, "get_close_matches", lambda name, *_, **__: compared.append(name) or [])
    read({**SOUND, **{f"k{number}": 0 for number in range(MANY)}})
    assert len(compared) == 50
    read({**SOUND, "x" * 100_000: 0})
    assert len(compared) == 50, "no field has a name of that length"


def test_read_repeats_little_of_a_long_value():
    long = "x" * 100_000
    for change in ({long: 1}, {"method": long}, {"name": long}, {"training": {"epochs": [0] * 100_000}}):
        _, _, found = read({**SOUND, **change})
        assert all(len(str(fault.as_dict())) < 5_000 for fault in found)


def test_read_accepts_an_object_of_many_known_fields():
    """A map of classes is no object with fields."""
    names = [str(number) for number in range(5_000)]
    assert faults(dataset={"source": "x", "class_names": names}) == {}
    body = {"architecture": "resnet56", "checkpoint": "model:big", "class_map": {name: int(name) for name in names}}
    assert faults(teacher=body) == {}


@pytest.mark.parametrize(
    ("pointer", "change"),
    [
        ("/labels", {"labels": {f"k{number}": "\n" for number in range(MANY)}}),
        ("/scheduling/alerts", {"scheduling": {"alerts": [{}] * MANY}}),
        (
            "/teacher/class_map",
            {"teacher": {"checkpoint": "model:big", "class_map": {f"k{number}\n": 0 for number in range(MANY)}}},
        ),
        (
            "/teacher/class_map",
            {"teacher": {"checkpoint": "model:big", "class_map": {"a": ["\n"] * MANY, "b": 0}}},
        ),
    ],
)
def test_read_makes_one_fault_of_very_many_wrong_entries(pointer, change):
    """Each would cost time before the answer keeps fifty of them."""
    assert list(faults(**change)) == [pointer]
