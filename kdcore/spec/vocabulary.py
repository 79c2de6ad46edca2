"""The base class of every object in a job spec, and the type of a place in a network."""

from itertools import islice
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

UNKNOWN_FIELDS = 60
"""The unknown fields of an object that are looked at. They make a fault each, and a body may hold thousands."""


def _require_name(schema: dict[str, Any]) -> None:
    """Make `name` required in the schema of a class that is chosen by its name, although the class has a default."""
    name = schema.get("properties", {}).get("name", {})
    if "const" in name:
        name.pop("default", None)
        schema["required"] = ["name", *schema.get("required", [])]


class Vocabulary(BaseModel):
    """An object of a job spec: frozen, with finite numbers only. An unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_require_name)

    @model_validator(mode="before")
    @classmethod
    def _first_unknown_fields(cls, given: Any) -> Any:
        return few_unknown(cls, given)


def few_unknown(model: type[BaseModel], given: Any) -> Any:
    """Return an object without most of its unknown fields, if it has very many: those left are refused all the same."""
    if not isinstance(given, dict) or len(given) <= UNKNOWN_FIELDS:
        return given
    known = {name for field, info in model.model_fields.items() for name in (field, info.alias)}
    unknown = islice((name for name in given if name not in known), UNKNOWN_FIELDS)
    return {name: given[name] for name in (*(name for name in known if name in given), *unknown)}


def at_most(number: int) -> BeforeValidator:
    """Return a validator that refuses a longer list before its entries are looked at, each of which may be a fault."""

    def check(given: Any) -> Any:
        if isinstance(given, list | tuple) and len(given) > number:
            context = {"field_type": "Tuple", "max_length": number, "actual_length": len(given)}
            raise PydanticKnownError("too_long", context)
        return given

    return BeforeValidator(check)


def named(field: str, of: Any, names: tuple[str, ...] = ()) -> BeforeValidator:
    """Return a validator that reads a plain string as an object with only this field; the schema shows both."""
    plain: Any = Literal[names] if names else str
    discriminated = Annotated[of, Field(discriminator="name")] if field == "name" else of
    return BeforeValidator(
        lambda given: {field: given} if isinstance(given, str) else given,
        json_schema_input_type=Union[plain, discriminated],  # noqa: UP007  # | does not take types that are variables
    )


TapPath = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.-]+(@(in|nhwc|tokens))?$")]


class Pair(Vocabulary):
    """The places at which student and teacher are compared, as module paths: an output `layer3`, an input `fc@in`."""

    student: TapPath
    teacher: TapPath


def _same_on_both_sides(given: Any) -> Any:
    return {"student": given, "teacher": given} if isinstance(given, str) else given


Tap = Annotated[Pair, BeforeValidator(_same_on_both_sides, json_schema_input_type=TapPath | Pair)]
"""Return a pair of places. A plain path means the same path in both networks."""

Taps = Annotated[tuple[Tap, ...], Field(min_length=1, max_length=16), at_most(16)]
