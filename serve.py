"""The embedded default: API, page and worker in one process, on SQLite and a folder (`python -m serve`).

The one place that knows both API and worker. The bell is the same Celery task as in a cluster, on a broker in memory.
Ctrl-C drains: trainings stop at a checkpoint, and go on from there when the server is started again.
"""

import argparse
import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError

from api.bell import Bell
from api.main import create_app
from base.defaults import HOST, PORT
from base.errors import StorageFull
from base.files import write_text
from store.database import migrate
from store.settings import Settings
from worker.service import Worker

log = logging.getLogger("distillery")

STREAMS_END_S = 3
"""Event streams stay open for as long as a job: at the end they are cut, and browsers come back by themselves."""


IN_MEMORY = "memory://localhost/"
"""Celery warns of a broker URL without a host, even where there is none to name."""
TALKATIVE = ("alembic", "celery", "kombu", "uvicorn")


class HomeTaken(Exception):
    """Another embedded server uses this home."""


def run(settings: Settings, ready: Callable[[str], None] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM. `ready` is told the URL once requests are answered. Raises HomeTaken."""
    if settings.broker_url.startswith("memory:"):
        settings = settings.model_copy(update={"broker_url": IN_MEMORY})
    with _sole_server(settings), _listening(settings.host, settings.port) as listener:
        migrate(settings.database_url)
        worker, bell = Worker(settings), Bell(settings.broker_url)
        app = create_app(settings, ring=bell.ring)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STREAMS_END_S,
        )
        url = _url(listener)
        server = _Server(config, ready=lambda: (ready or _say)(url), leaving=worker.drain)
        with _signals_only_end_serving(server):
            worker.start()
            try:
                server.run(sockets=[listener])
                log.info("stopping: trainings save their state")
            finally:
                bell.close()
                worker.stop()


class _Server(uvicorn.Server):
    """Tells when it answers, and when it was asked to leave: trainings stop while the last answers are given."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._leaving = ready, leaving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Not where the signal is handled: to ask takes locks, which the interrupted code may hold.
        self._leaving()
        await super().shutdown(sockets)


@contextmanager
def _sole_server(settings: Settings) -> Iterator[None]:
    """One embedded server a home: two would answer with one database and ring two bells."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "server.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise HomeTaken(
                f"another server (process {lock.read() or 'unknown'}) uses {settings.home}; stop it, or give this one "
                "a home of its own: --home or DISTILLERY_HOME"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The socket, bound before anything is started: a taken port is told at once."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        yield listener


@contextmanager
def _signals_only_end_serving(server: uvicorn.Server) -> Iterator[None]:
    """Until the drain is over: a second signal does not hurry it, nor the first, which uvicorn sends itself again."""

    def leave(*_: object) -> None:
        server.should_exit = True

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, leave) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(url: str) -> None:
    print(f"Distillery is at {url}  (Ctrl-C stops it; jobs go on when it is started again)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serve", description="API, page and worker in one process.")
    parser.add_argument("--host", help=f"default: {HOST}; another needs DISTILLERY_ADMIN_KEY_HASH")
    parser.add_argument("--port", type=int, help=f"default: {PORT}; 0 takes any free one")
    parser.add_argument("--home", type=Path, help="where everything is kept; default: ./distillery-data")
    parser.add_argument("--ready-file", type=Path, help='gets {"url", "pid"} as JSON once requests are answered')
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    ready_file: Path | None = given.pop("ready_file", None)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)

    def ready(url: str) -> None:
        _say(url)
        if ready_file:
            write_text(ready_file, json.dumps({"url": url, "pid": os.getpid()}))

    try:
        run(_settings(given), ready)
    except (HomeTaken, StorageFull, OSError) as error:
        return _refuse(str(error))
    except ValidationError as error:
        return _refuse("\n".join(str(fault["msg"]) for fault in error.errors()))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _settings(given: dict[str, Any]) -> Settings:
    return Settings(**given)


def _refuse(why: str) -> int:
    print(f"serve: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
