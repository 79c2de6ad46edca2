"""The command line's output: tables and sentences made of the service's answers."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast

from rich.box import HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from base.text import shown
from base.wire import (
    BUSY,
    ArtifactView,
    AttemptView,
    AuditView,
    Benchmark,
    CollectionView,
    Dataset,
    DeliveryView,
    Estimate,
    Evaluation,
    Export,
    Interval,
    JobSummary,
    JobView,
    KeyView,
    LimitsView,
    LimitView,
    Measured,
    Model,
    PredictionAnswer,
    ProjectView,
    Registered,
    Report,
    StorageView,
    Suggestions,
    TeacherCheck,
    UploadView,
    WarningView,
    WebhookView,
    WorkerView,
)

NO_FACTS = (
    *("progress", "requested", "queue_position", "not_before", "max_attempts"),
    *("spec", "resolved_spec", "result", "error", "warnings", "links"),
)
"""Fields of a job that are part of another field's text, or are printed below the facts."""

SHOWN_UNMEASURED = 6
"""So many networks without figures are named under suggestions."""
WORST_CLASSES = 3
"""So many classes are named under the result of an evaluation."""
COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "paused": "yellow"}


def _table(
    *columns: str, right: Sequence[str] = (), unbroken: Sequence[str] = ("id",), box: Box = SIMPLE_HEAD
) -> Table:
    """Return a table. Cells of `unbroken` columns, such as ids, stay on one line, so that they can be copied."""
    table = Table(header_style="bold", box=box, pad_edge=box is not SIMPLE_HEAD)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in unbroken)
    return table


def _add_row(table: Table, *cells: object) -> None:
    """Add a row. Cells are text, never rich's markup, and of one line: names come from users."""
    table.add_row(
        *(cell if isinstance(cell, Text) else Text("" if cell is None else shown(str(cell))) for cell in cells)
    )


# Jobs


def job_table(jobs: Iterable[JobSummary]) -> Table:
    """Return the table of a list. The gap closed and the labels have a column if any of the jobs has one."""
    listed = list(jobs)
    proven = any(_gap_text(job) for job in listed)
    labelled = any(job.get("labels") for job in listed)
    gaps, labels = (("gap closed",) if proven else ()), (("labels",) if labelled else ())
    columns = ("id", "status", *gaps, "accuracy", "age", "method", *labels, "name")
    unbroken = ("id", "status", *gaps, "accuracy", "age", "method")
    table = _table(*columns, right=(*gaps, "accuracy"), unbroken=unbroken)
    for job in listed:
        accuracy = "" if job["figures"] is None else percent([job["figures"]["accuracy"]])
        gap = (_gap_text(job),) if proven else ()
        named = (_fact_text(job["labels"]),) if labelled else ()
        _add_row(
            table, job["id"], status_text(job), *gap, accuracy, age(job["created_at"]), job["method"], *named,
            job["name"],
        )  # fmt: skip
    return table


def _gap_text(job: JobSummary) -> str:
    """Return the gap closed of a job that states one, else ""."""
    gap = None if job["figures"] is None else job["figures"].get("gap_closed")
    return "" if gap is None else f"{100 * gap:.0f} %"


def accuracy_text(job: JobView) -> str:
    """Return the accuracy that a job has measured: of its student, or of the evaluated model. "" before that."""
    if job["result"] is None:
        return ""
    if job["kind"] == "benchmark":
        return ""
    if job["kind"] == "export":
        return percent([export(job)["measured"]["accuracy"]])
    measured = evaluation(job) if job["kind"] == "evaluation" else job["result"]["student"]
    return percent([measured["accuracy"]])


def status_text(job: JobView | JobSummary) -> Text:
    """Return the status, with the reason of a wait, the error, the progress and the requested action."""
    text: str = job["status"]
    if job["waiting"] is not None:
        reason = job["waiting"]["reason"]
        if reason == "behind_others":
            text += f", position {job['queue_position']}"
        else:
            text += ", waits for its teacher" if reason == "teacher" else f", {_words(reason)}"
    if job["error"] is not None:
        text += f": {job['error']['code']}"
    if job["status"] == "running" and "percent" in (progress := job["progress"] or {}):
        text += f" {progress['percent']:.0f} %"
    if job["requested"] is not None:
        text += f" ({job['requested']} requested)"
    return Text(text, style=COLOURS.get(job["status"], ""))


