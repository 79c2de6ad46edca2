"""The application: routes, shared objects (database, files, inspections), the sweep, and the OpenAPI document."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI
from starlette.routing import BaseRoute

from api import problems, tracing
from api.audit import AuditLog
from api.auth import Authentication
from api.dependencies import known_parameters
from api.feed import Feed
from api.http_server import Connection
from api.inspections import FOREIGN_AFTER_S, Inspections, Inspector
from api.limits import Limiter
from api.middleware import Middleware
from api.observing import Observing
from api.openapi import document
from api.polls import Polls, Shortcut
from api.registrations import Registrations
from api.routes import (
    architectures,
    artifacts,
    attempts,
    audit,
    benchmarks,
    datasets,
    evaluations,
    events,
    exports,
    jobs,
    keys,
    limits,
    logs,
    methods,
    metrics,
    models,
    monitoring,
    page,
    predictions,
    projects,
    storage,
    suggestions,
    uploads,
    webhooks,
)
from api.sweep import Sweep
from api.webhooks import WebhookSender
from base.figures import WRITE_EVERY_S, Exchange
from base.folders import remove_abandoned
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings

SERVER_OPTIONS: dict[str, Any] = {
    "http": Connection,
    "ws": "none",
    "log_config": None,
    "server_header": False,
    "timeout_graceful_shutdown": 3,
}
"""Of uvicorn. Event streams stay open for as long as a job runs: at shutdown they are cut after so many seconds, and
browsers reconnect. There are no WebSockets: a request that asks for one is answered like any other."""

V1 = (
    jobs,
    exports,
    benchmarks,
    suggestions,
    attempts,
    events,
    metrics,
    logs,
    artifacts,
    predictions,
    uploads,
    models,
    evaluations,
    datasets,
    methods,
    architectures,
    webhooks,
    limits,
    audit,
    monitoring,
    storage,
    keys,
    projects,
)


def create_app(settings: Settings, wake_workers: Callable[[], None], inspector: Inspector | None = None) -> FastAPI:
    """Return the application. `wake_workers` is called after a commit; it must return at once and never raise."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.database_url)
        files = FileStore(settings.files)
        scratch = settings.home / "inspect"
        remove_abandoned(scratch, FOREIGN_AFTER_S)
        app.state.settings = settings
        app.state.wake_workers = wake_workers
        app.state.database = database
        app.state.authentication = authentication = Authentication(database, settings)
        app.state.files = files
        app.state.feed = feed = Feed(database)
        app.state.polls = Polls(database, lambda connection, job: jobs.views(connection, [job], settings.lease_s)[0])
        app.state.limiter = Limiter(database, files, settings)
        app.state.readiness = monitoring.Readiness()
        inspections = Inspections(database, files, inspector or Inspector(scratch))
        registrations = Registrations(database, inspections, settings, (models.KIND, datasets.KIND))
        app.state.inspections, app.state.registrations = inspections, registrations
        periodic = [asyncio.create_task(Sweep(database, settings, wake_workers).run())]
        periodic += [asyncio.create_task(registrations.run()), asyncio.create_task(feed.run())]
        app.state.exchange = exchange = Exchange(settings.home / "metrics", "api")
        periodic += [asyncio.create_task(_write_figures(exchange))]
        sender = WebhookSender(database, settings.webhook_allow)
        app.state.webhooks = sender
        periodic += [asyncio.create_task(sender.run())]
        try:
            yield
        finally:
            for task in periodic:
                task.cancel()
            await asyncio.wait(periodic)
            await sender.stop()
            exchange.remove()
            await registrations.stop()
            await inspections.close()
            await authentication.close()
            await database.close()

    app = FastAPI(
        title="Distillery",
        version=version("distillery"),
        summary="Distils a large image classifier into a small one, and proves that it helped.",
        lifespan=lifespan,
        # An address has one form. A redirect would repeat the Host header, and many clients do not follow with a body.
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        telemetry=tracing.telemetry(settings.otel),
    )
    problems.install(app)
    app.router.routes.extend(_routes())
    app.mount("/static", page.static)
    app.add_middleware(Shortcut)
    app.add_middleware(Middleware)
    app.add_middleware(AuditLog)
    # The last one that is added is the outermost.
    app.add_middleware(Observing, access_log=settings.access_log is not False)
    app.openapi = cache(lambda: document(app, needs_key=settings.admin_key_hash is not None))  # type: ignore[method-assign]
    return app


async def _write_figures(exchange: Exchange) -> None:
    """Write this process's figures for the others, until it is cancelled."""
    while True:
        await asyncio.sleep(WRITE_EVERY_S)
        await to_thread.run_sync(exchange.write)


@cache
def _routes() -> list[BaseRoute]:
    """Return the routes of all resources. They are made once for all applications of a process, which takes a while."""
    v1 = APIRouter(responses=problems.responses(*problems.EVERYWHERE), dependencies=[Depends(known_parameters)])
    for resource in V1:
        v1.include_router(resource.router)
    everything = APIRouter()
    for router in (v1, monitoring.probes, page.router):
        everything.include_router(router)
    return everything.routes
