"""A backup of a service that trains, and a new service of it: `python -m store backup` and `restore`, for real.

    python -m bench.backup [--setting embedded|cluster]

One job has succeeded, a model is registered, and a second job trains, when the backup is made. The old service is then
stopped and removed. The new one, in another home and with another database of the same kind, must have the first job
with its files, byte for byte, the model, and must bring the second job to its end from the checkpoint of the backup.
Prints the times; exit code 1 if a check fails. Takes a minute.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.processes import REPOSITORY, exit_on_sigterm, wait_until
from bench.service import SETTINGS, embedded, open_folder
from client.sdk import Distillery
from local import servers

TINY = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 2, "seed": 1}}
LONG = {**TINY, "training": {"epochs": 60, "seed": 1, "checkpoint_every_s": 1}}
START_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.backup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=("embedded", "cluster"), default="embedded")
    setting = parser.parse_args().setting
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="distillery-backup-") as name:
        root = Path(name)
        root.chmod(0o755)  # PostgreSQL is another user if we are root.
        return _run(setting, root)


def _run(setting: str, root: Path) -> int:
    settings = {"DISTILLERY_SLOTS": "1", "DISTILLERY_MIN_FREE_BYTES": "0"}
    old, new, folder = root / "old", root / "new", root / "backup"
    with SETTINGS[setting](_made(old), **settings) as url:
        distillery = Distillery(url)
        done = distillery.wait(distillery.submit(TINY)["id"])["id"]
        student = distillery.download(done, to=root / "before.safetensors").read_bytes()
        distillery.register_model("kept", root / "before.safetensors", architecture="convnet4")
        running = distillery.submit(LONG)["id"]
        wait_until(lambda: _checkpoint(distillery, running), "the training's first checkpoint", START_S)
        of_old = _environment(setting, old, settings)
        backup_s = _store("backup", folder, of_old)
        again_s = _store("backup", folder, of_old)
        step = _checkpoint(distillery, running)
    shutil.rmtree(old)
    with _new_database(setting, root) as database:
        of_new = {**settings, "DISTILLERY_HOME": str(_made(new) / "home"), **database}
        restore_s = _store("restore", folder, of_new)
        with embedded(new, **settings, **database) as url:
            distillery = Distillery(url)
            ended = distillery.wait(running)
            attempts = distillery.attempts(running)
            checks = {
                "the first job is there": distillery.job(done)["status"] == "succeeded",
                "its student is the same": distillery.download(done, to=root / "after").read_bytes() == student,
                "the model is there": [model["name"] for model in distillery.models()] == ["kept"],
                "the running job succeeded": ended["status"] == "succeeded",
                "it went on from a checkpoint": attempts[-1]["first_step"] > 0,
            }
    print(f"{setting}: backup {backup_s:.1f} s, again {again_s:.1f} s, restore {restore_s:.1f} s; the running job was "
          f"at step {step} and went on from {attempts[-1]['first_step']}")  # fmt: skip
    for check, held in checks.items():
        print(f"{'ok  ' if held else 'FAIL'} {check}")
    return 0 if all(checks.values()) else 1


def _made(folder: Path) -> Path:
    folder.mkdir()
    open_folder(folder)
    return folder


def _checkpoint(distillery: Distillery, job_id: str) -> int | None:
    return distillery.job(job_id)["checkpoint_step"]


def _environment(setting: str, folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """Return the settings of the service that runs in a folder."""
    addresses = json.loads((folder / "ready.json").read_text())
    database = {"DISTILLERY_DATABASE_URL": addresses["database"]} if setting == "cluster" else {}
    return {**settings, "DISTILLERY_HOME": str(folder / "home"), **database}


@contextlib.contextmanager
def _new_database(setting: str, root: Path) -> Iterator[dict[str, str]]:
    """Yield the settings of a new and empty database of the same kind."""
    if setting == "embedded":
        yield {}
        return
    with servers.postgres(root / "postgres", durable=True) as url:
        yield {"DISTILLERY_DATABASE_URL": url}


def _store(command: str, folder: Path, settings: dict[str, str]) -> float:
    """Run `python -m store COMMAND FOLDER`. Returns its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "store", command, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"store {command}: {done.stdout.strip() or done.stderr.strip()}")
    if done.returncode:
        raise SystemExit(f"store {command} ended with exit code {done.returncode}")
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
