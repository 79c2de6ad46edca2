"""The embedded default: API, page and worker in one process, on SQLite and a folder (`python -m serve`).

Only this file imports both API and worker. Wake-up messages are the same Celery task as in a cluster, on a broker in
memory. Ctrl-C drains: trainings stop at a checkpoint, and continue when the server is started again.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `after_imports`

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

import uvicorn
from pydantic import ValidationError

from api.app import SERVER_OPTIONS, create_app
from api.wakeup_sender import WakeUpSender
from base.defaults import HOST, PORT
from base.errors import StorageFull
from base.files import write_text
from base.logs import log_to_stderr
from base.processes import after_imports, raise_descriptor_limit
from base.wakeup import MEMORY
from store.database import migrate
from store.keys import KeyNeeded, require_if_reachable
from store.settings import ConfigFileFault, Settings, described, keep_private
from worker.worker import Worker

log = logging.getLogger("distillery")

IN_MEMORY = f"{MEMORY}//localhost/"
"""The broker in memory. It needs no host, but Celery would warn about a URL without one."""
QUIET = ("alembic", "celery", "kombu", "uvicorn")


class HomeTaken(Exception):
    """Another embedded server uses this home."""


def run(settings: Settings, ready: Callable[[str], None] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM. Calls `ready` with the URL when requests are answered.

    Raises HomeTaken and KeyNeeded.
    """
    if settings.broker_url.startswith(MEMORY):
        settings = settings.model_copy(update={"broker_url": IN_MEMORY})
    # One person's terminal, in which the page asks every few seconds.
    settings = settings.model_copy(update={"access_log": bool(settings.access_log)})
    require_if_reachable(settings.database_url, settings.host, settings.admin_key_hash)
    with _sole_server(settings), _listening(settings.host, settings.port) as listener:
        migrate(settings.database_url)
        worker, sender = Worker(settings), WakeUpSender(settings.broker_url)
        app = create_app(settings, wake_workers=sender.wake_workers)
        config = uvicorn.Config(app, access_log=False, **SERVER_OPTIONS)
        url = _url(listener)
        server = _Server(config, on_ready=lambda: (ready or _print_ready)(url), on_leaving=worker.drain)
        with _signals_only_stop(server):
            worker.start()
            try:
                server.run(sockets=[listener])
                log.info("stopping: trainings save their state")
            finally:
                sender.close()
                worker.stop()


class _Server(uvicorn.Server):
    """A server that calls `on_ready` when it answers and `on_leaving` when it stops, before its last answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready, self._on_leaving = on_ready, on_leaving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Not in the signal handler, which must not take locks that the interrupted code may hold.
        self._on_leaving()
        await super().shutdown(sockets)


@contextmanager
def _sole_server(settings: Settings) -> Iterator[None]:
    """Lock the home, because two embedded servers would share a database, but not their wake-up messages."""
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
    """Bind the socket before anything is started, so that a port in use is reported at once."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(f"{host}:{port}: {error.strerror}; --port or DISTILLERY_PORT names another port") from error
        yield listener


@contextmanager
def _signals_only_stop(server: uvicorn.Server) -> Iterator[None]:
    """Make SIGINT and SIGTERM stop the server and nothing else until the drain is over.

    Neither a second signal nor the first one, which uvicorn sends again at its end, may interrupt the drain.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, stop) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _print_ready(url: str) -> None:
    print(f"Distillery is at {url}  (Ctrl-C stops it; jobs continue when it is started again)", flush=True)


def main() -> int:
    after_imports()
    parser = argparse.ArgumentParser(prog="python -m serve", description="API, page and worker in one process.")
    parser.add_argument("--host", help=f"default: {HOST}; any other needs a key")
    parser.add_argument("--port", type=int, help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument("--home", type=Path, help="folder of all data; default: ./distillery-data")
    parser.add_argument("--ready-file", type=Path, help='file for {"url", "pid"} as JSON when requests are answered')
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    ready_file: Path | None = options.pop("ready_file", None)
    raise_descriptor_limit()

    def ready(url: str) -> None:
        _print_ready(url)
        if ready_file:
            write_text(ready_file, json.dumps({"url": url, "pid": os.getpid()}))

    try:
        settings = Settings(**options)
        log_to_stderr(*QUIET, form=settings.log_format)
        keep_private(settings)
        run(settings, ready)
    except (HomeTaken, ConfigFileFault, KeyNeeded, StorageFull, OSError) as error:
        return _refuse(str(error))
    except ValidationError as error:
        return _refuse("\n".join(described(fault) for fault in error.errors()))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _refuse(reason: str) -> int:
    print(f"serve: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
