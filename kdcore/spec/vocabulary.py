"""The base classes of every object in a job spec or another body, and the type of a place in a network."""

from itertools import islice
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from base.text import STORED, Text

UNKNOWN_FIELDS = 60
"""The unknown fields of an object that are looked at. They make a fault each, and a body may hold thousands."""


def _require_name(schema: dict[str, Any]) -> None:
    """Make `name` required in the schema of a class that is chosen by its name, although the class has a default."""
    name = schema.get("properties", {}).get("name", {})
    if "const" in name:
        name.pop("default", None)
        schema["required"] = ["name", *schema.get("required", [])]


def _number(given: Any, info: core_schema.ValidationInfo) -> Any:
    return _of_type(given, info, isinstance(given, int | float) and not isinstance(given, bool), "float_type")


def _whole_number(given: Any, info: core_schema.ValidationInfo) -> Any:
    """The number 3.0 is a whole one, as in JSON schemas; pydantic refuses 3.5."""
    return _of_type(given, info, isinstance(given, int | float) and not isinstance(given, bool), "int_type")


def _true_or_false(given: Any, info: core_schema.ValidationInfo) -> Any:
    return _of_type(given, info, isinstance(given, bool), "bool_type")


def _of_type(given: Any, info: core_schema.ValidationInfo, fits: bool, fault: Any) -> Any:
    if fits or info.context is STORED:  # An earlier version has accepted it.
        return given
    raise PydanticKnownError(fault)


_CHECKS = {"int": _whole_number, "float": _number, "bool": _true_or_false}


def _with_json_types(model: type[BaseModel], schema: Any) -> None:
    """Put a check of the JSON type in front of each number and boolean of a model, in its core schema, in place.
    Models in it have their own."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list | tuple):
            parts += part
        if not isinstance(part, dict) or (part.get("type") == "model" and part["cls"] is not model):
            continue
        check = _CHECKS.get(str(part.get("type")))
        if check is not None:
            checked = core_schema.with_info_before_validator_function(check, part.copy())
            part.clear()
            part.update(checked)
        elif part.get("type") != "function-before" or part["function"]["function"] not in _CHECKS.values():
            parts += [inner for name, inner in part.items() if name not in ("metadata", "serialization", "function")]


class JsonObject(BaseModel):
    """An object of a body. An unknown field is an error, and so is a value of another JSON type than the field's:
    pydantic would take true for the number 1, and "no" for false."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _with_json_types(cls, handler.resolve_ref_schema(schema))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _first_unknown_fields(cls, given: Any) -> Any:
        return few_unknown(cls, given)


class Vocabulary(JsonObject):
    """An object of a job spec: frozen, with finite numbers only."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, json_schema_extra=_require_name)


def few_unknown(model: type[BaseModel], given: Any) -> Any:
    """Return an object without most of its unknown fields, if it has very many: those left are refused all the same."""
    if not isinstance(given, dict) or len(given) <= UNKNOWN_FIELDS:
        return given
    known = {name for field, info in model.model_fields.items() for name in (field, info.alias)}
    unknown = islice((name for name in given if name not in known), UNKNOWN_FIELDS)
    return {name: given[name] for name in (*(name for name in known if name in given), *unknown)}


def at_most(number: int) -> BeforeValidator:
    """Return a validator that refuses a longer list or object before its entries are looked at, each of which may be a
    fault."""

    def check(given: Any) -> Any:
        if isinstance(given, list | tuple | dict) and len(given) > number:
            kind = "Dictionary" if isinstance(given, dict) else "Tuple"
            context = {"field_type": kind, "max_length": number, "actual_length": len(given)}
            raise PydanticKnownError("too_long", context)
        return given

    return BeforeValidator(check)


def named(field: str, of: Any, names: tuple[str, ...] = ()) -> BeforeValidator:
    """Return a validator that reads a plain string as an object with only this field; the schema shows both."""
    if field == "name":
        names = names or tuple(one.model_fields["name"].default for one in get_args(of))
    plain: Any = Literal[names] if names else of.model_fields[field].rebuild_annotation()
    discriminated = Annotated[of, Field(discriminator="name")] if field == "name" else of
    return BeforeValidator(
        lambda given: {field: given} if isinstance(given, str) else given,
        json_schema_input_type=Union[plain, discriminated],  # noqa: UP007  # | does not take types that are variables
    )


class Bounds:
    """Annotation of a number or a list: bounds that are newer than stored specs.

    A spec that an earlier version has accepted runs as it did: it is read with the context `STORED`, in which these
    bounds are not checked. Bounds that the first version had are pydantic's own.
    """

    def __init__(self, *, ge: float | None = None, le: float | None = None, max_length: int | None = None) -> None:
        self.ge, self.le, self.max_length = ge, le, max_length

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def check(value: Any, info: core_schema.ValidationInfo) -> Any:
            if info.context is STORED:
                return value
            if self.ge is not None and value < self.ge:
                raise PydanticKnownError("greater_than_equal", {"ge": self.ge})
            if self.le is not None and value > self.le:
                raise PydanticKnownError("less_than_equal", {"le": self.le})
            if self.max_length is not None and len(value) > self.max_length:
                lengths = {"max_length": self.max_length, "actual_length": len(value)}
                raise PydanticKnownError("too_long", {"field_type": "List", **lengths})
            return value

        return core_schema.with_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        described = handler(schema)
        own = {"minimum": self.ge, "maximum": self.le, "maxItems": self.max_length}
        return {**described, **{name: bound for name, bound in own.items() if bound is not None}}


TapPath = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.-]+(@(in|nhwc|tokens))?$")]
Path = Annotated[str, Text(200)]
"""A module's path that may be any name of a checkpoint."""


class Pair(Vocabulary):
    """The places at which student and teacher are compared, as module paths: an output `layer3`, an input `fc@in`."""

    student: TapPath
    teacher: TapPath


def _same_on_both_sides(given: Any) -> Any:
    return {"student": given, "teacher": given} if isinstance(given, str) else given


Tap = Annotated[Pair, BeforeValidator(_same_on_both_sides, json_schema_input_type=TapPath | Pair)]
"""Return a pair of places. A plain path means the same path in both networks."""

Taps = Annotated[tuple[Tap, ...], Field(min_length=1, max_length=16), at_most(16)]
