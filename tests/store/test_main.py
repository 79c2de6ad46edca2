import os
import subprocess
import sys
from pathlib import Path

from store import keys
from store.database import Database
from store.file_store import FileStore


def test_migrate_makes_the_tables_and_prints_the_url(tmp_path: Path):
    environment = {**os.environ, "DISTILLERY_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "store", "migrate"]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"sqlite:///{tmp_path}/distillery.db is up to date\n"
    assert (tmp_path / "distillery.db").exists()


def test_key_makes_the_tables_and_prints_a_key_that_can_be_used(tmp_path: Path):
    environment = {**os.environ, "DISTILLERY_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "store", "key", "root"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "has the role operator in the project default. It is shown only now:" in done.stderr
    database = Database(f"sqlite:///{tmp_path}/distillery.db")
    with database.connect() as connection:
        key = keys.find(connection, str(keys.prefix_of(done.stdout.strip())))
    database.dispose()
    assert key is not None
    assert (key.sha256, key.role, key.created_by) == (
        keys.digest_of(done.stdout.strip()),
        "operator",
        "python -m store key",
    )


def test_main_without_a_command_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "store"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "COMMAND" in done.stderr


def test_collect_lists_what_it_removes_and_dry_run_removes_nothing(sqlite_database_url: str, tmp_path: Path):
    files = FileStore(tmp_path / "home" / "files")
    sha256 = files.put_stream([b"not named"]).sha256
    os.utime(files.path(sha256), (0, 0))
    half_decoded = tmp_path / "home" / "cache" / "cifar10-native-v1.partial"
    half_decoded.mkdir(parents=True)
    line = f"to_trash\t9\t{files.path(sha256)}\n"
    os.utime(files.path(sha256), (0, 0))
    assert collect(sqlite_database_url, tmp_path / "home", "--dry-run").stdout == line + f"cache\t0\t{half_decoded}\n"
    assert files.exists(sha256) and half_decoded.exists()
    os.utime(files.path(sha256), (0, 0))
    assert collect(sqlite_database_url, tmp_path / "home").stdout == line + f"cache\t0\t{half_decoded}\n"
    assert files.trash_path(sha256).exists() and not half_decoded.exists()


def test_collect_without_tables_names_the_command_that_makes_them(tmp_path: Path):
    tmp_path.joinpath("home").mkdir()
    refused = collect(f"sqlite:///{tmp_path}/home/new.db", tmp_path / "home")
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "store: the database does not have the expected tables; run `python -m store migrate`"
    )


def collect(url: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DISTILLERY_HOME": str(home), "DISTILLERY_DATABASE_URL": url}
    command = [sys.executable, "-m", "store", "collect", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
