"""The process `python -m api`: what it loads, and when it refuses to start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from api.__main__ import _refuse_an_old_schema
from base.errors import DatabaseUnavailable
from store.database import Database


def test_main_loads_no_torch() -> None:
    load = "import sys, api.app, api.wakeup_sender, api.__main__; "
    show = "print([name for name in ('torch', 'numpy', 'worker') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", load + show], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_main_does_not_start_on_an_old_schema(tmp_path: Path) -> None:
    (tmp_path / "distillery.db").touch()
    environment = {**os.environ, "DISTILLERY_HOME": str(tmp_path), "DISTILLERY_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "run `python -m store migrate`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_refuse_an_old_schema_waits_for_a_database_server(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, waited = Database.connect, []

    def come_back_late(self: Database) -> object:
        if len(waited) < 2:
            raise DatabaseUnavailable("connection refused")
        return connect(self)

    monkeypatch.setattr(Database, "connect", come_back_late)
    monkeypatch.setattr("api.__main__.time.sleep", waited.append)
    _refuse_an_old_schema(postgres_database_url)
    assert len(waited) == 2


def test_refuse_an_old_schema_refuses_a_missing_database_file_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="store migrate"):
        _refuse_an_old_schema(f"sqlite:///{tmp_path}/no/such.db")
