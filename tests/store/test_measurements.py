"""Measurements are kept by project, kind and key."""

import pytest

from store import measurements
from store.database import Database

KEY = "a" * 64


def test_get_returns_none_before_a_measurement(database: Database) -> None:
    with database.begin() as connection:
        assert measurements.get(connection, "p", "cost", KEY) is None


def test_put_replaces_what_was_measured_before(database: Database) -> None:
    with database.begin() as connection:
        measurements.put(connection, "p", "cost", KEY, {"step_s": 1.5})
        measurements.put(connection, "p", "cost", KEY, {"step_s": 2.0, "stages": [1]})
        assert measurements.get(connection, "p", "cost", KEY) == {"step_s": 2.0, "stages": [1]}


@pytest.mark.parametrize(("project", "kind", "key"), [("q", "cost", KEY), ("p", "evaluation", KEY), ("p", "cost", "b")])
def test_get_does_not_find_another_projects_kinds_or_keys_figures(
    database: Database, project: str, kind: measurements.Kind, key: str
) -> None:
    with database.begin() as connection:
        measurements.put(connection, "p", "cost", KEY, {"step_s": 1.5})
        assert measurements.get(connection, project, kind, key) is None
