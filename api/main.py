"""The server: routes around a database, a folder of files, an inspector and a bell; and a sweep now and then."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI

from api import problems
from api.envelope import Envelope
from api.inspections import Inspections
from api.inspector import Inspector
from api.openapi import describe
from api.routes import (
    architectures,
    artifacts,
    attempts,
    datasets,
    events,
    health,
    jobs,
    logs,
    methods,
    metrics,
    models,
    page,
    prometheus,
    storage,
    uploads,
    workers,
)
from api.scratch import sweep
from api.sweep import Sweep
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings

ROUTERS = (
    jobs,
    attempts,
    events,
    metrics,
    logs,
    artifacts,
    uploads,
    models,
    datasets,
    methods,
    architectures,
    workers,
    storage,
)


def create_app(settings: Settings, ring: Callable[[], None], inspector: Inspector | None = None) -> FastAPI:
    """The application. `ring` wakes the workers after a commit; it must return at once and never raise."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.database_url)
        files = FileStore(settings.files)
        inspecting = settings.home / "inspect"
        sweep(inspecting)
        app.state.settings = settings
        app.state.ring = ring
        app.state.database = database
        app.state.files = files
        app.state.inspections = Inspections(database, files, inspector or Inspector(inspecting))
        sweeping = asyncio.create_task(Sweep(database, settings, ring).run())
        try:
            yield
        finally:
            sweeping.cancel()
            await asyncio.wait([sweeping])
            await database.close()

    app = FastAPI(
        title="Distillery",
        version=version("distillery"),
        summary="Distils a large image classifier into a small one, and proves that it helped.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    v1 = APIRouter(responses=problems.responses(*problems.EVERYWHERE))
    for resource in ROUTERS:
        v1.include_router(resource.router)
    app.include_router(v1)
    app.include_router(health.router)
    app.include_router(prometheus.router)
    app.include_router(page.router)
    app.mount("/static", page.static)
    app.add_middleware(Envelope)
    describe(app)
    return app
