"""Dependencies of routes: the caller, database, files, settings, and services that the application holds.

Every dependency is a coroutine, because FastAPI would run a plain function in another thread, which is slower.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from pydantic import BaseModel

from api.audit import Auditor
from api.auth import Authentication, Member, admin, member, operator
from api.feed import Feed
from api.inspections import Inspections
from api.limits import Limiter
from api.polls import Polls
from api.problems import Invalid, summary
from api.references import References
from api.registrations import Registrations
from base.errors import Fault
from base.figures import Exchange
from base.wakeup import MEMORY
from kdcore.spec.reading import MAX_FAULTS, more_faults, nearest
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


async def known_parameters(request: Request, caller: Caller) -> None:
    """Raise Invalid for query parameters that the route does not have: a misspelt filter would list everything.

    It depends on the caller so that a request without a key is answered like any other.
    """
    names = list(_query_names(request.scope["route"].dependant)) if request.scope["query_string"] else []
    faults = []
    for sent, value in request.query_params.items():
        if sent not in names:
            message = f"there is no parameter {sent[:200]!r} here{nearest(sent, names)}"
            faults.append(Fault(f"?{sent}", message, "extra_forbidden", sorted(names), value))
    if faults:
        shown = faults[:MAX_FAULTS]
        more = [more_faults(len(faults) - MAX_FAULTS)] if len(faults) > MAX_FAULTS else []
        raise Invalid(summary(faults), [*shown, *more])


def _query_names(dependant: Dependant) -> Iterator[str]:
    """Yield the names of all query parameters of a route: fields of models, and those of dependencies, included."""
    for field in dependant.query_params:
        model = field.field_info.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield from model.model_fields
        else:
            yield field.alias
    for dependency in dependant.dependencies:
        yield from _query_names(dependency)


async def references(
    request: Request, db: Db, inspections: InspectionsDep, caller: Caller, settings: Config
) -> References:
    return References(db, inspections, caller, request.is_disconnected, settings.broker_url.startswith(MEMORY))


ReferencesDep = Annotated[References, Depends(references)]
