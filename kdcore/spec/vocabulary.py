"""The base class of every object in a job spec, and the type of a place in a network."""

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _require_name(schema: dict[str, Any]) -> None:
    """Make `name` required in the schema of a class that is chosen by its name, although the class has a default."""
    name = schema.get("properties", {}).get("name", {})
    if "const" in name:
        name.pop("default", None)
        schema["required"] = ["name", *schema.get("required", [])]


class Vocabulary(BaseModel):
    """An object of a job spec: frozen, with finite numbers only. An unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_require_name)


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

Taps = Annotated[tuple[Tap, ...], Field(min_length=1, max_length=16)]
