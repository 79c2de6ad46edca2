"""The whole service for a bench: `local.cluster` as a process of its own, up when it says so, gone afterwards."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 60


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 1) -> Iterator[str]:
    """PostgreSQL, Valkey, API and Celery workers; yields the API's address."""
    ready, log = folder / "ready.json", folder / "cluster.log"
    # As root, PostgreSQL runs as somebody else, who must be able to reach its data.
    folder.chmod(0o711)
    command = [sys.executable, "-m", "local.cluster", "--workers", str(workers), "--home", str(folder / "home")]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield _address(ready, process, log)
    finally:
        process.terminate()
        process.wait(START_S)


def _address(ready: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit("the cluster did not come up:\n" + "\n".join(log.read_text().splitlines()[-20:]))
        time.sleep(0.1)
    address: str = json.loads(ready.read_text())["url"]
    return address
