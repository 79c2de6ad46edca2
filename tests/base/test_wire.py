"""The types of the answers, beside the page that describes the report, and a real one."""

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest
from typing_extensions import is_typeddict

from base import wire
from kdcore.exports import FileRow
from kdcore.run import run
from tests import report_page
from tests.kdcore.engine import distilled, workspace, write_arrays, write_teacher


def test_report_page_has_every_field():
    text = report_page.PAGE.read_text()
    assert text == report_page.page(text), "python -m tests.report_page"
    for name in report_page.reached("Report", report_page.types()):
        assert f"## {report_page.TITLES.get(name, name)}\n" in text


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    data, teacher = write_arrays(folder / "data.npz"), write_teacher(folder / "teacher.safetensors")
    where, _ = workspace(folder / "out")
    return run(distilled(data, teacher), where)


def unknown(value: Any, of: Any, path: str = "report") -> list[str]:
    """The fields of a value that its type does not have, and those that it lacks."""
    if is_typeddict(of):
        hints = get_type_hints(of)
        lacks = [f"{path} lacks {name}" for name in of.__required_keys__ - value.keys()]
        more = [f"{path}.{name}" for name in value.keys() - hints.keys()]
        inside = (unknown(one, hints[name], f"{path}.{name}") for name, one in value.items() if name in hints)
        return [*lacks, *more, *(fault for faults in inside for fault in faults)]
    kinds = [kind for kind in get_args(of) or () if kind is not type(None)]
    if isinstance(value, list) and kinds:
        listed = next((kind for kind in kinds if getattr(kind, "__origin__", None) is list), of)
        return [fault for one in value for fault in unknown(one, get_args(listed)[0], f"{path}[]")]
    if isinstance(value, dict):
        typed = next((kind for kind in kinds if is_typeddict(kind)), None)
        if typed is not None and getattr(of, "__origin__", None) is dict:
            return [fault for one in value.values() for fault in unknown(one, typed, f"{path}.*")]
        return [] if typed is None else unknown(value, typed, path)
    return []


def test_report_of_a_job_has_the_fields_that_its_type_has(report):
    assert unknown(report, wire.Report) == []
    assert {"version", "proof", "fidelity", "calibration", "confusion", "classes", "files"} <= report.keys()


def test_report_with_a_field_that_its_type_lacks_is_found(report):
    wrong = {**report, "student": {**report["student"], "colour": "red"}}
    wrong["calibration"] = {**report["calibration"], "student": {**report["calibration"]["student"], "t": 1}}
    del wrong["gain"]
    assert sorted(unknown(wrong, wire.Report)) == [
        "report lacks gain", "report.calibration.student.t", "report.student.colour",
    ]  # fmt: skip


def test_file_figures_are_those_of_a_row():
    assert {field.name for field in dataclasses.fields(FileRow)} == wire.FileFigures.__annotations__.keys()
