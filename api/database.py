"""How a route reaches what outlives the process: rows and files.

Every dependency is a coroutine: a plain function would cost each request a hop to a thread and back.
"""

from typing import Annotated

from fastapi import Depends, Request

from store.database import Database
from store.file_store import FileStore
from store.settings import Settings


async def database(request: Request) -> Database:
    found: Database = request.app.state.database
    return found


async def files(request: Request) -> FileStore:
    found: FileStore = request.app.state.files
    return found


async def settings(request: Request) -> Settings:
    found: Settings = request.app.state.settings
    return found


Db = Annotated[Database, Depends(database)]
Files = Annotated[FileStore, Depends(files)]
Setup = Annotated[Settings, Depends(settings)]
