"""Real databases and brokers for every room: each test gets a migrated and empty database for itself."""

import gc
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from base import clock as base_clock
from base.processes import after_imports
from local import servers
from store.database import Database, migrate
from store.tables import metadata
from tests.clock import SettableClock

gc.disable()  # until all tests are collected: until then there is no garbage, and much to search for it

HANG_UP_ON_ALL_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server for this test process, started when first asked for."""
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A Valkey server for this test process, started when first asked for."""
    with servers.valkey() as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "distillery.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[Engine]:
    """One database for all tests of this process: emptying it takes a millisecond, copying it hundreds."""
    ours = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = create_engine(ours, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    migrate(postgres_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_database_url(sqlite_template: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'distillery.db')}"


@pytest.fixture
def postgres_database_url(migrated_postgres: Engine) -> Iterator[str]:
    yield migrated_postgres.url.set(drivername="postgresql").render_as_string()
    with migrated_postgres.connect() as connection:
        connection.execute(text(HANG_UP_ON_ALL_OTHERS))
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SettableClock:
    """The time of this process, in Python and in SQL: `clock.advance(31)` instead of waiting."""
    monkeypatch.setattr(base_clock, "offset_s", 0.0)
    return SettableClock()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The test runs on both databases."""
    url: str = request.getfixturevalue(f"{request.param}_database_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """For threads; a test with coroutines makes its own and closes it on its own event loop."""
    database = Database(database_url)
    yield database
    database.dispose()


def compile_kernels(config: pytest.Config) -> None:
    """Compile the engine's kernels once for this checkout: an engine that finds none compiles them for seconds."""
    folder = config.rootpath / "kdcore" / "kernels"
    written = max(one.stat().st_mtime for one in folder.glob("*.[ch]pp"))
    built = (folder / "built").glob("kernels-*/")
    if hasattr(config, "workerinput") or any(one.stat().st_mtime > written for one in built):
        return
    command = "from kdcore.kernels.building import *; build(BUILT, [kind()])"
    # Where it fails, engines compute without kernels, and the tests of the kernels say why they are skipped.
    subprocess.run([sys.executable, "-c", command], cwd=config.rootpath, capture_output=True, check=False)


LONG = (
    "proofs/",
    "tests/client/test_embedded_server.py",
    "tests/end_to_end/",
    "tests/local/",
    "tests/worker/",
    "tests/test_serve.py",
)
"""Tests that start processes and wait for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every test process but the last begin with its share of the long tests, so that the run does not end with
    one process that still has them. pytest-xdist deals the list out in equal parts, then moves tests to idle processes.

    A share has whole files: tests of two processes would not share the server, and its jobs, of a file's fixtures.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    shares: list[list[pytest.Item]] = [[] for _ in range(processes - 1)]
    long = [item for item in items if item.nodeid.startswith(LONG)]
    for number, (_, file) in enumerate(groupby(long, key=lambda item: item.path)):
        shares[number % len(shares)] += file
    short = [item for item in items if not item.nodeid.startswith(LONG)]
    size = -(-len(items) // processes)
    ordered: list[pytest.Item] = []
    for share in shares:
        fill = max(0, size - len(share))
        ordered += [*share, *short[:fill]]
        short = short[fill:]
    items[:] = [*ordered, *short]


def pytest_collection_finish() -> None:
    after_imports()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="print the CPU seconds of each test file, most first")


def pytest_configure(config: pytest.Config) -> None:
    compile_kernels(config)
    if config.getoption("--cpu"):
        config.pluginmanager.register(CpuSeconds())


def cpu_seconds() -> float:
    """Of this process since its start, and of its child processes that have ended, with theirs."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class CpuSeconds:
    """CPU seconds of each test file. A session's fixture counts for the test that first asks for it, and a process for
    the test in which it ends; imports and collection count for no test.
    """

    def __init__(self) -> None:
        self.mark = cpu_seconds()
        self.of_files: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = cpu_seconds()
        report.cpu_s, self.mark = now - self.mark, now
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self.mark = cpu_seconds()
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Also in the process that deals out the tests: pytest-xdist sends it the reports with all their attributes."""
        self.of_files[report.nodeid.split("::")[0]] += report.cpu_s

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"CPU seconds: {self.of_files.total():.0f} in tests")
        for path, seconds in self.of_files.most_common(40):
            terminalreporter.line(f"{seconds:7.1f} {path}")
