from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from store.database import Database
from store.tables import jobs, metadata
from tests.store.scene import submitted


@pytest.mark.parametrize(
    "nonsense",
    [
        {"status": "stuck"},
        {"status": "running"},
        {"lease_until": 1.0},
        {"requested": "cancel"},
        {"status": "running", "lease_until": 1.0, "requested": "hurry"},
    ],
    ids=" ".join,
)
def test_the_database_itself_refuses_a_row_that_makes_no_sense(database: Database, nonsense: dict[str, Any]):
    submitted(database)
    with pytest.raises(IntegrityError), database.begin() as connection:
        connection.execute(update(jobs).values(**nonsense))


def test_every_constraint_has_a_name_so_that_a_migration_can_reach_it():
    assert all(constraint.name for table in metadata.tables.values() for constraint in table.constraints)
