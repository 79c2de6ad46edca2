"""The output of the command line: lines, JSON, tables, progress bars, and the progress of a job."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from base.jobs import TERMINAL
from base.text import shown
from base.wire import Benchmark, EventView, JobView, TeacherCheck, WarningView
from client import tables
from client.errors import DistilleryError
from client.sdk import Distillery
from client.tables import duration
from client.transfer import OnProgress

POLL_S = 0.4
MAX_OUTAGE_S = 120.0
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN_BY_BAR = ("queued", "phase", "checkpoint", "claimed", "succeeded", "failed", "warning", "teacher_check")
"""Types of events that are not printed above the bar: it shows their content, or they are printed from the job."""


def output() -> Console:
    """Return standard output. If it is not a terminal, it is wide enough for a row on one line."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=200)


def visible(text: str) -> str:
    """Return text in which control characters, and those that change the direction, are escapes: names of classes come
    from files, and must not command a terminal."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell(line: str) -> None:
    """Print a line of the server's on standard error."""
    typer.echo(visible(line), err=True)


def print_lines(console: Console, *lines: str, style: str | None = None) -> None:
    """Print lines without markup and wrapping."""
    for line in lines:
        console.print(visible(line), markup=False, highlight=False, soft_wrap=True, style=style)


def print_warnings(warnings: Iterable[WarningView], about: str = "") -> None:
    """Print warnings on standard error, a block of lines each; also when standard output is JSON for a program."""
    for warning in warnings:
        for line in tables.warning_lines(warning, about):
            tell(line)


class NewWarnings:
    """Prints each warning of a job once, however often the job is read."""

    def __init__(self, shown: Iterable[WarningView] = ()) -> None:
        """`shown` are those that the user has seen already."""
        self.shown = list(shown)

    def print(self, warnings: Iterable[WarningView]) -> None:
        new = [warning for warning in warnings if warning not in self.shown]
        self.shown += new
        print_warnings(new)


def print_json(answer: Any) -> None:
    text = json.dumps(answer, indent=2, ensure_ascii=False)
    # JSON escapes the control characters of ASCII, and none of the others that a terminal obeys.
    typer.echo(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_list(rows: list[Any], as_json: bool, to_table: Callable[[Iterable[Any]], Any], if_empty: str) -> None:
    if as_json:
        print_json(rows)
    elif rows:
        output().print(to_table(rows))
    else:
        typer.echo(if_empty, err=True)


class _Amount(ProgressColumn):
    """Bytes of a transfer, or images of an inspection."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._images = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        return (self._images if task.fields["images"] else self._bytes).render(task)


class TransferBars:
    """Progress bars of uploads, downloads and inspections, on standard error and only on a terminal. They are removed
    at the end."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Amount())
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def add(self, name: str) -> OnProgress:
        """Add the bar of a file. Returns the callback that moves it."""
        return self._add(name, images=False)

    def add_inspection(self, name: str) -> OnProgress:
        """Add the bar of an inspection, which counts images."""
        return self._add(f"reading {name}", images=True)

    def _add(self, name: str, *, images: bool) -> OnProgress:
        self.progress.start()
        bar = self.progress.add_task(shown(name), total=None, images=images)
        return lambda done, total: self.progress.update(bar, completed=done, total=total)


def follow(
    distillery: Distillery,
    job_id: str,
    console: Console,
    title: str | None = None,
    shown: Iterable[WarningView] = (),
) -> JobView:
    """Show a job until it has ended, and return it: a bar on a terminal, else one line for each event.

    Its warnings go to standard error, except those that were shown before. KeyboardInterrupt does not affect the job.
    """
    warnings = NewWarnings(shown)
    if not console.is_terminal:
        print_lines(console, f"{title or 'job'}: {job_id}")
        for event in distillery.watch(job_id):
            if event["type"] == "warning":
                warnings.print(distillery.job(job_id)["warnings"])
            elif event["type"] != "checkpoint":
                print_lines(console, event_line(event))
        job = distillery.job(job_id)
        warnings.print(job["warnings"])
        return job
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[details]}"),
    )
    # Standard error is drawn above the bar only if it is the same terminal, not if it is a file.
    with Progress(*columns, console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty()) as progress:
        bar = _JobBar(distillery, job_id, progress, title, warnings)
        while not bar.update():
            time.sleep(POLL_S)
    return bar.job


