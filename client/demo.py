"""From nothing to a proven student, over REST alone: train a teacher, distil it, and check what comes out.

The data is the handwritten digits that the engine brings along (1,797 images of 8 x 8). The students learn for
10 epochs with the default recipe. On so easy a set the same student alone nearly catches up in 30: what the demo shows
is what a teacher is worth on a small budget, and it says so. Seeds are fixed; several runs are shown with their spread.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from client import tables
from client.answers import STUDENT_FILE, Job, Report
from client.errors import DistilleryError
from client.local_server import LocalServer, local_server
from client.sdk import Distillery
from client.watching import follow, say, verdict

TEACHER: dict[str, Any] = {
    "name": "digits teacher",
    "dataset": "digits",
    "student": "convnet32",
    "method": "supervised",
    "training": {
        "epochs": 30,
        "seed": 0,
        "optimizer": {"name": "adamw", "lr": 0.003},
        "schedule": "cosine",
        "augmentation": {"name": "crop_flip", "padding": 1, "flip": False},
    },
}


STUDENT_EPOCHS = 10
BUDGET = (
    f"That is on a budget of {STUDENT_EPOCHS} epochs. The digits are easy: with three times as many, "
    "the student alone nearly catches up."
)


def student_spec(teacher_id: str, seed: int) -> dict[str, Any]:
    return {
        "name": f"digits student, seed {seed}",
        "dataset": "digits",
        "teacher": {"checkpoint": f"job:{teacher_id}"},
        "student": "convnet4",
        "method": "kd",
        "temperature": 4.0,
        "alpha": 0.1,
        "beta": 0.9,
        "baseline": "train",
        "training": {"epochs": STUDENT_EPOCHS, "seed": seed},
    }


class DidNotHold(Exception):
    """Something that the demo promises is not so."""


def demo(console: Console, *, seeds: int, to: Path, keep: bool) -> int:
    """0 if everything held, 1 if something did not, 130 when interrupted. Leaves no process behind."""
    began = time.monotonic()
    say(
        console,
        "A real distillation over REST: a server of its own, a teacher trained from nothing, students 50 times",
        "smaller, and the same students without the teacher. It takes half a minute, more on a busy machine.",
        "",
    )
    try:
        with _terminates_in_order(), _home(to, keep) as home, local_server(home, slots=seeds) as server:
            say(console, f"The server is at {server.url} for as long as this runs.")
            try:
                _distil(console, server, home, seeds, to)
            except (DidNotHold, DistilleryError):
                say(console, "", "The server's log ends so:", *server.log_tail(), style="dim")
                raise
    except KeyboardInterrupt:
        say(console, "", "Interrupted: the server is stopped, nothing is left running.")
        return 128 + signal.SIGINT
    except DidNotHold as failure:
        say(console, "", f"The demo failed: {failure}", style="red")
        return 1
    except DistilleryError as failure:
        say(console, "", "The demo failed:", *failure.lines(), style="red")
        return 1
    _where_next(console, to if keep else None, time.monotonic() - began)
    return 0


def _distil(console: Console, server: LocalServer, home: Path, seeds: int, to: Path) -> None:
    with Distillery(server.url) as distillery:
        teacher = _run(distillery, console, TEACHER, "teacher")
        specs = [student_spec(teacher["id"], seed) for seed in range(1, seeds + 1)]
        jobs = [distillery.submit(spec) for spec in specs]
        ended = [
            _ended(follow(distillery, job["id"], console, f"student {number} of {seeds}"), console)
            for number, job in enumerate(jobs, 1)
        ]
        reports = [report_of(job) for job in ended]
        console.print()
        console.print(tables.proof(reports))
        say(console, tables.gain_sentence(reports), _smaller(reports[0]), BUDGET, "")
        _check_student(distillery, ended[0], home, to / STUDENT_FILE, console)
    _check_gain(reports)


def _run(distillery: Distillery, console: Console, spec: dict[str, Any], title: str) -> Job:
    job = distillery.submit(spec)
    return _ended(follow(distillery, job["id"], console, title), console)


def _ended(job: Job, console: Console) -> Job:
    if job["status"] != "succeeded":
        verdict(job, console)
        raise DidNotHold(f"job {job['id']} ({job['name']}) {job['status']}")
    return job


def report_of(job: Job) -> Report:
    if job["result"] is None:
        raise DidNotHold(f"job {job['id']} succeeded without a report")
    return job["result"]


def _smaller(report: Report) -> str:
    teacher, student = report["teacher"], report["student"]
    if teacher is None:
        raise DidNotHold("the report of a distillation names no teacher")
    times = teacher["parameters"] / student["parameters"]
    return f"The student has {times:.0f} times fewer parameters than its teacher."


def _check_student(distillery: Distillery, job: Job, home: Path, target: Path, console: Console) -> None:
    """Fetch the first student, load it in a process that knows nothing of the service, and measure it again."""
    path = distillery.download(job["id"], to=target)
    digest = next(file["sha256"] for file in distillery.artifacts(job["id"]) if file["name"] == STUDENT_FILE)
    say(console, f"Downloaded {path} ({path.stat().st_size:,} bytes), sha256 {digest}: as the service said.")
    measured = _measured(path, home)
    reported = report_of(job)["student"]
    compare(measured, reported["accuracy"], reported["parameters"])
    say(
        console,
        f"Loaded it again in plain PyTorch in another process: {measured['parameters']:,} parameters, "
        f"{100 * measured['accuracy']:.1f} % on {measured['test_samples']} test images, as the report says.",
    )


def _measured(path: Path, home: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "kdcore", "evaluate", str(path), "--dataset", "digits"]
    done = subprocess.run([*command, "--cache", str(home / "cache")], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DidNotHold(f"the student could not be loaded again:\n{done.stdout}{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def compare(measured: dict[str, Any], accuracy: float, parameters: int) -> None:
    """Raises DidNotHold unless the student is the one that was reported."""
    if measured["parameters"] != parameters:
        raise DidNotHold(f"the student has {measured['parameters']} parameters, its report says {parameters}")
    # Another number of threads may round one sum otherwise; that can move an image on the very border.
    if abs(measured["accuracy"] - accuracy) > 1.5 / measured["test_samples"]:
        raise DidNotHold(f"the student's accuracy is {measured['accuracy']:.4f}, its report says {accuracy:.4f}")


def _check_gain(reports: list[Report]) -> None:
    gains = [gain for report in reports if (gain := report["gain"]) is not None]
    if len(gains) != len(reports):
        raise DidNotHold("a report has no gain, though its baseline was trained")
    if sum(gains) <= 0:
        raise DidNotHold("distilling did not help: on average, the students alone were as good")


def _where_next(console: Console, kept: Path | None, seconds: float) -> None:
    home = f" --home {kept / 'data'}" if kept else ""
    say(
        console,
        "",
        f"Everything held, in {seconds:.0f} s. From here:",
        f"  ./run up{home}    serve for real: the page at http://127.0.0.1:8000/, the API's manual at /docs",
        "  ./run distillery submit --help    your own teacher, data and student",
    )


@contextmanager
def _home(to: Path, keep: bool) -> Iterator[Path]:
    """Where the server keeps its things: beside the student if they are to stay, else a folder that goes away."""
    to.mkdir(parents=True, exist_ok=True)
    if keep:
        yield to / "data"
        return
    home = Path(tempfile.mkdtemp(prefix="distillery-demo-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _terminates_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: the server is stopped on the way out."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, interrupt) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
