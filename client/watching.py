"""Follow a job to its end: a live bar on a terminal, one line an event elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from base.jobs import TERMINAL
from client import tables
from client.answers import Event, Job
from client.errors import DistilleryError
from client.sdk import Distillery

POLL_S = 0.4
PATIENCE_S = 120.0
QUIET = ("queued", "phase", "checkpoint", "claimed", "succeeded", "failed")
"""What the bar shows anyway."""


def follow(distillery: Distillery, job_id: str, console: Console, title: str | None = None) -> Job:
    """The job once it has ended. KeyboardInterrupt leaves the job alone."""
    if not console.is_terminal:
        say(console, f"{title or 'job'}: {job_id}")
        return _lines(distillery, job_id, console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = _Bar(distillery, job_id, progress, title)
        while not bar.look():
            time.sleep(POLL_S)
    return bar.job


def _lines(distillery: Distillery, job_id: str, console: Console) -> Job:
    for event in distillery.watch(job_id):
        if event["type"] != "checkpoint":
            say(console, event_line(event))
    return distillery.job(job_id)


class _Bar:
    """One job on one line; what is out of the ordinary scrolls by above it."""

    def __init__(self, distillery: Distillery, job_id: str, progress: Progress, title: str | None) -> None:
        self.distillery, self.progress, self.title = distillery, progress, title
        self.job = distillery.job(job_id)
        self.seen = 0
        self.heard = time.monotonic()
        self.accuracy: float | None = None
        self.measured_at: tuple[str, int] | None = None
        self.task: TaskID = progress.add_task(self._description("waiting"), total=100, told="")

    def look(self) -> bool:
        """Draw the job as it stands; True once it has ended. A server that is away for a while is waited for."""
        try:
            self.job = self.distillery.job(self.job["id"])
            self._tell_events()
            self._measure()
            self.heard = time.monotonic()
        except DistilleryError as error:
            if not error.passes or time.monotonic() - self.heard > PATIENCE_S:
                raise
            self._draw("server away")
            return False
        self._draw(tables.doing(self.job))
        return self.job["status"] in TERMINAL

    def _tell_events(self) -> None:
        for event in self.distillery.events(self.job["id"], after=self.seen):
            self.seen = event["seq"]
            if event["type"] not in QUIET:
                say(self.progress.console, event_line(event))

    def _measure(self) -> None:
        """Fetch the newest accuracy, once an epoch."""
        now = self.job["progress"] or {}
        trial, epoch = now.get("trial", ""), now.get("epoch", 0)
        if (trial, epoch) == self.measured_at:
            return
        curves = self.distillery.metrics(self.job["id"], ["validation/accuracy"], max_points=2).get(trial, {})
        points = curves.get("validation/accuracy", [])
        self.accuracy = points[-1][1] if points else None
        self.measured_at = trial, epoch

    def _draw(self, doing: str) -> None:
        done = 100 if self.job["status"] == "succeeded" else (self.job["progress"] or {}).get("percent", 0)
        told = progress_words(self.job, self.accuracy)
        self.progress.update(self.task, completed=done, description=self._description(doing), told=told)
        self.progress.refresh()

    def _description(self, doing: str) -> str:
        return escape(f"{self.title or self.job['name'] or self.job['id']}: {doing}")


def progress_words(job: Job, accuracy: float | None) -> str:
    """`epoch 7/15, validation accuracy 91.2 %, 8 s left`, behind the name of a trial that is not the student's own; of
    a waiting job why it waits, of a done one what its student reaches on the test images."""
    if job["result"] is not None:
        return f"test accuracy {tables.percent([job['result']['student']['accuracy']])}"
    if job["waiting"] is not None:
        return tables.waits(job)
    progress = job["progress"] or {}
    words = []
    if (trial := progress.get("trial", "student")) != "student":
        words.append(tables.title(trial))
    if "epoch" in progress and "epochs" in progress:
        words.append(f"epoch {progress['epoch']}/{progress['epochs']}")
    if accuracy is not None:
        words.append(f"validation accuracy {100 * accuracy:.1f} %")
    left = progress.get("seconds_remaining")
    if left is not None and job["phase"] == "training":
        words.append(f"{duration(left)} left")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def event_line(event: Event) -> str:
    """`13:05:07  claimed  attempt=1  device=cpu`; of what has the event's own name, the value alone."""
    told = [
        _told(value) if name == event["type"] else f"{name}={_told(value)}"
        for name, value in event["data"].items()
        if value is not None
    ]
    return "  ".join([event["at"][11:19], event["type"], *told])


def _told(value: object) -> str:
    """Lists of things by their names alone."""
    if isinstance(value, list):
        return ",".join(str(item["name"]) if isinstance(item, dict) and "name" in item else str(item) for item in value)
    return str(value)


def say(console: Console, *lines: str, style: str | None = None) -> None:
    """Lines as they are: neither markup nor wrapping."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True, style=style)


def verdict(job: Job, console: Console, hint: Callable[[Job], str] | None = None) -> bool:
    """Show how a job ended; True for success."""
    if job["status"] == "succeeded":
        if job["result"] is not None:
            console.print(tables.proof([job["result"]]))
            say(console, tables.gain_sentence([job["result"]]))
        if hint:
            say(console, hint(job))
        return True
    say(console, f"job {job['id']} {job['status']}", *tables.failure_lines(job), style="red")
    return False
