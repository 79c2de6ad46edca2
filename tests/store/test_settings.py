import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from base.defaults import is_loopback
from store.settings import Settings, keep_private, settings_or_exit
from worker.context import Options

KEY_HASH = "a" * 64
ANYWHERE = ".".join("0000")


def test_settings_by_default_are_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.home == tmp_path / "distillery-data"
    assert settings.database_url == f"sqlite:///{tmp_path}/distillery-data/distillery.db"
    assert settings.files == tmp_path / "distillery-data" / "files"
    assert (settings.host, settings.broker_url, settings.admin_key_hash) == ("127.0.0.1", "memory://", None)


def test_settings_home_is_the_default_place(tmp_path: Path):
    settings = Settings(home=tmp_path, files=tmp_path / "volume")
    assert (settings.database_url, settings.files) == (f"sqlite:///{tmp_path}/distillery.db", tmp_path / "volume")


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path))
    monkeypatch.setenv("DISTILLERY_LEASE_S", "2")
    monkeypatch.setenv("DISTILLERY_HEARTBEAT_S", "0.5")
    monkeypatch.setenv("DISTILLERY_LOOK_S", "0.5")
    settings = Settings()
    assert (settings.home, settings.lease_s) == (tmp_path, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lease_s": 19}, "lease_s 19 is shorter than four heartbeats of 5 s.* set lease_s to 20 or more"),
        ({"look_s": 8}, "look_s 8 is more than a quarter of lease_s 30.* set look_s to 7.5 or less"),
        ({"admin_key_hash": "my secret"}, "as 64 hexadecimal digits, not the key itself"),
        ({"database_url": "sqlite://"}, "SQLite in memory is not supported"),
        ({"database_url": "sqlite:///:memory:"}, "SQLite in memory is not supported"),
        ({"database_url": "mysql://host/name"}, "mysql is not supported; use sqlite:/// or postgresql://"),
        ({"database_url": "distillery.db"}, "is not a URL; use sqlite:///path"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"lease": 30}, "lease"),
        ({"collect_every_s": 0}, "collect_every_s"),
        ({"collect_after_s": 3599}, "collect_after_s\n.*greater than or equal to 3600"),
        ({"retain_checkpoints_s": -1}, "retain_checkpoints_s"),
        ({"retain_uploads_s": 60}, "retain_uploads_s\n.*greater than or equal to 3600"),
        ({"cache_max_bytes": -1}, "cache_max_bytes"),
    ],
)
def test_settings_refuse_an_invalid_value_and_name_a_valid_one(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Settings(**values)


def test_settings_error_does_not_repeat_a_secret():
    with pytest.raises(ValidationError) as refused:
        Settings(admin_key_hash="my secret")
    assert "my secret" not in str(refused.value)


def test_settings_with_a_key_take_any_address():
    assert Settings(host=ANYWHERE, admin_key_hash=KEY_HASH).host == ANYWHERE
    assert Settings(lease_s=20).lease_s == 20


def test_settings_or_exit_prints_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISTILLERY_LEASE_S", "19")
    with pytest.raises(SystemExit, match=r"^api: lease_s 19 is shorter than four heartbeats"):
        settings_or_exit("api")
    monkeypatch.setenv("DISTILLERY_LEASE_S", "half a minute")
    with pytest.raises(SystemExit, match=r"^api: DISTILLERY_LEASE_S: Input should be a valid number"):
        settings_or_exit("api")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("127.9.9.9", True), ("localhost", True), ("", False), ("10.0.0.1", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "distillery.toml"
    monkeypatch.setenv("DISTILLERY_CONFIG", str(path))
    return path


def test_settings_are_read_from_a_file_and_the_environment_is_stronger(config: Path, monkeypatch: pytest.MonkeyPatch):
    config.write_text(f'home = "{config.parent}"\nport = 9000\nlease_s = 60\n[worker]\nthreads = 3\nwarm = false\n')
    monkeypatch.setenv("DISTILLERY_LEASE_S", "40")
    monkeypatch.setenv("DISTILLERY_WARM", "true")
    settings, options = settings_or_exit("worker", Options)
    assert (settings.home, settings.port, settings.lease_s) == (config.parent, 9000, 40)
    assert (options.threads, options.warm) == (3, True)
    assert settings.database_url == f"sqlite:///{config.parent}/distillery.db"
    assert Settings(port=1).port == 1, "an argument is stronger than both"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "DISTILLERY_CONFIG: .* cannot be read: No such file"),
        ("port = ", "DISTILLERY_CONFIG: .* is not TOML"),
        ("worker = 3", "worker must be a table"),
        ("prot = 80", "prot in the file of DISTILLERY_CONFIG: there is no such setting"),
        ("[worker]\nthread = 1", "thread in the file of DISTILLERY_CONFIG: there is no such setting"),
        ("port = 70000", "DISTILLERY_PORT: Input should be less than or equal to 65535"),
    ],
)
def test_settings_refuse_a_wrong_file(config: Path, text: str | None, message: str):
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit, match=message):
        settings_or_exit("worker", Options)


@pytest.fixture
def old_umask() -> Iterator[None]:
    umask = os.umask(0o022)
    yield
    os.umask(umask)


def test_keep_private_takes_a_home_of_an_earlier_version_from_others(tmp_path: Path, old_umask: None):
    home = tmp_path / "home"
    for folder in ("files/blobs/ab", "cache/digits", "scratch", "inspect", "letters"):
        (home / folder).mkdir(parents=True)
    for file in ("distillery.db", "distillery.db-wal", "files/blobs/ab/abc", "cache/digits/images", "letters/mine"):
        (home / file).touch()
    keep_private(Settings(home=home))
    open_to_others = {str(path.relative_to(home)) for path in home.rglob("*") if path.stat().st_mode & 0o077}
    assert open_to_others == {"letters", "letters/mine"}, "what the service has not made is left as it is"
    assert home.stat().st_mode & 0o777 == 0o700
    (home / "files" / "new").touch()
    assert (home / "files" / "new").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_keep_private_leaves_the_way_to_what_another_user_has_in_the_home(tmp_path: Path, old_umask: None):
    home = tmp_path / "home"
    (home / "postgres").mkdir(parents=True)
    os.chown(home / "postgres", 65534, 65534)
    keep_private(Settings(home=home))
    assert home.stat().st_mode & 0o777 == 0o711
