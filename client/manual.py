"""A method's page for a terminal: what it matches, what it needs, its weights, and its options with their bounds.

The page is the service's answer (GET /v1/methods/{name}); what a newer or older service leaves out, is left out.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from client.tables import row, table

Schema = dict[str, Any]

FACTS = {
    "matches": "matches",
    "scheme": "scheme",
    "teacher": "teacher",
    "needs": "needs",
    "taps": "taps by default",
    "owns": "trained beside it",
    "cost": "cost of a step",
}
"""Names of the answer's fields, in the page's order and words."""

SHARED = ("name", "weight")
"""What every method has: `--method NAME=WEIGHT`."""

BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
KINDS = {"integer": "whole number", "boolean": "true | false", "string": "text"}


def page(method: dict[str, Any]) -> Iterator[RenderableType]:
    """From top to bottom."""
    title = method.get("title")
    yield Text.assemble((str(method["name"]), "bold"), f"  {title}" if title else "")
    yield Text(str(method.get("paper", "")), style="dim")
    yield Text()
    yield _facts(method)
    options = _options(method.get("options"))
    if options is not None:
        yield options
        yield Text(
            f"set one: --set method.OPTION=VALUE, in a sum --set method.{method['name']}.OPTION=VALUE", style="dim"
        )


def _facts(method: dict[str, Any]) -> Table:
    made = Table.grid(padding=(0, 2))
    for field, name in FACTS.items():
        told = _told(method.get(field))
        if told not in ("", "none", "nothing"):
            row(made, Text(name, style="dim"), told)
    weights = [
        f"{name} {_number(method[name])}" for name in ("alpha", "beta", "temperature") if method.get(name) is not None
    ]
    if weights:
        row(made, Text("defaults", style="dim"), ", ".join(weights))
    if method.get("defaults_from"):
        row(made, Text("defaults from", style="dim"), method["defaults_from"])
    return made


def _told(fact: Any) -> str:
    words = [str(word) for word in fact] if isinstance(fact, list) else [str(fact or "")]
    return ", ".join(words).replace("_", " ")


def _options(schema: Any) -> Table | None:
    """Its own options as a table; None where there are none, or where the service tells of them in another way."""
    fields = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(fields, dict):
        return None
    made = table("option", "values", "default", "what it does", whole=("option",))
    for name, field in fields.items():
        if name not in SHARED:
            row(made, name, values(field, schema.get("$defs", {})), _default(field), field.get("description"))
    return made if made.row_count else None


def _default(field: Schema) -> str:
    default = field.get("default")
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else _number(default) if isinstance(default, float) else str(default)


def _number(number: float) -> str:
    """As one would type it."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def values(field: Schema, known: dict[str, Schema]) -> str:
    """What may be written there: `number, ≥ 1, ≤ 8`, `sum | max`, `list of text, 1 to 16 long`."""
    if "$ref" in field:
        return values(known.get(field["$ref"].rpartition("/")[2], {}), known)
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " | ".join(values(one, known) for one in choices if one.get("type") != "null")
    if "const" in field or "enum" in field:
        return " | ".join(str(one) for one in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        inner = values(field.get("items", {}), known)
        return f"list of {f'({inner})' if ' | ' in inner else inner}{_length(field)}"
    if kind == "object":
        return f"{{{', '.join(field.get('properties', {}))}}}"
    bounds = [f"{sign} {_number(field[name])}" for name, sign in BOUNDS.items() if name in field]
    return ", ".join([KINDS.get(kind, kind), *bounds])


def _length(field: Schema) -> str:
    least, most = field.get("minItems", 0), field.get("maxItems")
    return "" if most is None else f", {least} to {most} long"
