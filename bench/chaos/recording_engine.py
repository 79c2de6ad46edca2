"""The engine with a record of every step that it begins: time, attempt and process.

    python -m bench.chaos.recording_engine RECORDS PAUSE_S run ...

Each step appends one whole line to the file RECORDS: boottime, job, fence, process, step. Then it waits PAUSE_S, so
that few steps can last longer than a lease. Two functions of the engine are wrapped; its results are unchanged.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from kdcore import __main__ as engine
from kdcore import run, training


def record_to(path: Path, pause_s: float) -> None:
    """Let this process append a line to `path` before each step, and wait."""
    records = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    train, step = run.run, training.StageTraining._step
    attempt = ""

    def named(spec: Any, place: Any, *rest: Any) -> Any:
        nonlocal attempt
        # The folder of an attempt has the name JOB.FENCE.HOST.
        job, fence, _ = place.out.resolve().parent.name.split(".", 2)
        attempt = f"{job} {fence} {os.getpid()}"
        return train(spec, place, *rest)

    def recorded(self: training.StageTraining, batch: Any) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.write(records, f"{now:.6f} {attempt} {self.global_step}\n".encode())
        time.sleep(pause_s)
        step(self, batch)

    run.run, training.StageTraining._step = named, recorded  # type: ignore[assignment, method-assign]


def main() -> int:
    record_to(Path(sys.argv.pop(1)), float(sys.argv.pop(1)))
    return engine.main()


if __name__ == "__main__":
    sys.exit(main())
