from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from base.defaults import is_loopback
from store.settings import Settings, settings_or_exit

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
