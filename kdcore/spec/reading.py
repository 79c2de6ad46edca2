"""The reading of a client's body. All faults are found at once; each points to the field as the client wrote it."""

import difflib
import json
import types
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from base.errors import Fault, SpecFaults
from base.text import STORED, clipped
from kdcore.spec.job import JobSpec
from kdcore.spec.recipe import Training
from kdcore.spec.rules import Fields, rules
from kdcore.spec.vocabulary import UNKNOWN_FIELDS

OTHER_WORDS = {
    **dict.fromkeys(("pretrained", "weights", "init", "load_from", "resume"), "checkpoint"),
    **dict.fromkeys(("frozen", "freeze_layers", "frozen_stages"), "freeze"),
    **dict.fromkeys(("backbone_lr", "lr_mult", "head_lr_mult"), "head_lr"),
    **dict.fromkeys(("classes", "labels", "names", "id2label"), "class_names"),
    **dict.fromkeys(("model", "arch", "network"), "architecture"),
    **dict.fromkeys(("tags", "metadata"), "labels"),
    **dict.fromkeys(("normalize", "normalization", "transform"), "preprocessing"),
}
"""Words of other tools for fields that are named here."""
_KINDS = {
    "model_type": "an object",
    "dict_type": "an object",
    "model_attributes_type": "an object with a 'name', or a plain name,",
    "tuple_type": "a list",
    "string_type": "a string",
}
TYPES = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"}
_BOUNDS = {
    "gt": "> {:g}",
    "ge": "≥ {:g}",
    "lt": "< {:g}",
    "le": "≤ {:g}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


LONGEST_COMPARED = 200
MAX_FAULTS = 50
"""The faults that are described; of more, only the number is given."""


def more_faults(number: int, least: str = "") -> Fault:
    return Fault("", f"and {least}{number} more faults; the first {MAX_FAULTS} are described", "more_faults")


def parse(body: Any, *, stored: bool = False) -> JobSpec:
    """Return the spec. Raises SpecFaults with every fault. `stored`: an earlier version may have accepted it."""
    spec, _, faults = read(body, STORED if stored else None)
    if spec is None:
        raise SpecFaults(faults)
    return spec


def read(body: Any, context: Any = None) -> tuple[JobSpec | None, Fields, list[Fault]]:
    """Return the spec (None if there is a fault), the fields that are valid by themselves, and every fault."""
    if not isinstance(body, dict):
        return None, {}, [Fault("", "a job spec is a JSON object", "type", "object", type(body).__name__)]
    details: list[ErrorDetails] = []
    try:
        spec: JobSpec | None = JobSpec.model_validate(body, context=context)
        faults: list[Fault] = []
    except ValidationError as error:
        spec = None
        details = error.errors(include_url=False)
        faults = _once(_fault(detail, body) for detail in details[:MAX_FAULTS] if not _follows(detail))
        if len(details) > MAX_FAULTS:
            return None, {}, [*faults, more_faults(len(details) + _left_out(details, body) - MAX_FAULTS)]
    partial = _readable(body, context, {str(detail["loc"][0]) for detail in details})
    faults += as_typed(rules(partial), body)
    return (None if faults else spec), partial, faults


def as_typed(faults: Iterable[Fault], body: Any) -> list[Fault]:
    """Point faults to what the client wrote: to the plain name if it is short for an object."""
    return _once(replace(fault, pointer=_typed(fault.pointer, body)) for fault in faults)


def _typed(pointer: str, body: Any) -> str:
    path = ""
    for step in pointer.split("/")[1:]:
        if not isinstance(body, dict | list):
            break
        path += f"/{step}"
        body = body.get(step) if isinstance(body, dict) else _item(body, step)
        if body is None:
            return pointer
    return path


def _item(body: list[Any], step: str) -> Any:
    return body[int(step)] if step.isdigit() and int(step) < len(body) else None


def _follows(detail: ErrorDetails) -> bool:
    """Return True for a fault that follows from another: for pydantic, a list with bad items is too short as well."""
    return detail["type"] == "too_short" and len(detail["input"]) > detail["ctx"]["actual_length"]


def _left_out(details: list[ErrorDetails], body: dict[str, Any]) -> int:
    """Return the number of unknown fields that `few_unknown` has left out."""
    count = 0
    for detail in {detail["loc"][:-1]: detail for detail in details if detail["type"] == "extra_forbidden"}.values():
        path, model, _ = _locate(detail, body)
        parent: Any = body
        for step in path[:-1]:
            parent = parent[step]
        known = model.model_fields if model else ()
        count += max(0, sum(name not in known for name in parent) - UNKNOWN_FIELDS)
    return count


def _once(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults without repetitions: one plain value can set two fields with the same fault."""
    return list({(fault.pointer, fault.code, fault.message): fault for fault in faults}.values())


def _readable(body: dict[str, Any], context: Any, faulty: Container[str]) -> Fields:
    fields = {}
    for name, field in JobSpec.model_fields.items():
        if name not in body:
            if not field.is_required():
                fields[name] = field.get_default()
            continue
        if name in faulty:
            continue
        try:
            fields[name] = _adapter(name).validate_python(body[name], context=context)
        except ValidationError:
            continue
    return fields


@cache
def _adapter(field: str) -> TypeAdapter[Any]:
    """Return the validator of a field, cached because building it takes longer than reading a spec."""
    return TypeAdapter(JobSpec.model_fields[field].rebuild_annotation())


def _fault(detail: ErrorDetails, body: dict[str, Any]) -> Fault:
    path, model, here = _locate(detail, body)
    kind, context = detail["type"], detail.get("ctx", {})
    given = None if kind == "missing" else clipped(detail["input"])
    if kind == "missing":
        return Fault(_pointer(path), "this field is required", "missing")
    if kind == "extra_forbidden":
        allowed = sorted(model.model_fields) if model else None
        message = _unknown(str(path[-1]), allowed or [], top=len(path) == 1)
        return Fault(_pointer(path), message, "unknown_field", allowed, given)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_variant(path, context, here)
    if kind == "literal_error":
        allowed = [choice.strip(" '") for choice in context["expected"].replace(" or ", ",").split(",")]
        return Fault(_pointer(path), "must be one of " + ", ".join(allowed), "not_allowed", allowed, given)
    if kind == "value_error":
        error = context["error"]
        return Fault(_pointer(path), str(error), "not_allowed", getattr(error, "nearest", None) or None, given)
    return _out_of_bounds(_pointer(path), detail, given)


def _out_of_bounds(pointer: str, detail: ErrorDetails, given: Any) -> Fault:
    """Return the fault of a value of another type, or outside its bounds."""
    kind, context = detail["type"], detail.get("ctx", {})
    bound = next((text.format(context[key]) for key, text in _BOUNDS.items() if key in context), None)
    message, code = f"{detail['msg']}, got {given!r}", kind
    if kind in ("too_short", "too_long"):
        given = len(detail["input"])
        what = "object" if isinstance(detail["input"], dict) else "list"
        message = f"the {what} holds {given}, which is {kind.replace('_', ' ')}"
    elif pointer == "/baseline" and kind == "string_pattern_mismatch":
        message = f"'none', 'train', 'train_anew' or 'job:<id>' belongs here, got {given!r}"
    elif kind.endswith(("_type", "_parsing")):
        code = "type"
        if kind in _KINDS:
            message = f"{_KINDS[kind]} belongs here, got {given!r}"
        elif kind in TYPES:
            message, bound = wrong_type(kind, given), bound or TYPES[kind]
    return Fault(pointer, message, code, bound, given)


def wrong_type(kind: str, given: Any) -> str:
    """Return the message of a number, or of true or false, that has another type; `kind` is pydantic's."""
    message = f"{TYPES[kind]} belongs here, got {json.dumps(given, ensure_ascii=False)}"
    with suppress(ValueError):
        meant = json.loads(given) if isinstance(given, str) else None
        if isinstance(meant, {"int_type": int, "float_type": int | float, "bool_type": bool}[kind]):
            message += ", which is text: write it without quotes"
    return message


def _unknown_variant(path: list[str | int], context: Mapping[str, Any], given: Any) -> Fault:
    name = str(context.get("discriminator", "'name'")).strip("'")
    if isinstance(given, dict) and name in given:
        path = [*path, name]
    allowed = [choice.strip(" '") for choice in str(context.get("expected_tags", "")).split(",") if choice]
    tag = clipped(context.get("tag"))
    message = f"no such {name}: {tag!r}" if tag is not None else f"an object with a {name!r}, or a plain {name}"
    return Fault(_pointer(path), message + nearest(str(tag), allowed), "not_allowed", allowed or None, tag)


def _locate(detail: ErrorDetails, body: Any) -> tuple[list[str | int], type[BaseModel] | None, Any]:
    """Return the path as the client wrote it, without pydantic's tags of unions; the model of the last step; the value
    there."""
    path: list[str | int] = []
    here: Any = body
    annotation: Any = JobSpec
    last = len(detail["loc"]) - 1
    for position, step in enumerate(detail["loc"]):
        model = _model(annotation)
        in_list = isinstance(here, list) and isinstance(step, int) and step < len(here)
        is_field = in_list or (isinstance(here, dict) and step in here)
        if is_field or (position == last and detail["type"] == "missing"):
            path.append(step)
            here = here[step] if is_field else None
            if position < last:
                annotation = _annotation(annotation, model, step)
        else:
            annotation = next((m for m in _models(annotation) if _tag(m) == step), annotation)
    return path, _model(annotation), here


def _annotation(annotation: Any, model: type[BaseModel] | None, step: str | int) -> Any:
    """Return the type at a step: of a field of the model, or of an item of the list."""
    if isinstance(step, int):
        return _item_type(annotation)
    return model.model_fields[step].annotation if model is not None and step in model.model_fields else None


def _item_type(annotation: Any) -> Any:
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    return next(filter(None, map(_item_type, get_args(annotation))), None)


def _model(annotation: Any) -> type[BaseModel] | None:
    return next(_models(annotation), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _models(part)


def _tag(model: type[BaseModel]) -> str | None:
    name = model.model_fields.get("name")
    return get_args(name.annotation)[0] if name and get_origin(name.annotation) is Literal else None


def _pointer(path: list[str | int]) -> str:
    """Return the RFC 6901 pointer. A step that is far longer than any name of a field is cut."""
    return "".join("/" + clipped(str(step)).replace("~", "~0").replace("/", "~1") for step in path)


def _unknown(name: str, allowed: list[str], *, top: bool) -> str:
    in_training = top and name in Training.model_fields
    meant = f"; did you mean 'training.{name}'?" if in_training else nearest(name, allowed)
    return f"there is no field {clipped(name)!r} here" + meant


def nearest(name: str, allowed: list[str]) -> str:
    """Return `; did you mean '…'?` if an allowed name is like this one, else nothing."""
    if (meant := OTHER_WORDS.get(name)) in allowed:
        return f"; did you mean {meant!r}?"
    # Comparing takes longer for longer names, and no name here is as long as that.
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5) if len(name) <= LONGEST_COMPARED else ()
    return f"; did you mean {near[0]!r}?" if near else ""