def phase_text(job: JobView) -> str:
    """Return the phase of a running job, or the status of any other job."""
    return _words(job["phase"] or "starting") if job["status"] == "running" else job["status"]


def waiting_text(job: JobView) -> str:
    """Return the reason why a queued job has not started, with the time when it is due; "" for any other job."""
    waiting = job["waiting"]
    if waiting is None:
        return ""
    return waiting["message"] + (f", until {waiting['until']}" if waiting["until"] else "")


def job_facts(job: JobView) -> Table:
    """Return a table of the job's fields that have a value, except those in `NO_FACTS`."""
    table = Table.grid(padding=(0, 2))
    tries = job["attempts_without_progress"]
    sender = job.get("created_by")
    texts: dict[str, object] = {
        "status": status_text(job),
        "waiting": waiting_text(job),
        # The first attempt counts as one until it has saved a checkpoint.
        "attempts_without_progress": f"{tries} of {job['max_attempts']}" if tries > 1 else "",
        "created_by": sender["key_name"] if sender else "",
        "teacher_check": "" if job["teacher_check"] is None else teacher_check_text(job["teacher_check"]),
    }
    for field in JobView.__annotations__:
        if field not in NO_FACTS and (fact := texts.get(field, job.get(field))):
            _add_row(table, Text(_words(field.removesuffix("_at")), style="dim"), _fact_text(fact))
    return table


def _fact_text(fact: object) -> object:
    if isinstance(fact, dict):
        fact = [f"{name}={value}" for name, value in fact.items()]
    return ", ".join(map(str, fact)) if isinstance(fact, list) else fact


def attempt_table(attempts: Iterable[AttemptView]) -> Table:
    """Return a table of a job's attempts. The first column is the number for `/logs?attempt=`."""
    numbers = ("attempt", "from step", "saved step")
    table = _table(*numbers, "outcome", "started at", "ended at", "device", "worker", right=numbers, unbroken=())
    for one in attempts:
        steps = (one["first_step"] or 0, one["last_step"])
        times = (one["started_at"], one["ended_at"])
        _add_row(table, one["attempt"], *steps, one["how"] or "running", *times, one["device"], one["worker"])
    return table


def teacher_check_text(check: TeacherCheck) -> str:
    """Return `70.2 % on 1,000 of 10,000 test images`: the teacher's accuracy before anything was trained."""
    images, all_images = check["images"], check["test_samples"]
    which = f"{images:,} of {all_images:,}" if images < all_images else f"all {images:,}"
    dropped = check.get("dropped")
    left_out = f", {percent([dropped])} of its probability left out" if dropped else ""
    return f"{percent([check['accuracy']])} on {which} test images{left_out}"


def warning_lines(warning: WarningView, about: str = "") -> list[str]:
    """Return a warning as a block of lines: its code, its place and what it is about, its message, its hint."""
    places = ", ".join(place for place in (about, warning["pointer"]) if place)
    heading = f"warning: {warning['code']}" + (f" ({places})" if places else "")
    hint = [f"  hint: {warning['hint']}"] if warning["hint"] else []
    return [heading, f"  {warning['message']}", *hint]


def failure_lines(job: JobView) -> list[str]:
    """Return the error of a failed job, one line each for message, hint and next commands."""
    error = job["error"]
    if error is None:
        return []
    hint = [f"  hint: {error['hint']}"] if error["hint"] else []
    if job["status"] != "failed":
        following = "it is tried again by itself"
    elif error["retryable"]:
        following = f"a retry may help: distillery retry {job['id']}"
    else:
        following = "a retry alone does not help"
    logs = f"; its output: distillery show {job['id']} --logs" if job["started_at"] else ""
    return [f"{error['code']}: {error['message']}", *hint, f"  {following}{logs}"]


# Reports

SHORTEST_S = 0.05
"""What took less is left out of the line of timings."""


def verdict_lines(job: JobView) -> list[str]:
    """Return the sentence that sums up the report of a job; none for an evaluation, or of an earlier version."""
    verdict = None if job["result"] is None else job["result"].get("verdict")
    return [str(verdict)] if verdict else []


