"""A server in this process, around a real SQLite file."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
