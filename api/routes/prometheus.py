"""Numbers for Prometheus, counted from the rows when asked: there is nothing to keep in step."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import PlainTextResponse

from api.auth import Who
from api.database import Db, Setup
from api.problems import Unauthorized, Unavailable, responses
from store import jobs, workers

router = APIRouter(tags=["service"])


@router.get("/metrics", response_class=PlainTextResponse, responses=responses(Unauthorized, Unavailable))
async def prometheus(who: Who, db: Db, setup: Setup) -> PlainTextResponse:
    """Jobs by status and workers that take them, in Prometheus' text form."""
    lines = await db.read(_count, setup.lease_s)
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")


def _count(connection: Connection, lease_s: float) -> list[str]:
    by_status = jobs.count_by_status(connection)
    return [
        *_gauge(
            "distillery_jobs", "Jobs by status.", {f'{{status="{name}"}}': n for name, n in sorted(by_status.items())}
        ),
        *_gauge(
            "distillery_workers",
            "Workers that prove that they take jobs.",
            {"": len(workers.list_consuming(connection, lease_s))},
        ),
    ]


def _gauge(name: str, meaning: str, values: dict[str, Any]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} gauge"
    for labels, value in values.items():
        yield f"{name}{labels} {value}"
