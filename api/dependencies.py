"""Dependencies of routes: the caller, database, files, settings, and services that the application holds.

Every dependency is a coroutine, because FastAPI would run a plain function in another thread, which is slower.
"""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request

from api.audit import Auditor
from api.auth import Authentication, Member, admin, member, operator
from api.feed import Feed
from api.inspections import Inspections
from api.limits import Limiter
from api.polls import Polls
from api.references import References
from api.registrations import Registrations
from base.figures import Exchange
from base.wakeup import MEMORY
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings


def _held(name: str) -> Any:
    """Return a dependency on the object that `create_app` has put into the application's state under this name."""

    async def held(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(held)


async def auditor(request: Request) -> Auditor:
    return Auditor(request.app.state.database, request.scope)


Caller = Annotated[Member, Depends(member)]
Auth = Annotated[Authentication, _held("authentication")]
AdminCaller = Annotated[Member, Depends(admin)]
"""An admin of the project, or the operator."""
OperatorCaller = Annotated[Member, Depends(operator)]
AuditDep = Annotated[Auditor, Depends(auditor)]
Config = Annotated[Settings, _held("settings")]
ExchangeDep = Annotated[Exchange, _held("exchange")]
Db = Annotated[Database, _held("database")]
Files = Annotated[FileStore, _held("files")]


async def own_inspections(request: Request, caller: Caller) -> Inspections:
    """Return the service's inspections, in which this caller takes turns with others."""
    inspections: Inspections = request.app.state.inspections
    return inspections.of(f"{caller.project}/{caller.key_id or ''}")


InspectionsDep = Annotated[Inspections, Depends(own_inspections)]
LimiterDep = Annotated[Limiter, _held("limiter")]
RegistrationsDep = Annotated[Registrations, _held("registrations")]
FeedDep = Annotated[Feed, _held("feed")]
PollsDep = Annotated[Polls, _held("polls")]
WakeWorkers = Annotated[Callable[[], None], _held("wake_workers")]


async def references(
    request: Request, db: Db, inspections: InspectionsDep, caller: Caller, settings: Config
) -> References:
    return References(db, inspections, caller, request.is_disconnected, settings.broker_url.startswith(MEMORY))


ReferencesDep = Annotated[References, Depends(references)]