def timing_lines(job: JobView) -> list[str]:
    """Return what took the time of a job that has succeeded, in a line; none of an earlier version."""
    timings: Any = None if job["result"] is None else job["result"].get("timings")
    if not timings:
        return []
    parts = []
    for name, value in timings.items():
        trials = value if isinstance(value, dict) else {"": value}
        seconds = sum(trials.values())
        each = ", ".join(f"{trial} {_short(one)}" for trial, one in trials.items())
        if seconds >= SHORTEST_S:
            text = f"{name.replace('_', ' ')} {_short(seconds)}"
            parts.append(f"{text} ({each})" if len(trials) > 1 else text)
    return [f"time: {', '.join(parts)}"] if parts else []


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def evaluation(job: JobView) -> Evaluation:
    """Return the result of a succeeded job of the kind `evaluation`."""
    return cast(Evaluation, job["result"])


def evaluation_lines(job: JobView) -> Iterator[str]:
    """Yield the figures of an evaluation: accuracy with its interval, top-5, loss, and the classes with the least."""
    result = evaluation(job)
    low, high = (f"{100 * bound:.1f}" for bound in result["interval"])
    images = f"{result['test_samples']:,} test images"
    yield f"accuracy {percent([result['accuracy']])} (95 % interval {low} to {high} %, {images})"
    yield f"top-5 accuracy {percent([result['accuracy_top5']])}, loss {result['loss']:.4g}"
    yield f"{result['architecture']}, {result['parameters']:,} parameters"
    measured = [(one["accuracy"], one["name"]) for one in result["per_class"] if one["accuracy"] is not None]
    if len(measured) > 1:
        worst = sorted(measured, key=lambda one: one[0])[:WORST_CLASSES]
        yield "least accurate classes: " + ", ".join(f"{name} {percent([accuracy])}" for accuracy, name in worst)


def export(job: JobView) -> Export:
    """Return the result of a succeeded job of the kind `export`."""
    return cast(Export, job["result"])


def export_lines(job: JobView) -> Iterator[str]:
    """Yield which weights an export has taken, and the figures of the student itself."""
    result = export(job)
    measured, taken = result["measured"], result["checkpoint"]
    epoch = "" if taken["epoch"] is None else f", epoch {taken['epoch']}"
    step = "" if taken["step"] is None else f", checkpoint of step {taken['step']:,}"
    low, high = (f"{100 * bound:.1f}" for bound in measured["interval"])
    yield f"{measured['architecture']}, {taken['which']} weights of {result['job'] or 'a job'}{epoch}{step}"
    yield f"the student itself: accuracy {percent([measured['accuracy']])} (95 % interval {low} to {high} %)"


