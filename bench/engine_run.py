"""The engine without the service: `python -m kdcore run`, started and waited for."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPEC = {"dataset": "digits", "student": "resnet20", "method": "supervised"}
"""About half a second an epoch on one core."""
FEW, MORE = 2, 22


def run(spec: Mapping[str, Any], folder: Path) -> float:
    """Seconds from the process's start to its exit. One thread, as workers of a bench have it."""
    folder.mkdir(parents=True)
    path = folder / "spec.json"
    path.write_text(json.dumps(dict(spec)))
    command = [sys.executable, "-m", "kdcore", "run", str(path), "--out", str(folder / "out")]
    with (folder / "log").open("wb") as log:
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return time.monotonic() - began


def lasting(seconds: float, folder: Path) -> dict[str, Any]:
    """A spec of a training that lasts about so long on this machine as it is now."""
    few, more = (run(_spec(epochs), folder / f"{epochs} epochs") for epochs in (FEW, MORE))
    return _spec(max(1, round(seconds / (more - few) * (MORE - FEW))))


def _spec(epochs: int) -> dict[str, Any]:
    return {**SPEC, "training": {"epochs": epochs, "seed": 1}}
