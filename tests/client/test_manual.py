import io
from typing import Any

import pytest
from rich.console import Console

from client import tables
from client.tables import allowed_values

METHOD = {
    "name": "attention",
    "title": "Attention transfer",
    "paper": "Zagoruyko & Komodakis, ICLR 2017",
    "matches": "where the teacher looks",
    "scheme": "offline",
    "teacher": "required",
    "needs": ["maps", "input_gradient"],
    "taps": "none",
    "alpha": 1,
    "beta": 1000.0,
    "temperature": None,
    "defaults_from": "CRD's code",
    "owns": "nothing",
    "cost": "one more forward pass",
    "options": {
        "$defs": {"Pair": {"type": "object", "properties": {"student": {}, "teacher": {}}}},
        "properties": {
            "name": {"const": "attention", "default": "attention"},
            "weight": {"type": "number", "default": None},
            "mapping": {"enum": ["sum", "max"], "default": "sum", "description": "What is made of the [channels]."},
            "p": {"type": "number", "minimum": 1, "maximum": 8.0, "default": 2.0},
            "gradient": {"type": "boolean", "default": False},
            "taps": {"anyOf": [{"items": {"$ref": "#/$defs/Pair"}, "type": "array"}, {"type": "null"}]},
        },
    },
}


def lines(method: dict[str, Any]) -> list[str]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*tables.method_page(method), sep="\n")
    return [" ".join(line.split()) for line in console.export_text().splitlines() if line.strip()]


def test_a_method_reads_from_its_paper_to_its_options():
    assert lines(METHOD) == [
        "attention Attention transfer",
        "Zagoruyko & Komodakis, ICLR 2017",
        "matches where the teacher looks",
        "scheme offline",
        "teacher required",
        "needs maps, input gradient",
        "cost of a step one more forward pass",
        "defaults alpha 1, beta 1000",
        "defaults from CRD's code",
        "option values default what it does",
        "─" * len(lines(METHOD)[10]),
        "mapping sum | max sum What is made of the [channels].",
        "p number, ≥ 1, ≤ 8 2",
        "gradient true | false false",
        "taps list of {student, teacher}",
        "set one: --set method.OPTION=VALUE, in a sum --set method.attention.OPTION=VALUE",
    ]


@pytest.mark.parametrize("options", [None, {}, [], {"properties": {"name": {}, "weight": {}}}])
def test_a_method_without_options_or_with_unknown_ones_ends_with_its_facts(options: Any):
    assert lines({"name": "new", "matches": "x", "options": options}) == ["new", "matches x"]


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 1e6}, "whole number, > 0, ≤ 1000000"),
        ({"type": "number", "minimum": 0.02, "exclusiveMaximum": 1}, "number, ≥ 0.02, < 1"),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 16}, "list of text, 0 to 16 long"),
        (
            {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/unknown"}]}},
            "list of (text | any)",
        ),
        ({"anyOf": [{"type": "integer"}, {"const": "all"}, {"type": "null"}]}, "whole number | all"),
        ({"$ref": "#/$defs/unknown"}, "any"),
    ],
)
def test_what_an_option_may_be(field: dict[str, Any], says: str):
    assert allowed_values(field, {}) == says
