"""What the command line shows: answers as tables and sentences."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from rich.box import HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.table import Table
from rich.text import Text

from client.answers import Attempt, Collection, Dataset, Job, Measured, Model, Report, Storage

TITLES = {"alone": "student alone", "last": "last generation"}
COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "paused": "yellow"}


def table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ("id",), box: Box = SIMPLE_HEAD) -> Table:
    """A table. Columns named in `whole` are never broken: ids are there to be copied."""
    made = Table(header_style="bold", box=box, pad_edge=box is not SIMPLE_HEAD)
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole
        )
    return made


def row(to: Table, *cells: object) -> None:
    """Cells are text, never markup: names come from other people."""
    to.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in cells))


def proof(reports: Sequence[Report]) -> Table:
    """Teacher, student and the same student alone, then all others. Of several runs, means with the standard deviation.

    Agreement: the share of test images on which a student says what the teacher says.
    """
    figures = ("parameters", "bytes", "accuracy", "agreement")
    made = table("", "network", *figures, right=figures, box=HEAVY_HEAD)
    for name, models in _all_models(reports):
        one = models[0]
        row(
            made,
            Text(title(name), style="bold" if name == "student" else ""),
            one["architecture"],
            f"{one['parameters']:,}",
            f"{one['bytes']:,}",
            percent([model["accuracy"] for model in models]),
            percent(_mean(_agreements(models))),
        )
    return made


def _all_models(reports: Sequence[Report]) -> Iterator[tuple[str, list[Measured]]]:
    """Each model by its name, once for each report that has it: the three that matter first, then all others."""
    first: tuple[Literal["teacher", "student", "alone"], ...] = ("teacher", "student", "alone")
    for name in first:
        if models := [model for report in reports if (model := report[name]) is not None]:
            yield name, models
    others = [report.get("models", {}) for report in reports]
    for other in dict.fromkeys(name for models in others for name in models):
        yield other, [models[other] for models in others if other in models]


def title(name: str) -> str:
    """A model or trial in words: `student alone`, `assistant 1`; of the stage `student/fsp`: `student, fsp stage`."""
    trial, _, stage = name.partition("/")
    told = TITLES.get(trial, trial.replace("-", " "))
    return f"{told}, {stage.replace('_', ' ')} stage" if stage else told


def _agreements(models: Iterable[Measured]) -> list[float]:
    return [agreement for model in models if (agreement := model["agreement"]) is not None]


def _mean(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values)] if values else []


def percent(fractions: Sequence[float]) -> str:
    """`94.2 %`, or `94.2 ± 0.8 %` where the values differ."""
    if not fractions:
        return "–"
    mean, spread = 100 * statistics.fmean(fractions), 100 * _spread(fractions)
    return f"{mean:.1f} ± {spread:.1f} %" if spread else f"{mean:.1f} %"


def gain_sentence(reports: Sequence[Report]) -> str:
    """What distilling was worth: the mean, and how far single runs lie apart."""
    gains = [100 * gain for report in reports if (gain := report["gain"]) is not None]
    if not gains and all(report["teacher"] is None and not report.get("models") for report in reports):
        return "Trained on labels alone: there was no teacher."
    if not gains:
        return "No baseline was trained, so what distilling was worth is not known (baseline: train)."
    one_image = 100 / reports[0]["test_samples"]
    scale = f"{reports[0]['test_samples']} test images; one image is {one_image:.2f} points"
    if len(gains) == 1:
        return f"Gain over the same student alone: {gains[0]:+.1f} points of accuracy, one run ({scale})."
    runs = ", ".join(f"{gain:+.1f}" for gain in gains)
    mean, spread = statistics.fmean(gains), _spread(gains)
    return f"Gain over the same student alone: {mean:+.1f} ± {spread:.1f} points of accuracy, runs {runs} ({scale})."


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def job_list(jobs: Iterable[Job]) -> Table:
    made = table(
        "id",
        "status",
        "accuracy",
        "age",
        "method",
        "name",
        right=("accuracy",),
        whole=("id", "status", "accuracy", "age", "method"),
    )
    for job in jobs:
        result = job["result"]
        accuracy = percent([result["student"]["accuracy"]]) if result else ""
        row(made, job["id"], status(job), accuracy, age(job["created_at"]), job["method"], job["name"])
    return made


def status(job: Job) -> Text:
    """In one phrase: the status, and what it leaves open: why it waits, the percent, the error."""
    told: str = job["status"]
    if job["waiting"] is not None:
        reason = job["waiting"]["reason"]
        told += f", number {job['queue_position']}" if reason == "behind_others" else f", {reason.replace('_', ' ')}"
    if job["error"] is not None:
        told += f": {job['error']['code']}"
    if job["status"] == "running" and "percent" in (progress := job["progress"] or {}):
        told += f" {progress['percent']:.0f} %"
    if job["requested"] is not None:
        told += f" ({job['requested']} asked)"
    return Text(told, style=COLOURS.get(job["status"], ""))


def doing(job: Job) -> str:
    """One word or two: the phase of a running job, else its status."""
    if job["status"] != "running":
        return job["status"]
    return (job["phase"] or "starting").replace("_", " ")


def waits(job: Job) -> str:
    """Why a queued job has not started, and until when, where that is known; else nothing."""
    waiting = job["waiting"]
    if waiting is None:
        return ""
    return waiting["message"] + (f", until {waiting['until']}" if waiting["until"] else "")


def job_facts(job: Job) -> Table:
    made = Table.grid(padding=(0, 2))
    facts: list[tuple[str, object]] = [
        ("id", job["id"]),
        ("name", job["name"]),
        ("status", status(job)),
        ("waits", waits(job)),
        ("phase", job["phase"]),
        ("method", job["method"]),
        ("priority", job["priority"]),
        ("attempts without progress", f"{job['attempts_without_progress']} of {job['max_attempts']}"),
        ("checkpoint", f"step {job['checkpoint_step']}" if job["checkpoint_step"] is not None else None),
        ("deadline", job["deadline_at"]),
        ("created", job["created_at"]),
        ("started", job["started_at"]),
        ("finished", job["finished_at"]),
        ("possible now", ", ".join(job["allowed_actions"])),
    ]
    for name, fact in facts:
        if fact:
            row(made, Text(name, style="dim"), fact)
    return made


def attempt_list(attempts: Iterable[Attempt]) -> Table:
    """Numbered as their logs are."""
    figures = ("attempt", "from step", "saved step")
    made = table(*figures, "ended", "began at", "ended at", "device", "worker", right=figures, whole=())
    for one in attempts:
        steps = (one["first_step"] or 0, one["last_step"])
        times = (one["started_at"], one["ended_at"])
        row(made, one["attempt"], *steps, one["how"] or "runs", *times, one["device"], one["worker"])
    return made


def worker_list(workers: Iterable[dict[str, Any]]) -> Table:
    made = table("worker", "takes jobs", "slots", "last heard", whole=("worker",))
    for one in workers:
        slots = [f"{slot['name']} {slot['job'] or slot['state'].replace('_', ' ')}" for slot in one["devices"]]
        takes = Text("yes", style="green") if one["alive"] else Text("no", style="red")
        row(made, one["id"], takes, ", ".join(slots), one["seen_at"])
    return made


def usage(storage: Storage) -> Table:
    made = table("kept", "files", "bytes", right=("files", "bytes"))
    for kind, used in storage["usage"].items():
        row(made, kind, f"{used['files']:,}", f"{used['bytes']:,}")
    return made


def room(storage: Storage) -> str:
    free, floor = storage["free_bytes"], storage["min_free_bytes"]
    short = "" if free >= floor else ": no job is started"
    return f"{free:,} bytes are free, {floor:,} are needed to start a job{short}"


def collection_list(collections: Iterable[Collection]) -> Table:
    made = table("collected at", "removed", "fault")
    for one in collections:
        removed = [
            f"{tally['count']} {kind.replace('_', ' ')} ({tally['bytes']:,} bytes)"
            for kind, tally in (one["removed"] or {}).items()
        ]
        told = ", ".join(removed) or "nothing"
        row(made, one["began_at"], told if one["ended_at"] else "has not ended", one["error"])
    return made


def failure_lines(job: Job) -> list[str]:
    error = job["error"]
    if error is None:
        return []
    again = "the same spec may succeed later: distillery retry" if error["retryable"] else "retrying alone won't help"
    hint = [f"  hint: {error['hint']}"] if error["hint"] else []
    return [
        f"{error['code']}: {error['message']}",
        *hint,
        f"  {again}; what it printed: distillery show {job['id']} --logs",
    ]


def model_list(models: Iterable[Model]) -> Table:
    made = table("name", "architecture", "classes", "parameters", "id", right=("classes", "parameters"))
    for model in models:
        facts = model["facts"]
        row(made, model["name"], facts["architecture"], facts["num_classes"], f"{facts['parameters']:,}", model["id"])
    return made


def dataset_list(datasets: Iterable[Dataset]) -> Table:
    made = table("name", "classes", "images", "train", "test", "id", right=("classes", "train", "test"))
    for dataset in datasets:
        facts = dataset["facts"]
        height, width = facts["image_size"]
        labelled = facts.get("labelled", True)
        images = f"{facts['channels']} x {height} x {width}"
        row(
            made,
            dataset["name"],
            facts["num_classes"] if labelled else "no labels",
            images,
            f"{facts['train']:,}",
            f"{facts['test']:,}",
            dataset["id"] or "built in",
        )
    return made


def method_list(methods: Iterable[dict[str, Any]]) -> Table:
    made = table("method", "matches", "paper")
    for method in methods:
        row(made, method["name"], method["matches"], method["paper"])
    return made


def architecture_list(architectures: Iterable[dict[str, Any]]) -> Table:
    made = table("architecture", "source", "family", "parameters", right=("parameters",))
    for one in architectures:
        counted = one["parameters_counted"]
        row(made, one["name"], one["source"], one["family"], f"{counted:,}" if counted else "")
    return made


def age(at: str, now: datetime | None = None) -> str:
    """`3 min`, as exactly as one wants to know it."""
    past_s = ((now or datetime.now(UTC)) - datetime.fromisoformat(at)).total_seconds()
    for unit, seconds in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if past_s >= seconds:
            return f"{past_s // seconds:.0f} {unit}"
    return "now"
