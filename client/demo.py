"""The demo: train a teacher, distil it, and check the result, all over REST.

The data are the handwritten digits that come with the engine (1,797 images of 8 x 8). The students train for 10 epochs
with the default recipe. On data this easy, 30 epochs let the student alone nearly catch up: the demo shows the gain on
a small budget, and prints that. The seeds are fixed; several runs are shown with their standard deviation.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from base.defaults import DEFAULT_URL
from base.references import STUDENT_FILE
from base.wire import JobView, Report
from client import tables
from client.errors import DistilleryError
from client.local_server import LocalServer, local_server
from client.sdk import Distillery
from client.terminal import follow, print_lines, print_result

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


SCRIPT = Path(__file__).with_name("files") / "use_student.py"
"""The student's network in plain PyTorch, for users to copy."""
TEST_IMAGES = "digits-test.safetensors"


class CheckFailed(Exception):
    """A check of the demo failed."""


def demo(console: Console, *, seeds: int, to: Path, keep: bool) -> int:
    """Run the demo. Returns 0 if every check passed, 1 if not, 130 if interrupted. No process is left running."""
    began = time.monotonic()
    print_lines(
        console,
        "A complete distillation over REST: a server of its own, a teacher trained from nothing, students 50 times",
        "smaller, and the same students without the teacher. It takes half a minute, more on a busy machine.",
        "",
    )
    try:
        with _termination_as_interrupt(), _home(to, keep) as home, local_server(home, slots=seeds) as server:
            print_lines(console, f"The server is at {server.url} while the demo runs.")
            try:
                _distil(console, server, home, seeds, to)
            except (CheckFailed, DistilleryError):
                print_lines(console, "", "The end of the server's log:", *server.log_tail(), style="dim")
                raise
    except KeyboardInterrupt:
        print_lines(console, "", "Interrupted: the server is stopped, nothing is left running.")
        return 128 + signal.SIGINT
    except CheckFailed as failure:
        print_lines(console, "", f"The demo failed: {failure}", style="red")
        return 1
    except DistilleryError as failure:
        print_lines(console, "", "The demo failed:", *failure.lines(), style="red")
        return 1
    home_option = f" --home {to / 'data'}" if keep else ""
    print_lines(
        console,
        "",
        f"All checks passed, in {time.monotonic() - began:.0f} s. Next:",
        f"  ./run up{home_option}    start a server: the page at {DEFAULT_URL}/, the API's manual at /docs",
        "  ./run distillery submit --help    your own teacher, data and student",
    )
    return 0


def _distil(console: Console, server: LocalServer, home: Path, seeds: int, to: Path) -> None:
    with Distillery(server.url) as distillery:
        teacher = _succeeded(follow(distillery, distillery.submit(TEACHER)["id"], console, "teacher"), console)
        jobs = [distillery.submit(student_spec(teacher["id"], seed)) for seed in range(1, seeds + 1)]
        students: list[JobView] = []
        # The first student is measured while the others still train.
        with ThreadPoolExecutor(1) as beside:
            for number, job in enumerate(jobs, 1):
                students.append(
                    _succeeded(follow(distillery, job["id"], console, f"student {number} of {seeds}"), console)
                )
                if number == 1:
                    path = distillery.download(job["id"], to=to / STUDENT_FILE)
                    measuring = beside.submit(measure_in_plain_torch, path, home / "cache")
        reports = [report_of(job) for job in students]
        console.print()
        console.print(tables.report_table(reports))
        print_lines(console, *tables.proof_lines(reports), _size_sentence(reports[0]), BUDGET, "")
        _check_student(distillery, students[0], path, measuring.result(), console)
    _check_gain(reports)


def _succeeded(job: JobView, console: Console) -> JobView:
    if job["status"] != "succeeded":
        print_result(job, console)
        raise CheckFailed(f"job {job['id']} ({job['name']}) {job['status']}")
    return job


def report_of(job: JobView) -> Report:
    if job["result"] is None:
        raise CheckFailed(f"job {job['id']} succeeded without a report")
    return job["result"]


def _size_sentence(report: Report) -> str:
    teacher, student = report["teacher"], report["student"]
    if teacher is None:
        raise CheckFailed("the report of a distillation has no teacher")
    times = teacher["parameters"] / student["parameters"]
    return f"The student has {times:.0f} times fewer parameters than its teacher."


def _check_student(
    distillery: Distillery, job: JobView, path: Path, measured: dict[str, int], console: Console
) -> None:
    """Compare with its job a student's file, as `use_student.py` measured it: that contains nothing of Distillery."""
    digest = next(file["sha256"] for file in distillery.artifacts(job["id"]) if file["name"] == STUDENT_FILE)
    print_lines(
        console, f"Downloaded {path} ({path.stat().st_size:,} bytes), sha256 {digest}, as listed by the service."
    )
    reported = report_of(job)["student"]
    if reported["accuracy"] is None:
        raise CheckFailed("the report does not say how accurate the student is")
    comparison = check_measured(measured, reported["accuracy"], reported["parameters"])
    print_lines(
        console,
        f"Loaded in plain PyTorch in another process: {measured['parameters']:,} parameters, "
        f"{100 * measured['correct'] / measured['test_samples']:.1f} % on {measured['test_samples']} test images, "
        f"{comparison}.",
        f"That process ran {path.with_name(SCRIPT.name)}, which needs torch and safetensors only: it is yours to copy.",
    )


def measure_in_plain_torch(student: Path, cache: Path) -> dict[str, int]:
    """Return parameters, correct answers and number of test images, as `use_student.py` counts them.

    The script and the test images are put beside the student. Only the images come from the engine, because the split
    of the digits is its own. The script runs in Python's isolated mode: it cannot import the service's source.
    """
    script = shutil.copy(SCRIPT, student.with_name(SCRIPT.name))
    images = student.with_name(TEST_IMAGES)
    _run([sys.executable, "-m", "kdcore", "images", str(images), "--dataset", "digits", "--cache", str(cache)])
    measured: dict[str, int] = json.loads(_run([sys.executable, "-I", str(script), str(student), str(images)]))
    return measured


def _run(command: list[str]) -> str:
    """Return what a command printed. Raises CheckFailed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckFailed(f"the student could not be measured:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_measured(measured: dict[str, int], accuracy: float, parameters: int) -> str:
    """Return how the measured student compares with the report: "as in the report", or that one image differs.

    Raises CheckFailed if more differs.
    """
    if measured["parameters"] != parameters:
        raise CheckFailed(f"the student has {measured['parameters']} parameters, the report has {parameters}")
    reported = round(accuracy * measured["test_samples"])
    counts = f"{measured['correct']} of {measured['test_samples']} answers are right, in the report {reported}"
    if measured["correct"] == reported:
        return "as in the report"
    # On another device or with another number of threads, sums are rounded differently, which can turn one answer.
    if abs(measured["correct"] - reported) > 1:
        raise CheckFailed(f"the student differs from its report: {counts}")
    return f"one image apart from the report ({counts}), which rounding can cause"


def _check_gain(reports: list[Report]) -> None:
    gains = [gain for report in reports if (gain := report["gain"]) is not None]
    if len(gains) != len(reports):
        raise CheckFailed("a report has no gain, though its baseline was trained")
    if sum(gains) <= 0:
        raise CheckFailed("distillation did not help: on average, the students alone were as good")


@contextmanager
def _home(to: Path, keep: bool) -> Iterator[Path]:
    """Yield the folder of the server's data: beside the student if it is kept, else a temporary one."""
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
def _termination_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM and a closed terminal like Ctrl-C, so that the server is stopped first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, interrupt) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
