"""constraints.txt must install anywhere: no place of this machine in it, and a version for whatever we ask for."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = (ROOT / "constraints.txt").read_text().splitlines()


def direct_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [entry for extra in project["optional-dependencies"].values() for entry in extra]
    names = {plain(entry) for entry in [*project["dependencies"], *extras]}
    return names - {project["name"]}


def plain(requirement: str) -> str:
    """`Celery[redis]>=5.7` is `celery`, as the index spells it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_every_line_pins_one_version():
    for pin in PINS:
        assert re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.!]+( ; .+)?", pin), pin


def test_no_local_versions_and_no_addresses():
    for pin in PINS:
        assert "+" not in pin
        assert "://" not in pin
        assert "@" not in pin


def test_every_direct_dependency_is_pinned():
    assert direct_dependencies() - {plain(pin) for pin in PINS} == set()
