"""The one clock that leases are measured by: the database's. A worker's own clock may be hours off."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement


class database_now(FunctionElement[float]):
    """Seconds since 1970 as the database tells them, this very moment and not since the transaction began."""

    type = Double()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _postgresql(element: database_now, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "sqlite")
def _sqlite(element: database_now, compiler: Any, **options: Any) -> str:
    # unixepoch('subsec') is NULL, silently, before SQLite 3.42: a lease that never lapses.
    return "((julianday('now') - 2440587.5) * 86400.0)"
