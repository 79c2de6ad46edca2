"""Text that comes from outside: which characters and lengths are accepted, and how it is shown.

Three kinds of text are refused everywhere, because something behind the service cannot take them:

    NUL                    PostgreSQL stores none
    lone surrogates        no UTF-8 has them: neither a database nor an answer can hold them
    control characters     a terminal runs them; line breaks forge rows in lists and logs, and those that change the
                           direction of writing make a name look like another

`Text` is the annotation of a field or parameter. It is written for pydantic, but imports nothing of it, so that the
client can use `shown` without loading it.
"""

import json
import re
from typing import Any

STORED: dict[str, Any] = {"stored": True}
"""The context of a validation (`model_validate(row, context=STORED)`) of what an earlier version has accepted: bounds
that are newer than the row are not checked."""

_REFUSED = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Control characters, separators of lines, and those that change the direction of writing."""
_UNWANTED = re.compile(f"[{_REFUSED}\ud800-\udfff]")
PATTERN = rf"^[^{_REFUSED}]*$".replace(r"\x", r"\u00")
"""The same as a JSON schema's pattern. No JSON that is valid UTF-8 has surrogates."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""The pattern of names that are parts of addresses and references."""
LIKE_AN_ID = re.compile(r"[a-z]{1,12}_[0-9a-hjkmnp-tv-z]{24}", re.IGNORECASE)
"""The form of all ids: `store.records.new_id`. A name of this form could be another row's id."""


def unwanted(text: str) -> str | None:
    """Return a sentence about the first character that is refused, or None."""
    found = _UNWANTED.search(text)
    if found is None:
        return None
    code = ord(found[0])
    kind = "a lone surrogate" if 0xD800 <= code <= 0xDFFF else "a control character"
    return f"character {found.start()} is {kind}, U+{code:04X}; text of one line belongs here"


def clean(text: str) -> str:
    """Return the text. Raises ValueError if it has a character that is refused."""
    fault = unwanted(text)
    if fault is not None:
        raise ValueError(fault)
    return text


def shown(text: str) -> str:
    """Return text of any source as a terminal, a log or an answer may show it: refused characters as `\\x1b`."""
    return _UNWANTED.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def all_shown(value: Any) -> Any:
    """Return JSON whose texts, also those of keys, are as `shown`: a database can store it, an answer can hold it."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {shown(str(key)): all_shown(part) for key, part in value.items()}
    return [all_shown(part) for part in value] if isinstance(value, list | tuple) else value


def clipped(value: Any, limit: int = 200) -> Any:
    """Return a client's value as an answer can repeat it: as it is if it is short, else as text of at most `limit`
    characters. The result is strict JSON: infinity and NaN become text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and abs(value) < 2**63:  # Neither infinite nor NaN, nor of thousands of digits.
        return value
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 3 * limit else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        text = shown(value[: limit + 1])
    elif isinstance(value, list | tuple | dict):
        text, whole = _beginning(value, limit)
        if whole:
            return _each_clipped(value)
        text = text[:limit] + "…"
    else:
        text = shown(str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _each_clipped(value: Any) -> Any:
    """Return a list or an object of few characters with the parts that JSON or UTF-8 cannot have as text."""
    if isinstance(value, dict):
        return {shown(str(key)): clipped(part) for key, part in value.items()}
    return [clipped(part) for part in value]


def _beginning(value: Any, limit: int) -> tuple[str, bool]:
    """Return the JSON of a list or an object, of a long one no more than its beginning; and whether that is all."""
    text = ""
    encoder = json.JSONEncoder(ensure_ascii=True, default=str, check_circular=False)
    try:
        for piece in encoder.iterencode(value):
            text += piece[: limit + 1]
            if len(text) > limit:
                return text, False
    except (ValueError, RecursionError):  # An integer of thousands of digits, or objects that are too deep.
        return text, False
    return text, True


class Text:
    """Annotation: text of one line, of at least `min_length` and at most `max_length` characters.

    `pattern` is a regular expression that it must match, too. `id_like=False` refuses the form of an id, so that no
    name stands for a row of another id. With the context `STORED` only the type is checked.
    """

    def __init__(
        self, max_length: int, *, min_length: int = 1, pattern: str | None = None, id_like: bool = True
    ) -> None:
        self.min_length, self.max_length, self.pattern, self.id_like = min_length, max_length, pattern, id_like

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticKnownError, core_schema

        def check(text: str, info: Any) -> str:
            if info.context is STORED:
                return text
            if len(text) < self.min_length:
                raise PydanticKnownError("string_too_short", {"min_length": self.min_length})
            if len(text) > self.max_length:
                raise PydanticKnownError("string_too_long", {"max_length": self.max_length})
            if self.pattern is not None and re.search(self.pattern, text) is None:
                raise PydanticKnownError("string_pattern_mismatch", {"pattern": self.pattern})
            if not self.id_like and LIKE_AN_ID.fullmatch(text):
                raise ValueError("this has the form of an id; a name must not, so that it never stands for another row")
            return clean(text)

        return core_schema.with_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        described = handler(schema)
        pattern = self.pattern or described.get("pattern", PATTERN)
        bounds = {"minLength": self.min_length, "maxLength": self.max_length, "pattern": pattern}
        return {**described, **{name: bound for name, bound in bounds.items() if bound != 0}}
