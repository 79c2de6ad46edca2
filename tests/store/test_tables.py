from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from store.database import Database
from store.tables import jobs, metadata
from tests.store.helpers import submitted


@pytest.mark.parametrize(
    "values",
    [
        {"status": "stuck"},
        {"status": "running"},
        {"lease_until": 1.0},
        {"requested": "cancel"},
        {"status": "running", "lease_until": 1.0, "requested": "hurry"},
    ],
    ids=" ".join,
)
def test_jobs_table_refuses_a_contradictory_row(database: Database, values: dict[str, Any]):
    submitted(database)
    with pytest.raises(IntegrityError), database.begin() as connection:
        connection.execute(update(jobs).values(**values))


def test_every_constraint_has_a_name_for_migrations():
    assert all(constraint.name for table in metadata.tables.values() for constraint in table.constraints)
