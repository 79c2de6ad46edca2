"""Runs of the engine in a list that can be continued: each finished run adds one line of JSON to a committed file.

A run is one `python -m kdcore run`, one after the other, each with the same number of threads. A line names the budget,
the row and the seed of a run, and the digest of its spec: a row whose spec has changed is run again. An interrupted run
continues from its checkpoint. Files have names in specs (`model:`, `blob:`), so no line contains a path.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.processes import REPOSITORY

Spec = dict[str, Any]
Line = dict[str, Any]

RESULTS = REPOSITORY / "bench" / "results"
STOP_S = 120
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REFUSED = ("spec_invalid", "teacher_mismatch", "loss_diverged")
"""Codes of errors that a repetition would have, too: such a run gets a line, without figures."""
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 %, two-sided, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Run:
    """One training: a seed of a row on a budget. `inputs`: the files that its spec names."""

    budget: str
    row: str
    seed: int
    spec: Spec
    inputs: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.budget, self.row, self.seed, self.digest

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        words = f"{self.budget} {self.row} {self.seed} {self.digest}"
        return "".join(each if each.isalnum() else "-" for each in words)


class EngineFailed(Exception):
    """A run ended with an error; `code` is the engine's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Results:
    """The lines of finished runs. Those of another spec are kept in the file, and not used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def of(self, run: Run) -> Line | None:
        """Return the line of a run; None if it is not done."""
        found = [line for line in self.lines if _key(line) == run.key]
        return found[-1] if found else None

    def add(self, run: Run, figures: Mapping[str, Any]) -> None:
        line = {"budget": run.budget, "row": run.row, "seed": run.seed, "spec": run.digest, **figures}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def accuracies(self, runs: Iterable[Run], figure: str = "accuracy") -> dict[int, float]:
        """Return a figure of these runs by seed, of those that are done."""
        lines = ((run.seed, self.of(run)) for run in runs)
        return {seed: line[figure] for seed, line in lines if line is not None and figure in line}


def _key(line: Line) -> tuple[str, str, int, str]:
    return line["budget"], line["row"], line["seed"], line["spec"]


Engine = Callable[[Run], Mapping[str, Any]]
"""Runs one run and returns its figures. Raises EngineFailed."""


def run_missing(runs: Sequence[Run], results: Results, engine: Engine) -> bool:
    """Run what has no line yet, in this order. Returns False if a run failed in a way that may pass."""
    missing = [run for run in runs if results.of(run) is None]
    fine = True
    for number, run in enumerate(missing, 1):
        text = f"{number} of {len(missing)}: {run.budget}, {run.row}, seed {run.seed}"
        try:
            figures = engine(run)
        except EngineFailed as error:
            _say(f"{text}: {error}")
            if error.code in REFUSED:
                results.add(run, {"refused": str(error)})
            fine &= error.code in REFUSED
            continue
        results.add(run, figures)
        _say(f"{text}: {figures['accuracy']:.2%} in {figures['seconds']:.0f} s")
    return fine


@dataclass(frozen=True)
class Kdcore:
    """The engine as a process. All runs share one cache: decoded data and the teacher's outputs."""

    state: Path
    """A folder that is kept between calls."""
    files: Mapping[str, Path]
    """Files by the names that specs have for them."""
    threads: int

    def __call__(self, run: Run) -> Line:
        report = json.loads((self.folder(run) / "report.json").read_text()) if self.is_done(run) else self._run(run)
        return figures(report)

    def folder(self, run: Run) -> Path:
        return self.state / "runs" / run.name

    def is_done(self, run: Run) -> bool:
        return (self.folder(run) / "report.json").exists()

    def _run(self, run: Run) -> Any:
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requested.json").write_text(json.dumps(run.spec))
        command = [sys.executable, "-m", "kdcore", "run", str(folder / "requested.json"), "--out", str(folder)]
        command += ["--cache", str(self.state / "cache")]
        for name in run.inputs:
            command += ["--input", f"{name}={self.files[name]}"]
        checkpoints = sorted((folder / "checkpoints").glob("*.pt"))
        if checkpoints:
            command += ["--resume", str(checkpoints[-1])]
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads))}
        with (folder / "lines").open("wb") as lines, (folder / "log").open("ab") as log:
            engine = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=lines, stderr=log, start_new_session=True
            )
            try:
                code = engine.wait()
            finally:  # A stopped bench leaves a checkpoint.
                if engine.poll() is None:
                    engine.send_signal(signal.SIGTERM)
                    engine.wait(STOP_S)
        *_, last = [{}, *map(json.loads, (folder / "lines").read_text().splitlines())]
        if code:
            raise EngineFailed(last.get("code", "stopped"), last.get("message", f"exit code {code}"))
        return last["report"]


def figures(report: Any) -> Line:
    """Return what a line keeps of a report."""
    student, teacher, computing = report["student"], report.get("teacher"), report.get("computing", {})
    kept = {
        "accuracy": student["accuracy"],
        "last": student["last"]["accuracy"],
        "teacher": teacher["accuracy"] if teacher else None,
        "agreement": student.get("agreement"),
        "test_samples": report["test_samples"],
        "seconds": report["seconds"],
        "threads": computing.get("threads"),
        "precision": "bf16" if computing.get("bf16") else "fp32",
    }
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in kept.items()}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by Student's t, None of fewer than two values."""
    degrees = len(values) - 1
    if degrees < 1:
        return None
    half = (T95[degrees - 1] if degrees <= len(T95) else 1.96) * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def points(values: Sequence[float]) -> str:
    """Return the mean of differences and its interval, in points of percent."""
    if not values:
        return "–"
    found = interval(values)
    low_high = "one seed" if found is None else f"{100 * found[0]:+.2f} to {100 * found[1]:+.2f}"
    return f"{100 * mean(values):+.2f} ({low_high})"


def gains(row: Mapping[int, float], alone: Mapping[int, float]) -> list[float]:
    """Return the differences of the seeds that both have."""
    return [row[seed] - alone[seed] for seed in sorted(row.keys() & alone.keys())]


def add_arguments(parser: argparse.ArgumentParser, results: str) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS / results, help="the file of finished runs")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(tempfile.gettempdir()) / "distillery-runs",
        help="folder of data, cache and checkpoints, kept between calls",
    )
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--table", action="store_true", help="print the table of what is done, and run nothing")
    parser.add_argument("--smoke", action="store_true", help="digits, one epoch, one seed; nothing is kept")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
