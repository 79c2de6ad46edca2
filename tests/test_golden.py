"""The service says of itself what it actual before: methods, resolved specs, refusals and the OpenAPI document.

A change that is meant: `python -m tests.golden_make`, and review the diff of tests/golden/.
"""

import difflib
from pathlib import Path

import pytest

from tests.golden_make import FOLDER, GOLDEN, made

SHOWN = 200
"""Lines of the diff."""


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file_is_what_the_service_says(name: str, tmp_path: Path) -> None:
    expected, actual = (FOLDER / name).read_text(), made(name, tmp_path)
    if expected != actual:
        pytest.fail(f"{_diff(name, expected, actual)}\nIf this is intended: python -m tests.golden_make", pytrace=False)


def _diff(name: str, expected: str, actual: str) -> str:
    pages = expected.splitlines(), actual.splitlines()
    lines = list(difflib.unified_diff(*pages, f"tests/golden/{name}", "the service", n=6, lineterm=""))
    more = [f"... and {len(lines) - SHOWN} lines more"] if len(lines) > SHOWN else []
    return "\n".join(lines[:SHOWN] + more)
