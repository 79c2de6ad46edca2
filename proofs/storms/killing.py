"""An engine that SIGKILL ends at a chosen moment, in a process of its own, and what it leaves on disk."""

import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

from base import files
from kdcore.prepare import Workspace
from kdcore.protocol import Lines
from kdcore.run import run
from kdcore.spec import JobSpec

PATIENCE_S = 120


@dataclass(frozen=True)
class Attempt:
    """One process of a job: its folder, and the lines that it wrote."""

    folder: Path

    @property
    def lines(self) -> list[dict]:
        return list(map(json.loads, (self.folder / "lines").read_text().splitlines()))

    @property
    def checkpoints(self) -> list[Path]:
        """Whole ones, the furthest last."""
        return sorted((self.folder / "checkpoints").glob("*.pt"))


def killed(spec: JobSpec, folder: Path, cache: Path, resume: Path | None, writing: str) -> Attempt:
    """Run until the file `writing` is on its way to the disk, and no further. Fails where it never is."""
    folder.mkdir(parents=True)
    # Forked, so that nothing is imported again.
    child = multiprocessing.get_context("fork").Process(
        target=_run_until, args=(spec, folder, cache, resume, writing), daemon=True
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads' locks: those here only wait for pytest-xdist's messages.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join(PATIENCE_S)
    assert child.exitcode == -signal.SIGKILL, f"the engine that was to die writing {writing} left {child.exitcode}"
    return Attempt(folder)


def _run_until(spec: JobSpec, folder: Path, cache: Path, resume: Path | None, writing: str) -> None:
    def sync(path: Path) -> None:
        if path.name.startswith(f".{writing}."):
            os.kill(os.getpid(), signal.SIGKILL)

    files.sync = sync
    with (folder / "lines").open("w") as stream:
        run(spec, Workspace(folder, {}, cache, Lines(stream)), resume)
