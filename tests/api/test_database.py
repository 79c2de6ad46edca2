"""Dependencies stay on the event loop."""

import inspect

import pytest

from api import auth, database, inspections
from api.routes import jobs


@pytest.mark.parametrize(
    "dependency",
    [auth.member, database.database, database.files, database.settings, inspections.inspections_of, jobs.body,
     jobs.shelves, jobs.bell],
    ids=lambda dependency: dependency.__name__,
)  # fmt: skip
def test_no_request_waits_for_a_thread_to_be_told_where_things_are(dependency: object) -> None:
    """A plain function as a dependency is run in a thread: half of a cheap request's time."""
    assert inspect.iscoroutinefunction(dependency)
