"""The service's answers are those of the golden files: methods, resolved specs, refusals and the OpenAPI document.

Additions are allowed (a method, a field, a route), so that adding one touches no golden file. A change or a removal
must be intended: `python -m tests.golden_make` rewrites the files, and the diff of tests/golden/ is reviewed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden_make import FOLDER, GOLDEN, made

SHOWN = 40
"""Differences that a failure lists."""


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file_is_contained_in_the_answers_of_the_service(name: str, tmp_path: Path) -> None:
    differences = list(changes(json.loads((FOLDER / name).read_text()), json.loads(made(name, tmp_path))))
    if differences:
        shown = "\n".join(differences[:SHOWN])
        pytest.fail(
            f"{len(differences)} changes of {name}:\n{shown}\nintended? python -m tests.golden_make", pytrace=False
        )


def changes(golden: Any, now: Any, pointer: str = "") -> Iterator[str]:
    """What is changed or removed, with its JSON pointer; nothing for what is only added."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key, value in golden.items():
            if key in now:
                yield from changes(value, now[key], f"{pointer}/{key}")
            else:
                yield f"{pointer}/{key} is removed"
    elif isinstance(golden, list) and isinstance(now, list):
        # Lists of faults and of schemas have no keys; an entry may be added anywhere, in the same order.
        rest = iter(enumerate(now))
        for at, value in enumerate(golden):
            if all(any(changes(value, other)) for _, other in rest):
                yield f"{pointer}/{at} is changed or removed: {json.dumps(value)[:300]}"
                return
    elif golden != now:
        yield f"{pointer} was {json.dumps(golden)[:300]}, is {json.dumps(now)[:300]}"


@pytest.mark.parametrize(
    ("golden", "now", "changed"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, []),
        ({"a": 1}, {"a": 2}, ["/a was 1, is 2"]),
        ({"a": 1}, {}, ["/a is removed"]),
        (["kd", "sp"], ["dkd", "kd", "nst", "sp"], []),
        (["kd", "sp"], ["sp", "kd"], ['/1 is changed or removed: "sp"']),
        ([{"code": "x"}], [{"code": "y"}], ['/0 is changed or removed: {"code": "x"}']),
    ],
)
def test_changes_lists_what_is_changed_or_removed(golden: Any, now: Any, changed: list[str]) -> None:
    assert list(changes(golden, now)) == changed
