import json
import math
import re
import subprocess
import sys
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from base.text import LIKE_AN_ID, NAME, PATTERN, STORED, Text, clean, clipped, shown, unwanted
from store.records import new_id

LINE: TypeAdapter[str] = TypeAdapter(Annotated[str, Text(10)])
NAMES: TypeAdapter[str] = TypeAdapter(Annotated[str, Text(100, pattern=NAME, id_like=False)])
REFUSED = ["\0", "\x1b", "\n", "\r", "\t", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\ud800", "\udfff"]


@pytest.mark.parametrize("character", REFUSED)
def test_clean_refuses_what_a_database_or_a_terminal_cannot_take(character: str) -> None:
    assert f"character 2 is a {'lone' if character >= chr(0xD800) else 'control'}" in str(unwanted(f"ab{character}c"))
    with pytest.raises(ValueError, match=f"U\\+{ord(character):04X}"):
        clean(character)
    is_surrogate = character >= "\ud800"
    assert bool(re.fullmatch(PATTERN, character)) is is_surrogate  # no valid JSON has a lone surrogate


@pytest.mark.parametrize("text", ["", "naïve ☃", "中文 名", "👩‍👩‍👧", "שלום", "a b"])
def test_clean_keeps_every_language(text: str) -> None:
    assert clean(text) == text
    assert shown(text) == text
    assert re.search(PATTERN, text)


def test_shown_escapes_what_a_terminal_would_run() -> None:
    assert shown("\x1b]0;x\x07\x1b[2J\nrow\u202e\ud800") == r"\x1b]0;x\x07\x1b[2J\x0arow\u202e\ud800"


def test_text_bounds_length_and_characters() -> None:
    assert LINE.validate_python("0123456789") == "0123456789"
    for given, kind in (
        ("", "string_too_short"),
        ("0123456789x", "string_too_long"),
        ("a\0", "value_error"),
        (5, "string_type"),
    ):
        with pytest.raises(ValidationError) as error:
            LINE.validate_python(given)
        assert error.value.errors()[0]["type"] == kind
    assert LINE.json_schema() == {"type": "string", "minLength": 1, "maxLength": 10, "pattern": PATTERN}


def test_text_lets_stored_values_pass() -> None:
    assert LINE.validate_python("older\nand longer than ten", context=STORED) == "older\nand longer than ten"


def test_text_of_names_refuses_every_id() -> None:
    for prefix in ("job", "up", "mdl", "ds", "col"):
        assert LIKE_AN_ID.fullmatch(new_id(prefix))
        with pytest.raises(ValidationError, match="form of an id"):
            NAMES.validate_python(new_id(prefix))
        with pytest.raises(ValidationError, match="form of an id"):
            NAMES.validate_python(new_id(prefix).upper())
    for name in ("resnet56", "ds_1", "my_data_set_of_twenty_four_x", "a" * 100):
        assert NAMES.validate_python(name) == name
    for name in ("a\n", ".a", "a/b", "a" * 101, "é"):
        with pytest.raises(ValidationError):
            NAMES.validate_python(name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (0.5, 0.5),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ("\ud800\0", r"\ud800\x00"),
        ({"a": [1, "\ud800", (math.inf,)]}, {"a": [1, r"\ud800", ["inf"]]}),
        (b"\xff", "b'\\xff'"),
    ],
)
def test_clipped_is_strict_json_of_the_same_meaning(value: Any, expected: Any) -> None:
    assert clipped(value) == expected
    json.dumps(clipped(value), allow_nan=False).encode()


@pytest.mark.parametrize("value", ["x" * 10**6, ["x" * 10**6], list(range(10**6)), {"k" * 10**6: 1}])
def test_clipped_is_short(value: Any) -> None:
    assert len(clipped(value)) == 200
    assert clipped(value).endswith("…")


def test_clipped_takes_values_that_python_itself_does_not_print() -> None:
    huge = 10**5000
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert clipped(huge) == "an integer of 16610 bits"
    assert clipped([1, huge]) == "[1…"
    assert clipped(deep).startswith("[[[[")


def test_text_module_loads_no_library() -> None:
    """The command line imports it for `shown`."""
    check = "import sys, base.text; assert not {'pydantic', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
