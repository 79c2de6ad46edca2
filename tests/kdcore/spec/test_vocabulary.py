"""JSON types, and bounds that are newer than stored specs: they hold for what a client sends, and not for what was
accepted before."""

from typing import Annotated, Any, Self

import pytest
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from base.text import STORED
from kdcore.spec import parse, read
from kdcore.spec.job import JobSpec
from kdcore.spec.vocabulary import Bounds, Vocabulary
from tests.kdcore.spec.specs import SOUND

CROP = {"name": "random_resized_crop"}
ODD: list[tuple[str, dict[str, Any]]] = [
    ("/name", {"name": "a\nb"}),
    ("/name", {"name": "a\0b"}),
    ("/temperature", {"temperature": 1e-300}),
    ("/training/mix/alpha", {"training": {"mix": {"name": "mixup", "alpha": 1e-300}}}),
    ("/training/augmentation/scale/0", {"training": {"augmentation": {**CROP, "scale": [1e-300, 1]}}}),
    ("/training/augmentation/ratio/1", {"training": {"augmentation": {**CROP, "ratio": [1, 1e300]}}}),
    (
        "/training/schedule/milestones",
        {"training": {"epochs": 2000, "schedule": {"name": "multistep", "milestones": [*range(1, 1002)]}}},
    ),
    ("/dataset/class_names", {"dataset": {"source": "mine", "class_names": ["a\0", "b"]}}),
    (
        "/student/preprocessing/std/0",
        {"student": {"architecture": "resnet20", "preprocessing": {"mean": [0.5], "std": [1e-300]}}},
    ),
    ("/baseline", {"baseline": "job:a\x1b"}),
]


@pytest.mark.parametrize(("pointer", "changes"), ODD)
def test_bounds_refuse_a_new_value_and_let_a_stored_one_pass(pointer: str, changes: dict[str, Any]) -> None:
    body = {**SOUND, **changes}
    spec, _, faults = read(body)
    assert spec is None and pointer in [fault.pointer for fault in faults]
    stored = [fault for fault in read(body, STORED)[2] if fault.pointer == pointer]
    assert not stored, "what an earlier version accepted runs as it did"
    JobSpec.model_validate(body, context=STORED)


def test_bounds_of_numbers_and_lists_and_their_schema() -> None:
    number = TypeAdapter(Annotated[float, Bounds(ge=1, le=2)])
    several = TypeAdapter(Annotated[tuple[int, ...], Bounds(max_length=2)])
    assert number.validate_python(1) == 1 and several.validate_python([1, 2]) == (1, 2)
    for adapter, value, kind in ((number, 0.5, "greater_than_equal"), (number, 3, "less_than_equal")):
        with pytest.raises(ValueError, match="Input should be") as error:
            adapter.validate_python(value)
        assert error.value.errors()[0]["type"] == kind  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="at most 2 items"):
        several.validate_python([1, 2, 3])
    assert several.validate_python([1, 2, 3], context=STORED) == (1, 2, 3)
    assert number.json_schema() == {"type": "number", "minimum": 1, "maximum": 2}
    assert several.json_schema() == {"type": "array", "items": {"type": "integer"}, "maxItems": 2}


class Inner(Vocabulary):
    number: float = 0.5


class Outer(Vocabulary):
    whole: Annotated[int, Field(ge=0)] | None = None
    numbers: tuple[float, ...] = ()
    named: dict[str, int] | None = None
    flag: bool = False
    text_or_whole: str | Annotated[int, Field(ge=1)] = ""
    inner: Inner | None = None

    @model_validator(mode="after")
    def _nothing(self) -> Self:
        return self


@pytest.mark.parametrize(
    ("given", "place", "kind"),
    [
        ({"whole": True}, ("whole",), "int_type"),
        ({"whole": "3"}, ("whole",), "int_type"),
        ({"whole": 2.5}, ("whole",), "int_from_float"),
        ({"numbers": [1, False]}, ("numbers", 1), "float_type"),
        ({"numbers": [1, "0.5"]}, ("numbers", 1), "float_type"),
        ({"named": {"a": True}}, ("named", "a"), "int_type"),
        ({"flag": 1}, ("flag",), "bool_type"),
        ({"flag": "yes"}, ("flag",), "bool_type"),
        ({"inner": {"number": True}}, ("inner", "number"), "float_type"),
    ],
)
def test_a_value_of_another_json_type_is_refused_however_deep_it_is(given: Any, place: tuple, kind: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(given)
    assert [(error["loc"], error["type"]) for error in caught.value.errors()] == [(place, kind)]


def test_values_of_their_json_types_are_taken() -> None:
    """A whole number is a number, and 3.0 a whole one, as in JSON schemas; a text that looks like a number is text."""
    given = {"whole": 3.0, "numbers": [1, 0.5], "flag": True, "inner": {"number": 2}, "text_or_whole": "3"}
    read = Outer.model_validate(given)
    assert (read.whole, read.numbers, read.flag, read.inner, read.text_or_whole) == (
        3, (1.0, 0.5), True, Inner(number=2.0), "3"
    )  # fmt: skip
    assert type(read.whole) is int and Outer.model_validate({"whole": None}).whole is None
    assert Outer.model_validate({"whole": "3", "inner": {"number": True}}, context=STORED).whole == 3
    with pytest.raises(ValidationError):
        Outer.model_validate({"text_or_whole": True})


def test_the_schema_of_an_object_does_not_show_these_checks() -> None:
    schema = Outer.model_json_schema()["properties"]
    assert schema["whole"]["anyOf"] == [{"type": "integer", "minimum": 0}, {"type": "null"}]
    assert schema["numbers"]["items"] == {"type": "number"} and schema["flag"]["type"] == "boolean"


def test_parse_takes_a_stored_spec_as_it_is() -> None:
    assert parse({**SOUND, "name": "two\nlines"}, stored=True).name == "two\nlines"