class _JobBar:
    """The bar of one job. Unusual events, its warnings and its teacher's accuracy are printed above it."""

    def __init__(
        self, distillery: Distillery, job_id: str, progress: Progress, title: str | None, warnings: NewWarnings
    ) -> None:
        self.distillery, self.progress, self.title, self.warnings = distillery, progress, title, warnings
        self.teacher_is_shown = False
        self.job = distillery.job(job_id)
        self.last_seq = 0
        self.answered_at = time.monotonic()
        self.accuracy: float | None = None
        self.measured_at: tuple[str, int] | None = None
        self.task: TaskID = progress.add_task(self._description("waiting"), total=100, details="")

    def update(self) -> bool:
        """Draw the job's state. Returns True if it has ended. An outage of the server is tolerated for a while."""
        try:
            self.job = self.distillery.job(self.job["id"])
            self._print_events()
            self._print_teacher()
            self.warnings.print(self.job["warnings"])
            self._fetch_accuracy()
            self.answered_at = time.monotonic()
        except DistilleryError as error:
            if not error.transient or time.monotonic() - self.answered_at > MAX_OUTAGE_S:
                raise
            self._draw("server unreachable")
            return False
        self._draw(tables.phase_text(self.job))
        return self.job["status"] in TERMINAL

    def _print_events(self) -> None:
        for event in self.distillery.events(self.job["id"], after=self.last_seq):
            self.last_seq = event["seq"]
            if event["type"] not in SHOWN_BY_BAR:
                print_lines(self.progress.console, event_line(event))

    def _print_teacher(self) -> None:
        check = self.job["teacher_check"]
        if check is not None and not self.teacher_is_shown:
            self.teacher_is_shown = True
            print_lines(self.progress.console, f"teacher: {tables.teacher_check_text(check)}")

    def _fetch_accuracy(self) -> None:
        """Fetch the newest accuracy, once for each epoch."""
        now = self.job["progress"] or {}
        trial, epoch = now.get("trial", ""), now.get("epoch", 0)
        if (trial, epoch) == self.measured_at:
            return
        curves = self.distillery.metrics(self.job["id"], ["validation/accuracy"], max_points=2).get(trial, {})
        points = curves.get("validation/accuracy", [])
        self.accuracy = points[-1][1] if points else None
        self.measured_at = trial, epoch

    def _draw(self, state: str) -> None:
        done = 100 if self.job["status"] == "succeeded" else (self.job["progress"] or {}).get("percent", 0)
        details = progress_text(self.job, self.accuracy)
        self.progress.update(self.task, completed=done, description=self._description(state), details=details)
        self.progress.refresh()

    def _description(self, state: str) -> str:
        return escape(shown(f"{self.title or self.job['name'] or self.job['id']}: {state}"))


def progress_text(job: JobView, accuracy: float | None) -> str:
    """Return `epoch 7/15, validation accuracy 91.2 %, 8 s left`, with the trial's name unless it is the student's.

    For a waiting job it is the reason of the wait, for a succeeded one the accuracy on the test images.
    """
    if job["result"] is not None:
        return f"test accuracy {tables.accuracy_text(job)}"
    if job["waiting"] is not None:
        return tables.waiting_text(job)
    progress = job["progress"] or {}
    parts = []
    if (trial := progress.get("trial", "student")) != "student":
        parts.append(tables.display_name(trial))
    if "epoch" in progress and "epochs" in progress:
        parts.append(f"epoch {progress['epoch']}/{progress['epochs']}")
    if accuracy is not None:
        parts.append(f"validation accuracy {100 * accuracy:.1f} %")
    left_s = progress.get("seconds_remaining")
    if left_s is not None and job["phase"] == "training":
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


def event_line(event: EventView) -> str:
    """Return `13:05:07  claimed  attempt=1  device=cpu`. A value with the name of the event's type is printed alone.

    The measurement of the teacher is a sentence: `13:05:08  teacher: 70.2 % on 1,000 of 10,000 test images`.
    """
    if event["type"] == "teacher_check" and TeacherCheck.__required_keys__ <= event["data"].keys():
        check = cast(TeacherCheck, event["data"])
        return f"{event['at'][11:19]}  teacher: {tables.teacher_check_text(check)}"
    fields = [
        _value_text(value) if name == event["type"] else f"{name}={_value_text(value)}"
        for name, value in event["data"].items()
        if value is not None
    ]
    return "  ".join([event["at"][11:19], event["type"], *fields])


def _value_text(value: object) -> str:
    """Return the value as text: an error as code and message, objects in a list by their names."""
    if isinstance(value, dict) and "message" in value:
        return f"{value['code']}: {value['message']}"
    if isinstance(value, list):
        return ",".join(str(item["name"]) if isinstance(item, dict) and "name" in item else str(item) for item in value)
    return str(value)


def print_report(job: JobView, console: Console) -> None:
    """Print the report of a job that has one."""
    if job["result"] is None:
        return
    if job["kind"] == "evaluation":
        print_lines(console, *tables.evaluation_lines(job))
    elif job["kind"] == "export":
        print_lines(console, *tables.export_lines(job))
        _print_files(tables.export(job)["files"], console)
    elif job["kind"] == "benchmark":
        figures = cast(Benchmark, job["result"])
        print_lines(console, *tables.benchmark_lines(figures))
        _print_files(figures["files"], console)
    else:
        console.print(tables.report_table([job["result"]]))
        print_lines(console, *tables.proof_lines([job["result"]]))
        if files := job["result"].get("files"):
            _print_files(files, console)


def _print_files(files: Sequence[Mapping[str, Any]], console: Console) -> None:
    console.print(tables.files_table(files))
    print_lines(console, *tables.busy_lines(files))


def print_result(job: JobView, console: Console, hint: str | None = None) -> bool:
    """Print how a job ended, and for a success its report and a hint. Returns True for a success."""
    if job["status"] != "succeeded":
        print_lines(console, f"job {job['id']} {job['status']}", *tables.failure_lines(job), style="red")
        return False
    print_lines(console, *tables.verdict_lines(job))
    print_report(job, console)
    if hint:
        print_lines(console, hint)
    return True
