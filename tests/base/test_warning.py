"""The closed list of warnings, the page that describes them, and what `strict` refuses."""

import re
from pathlib import Path

import pytest

from base.warning import (
    CODES,
    KNOWN_AT_SUBMIT,
    NEVER_REFUSED,
    REFUSED_IF_STRICT,
    WarningItem,
    refused_if_strict,
    warning_faults,
)

PAGE = Path(__file__).parents[2] / "docs" / "warnings.md"


def rows() -> list[list[str]]:
    """The cells of the page's table: code, first known, cause, cure."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_warnings_page_has_every_code_in_the_lists_order():
    assert [(code.strip("`"), known) for code, known, *_ in rows()] == list(CODES.items())


def test_warnings_page_has_cause_and_cure_of_every_code():
    for code, _, cause, cure in rows():
        assert re.fullmatch(r"[A-Z].*\.", cause), code
        assert re.fullmatch(r"[A-Z].*\.", cure), code


def test_warnings_page_links_to_places_that_exist():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        name, _, heading = target.partition("#")
        text = (PAGE.parent / name).read_text()
        headings = [
            re.sub(r"[^a-z -]", "", line[3:].lower()).replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("## ")
        ]
        assert not heading or heading in headings, target


def test_every_code_is_emitted_somewhere():
    root = PAGE.parents[1]
    sources = [path for room in ("api", "kdcore", "store", "worker") for path in (root / room).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_warning_item_refuses_a_code_that_is_not_on_the_list():
    with pytest.raises(ValueError, match="'unheard_of' is not in the closed list of codes"):
        WarningItem("unheard_of", "", "m")


def test_warning_item_as_dict():
    item = WarningItem("budget_short", "/training/epochs", "too few", "train longer")
    assert item.as_dict() == {
        "code": "budget_short",
        "pointer": "/training/epochs",
        "message": "too few",
        "hint": "train longer",
    }
    assert WarningItem("engine_ended", "", "killed").as_dict()["hint"] is None


@pytest.mark.parametrize("code", CODES)
def test_refused_if_strict_takes_what_is_known_before_the_training(code: str):
    item = WarningItem(code, "", "m")
    refused = CODES[code] not in ("training", "result") and code not in NEVER_REFUSED
    assert refused_if_strict([item]) == ([item] if refused else [])


def test_what_is_known_at_submit_is_also_refused():
    assert set(KNOWN_AT_SUBMIT) < set(REFUSED_IF_STRICT)


def test_warning_faults_say_what_would_work():
    (fault,) = warning_faults([WarningItem("test_split_carved", "/dataset", "no test split", "add a folder test")])
    assert fault.as_dict() == {
        "pointer": "/dataset",
        "message": "test_split_carved: no test split; add a folder test",
        "code": "warning_refused",
    }