def files_table(files: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a student's files, or of a benchmark: size, accuracy, agreement with the float student, the
    latency of one image and of a batch, memory. A refused file says why."""
    batches = sorted({int(one["batch"]) for row in files for one in row.get("latency") or ()})
    latencies = [f"p50 ms, {batch} image{'s' if batch > 1 else ''}" for batch in batches]
    judged = ("accuracy", "agreement") if any(row.get("accuracy") is not None for row in files) else ()
    right = ("bytes", *judged, *latencies, "memory")
    table = _table("file", "runtime", *right, right=right, unbroken=("bytes", *judged))
    for row in files:
        if row.get("refused"):
            _add_row(table, row["format"], f"refused: {row['refused']['message']}", *[None] * len(right))
            continue
        times = {int(one["batch"]): one["p50_ms"] for one in row.get("latency") or ()}
        figures = [row.get(name) for name in judged]
        memory = row.get("peak_memory_bytes")
        _add_row(
            table,
            row["name"] or row["format"],
            row["runtime"],
            f"{row['bytes']:,}",
            *(None if value is None else percent([value]) for value in figures),
            *(None if batch not in times else f"{times[batch]:.2f}" for batch in batches),
            None if memory is None else f"{memory / 2**20:.0f} MiB",
        )
    return table


def busy_lines(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line if other programs used the CPU while the latencies of files were measured."""
    share = min((one.get("cpu_share", 1.0) for row in files for one in row.get("latency") or ()), default=1.0)
    text = f"other programs used the CPU meanwhile (a file had {100 * share:.0f} % of it): the latencies are too long"
    return [text] if share < BUSY else []


def artifact_lines(artifacts: Sequence[ArtifactView]) -> list[str]:
    """Return the names of all files that a job offers, in a line."""
    return [f"files to download: {', '.join(one['name'] for one in artifacts)}"] if artifacts else []


def benchmark_lines(figures: Benchmark) -> Iterator[str]:
    """Yield what was measured, and on what."""
    height, width = figures["image_size"]
    macs = "" if figures["macs"] is None else f", {figures['macs'] / 1e6:,.1f} million multiplications an image"
    yield (
        f"{figures['architecture']}, {figures['parameters']:,} parameters{macs}; images of {figures['channels']} x "
        f"{height} x {width}, {figures['num_classes']} classes"
    )
    device = figures["device"]
    threads = f", {_threads(figures['threads'])}" if device["kind"] == "cpu" else ""
    yield f"on {device['name'] or device['kind']}{threads}"


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def suggestion_table(found: Suggestions) -> Table:
    """Return the table of the students that fit, the best first."""
    figures = ("p50 ms", "bytes", "parameters", "accuracy")
    table = _table("architecture", "file", "runtime", "on", *figures, right=figures, unbroken=figures)
    for one in found["data"]:
        latency, accuracy = one["p50_ms"], one["accuracy"]
        threads = "" if one["threads"] is None else f", {_threads(one['threads'])}"
        _add_row(
            table,
            one["architecture"],
            one["format"],
            one["runtime"],
            f"{one['device']['name'] or one['device']['kind']}{threads}",
            None if latency is None else f"{latency:.2f}",
            f"{one['bytes']:,}",
            f"{one['parameters']:,}",
            None if accuracy is None else percent([accuracy]),
        )
    return table


def suggestion_lines(found: Suggestions) -> Iterator[str]:
    """Yield how suggestions are ranked, what was not measured, and the command that measures the smallest of it."""
    yield found["why"]
    if not found["not_measured"]:
        return
    names = ", ".join(one["architecture"] for one in found["not_measured"][:SHOWN_UNMEASURED])
    more = found["not_measured_count"] - SHOWN_UNMEASURED
    yield f"not measured at this shape: {names}{f' and {more} more' if more > 0 else ''}"
    options = {"image_size": "--image-size", "channels": "--channels", "num_classes": "--classes"}
    options |= {"batch_size": "--batch-size", "device": "--device", "threads": "--threads"}
    body = found["not_measured"][0]["body"]
    given = " ".join(f"{option} {body[name]}" for name, option in options.items() if name in body)
    yield f"measure one: distillery benchmark {body['architecture']} {given}"


def report_table(reports: Sequence[Report]) -> Table:
    """Return a table of the models: teacher, student, the same student alone, then all others.

    For several runs, it shows mean and standard deviation. Agreement is the share of the test images on which a model
    and the teacher predict the same class.
    """
    figures = ("parameters", "bytes", "accuracy", "agreement")
    table = _table("", "network", *figures, right=figures, box=HEAVY_HEAD)
    for name, models in _models_by_name(reports):
        first = models[0]
        agreements = [model["agreement"] for model in models if model["agreement"] is not None]
        _add_row(
            table,
            Text(display_name(name), style="bold" if name == "student" else ""),
            first["architecture"],
            f"{first['parameters']:,}",
            f"{first['bytes']:,}",
            percent([model["accuracy"] for model in models]),
            percent([statistics.fmean(agreements)] if agreements else []),
        )
    return table


def _models_by_name(reports: Sequence[Report]) -> Iterator[tuple[str, list[Measured]]]:
    """Yield each model's name with its figures in all reports: teacher, student and alone first, then the others."""
    main: tuple[Literal["teacher", "student", "alone"], ...] = ("teacher", "student", "alone")
    for name in main:
        if models := [model for report in reports if (model := report[name]) is not None]:
            yield name, models
    others = [report.get("models", {}) for report in reports]
    for other in dict.fromkeys(name for models in others for name in models):
        yield other, [models[other] for models in others if other in models]


def prediction_table(answer: PredictionAnswer) -> Table:
    """Return what each model of a job sees in an image: its most probable classes, side by side."""
    given = {"teacher": answer["teacher"], "student": answer["student"], "alone": answer["alone"]}
    models = {name: model for name, model in given.items() if model is not None}
    table = _table(*(display_name(name) for name in models), unbroken=())
    for rank in range(max(len(model["top"]) for model in models.values())):
        tops = (model["top"][rank : rank + 1] for model in models.values())
        _add_row(table, *(f"{top[0]['class']} {100 * top[0]['probability']:.1f} %" if top else "" for top in tops))
    return table


def prediction_lines(answer: PredictionAnswer) -> Iterator[str]:
    """Yield what is to be known of an answer beside the classes."""
    image = answer["image"]
    if answer["agree"] is not None:
        yield f"teacher and student {'agree' if answer['agree'] else 'do not agree'}"
    yield f"of {image['width']} x {image['height']} pixels, the student was shown {image['shown']}"
    yield from answer["notes"]


def display_name(name: str) -> str:
    """Return the display name of a model or trial: `student alone`, `assistant 1`, `student, fsp stage`."""
    trial, _, stage = name.partition("/")
    model, of_seed, seed = trial.partition("-seed-")
    text = {"alone": "student alone", "last": "last generation"}.get(model, model.replace("-", " "))
    text += f", seed {seed}" if of_seed else ""
    return f"{text}, {_words(stage)} stage" if stage else text


def percent(given: Sequence[float | None]) -> str:
    """Return `94.2 %`, or `94.2 ± 0.8 %` if the values differ. What could not be measured is left out."""
    fractions = [one for one in given if one is not None]
    if not fractions:
        return "–"
    mean, spread = 100 * statistics.fmean(fractions), 100 * _spread(fractions)
    return f"{mean:.1f} ± {spread:.1f} %" if spread else f"{mean:.1f} %"


def proof_lines(reports: Sequence[Report]) -> list[str]:
    """Return what reports prove, the gap closed first, then the gain; of a job of several seeds, what each seed has.
    Its means are in the verdict."""
    seeds = [] if len(reports) > 1 else _seed_lines(reports[0])
    return seeds or [*_gap_lines(reports), gain_sentence(reports)]


def _gap_lines(reports: Sequence[Report]) -> list[str]:
    """Return the line of the gap closed, or why none is stated; none without a baseline, or of an earlier version."""
    proofs = [proof for report in reports if (proof := report.get("proof")) is not None and proof["gain"] is not None]
    stated = [gap for proof in proofs if (gap := proof["gap_closed"]) is not None]
    if not proofs or len(proofs) < len(reports):
        return []
    if len(stated) < len(proofs):
        reason = next(proof["no_gap"]["message"] for proof in proofs if proof["no_gap"] is not None)
        runs = f" in {len(proofs) - len(stated)} of {len(proofs)} runs" if len(proofs) > 1 else ""
        return [f"Gap closed: not stated{runs}: {reason}."]
    if len(stated) == 1:
        return [f"Gap closed: {interval_text(stated[0])}."]
    runs = ", ".join(f"{100 * gap['value']:.0f}" for gap in stated)
    values = [gap["value"] for gap in stated]
    return [f"Gap closed: {100 * statistics.fmean(values):.0f} ± {100 * _spread(values):.0f} %, runs {runs}."]


def interval_text(interval: Interval) -> str:
    """Return `62 % (95 % interval 45 to 79 %)`."""
    value, low, high = (100 * one for one in (interval["value"], interval["low"], interval["high"]))
    return f"{value:.0f} % (95 % interval {low:.0f} to {high:.0f} %)"


def _points(interval: Interval) -> str:
    return f"{100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}"


def _seed_lines(report: Report) -> list[str]:
    """Return a line for each run of a job of several seeds."""
    proof = report.get("proof")
    if proof is None or proof["over_seeds"] is None:
        return []
    lines = []
    for one in proof["seeds"]:
        alone = "" if one["alone"] is None else f", student alone {percent([one['alone']])}"
        gap = "" if one["gap_closed"] is None else f", gap closed {100 * one['gap_closed']:.0f} %"
        lines.append(f"seed {one['seed']}: student {percent([one['student']])}{alone}{gap}")
    return lines


def gain_sentence(reports: Sequence[Report]) -> str:
    """Return a sentence on the gain of distillation: the mean, its standard deviation, and each run."""
    gains = [100 * gain for report in reports if (gain := report["gain"]) is not None]
    if not gains and all(report["teacher"] is None and not report.get("models") for report in reports):
        return "Trained on labels alone: there was no teacher."
    if not gains:
        return "No baseline was trained, so the gain of distillation is not known (baseline: train)."
    one_image = 100 / reports[0]["test_samples"]
    scale = f"{reports[0]['test_samples']:,} test images; one image is {one_image:.2f} points"
    if len(gains) == 1:
        proof = reports[0].get("proof")
        interval = None if proof is None else proof["gain"]
        within = "" if interval is None else f" (95 % interval {_points(interval)})"
        return f"Gain over the same student alone: {gains[0]:+.1f} points of accuracy{within}, one run ({scale})."
    runs = ", ".join(f"{gain:+.1f}" for gain in gains)
    mean, spread = statistics.fmean(gains), _spread(gains)
    return f"Gain over the same student alone: {mean:+.1f} ± {spread:.1f} points of accuracy, runs {runs} ({scale})."


# Estimates

BASES = {
    "measured": "as measured in earlier jobs",
    "probe": "from a probe of a few steps",
    "parameters": "by the parameters alone",
}


def estimate_lines(estimate: Estimate) -> list[str]:
    """Return what a job will probably take, in a line or two."""
    seconds, memory = estimate.get("seconds"), estimate.get("memory_bytes")
    basis = BASES.get(str(estimate.get("basis")), "")
    if seconds is None:
        least = "" if memory is None else f"; at least {memory / 1e6:,.0f} MB of memory, {basis}"
        return [f"estimate: {estimate['steps']:,} steps; their time was never measured{least}"]
    parts = [f"{phase} {duration(value)}" for phase, value in _phases(estimate) if value is not None]
    unknown = [phase for phase, value in _phases(estimate) if value is None]
    without = f", without {' and '.join(unknown)}" if unknown else ""
    lines = [f"estimate: about {duration(seconds)} ({', '.join(parts)}){without}"]
    needs = "" if memory is None else f"{memory / 1e6:,.0f} MB of memory on "
    return [*lines, f"  {needs}{estimate['device']}, {basis}"]


def _phases(estimate: Estimate) -> list[tuple[str, float | None]]:
    phases = estimate["seconds_by_phase"]
    known = [("preparing", phases["preparing"]), ("training", phases["training"]), ("evaluating", phases["evaluating"])]
    return [*known, ("exporting", phases.get("exporting"))]  # An older server does not know the last one.


def duration(seconds: float) -> str:
    """Return a duration such as `8 s`, `3 min`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# The server


def worker_table(workers: Iterable[WorkerView]) -> Table:
    table = _table("worker", "takes jobs", "slots", "last seen", unbroken=("worker",))
    for one in workers:
        slots = [f"{slot['name']} {slot['job'] or _words(slot['state'])}" for slot in one["devices"]]
        alive = Text("yes", style="green") if one["alive"] else Text("no", style="red")
        _add_row(table, one["id"], alive, ", ".join(slots), one["seen_at"])
    return table


def upload_table(uploads: Iterable[UploadView]) -> Table:
    table = _table("file", "bytes", "of", "status", "id", right=("bytes", "of"))
    for one in uploads:
        size = "" if one["bytes"] is None else f"{one['bytes']:,}"
        _add_row(table, one["filename"], f"{one['offset']:,}", size, one["status"], one["id"])
    return table


def key_table(keys: Iterable[KeyView]) -> Table:
    table = _table("id", "project", "name", "role", "state", "last used")
    for key in keys:
        table_row = (
            key["id"],
            key["project"],
            key["name"],
            key["role"],
            key_state(key),
            key["last_used_at"] or "never",
        )
        _add_row(table, *table_row)
    return table


def key_state(key: KeyView) -> Text:
    """Return whether a key can be used, and until when."""
    if key["revoked_at"]:
        return Text(f"revoked {key['revoked_at']}", style="red")
    expires_at = key["expires_at"]
    if expires_at is None:
        return Text("valid", style="green")
    if datetime.fromisoformat(expires_at) <= datetime.now(UTC):
        return Text(f"expired {expires_at}", style="red")
    return Text(f"valid until {expires_at}", style="green")


def project_table(projects: Iterable[ProjectView]) -> Table:
    table = _table("name", "created at", unbroken=("name",))
    for project in projects:
        _add_row(table, project["name"], project["created_at"])
    return table


def limits_table(limits: LimitsView) -> Table:
    table = _table("limit", "value", "used", "", right=("value", "used"), unbroken=("limit",))
    for name, one in limits["limits"].items():
        limit = cast(LimitView, one)
        value = "none" if limit["value"] is None else f"{limit['value']:,}"
        used = "" if limit["used"] is None else f"{limit['used']:,}"
        of = {"project": "", "process": "in one API process", "upload": "each"}[limit["counts_in"]]
        _add_row(table, name, value, used, ", ".join(filter(None, (of, "" if limit["is_default"] else "set"))))
    return table


def audit_table(entries: Iterable[AuditView]) -> Table:
    table = _table("at", "who", "did", "to", "from", "project", unbroken=("at", "to"))
    for one in entries:
        who = f"{one['key_name']} ({one['role']})" if one["key_name"] else "unknown key"
        did = one["action"] if one["outcome"] == "done" else Text(one["action"], style="red")
        to = one["resource"] or one["details"].get("path")
        _add_row(table, one["at"], who, did, to, one["address"], one["project"])
    return table


def usage_table(storage: StorageView) -> Table:
    table = _table("of", "kind", "files", "bytes", right=("files", "bytes"))
    for whose, kinds in (("project", storage["project"]), ("all", storage["usage"])):
        for kind, used in kinds.items():
            _add_row(table, whose, _words(kind), f"{used['files']:,}", f"{used['bytes']:,}")
    return table


def disk_space_line(storage: StorageView) -> str:
    free, needed = storage["free_bytes"], storage["min_free_bytes"]
    enough = "" if free >= needed else ": no job is started"
    return f"{free:,} bytes are free, {needed:,} are needed to start a job{enough}"


def collection_table(collections: Iterable[CollectionView]) -> Table:
    table = _table("started at", "removed", "error")
    for one in collections:
        removed = [
            f"{total['count']} {_words(kind)} ({total['bytes']:,} bytes)"
            for kind, total in (one["removed"] or {}).items()
        ]
        text = (", ".join(removed) or "nothing") if one["ended_at"] else "has not ended"
        _add_row(table, one["began_at"], text, one["error"])
    return table


# Webhooks


def webhook_table(webhooks: Iterable[WebhookView]) -> Table:
    table = _table("id", "state", "url", "events")
    for webhook in webhooks:
        state = "enabled" if webhook["enabled"] else "disabled"
        if webhook["failing_since"] is not None:
            state += f", fails since {webhook['failing_since']}"
        _add_row(table, webhook["id"], state, webhook["url"], ", ".join(webhook["events"]))
    return table


def delivery_table(deliveries: Iterable[DeliveryView]) -> Table:
    table = _table("id", "status", "age", "type", "tries", "answer", right=("tries",), unbroken=("id", "age", "type"))
    for one in deliveries:
        status = one["status"] + (f", next {one['next_at']}" if one["next_at"] and one["attempts"] else "")
        answer = one["error"] or one["answer_status"]
        _add_row(table, one["id"], status, age(one["created_at"]), one["type"], one["attempts"], answer)
    return table


# The registry and the catalogue


def model_table(models: Iterable[Model]) -> Table:
    table = _table("name", "architecture", "classes", "parameters", "id", right=("classes", "parameters"))
    for model in models:
        facts = model["facts"]
        if facts is None:
            _add_row(table, model["name"], state_text(model), "", "", model["id"])
            continue
        counts = (facts["num_classes"], f"{facts['parameters']:,}")
        _add_row(table, model["name"], facts["architecture"], *counts, model["id"])
    return table


def state_text(entry: Registered) -> str:
    """Return `inspecting, 1,200 of 60,000 images` for a registration without facts."""
    progress = entry["progress"]
    return entry["state"] + (f", {progress['done']:,} of {progress['total']:,} images" if progress else "")


def refusal_lines(entry: Registered) -> list[str]:
    """Return the reason of a refused registration; nothing for others."""
    error = entry.get("error")
    if not error:
        return []
    hint = [f"  hint: {error['hint']}"] if error["hint"] else []
    return [f"{entry['name']} was refused: {error['message']}", *hint]


def dataset_table(datasets: Iterable[Dataset]) -> Table:
    table = _table("name", "classes", "images", "train", "test", "id", right=("classes", "train", "test"))
    for dataset in datasets:
        facts = dataset["facts"]
        if facts is None:
            _add_row(table, dataset["name"], "", state_text(dataset), "", "", dataset["id"] or "")
            continue
        height, width = facts["image_size"]
        _add_row(
            table,
            dataset["name"],
            facts["num_classes"] if facts.get("labelled", True) else "no labels",
            f"{facts['channels']} x {height} x {width}",
            f"{facts['train']:,}",
            f"{facts['test']:,}",
            dataset["id"] or "built in",
        )
    return table


def method_table(methods: Iterable[dict[str, Any]]) -> Table:
    table = _table("method", "matches", "paper")
    for method in methods:
        _add_row(table, method["name"], method["matches"], method["paper"])
    return table


def architecture_table(architectures: Iterable[dict[str, Any]]) -> Table:
    table = _table("architecture", "source", "family", "parameters", right=("parameters",))
    for one in architectures:
        parameters = one["parameters_counted"]
        _add_row(table, one["name"], one["source"], one["family"], f"{parameters:,}" if parameters else "")
    return table


# One method. Fields that the service does not send are left out.

METHOD_FACTS = {
    "matches": "matches",
    "scheme": "scheme",
    "teacher": "teacher",
    "needs": "needs",
    "taps": "default taps",
    "owns": "also trains",
    "cost": "cost of a step",
}
"""Fields of GET /v1/methods/{name} and their labels, in the order of the page."""

COMMON_OPTIONS = ("name", "weight")
"""Options that every method has: `--method NAME=WEIGHT`."""

BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
TYPES = {"integer": "whole number", "boolean": "true | false", "string": "text"}

Schema = dict[str, Any]


def method_page(method: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield a method's page: its paper, its needs, its default weights, and its options with their bounds."""
    heading = method.get("title")
    yield Text.assemble((str(method["name"]), "bold"), f"  {heading}" if heading else "")
    yield Text(str(method.get("paper", "")), style="dim")
    yield Text()
    yield _method_facts(method)
    options = _option_table(method.get("options"))
    if options is not None:
        yield options
        in_sum = f"--set method.{method['name']}.OPTION=VALUE"
        yield Text(f"set an option: --set method.OPTION=VALUE, in a sum {in_sum}", style="dim")


def _method_facts(method: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for field, label in METHOD_FACTS.items():
        fact = method.get(field)
        text = _words(", ".join(map(str, fact)) if isinstance(fact, list) else str(fact or ""))
        if text not in ("", "none", "nothing"):
            _add_row(table, Text(label, style="dim"), text)
    weights = [
        f"{name} {_number(method[name])}" for name in ("alpha", "beta", "temperature") if method.get(name) is not None
    ]
    if weights:
        _add_row(table, Text("defaults", style="dim"), ", ".join(weights))
    if method.get("defaults_from"):
        _add_row(table, Text("defaults from", style="dim"), method["defaults_from"])
    return table


def _option_table(schema: Any) -> Table | None:
    """Return a table of the method's own options; None if it has none, or if their schema is unknown."""
    fields = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(fields, dict):
        return None
    table = _table("option", "values", "default", "description", unbroken=("option",))
    for name, field in fields.items():
        if name not in COMMON_OPTIONS:
            values = allowed_values(field, schema.get("$defs", {}))
            _add_row(table, name, values, _default(field), field.get("description"))
    return table if table.row_count else None


def _default(field: Schema) -> str:
    default = field.get("default")
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else _number(default) if isinstance(default, float) else str(default)


def _number(number: float) -> str:
    """Return the number as a user types it: 1000, not 1000.0."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def allowed_values(field: Schema, definitions: dict[str, Schema]) -> str:
    """Return the values that a JSON schema allows: `number, ≥ 1, ≤ 8`, `sum | max`, `list of text, 1 to 16 long`."""
    if "$ref" in field:
        return allowed_values(definitions.get(field["$ref"].rpartition("/")[2], {}), definitions)
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " | ".join(allowed_values(one, definitions) for one in choices if one.get("type") != "null")
    if "const" in field or "enum" in field:
        return " | ".join(str(one) for one in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        inner = allowed_values(field.get("items", {}), definitions)
        least, most = field.get("minItems", 0), field.get("maxItems")
        length = "" if most is None else f", {least} to {most} long"
        return f"list of {f'({inner})' if ' | ' in inner else inner}{length}"
    if kind == "object":
        return f"{{{', '.join(field.get('properties', {}))}}}"
    bounds = [f"{sign} {_number(field[name])}" for name, sign in BOUNDS.items() if name in field]
    return ", ".join([TYPES.get(kind, kind), *bounds])


def _words(name: str) -> str:
    return name.replace("_", " ")


def age(at: str, now: datetime | None = None) -> str:
    """Return the time since `at`: `3 min`, `2 h`, `5 d`."""
    past_s = ((now or datetime.now(UTC)) - datetime.fromisoformat(at)).total_seconds()
    for unit, seconds in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if past_s >= seconds:
            return f"{past_s // seconds:.0f} {unit}"
    return "now"
