"""The engine without the service: one `python -m kdcore run`, from start to end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import REPOSITORY

SPEC = {"dataset": "digits", "student": "resnet20", "method": "supervised"}
"""About half a second an epoch on one core."""
FEW_EPOCHS, MORE_EPOCHS = 2, 22
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""The engines of a bench's workers have one thread; other numbers of threads give other bits."""


@dataclass(frozen=True)
class EngineRun:
    seconds: float
    """From the start of the process to its exit."""
    lines: list[dict[str, Any]]
    """The lines of its standard output."""


def run_engine(spec: Mapping[str, Any], folder: Path, inputs: Mapping[str, Path] | None = None) -> EngineRun:
    """Run the engine with one thread, its results in `folder/out`. Raises RuntimeError if it fails."""
    folder.mkdir(parents=True)
    path = folder / "spec.json"
    path.write_text(json.dumps(dict(spec)))
    command = [sys.executable, "-m", "kdcore", "run", str(path), "--out", str(folder / "out")]
    for reference, file in (inputs or {}).items():
        command += ["--input", f"{reference}={file}"]
    environment = {**os.environ, **ONE_THREAD}
    began = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        last_line = done.stdout.splitlines()[-1:]
        raise RuntimeError(f"the engine ended with {done.returncode}: {last_line}\n{done.stderr[-2000:]}")
    return EngineRun(seconds, [json.loads(line) for line in done.stdout.splitlines()])


def spec_lasting(seconds: float, folder: Path) -> dict[str, Any]:
    """A spec whose training takes about `seconds` on this machine, from two short runs."""
    few, more = (run_engine(_spec(n), folder / f"{n} epochs").seconds for n in (FEW_EPOCHS, MORE_EPOCHS))
    return _spec(max(1, round(seconds / (more - few) * (MORE_EPOCHS - FEW_EPOCHS))))


def _spec(epochs: int) -> dict[str, Any]:
    return {**SPEC, "training": {"epochs": epochs, "seed": 1}}
