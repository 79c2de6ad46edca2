"""Dependencies stay on the event loop."""

import inspect

import pytest

from api import auth, dependencies
from api.routes import jobs

HELD = ("Config", "Db", "Files", "InspectionsDep", "WakeWorkers")


@pytest.mark.parametrize(
    "dependency",
    [
        auth.member,
        auth.admin,
        auth.operator,
        dependencies.references,
        jobs.body,
        *(getattr(dependencies, name).__metadata__[0].dependency for name in HELD),
    ],
)
def test_dependencies_are_coroutines(dependency: object) -> None:
    """A plain function as a dependency is run in a thread: half of a cheap request's time."""
    assert inspect.iscoroutinefunction(dependency)
