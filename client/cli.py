"""The command line `distillery`. Exit codes: 0 success, 1 the job did not succeed, 2 an error, 130 interrupted.

Errors are lines on standard error, one for each fault. Warnings are blocks of lines there, and change no exit code.
`--json` prints the service's answer for programs.
"""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from typer.core import TyperGroup

from base.defaults import DEFAULT_URL, PORT
from base.jobs import TERMINAL, WebhookEvent
from base.references import STUDENT_FILE
from base.wire import (
    Benchmark,
    BenchmarkView,
    JobFilters,
    JobView,
    NewKeyView,
    Registered,
    Role,
    SecretWebhookView,
    WarningView,
)
from client import tables
from client.errors import DistilleryError, InvalidInput, fault_line
from client.local_server import serve_command
from client.sdk import Distillery
from client.spec import (
    Spec,
    label_filters,
    labels_of,
    parse_duration,
    parse_methods,
    parse_numbers,
    read_class_map,
    read_class_names,
    read_spec,
    set_data,
    set_field,
    set_student,
    set_teachers,
    upload_files,
)
from client.terminal import (
    NewWarnings,
    TransferBars,
    event_line,
    follow,
    output,
    print_json,
    print_lines,
    print_list,
    print_report,
    print_result,
    print_warnings,
    tell,
    visible,
)
from client.transfer import digest_of, packed

DETACHED = 130


class Commands(TyperGroup):
    """A group of commands. Errors are printed as lines on standard error, with exit code 2 and without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DistilleryError as error:
            for number, line in enumerate(error.lines()):
                tell(line if number else f"error: {line}")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large image classifier into a small one, and measure what the teacher was worth.",
)
models_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Teachers: list, add, evaluate, remove.")
datasets_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Data sets: list, add, remove.")
uploads_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Uploaded files: list, remove.")
keys_app = typer.Typer(cls=Commands, no_args_is_help=True, help="API keys: create, list, rotate, revoke.")
projects_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Projects: list, create, delete.")
app.add_typer(models_app, name="models")
app.add_typer(datasets_app, name="datasets")
app.add_typer(uploads_app, name="uploads")
app.add_typer(keys_app, name="keys")
webhooks_app = typer.Typer(
    cls=Commands, invoke_without_command=True, help="Webhooks: list, add, change, test, deliveries, replay, remove."
)
app.add_typer(webhooks_app, name="webhooks")
app.add_typer(projects_app, name="projects")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]
NameOrId = Annotated[str, typer.Argument(help="Name or id.")]
Strict = Annotated[bool, typer.Option("--strict", help="A warning is an error: nothing is registered.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the inspection.")]
ListLabels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="Only with this label, or a NAME. Repeat it.")
]
NewLabels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label to find it by. Repeat it.")
]
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]
WebhookEvents = Annotated[
    list[str] | None,
    typer.Option(
        "--event", help=f"An event to notify it of; repeat it for several: {', '.join(get_args(WebhookEvent))}."
    ),
]
FileName = Annotated[str | None, typer.Option("--name", help="Default: the file's name.")]


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="DISTILLERY_URL", help=f"The server. Default: {DEFAULT_URL}")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="DISTILLERY_API_KEY", help="The API key, if the server requires one.")
    ] = None,
) -> None:
    if context.obj is None:
        context.obj = Distillery(url, key)


# A local server


@app.command()
def up(
    host: Annotated[
        str | None, typer.Option(help="Default: this machine only. Any other address needs a key: keys create.")
    ] = None,
    port: Annotated[int | None, typer.Option(help=f"Default: {PORT}; 0 takes any free port.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of all data. Default: ./distillery-data")] = None,
) -> None:
    """Start a server: API, web page and a worker in one process, on SQLite. Ctrl-C saves running jobs and stops."""
    options = {"--host": host, "--port": port, "--home": home}
    command = serve_command(
        [text for name, value in options.items() if value is not None for text in (name, str(value))]
    )
    os.execv(command[0], command)  # noqa: S606 - the server replaces this process: its signals and exit code are its own


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Number of students, each with its own seed.")] = 3,
    to: Annotated[Path, typer.Option(help="Folder of the student.")] = Path("distillery-demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the server's data in that folder too.")] = False,
) -> None:
    """Run a complete distillation in half a minute: start a server, train a teacher, distil it, check the result."""
    from client.demo import demo as run_demo

    raise typer.Exit(run_demo(Console(), seeds=seeds, to=to, keep=keep))


# Jobs


@app.command()
def submit(
    context: typer.Context,
    spec: Annotated[
        str | None, typer.Argument(metavar="[SPEC]", help="JSON or YAML file; - is standard input.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A built-in set (digits, ...), a registered set, or a local file or folder (./flowers)."),
    ] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="Images without labels to distil on, in the same forms as --dataset.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="model:<name>, job:<id>, weights:<name>, or a local file: a checkpoint, or a program (.onnx, or "
            ".pt2 of torch.export). Repeat it for several teachers: their probabilities are averaged."
        ),
    ] = None,
    teacher_architecture: Annotated[
        list[str] | None,
        typer.Option(help="The architecture, if the checkpoint does not name it; one for each --teacher."),
    ] = None,
    assistant: Annotated[
        list[str] | None,
        typer.Option(help="An architecture between teacher and student. Repeat it, largest first."),
    ] = None,
    student: Annotated[
        list[str] | None, typer.Option(help="The student's architecture. Repeat it for peers (method dml).")
    ] = None,
    student_checkpoint: Annotated[
        str | None,
        typer.Option(help="What the student starts from: as --teacher, a reference or a local checkpoint."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="A module of the student that keeps the checkpoint's weights, such as layer1. Repeat it; '*' is "
            "everything but the classifier.",
        ),
    ] = None,
    head_lr: Annotated[
        float | None, typer.Option(help="Factor of the learning rate for what the checkpoint does not give.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="kd, attention, ...: see `distillery methods`. Repeat it for a weighted sum, such as kd=0.9.",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the loss on labels.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the distillation loss.")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs with so many seeds; the report has an interval over them.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="none, train, train_anew or job:<id>.")] = None,
    name: Annotated[str | None, typer.Option(help="A name for the job.")] = None,
    label: NewLabels = None,
    priority: Annotated[
        int | None, typer.Option(help="-100 to 100; a job with a higher priority starts first. Default: 0.")
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="The job fails if it has not ended after this time: seconds, 30m, 8h, 2d."),
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Attempts in a row that may end without a new checkpoint.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any field: training.batch_size=64. A method's option: method.p=1; in a sum: method.attention.p=1.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A warning that is known before the training is an error.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job to its end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the spec, and print it resolved.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A second request with the same key returns the same job.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job from a spec file, from flags, or both: flags override the file. Local files are uploaded first."""
    distillery: Distillery = context.obj
    fields = read_spec(spec) if spec else {}
    flags = {
        "student": student[0] if student and len(student) == 1 else student or None,
        "assistants": assistant or None,
        "method": parse_methods(method) if method else None,
        "temperature": temperature,
        "alpha": alpha,
        "beta": beta,
        "seeds": seeds,
        "baseline": baseline,
        "name": name,
        "labels": {**fields.get("labels", {}), **labels_of(label)} if label else None,
        "strict": True if strict else None,
    }
    fields.update({field: value for field, value in flags.items() if value is not None})
    if dataset is not None:
        set_data(fields, dataset)
    if unlabelled is not None:
        set_data(fields, unlabelled, "unlabelled")
    if teacher or teacher_architecture:
        set_teachers(fields, teacher or [], teacher_architecture or [])
    set_student(fields, student_checkpoint, freeze or [], head_lr)
    nested = {
        "training.epochs": epochs,
        "training.seed": seed,
        "scheduling.priority": priority,
        "scheduling.deadline_s": None if deadline is None else parse_duration(deadline),
        "scheduling.max_attempts": max_attempts,
    }
    for setting in [f"{path}={value}" for path, value in nested.items() if value is not None] + (settings or []):
        set_field(fields, setting)
    if not fields:
        raise InvalidInput("nothing to submit: give a spec file, or flags such as --dataset, --student and --method")
    with _cancelling("submitted"), TransferBars() as bars:
        fields = upload_files(distillery, fields, bars.add, bars.add_inspection)
    if dry_run:
        _validate(distillery, fields, as_json)
        return
    job = distillery.submit(fields, idempotency_key=idempotency_key)
    print_warnings(job["warnings"])
    if as_json and not watch:
        print_json(job)
        return
    typer.echo(job["id"])
    if watch:
        _follow(distillery, job["id"], as_json, job["warnings"])
    else:
        typer.echo(f"follow it: distillery watch {job['id']}", err=True)


def _validate(distillery: Distillery, spec: Spec, as_json: bool) -> None:
    validation = distillery.validate(spec)
    if as_json:
        print_json(validation)
    elif validation["valid"]:
        print_json({"resolved_spec": validation["resolved_spec"], "estimate": validation["estimate"]})
        for line in tables.estimate_lines(validation["estimate"]) if validation["estimate"] else ():
            typer.echo(line, err=True)
    else:
        for fault in validation["errors"]:
            tell(fault_line(fault))
    if not validation["valid"]:
        raise typer.Exit(2)
    print_warnings(validation["warnings"])


@app.command("list")
def list_jobs(
    context: typer.Context,
    status: Annotated[
        list[str] | None, typer.Option(help="queued, running, paused, succeeded, failed or cancelled. Repeat it.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="distillation, evaluation, export or benchmark.")] = None,
    method: Annotated[str | None, typer.Option(help="Jobs of this method; a sum is written as kd+dkd.")] = None,
    name: Annotated[str | None, typer.Option(help="The beginning of the name.")] = None,
    label: ListLabels = None,
    dataset: Annotated[str | None, typer.Option(help="As the spec names it, or sha256:<hex>.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Its name, architecture, or sha256:<hex>.")] = None,
    student: Annotated[str | None, typer.Option(help="Its architecture.")] = None,
    of_job: Annotated[str | None, typer.Option("--job", help="Exports and others of this job's student.")] = None,
    sender: Annotated[str | None, typer.Option(help="The key that submitted it, by name or id.")] = None,
    created_after: Annotated[str | None, typer.Option(metavar="TIME", help="From then on: 2026-01-31T08:00Z.")] = None,
    created_before: Annotated[str | None, typer.Option(metavar="TIME", help="Before then.")] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="created_at, finished_at, name or accuracy; with a - before it descending (--sort=-accuracy)."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The largest number of jobs.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first. Filters combine."""
    distillery: Distillery = context.obj
    filters: JobFilters = {
        **{"status": status, "kind": kind, "method": method, "name": name, "labels": label_filters(label)},
        **{"dataset": dataset, "teacher": teacher, "student": student, "sender": sender, "job": of_job},
        **{"created_after": created_after, "created_before": created_before, "sort": sort},
    }
    jobs = islice(distillery.jobs(limit=min(limit, 100), **filters), limit)
    print_list(list(jobs), as_json, tables.job_table, "no jobs yet: distillery submit --help")


@app.command()
def show(
    context: typer.Context,
    job_id: JobId,
    logs: Annotated[bool, typer.Option("--logs", help="Print the output of the job's newest attempt.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Print the job's events.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a job: its state, its report or its error, and its attempts."""
    distillery: Distillery = context.obj
    if logs:
        text = distillery.logs(job_id)
        typer.echo(visible(text) if sys.stdout.isatty() else text, nl=False)
        return
    if events:
        for event in distillery.events(job_id):
            typer.echo(json.dumps(event) if as_json else visible(event_line(event)))
        return
    job = distillery.job(job_id)
    print_warnings(job["warnings"])
    if as_json:
        print_json(job)
        return
    console = output()
    print_lines(console, *tables.verdict_lines(job))
    console.print(tables.job_facts(job))
    if attempts := distillery.attempts(job_id):
        console.print(tables.attempt_table(attempts))
    print_report(job, console)
    if job["kind"] == "distillation" and job["status"] == "succeeded":
        print_lines(console, *tables.artifact_lines(distillery.artifacts(job_id)))
    print_lines(console, *tables.timing_lines(job))
    print_lines(console, *tables.failure_lines(job), style="red")


@app.command()
def watch(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end; exit code 0 if it succeeds, else 1. Ctrl-C detaches, and the job continues."""
    _follow(context.obj, job_id, as_json)


def _follow(distillery: Distillery, job_id: str, as_json: bool, shown: Sequence[WarningView] = ()) -> None:
    """Follow the job, then exit with 0 if it succeeded, else with 1. Warnings that were shown are not repeated."""
    console = Console()
    with _detachable(job_id):
        if as_json:
            for event in distillery.watch(job_id):
                typer.echo(json.dumps(event))
            job = distillery.job(job_id)
            NewWarnings(shown).print(job["warnings"])
        else:
            job = follow(distillery, job_id, console, shown=shown)
    hint = f"fetch the student: distillery download {job_id}" if job["kind"] == "distillation" else None
    succeeded = job["status"] == "succeeded" if as_json else print_result(job, console, hint)
    raise typer.Exit(0 if succeeded else 1)


@contextmanager
def _detachable(job_id: str) -> Iterator[None]:
    """Let Ctrl-C end the command, and not the job that it follows."""
    try:
        yield
    except KeyboardInterrupt:
        again = f"follow it again: distillery watch {job_id}   stop it: distillery cancel {job_id}"
        typer.echo(f"detached; the job continues. {again}", err=True)
        raise typer.Exit(DETACHED) from None


@app.command()
def cancel(context: typer.Context, job_id: JobId) -> None:
    """Cancel a job. A running job becomes cancelled when its process has ended."""
    _print_status(context.obj.cancel(job_id))


@app.command()
def pause(context: typer.Context, job_id: JobId) -> None:
    """Pause a job. A running job saves a checkpoint first, and resumes from it."""
    _print_status(context.obj.pause(job_id))


@app.command()
def resume(context: typer.Context, job_id: JobId) -> None:
    """Put a paused job back into the queue."""
    _print_status(context.obj.resume(job_id))


@app.command()
def retry(
    context: typer.Context,
    job_id: JobId,
    start: Annotated[
        Literal["checkpoint", "scratch"],
        typer.Option("--from", help="checkpoint: continue from the last one. scratch: start from the beginning."),
    ] = "checkpoint",
) -> None:
    """Queue a failed or cancelled job again."""
    _print_status(context.obj.retry(job_id, from_scratch=start == "scratch"))


def _print_status(job: JobView) -> None:
    requested = f", {job['requested']} requested" if job["requested"] else ""
    typer.echo(f"{job['id']} is {job['status']}{requested}")


@app.command()
def delete(context: typer.Context, job_id: JobId) -> None:
    """Delete a job that has ended, with its files."""
    context.obj.delete(job_id)
    typer.echo(f"{job_id} deleted")


@app.command()
def download(
    context: typer.Context,
    job_id: JobId,
    file: Annotated[str, typer.Argument(help="The name of the job's file.")] = STUDENT_FILE,
    to: Annotated[Path | None, typer.Option(help="Path or folder. Default: the file's name, in this folder.")] = None,
) -> None:
    """Fetch a file of a job and check its SHA-256. Repeat the command to continue a broken download."""
    distillery: Distillery = context.obj
    with TransferBars() as bars:
        path = distillery.download(job_id, file, to=to, on_progress=bars.add(file))
    typer.echo(f"{path}  {path.stat().st_size:,} bytes  sha256:{digest_of(path)}")


@app.command()
def export(
    context: typer.Context,
    job_id: JobId,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="A file; repeat it for several: safetensors (default), onnx, onnx_int8, torch_export or openvino.",
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="best: of the best epoch so far. last: after the newest checkpoint's step.")
    ] = "best",
    normalization: Annotated[
        str | None, typer.Option(help="inside: the files take pixels in 0..1. Default: outside.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="The most accuracy that a file may lose, as a fraction. Default: 0.02.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Fetch the files into this folder when they are there.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a file is refused.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write files of a job's student, from its best or last weights so far, and measure each; exit code 0 if that
    succeeds. The job may be running, paused, or have ended."""
    distillery: Distillery = context.obj
    if no_wait and to is not None:
        raise InvalidInput("--out needs the files, and --no-wait does not wait for them: give one of the two")
    options = {"normalization": normalization, "tolerance": tolerance}
    given = {name: value for name, value in options.items() if value is not None}
    job = distillery.export(
        job_id, formats or ["safetensors"], checkpoint=checkpoint, options=given or None, strict=strict
    )
    if not no_wait:
        with _detachable(job["id"]):
            job = follow(distillery, job["id"], Console(stderr=True), f"export of {job_id}")
    fetched = []
    if to is not None and job["status"] == "succeeded":
        to.mkdir(parents=True, exist_ok=True)
        with TransferBars() as bars:
            for artifact in distillery.artifacts(job["id"]):
                name = artifact["name"]
                fetched.append(distillery.download(job["id"], name, to=to / name, on_progress=bars.add(name)))
    if as_json:
        print_json(job)
    elif no_wait:
        typer.echo(job["id"])
    elif job["status"] == "succeeded":
        print_report(job, output())
        hint = f"fetch a file: distillery download {job['id']} NAME"
        print_lines(output(), *(str(path) for path in fetched) if fetched else [hint])
    else:
        lines = (f"job {job['id']} {job['status']}", *tables.failure_lines(job))
        print_lines(Console(stderr=True), *lines, style="red")
    raise typer.Exit(0 if no_wait or job["status"] == "succeeded" else 1)


@app.command()
def benchmark(
    context: typer.Context,
    network: Annotated[
        str | None,
        typer.Argument(metavar="[NETWORK]", help="An architecture, model:NAME, or job:ID. Default: list what is kept."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width. A file may have its own.")] = None,
    channels: Annotated[int | None, typer.Option(help="Of an architecture. Default: 3.")] = None,
    classes: Annotated[int | None, typer.Option(help="Of an architecture. Default: 10.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="The larger batch. Default: 32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: those that are free.")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="What to measure; repeat it. safetensors (default) is the network in PyTorch."),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Measure again, also what is kept.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the size and the speed of a network on the service's machine; exit code 0 if there are figures."""
    distillery: Distillery = context.obj
    if network is None:
        kept = list(distillery.benchmarks())
        if as_json:
            print_json(kept)
        for one in kept if not as_json else ():
            print_lines(output(), *tables.benchmark_lines(_figures(one)))
            output().print(tables.files_table(_figures(one)["files"]))
        return
    kind, colon, named = network.partition(":")
    source = {kind: named} if colon and kind in ("model", "job") else {"architecture": network}
    found = distillery.benchmark(
        **source,
        image_size=image_size,
        channels=channels,
        num_classes=classes,
        batch_size=batch_size,
        device=device,
        threads=threads,
        formats=formats,
        anew=anew,
    )
    if found["status"] not in TERMINAL:
        with _detachable(found["job"]):
            job = follow(distillery, found["job"], Console(stderr=True), f"benchmark of {network}")
        found = distillery.benchmark_of(found["key"])
        if job["status"] != "succeeded":
            lines = (f"job {job['id']} {job['status']}", *tables.failure_lines(job))
            print_lines(Console(stderr=True), *lines, style="red")
            raise typer.Exit(1)
    if as_json:
        print_json(found)
    elif found["figures"] is not None:
        print_lines(output(), *tables.benchmark_lines(_figures(found)))
        output().print(tables.files_table(_figures(found)["files"]))
        print_lines(output(), f"measured at {found['measured_at']}; --anew measures again")
    raise typer.Exit(0 if found["figures"] is not None else 1)


def _figures(found: BenchmarkView) -> Benchmark:
    """Return the figures of a benchmark that has some."""
    figures = found["figures"]
    assert figures is not None, "what is listed is measured"  # noqa: S101
    return figures


@app.command()
def suggest(
    context: typer.Context,
    budget_ms: Annotated[float | None, typer.Option("--ms", help="The most that the p50 latency may be.")] = None,
    budget_bytes: Annotated[int | None, typer.Option("--bytes", help="The most bytes that it may have.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width. Default: 32.")] = None,
    channels: Annotated[int | None, typer.Option(help="Default: 3.")] = None,
    classes: Annotated[int | None, typer.Option(help="Default: 10.")] = None,
    batch: Annotated[int | None, typer.Option(help="The latency is that of so many images. Default: 1.")] = None,
    runtime: Annotated[str | None, typer.Option(help="torch, onnxruntime, torch.export or openvino.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Accuracies on it rank the students.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name students that fit into a budget of latency or size, from what was measured; exit code 1 if none does."""
    found = context.obj.suggestions(
        budget_ms=budget_ms, budget_bytes=budget_bytes, image_size=image_size, channels=channels, classes=classes,
        batch=batch, runtime=runtime, device=device, threads=threads, dataset=dataset,
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        if found["data"]:
            output().print(tables.suggestion_table(found))
        print_lines(output(), *tables.suggestion_lines(found))
    raise typer.Exit(0 if found["data"] else 1)


@app.command()
def predict(
    context: typer.Context,
    job_id: JobId,
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, BMP, GIF, PPM or TIFF.")],
    as_json: AsJson = False,
) -> None:
    """Show an image to a job's teacher and student, and print what each sees; exit code 0 if there is an answer."""
    found = context.obj.predict(job_id, image)
    if as_json:
        print_json(found)
    elif found["answer"] is not None:
        output().print(tables.prediction_table(found["answer"]))
        print_lines(output(), *tables.prediction_lines(found["answer"]))
    else:
        error = found["error"]
        tell(f"no answer yet: {found['message']}" if error is None else f"{error['code']}: {error['message']}")
    raise typer.Exit(0 if found["answer"] is not None else 1)


# Registered teachers and data sets


@models_app.callback()
def list_models(context: typer.Context, label: ListLabels = None, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        none_yet = "no models yet: distillery models add FILE --architecture resnet56"
        models = list(context.obj.models(labels=label_filters(label) or ()))
        print_list(models, as_json, tables.model_table, none_yet)
        for model in models:
            _print_doubts(model)


@models_app.command("add")
def add_model(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A PyTorch or safetensors checkpoint, or a program: .onnx or .pt2.")],
    architecture: Annotated[
        str | None,
        typer.Option(help="Of a checkpoint, a name of `distillery architectures`. Default: the one that it fits."),
    ] = None,
    name: FileName = None,
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", help="Mean of the training images' pixels in 0..1, for each channel: 0.5,0.4,0.4."
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Their standard deviation, in the same way.")
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|a,b,c",
            help="The names of the outputs in their order: in a file one on each line or a JSON list, or here.",
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of the images that it learned from.")] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a file with several networks: a name of the path to it, as student."),
    ] = None,
    averaged: Annotated[
        bool | None,
        typer.Option("--averaged/--raw", help="Of a file with both: the averaged weights (EMA), or the raw ones."),
    ] = None,
    label: NewLabels = None,
    strict: Strict = False,
    no_wait: NoWait = False,
) -> None:
    """Upload a checkpoint and register it as a teacher. The server inspects it first. Ctrl-C cancels that."""
    if (mean is None) != (std is None):
        raise InvalidInput("--mean and --std belong together: give both")
    preprocessing = None
    if mean is not None and std is not None:
        preprocessing = {"mean": parse_numbers("--mean", mean), "std": parse_numbers("--std", std)}
    names = None if class_names is None else read_class_names(class_names)
    distillery: Distillery = context.obj
    with _cancelling(), TransferBars() as bars:
        model = distillery.register_model(
            name or _stem(file),
            file,
            architecture,
            preprocessing=preprocessing,
            class_names=names,
            image_size=image_size,
            part=part,
            averaged=averaged,
            labels=labels_of(label) if label else None,
            strict=strict,
            wait=not no_wait,
            on_progress=bars.add(file.name),
        )
    output().print(tables.model_table([model]))
    print_warnings(model["warnings"])
    _echo_use(model, f"--teacher model:{model['name']}", "models")


@models_app.command("evaluate")
def evaluate_model(
    context: typer.Context,
    name: NameOrId,
    dataset: Annotated[
        str, typer.Option(help="A built-in set (digits, ...), a registered set, or a local file or folder (./flowers).")
    ],
    image_size: Annotated[int | None, typer.Option(help="Needed if the images have different sizes.")] = None,
    class_map: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON",
            help="The model's outputs for each class of the data, where the classes differ: "
            '{"cat": ["tabby", "tiger_cat"], "dog": 207}.',
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is an error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on the test images of a data set; exit code 0 if that succeeds. Warnings go to standard error."""
    distillery: Distillery = context.obj
    answers = None if class_map is None else read_class_map(class_map)
    fields: Spec = {"dataset": {"source": dataset, "image_size": image_size} if image_size else dataset}
    set_data(fields, dataset)
    with _cancelling("submitted"), TransferBars() as bars:
        data = upload_files(distillery, fields, bars.add, bars.add_inspection)["dataset"]
    source = data["source"] if isinstance(data, dict) else data
    job = distillery.evaluate_model(name, source, image_size=image_size, class_map=answers, strict=strict)
    console = Console(stderr=True)
    with _detachable(job["id"]):
        job = follow(distillery, job["id"], console, f"evaluation of {name}")
    if as_json:
        print_json(job)
    elif job["status"] == "succeeded":
        print_report(job, output())
    else:
        print_lines(console, f"job {job['id']} {job['status']}", *tables.failure_lines(job), style="red")
    raise typer.Exit(0 if job["status"] == "succeeded" else 1)


@app.command()
def label(
    context: typer.Context,
    row: Annotated[
        str, typer.Argument(metavar="JOB", help="A job's id; model:NAME or dataset:NAME of a registration.")
    ],
    labels: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="All labels that it is to have. None: no labels.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the labels of a job, a model or a data set."""
    distillery: Distillery = context.obj
    kind, colon, name = row.partition(":")
    given = labels_of(labels)
    if not colon:
        changed: Any = distillery.label_job(row, given)
    elif kind in ("model", "dataset"):
        changed = (distillery.label_model if kind == "model" else distillery.label_dataset)(name, given)
    else:
        raise InvalidInput(f"{row!r}: a job's id, model:NAME or dataset:NAME belongs here")
    if as_json:
        print_json(changed)
    else:
        typer.echo(
            f"{row}  " + (" ".join(f"{name}={value}" for name, value in changed["labels"].items()) or "no labels")
        )


@models_app.command("remove")
def remove_model(context: typer.Context, name: NameOrId) -> None:
    """Remove a teacher. Accepted jobs keep its file."""
    context.obj.delete_model(name)
    typer.echo(f"{name} removed")


@datasets_app.callback()
def list_datasets(context: typer.Context, label: ListLabels = None, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        datasets = list(context.obj.datasets(labels=label_filters(label) or ()))
        print_list(datasets, as_json, tables.dataset_table, "no data sets")
        for dataset in datasets:
            _print_doubts(dataset)


@datasets_app.command("add")
def add_dataset(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            help="A folder with one folder for each class (it is packed), a .zip or .tar of it, or .npz arrays."
        ),
    ],
    name: FileName = None,
    image_size: Annotated[int | None, typer.Option(help="Needed if the images have different sizes.")] = None,
    resize: Annotated[str | None, typer.Option(help="crop, squash or pad to the image size. Default: crop.")] = None,
    resize_to: Annotated[
        int | None, typer.Option(help="Length of the shorter side before the crop, as 256 for an image size of 224.")
    ] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear, bicubic or nearest.")] = None,
    channels: Annotated[int | None, typer.Option(help="3 for grey images and a colour teacher; 1 for grey.")] = None,
    orientation: Annotated[str | None, typer.Option(help="apply: turn images as their camera's tag says.")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave out broken image files.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use so many training images, evenly over the classes.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of names in an archive that are not UTF-8, such as cp932.")
    ] = None,
    label: NewLabels = None,
    strict: Strict = False,
    no_wait: NoWait = False,
) -> None:
    """Upload a data set and register it. The server reads every row first. Ctrl-C cancels that."""
    distillery: Distillery = context.obj
    given = {
        "resize": resize,
        "resize_to": resize_to,
        "interpolation": interpolation,
        "channels": channels,
        "orientation": orientation,
        "labels": labels_of(label) if label else None,
        "skip_unreadable": skip_unreadable or None,
        "limit": limit,
        "encoding": encoding,
    }
    packing = f"packing {file.name}" if file.is_dir() else None
    with _cancelling(), TransferBars() as bars, packed(file, bars.add(packing) if packing else None) as whole:
        dataset = distillery.register_dataset(
            name or _stem(whole),
            whole,
            image_size=image_size,
            options={option: value for option, value in given.items() if value is not None},
            strict=strict,
            wait=False,
            on_progress=bars.add(whole.name),
        )
        if not no_wait:
            dataset = distillery.wait_for_dataset(dataset, on_progress=bars.add_inspection(dataset["name"]))
    output().print(tables.dataset_table([dataset]))
    print_warnings(dataset["warnings"])
    _echo_use(dataset, f"--dataset {dataset['name']}", "datasets")


@datasets_app.command("remove")
def remove_dataset(context: typer.Context, name: NameOrId) -> None:
    """Remove a data set. Accepted jobs keep its file."""
    context.obj.delete_dataset(name)
    typer.echo(f"{name} removed")


# Webhooks


@webhooks_app.callback()
def list_webhooks(context: typer.Context, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        webhooks = list(context.obj.webhooks())
        print_list(webhooks, as_json, tables.webhook_table, "no webhooks yet: distillery webhooks add URL")
        for webhook in webhooks:
            if webhook["note"] is not None:
                tell(f"{webhook['id']}: {webhook['note']}")


@webhooks_app.command("add")
def add_webhook(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="https://host/path")],
    events: WebhookEvents = None,
) -> None:
    """Notify an address of the project's jobs: by default of their ends and alerts. Its secret is printed once."""
    webhook = context.obj.add_webhook(url, events)
    output().print(tables.webhook_table([webhook]))
    _print_secret(webhook)


@webhooks_app.command("change")
def change_webhook(
    context: typer.Context,
    webhook_id: WebhookId,
    url: Annotated[str | None, typer.Option(help="https://host/path")] = None,
    events: WebhookEvents = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Begin to send again, or send nothing more.")
    ] = None,
) -> None:
    """Change the URL or the events of a webhook, disable it, or enable it again."""
    output().print(
        tables.webhook_table([context.obj.change_webhook(webhook_id, url=url, events=events, enabled=enabled)])
    )


@webhooks_app.command("rotate")
def rotate_webhook(context: typer.Context, webhook_id: WebhookId) -> None:
    """Give a webhook another secret. For a day messages are signed with the earlier one, too."""
    _print_secret(context.obj.rotate_webhook(webhook_id))


@webhooks_app.command("test")
def test_webhook(context: typer.Context, webhook_id: WebhookId) -> None:
    """Send a test message."""
    delivery = context.obj.test_webhook(webhook_id)
    typer.echo(f"{delivery['id']} will be sent; what comes of it: distillery webhooks deliveries {webhook_id}")


@webhooks_app.command("deliveries")
def list_deliveries(
    context: typer.Context,
    webhook_id: WebhookId,
    status: Annotated[Literal["pending", "delivered", "failed"] | None, typer.Option(help="Default: all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the messages to a webhook, newest first, with the last answer."""
    deliveries = list(islice(context.obj.deliveries(webhook_id, status=status), limit))
    print_list(deliveries, as_json, tables.delivery_table, "nothing was sent yet")


@webhooks_app.command("replay")
def replay_delivery(
    context: typer.Context,
    webhook_id: WebhookId,
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY", help="The message's id.")],
) -> None:
    """Send a message again. It keeps its id."""
    context.obj.replay_delivery(webhook_id, delivery_id)
    typer.echo(f"{delivery_id} will be sent again")


@webhooks_app.command("remove")
def remove_webhook(context: typer.Context, webhook_id: WebhookId) -> None:
    """Remove a webhook, with its messages."""
    context.obj.delete_webhook(webhook_id)
    typer.echo(f"{webhook_id} removed")


def _print_secret(webhook: SecretWebhookView) -> None:
    tell("its secret, shown only now: the receiver verifies each message with it")
    typer.echo(webhook["secret"])


def _print_doubts(entry: Registered) -> None:
    print_warnings(entry["warnings"], entry["name"])
    for line in tables.refusal_lines(entry):
        tell(line)


@contextmanager
def _cancelling(done: str = "registered") -> Iterator[None]:
    """Say on Ctrl-C that the command is cancelled. The SDK has cancelled the registration that it waited for."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"cancelled; nothing is {done}", err=True)
        raise typer.Exit(DETACHED) from None


def _echo_use(entry: Registered, option: str, noun: str) -> None:
    if entry.get("state") == "inspecting":
        typer.echo(f"it is still being inspected; `distillery {noun}` shows its state", err=True)
    else:
        typer.echo(f"use it: {option}", err=True)


def _stem(file: Path) -> str:
    return file.name.partition(".")[0]


# The catalogue, the server's state, keys


@app.command()
def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Show one method with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods with their papers, or show one of them."""
    if name is None:
        print_list(context.obj.methods(), as_json, tables.method_table, "no methods")
        return
    method = context.obj.method(name)
    if as_json:
        print_json(method)
    else:
        output().print(*tables.method_page(method), sep="\n")


@app.command()
def architectures(
    context: typer.Context,
    family: Annotated[str | None, typer.Option()] = None,
    source: Annotated[str | None, typer.Option(help="kdcore or torchvision.")] = "kdcore",
    classes: Annotated[int, typer.Option(min=2, help="Parameters are counted for so many classes.")] = 10,
    channels: Annotated[int, typer.Option(min=1, help="Parameters are counted for so many channels.")] = 3,
    as_json: AsJson = False,
) -> None:
    """List the networks for teachers and students."""
    rows = context.obj.architectures(family=family, source=source or None, classes=classes, channels=channels)
    if not rows and source == "timm":
        raise InvalidInput("--source timm: its networks are not listed; timm/<name> takes each of timm.list_models()")
    if not rows:
        known = context.obj.architectures()
        families = sorted({row["family"] for row in known if source in (None, "", row["source"])})
        sources = sorted({row["source"] for row in known})
        way = f"its families are {', '.join(families)}" if families else f"sources are {', '.join(sources)}"
        asked = f"source {source!r}" + (f" and family {family!r}" if family else "")
        raise InvalidInput(f"there are no networks of {asked}; {way}")
    print_list(rows, as_json, tables.architecture_table, "")


@app.command()
def workers(context: typer.Context, as_json: AsJson = False) -> None:
    """List the workers with their devices."""
    if_empty = "no workers: distillery up starts one with the server"
    print_list(context.obj.workers(), as_json, tables.worker_table, if_empty)


@uploads_app.callback()
def list_uploads(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="Only those that are open, or complete.")] = None,
    as_json: AsJson = False,
) -> None:
    if context.invoked_subcommand is None:
        print_list(list(context.obj.uploads(status=status)), as_json, tables.upload_table, "no uploads")


@uploads_app.command("remove")
def remove_upload(context: typer.Context, upload: Annotated[str, typer.Argument(help="The upload's id.")]) -> None:
    """Remove an upload. Models, data sets and jobs keep its bytes."""
    context.obj.delete_upload(upload)
    typer.echo(f"{upload} removed")


@app.command()
def storage(
    context: typer.Context,
    collect: Annotated[
        bool, typer.Option("--collect", help="First delete what nothing needs any more (the operator's key).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show disk usage, free disk space, and what the collector removed."""
    if collect:
        context.obj.collect()
    answer = context.obj.storage()
    if as_json:
        print_json(answer)
        return
    console = output()
    console.print(tables.usage_table(answer))
    print_lines(console, tables.disk_space_line(answer))
    if answer["collections"]:
        console.print(tables.collection_table(answer["collections"]))


@app.command()
def limits(
    context: typer.Context,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Set limits: jobs_running=4 bytes_stored=default. Operator only."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="Only the operator names one. Default: yours.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the limits of a project and what is used, or set some."""
    answer = context.obj.limits(project)
    if changes:
        answer = context.obj.set_limits(answer["project"], dict(map(_limit, changes)))
    if as_json:
        print_json(answer)
        return
    output().print(tables.limits_table(answer))


def _limit(text: str) -> tuple[str, int | None]:
    name, _, value = text.partition("=")
    if value == "default":
        return name, None
    if not (name and value.isascii() and value.isdigit()):
        raise InvalidInput(f"{text} is no limit; write NAME=NUMBER, or NAME=default")
    return name, int(value)


@app.command()
def audit(
    context: typer.Context,
    action: Annotated[str | None, typer.Option(help="As in job.submit, key.revoke.")] = None,
    resource: Annotated[str | None, typer.Option(help="The id or name of what was acted on.")] = None,
    key: Annotated[str | None, typer.Option(help="The id or name of a key.")] = None,
    refused: Annotated[bool, typer.Option("--refused", help="Only what was refused for lack of rights.")] = False,
    project: Annotated[str | None, typer.Option(help="For the operator. Default: all.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="2026-11-29T00:00:00Z")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most entries.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show who did what to which resource, newest first. For admins of a project and the operator."""
    outcome = "refused" if refused else None
    filters = {"action": action, "resource": resource, "key": key, "outcome": outcome, "project": project}
    entries = list(islice(context.obj.audit(**filters, since=since, until=until), limit))
    print_list(entries, as_json, tables.audit_table, "no entries")


KeyId = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as in `keys list`.")]
OfProject = Annotated[str | None, typer.Option(help="Only the operator names one. Default: that of your key.")]


@keys_app.command("list")
def list_keys(context: typer.Context, project: OfProject = None, as_json: AsJson = False) -> None:
    """List the keys, newest first, with the ended ones."""
    keys = list(context.obj.keys(project=project))
    print_list(keys, as_json, tables.key_table, "no keys: distillery keys create NAME --role operator")


@keys_app.command("create")
def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Whose it is, as it is shown on jobs: ann, ci-nightly.")],
    role: Annotated[Role, typer.Option(help="At most that of your own key.")] = "member",
    project: OfProject = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="It can be used for this time: 8h, 30d. Default: no end.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is printed once, alone on standard output; the server stores only its SHA-256."""
    expires_in_s = None if expires is None else round(parse_duration(expires))
    made = context.obj.create_key(name, role=role, project=project, expires_in_s=expires_in_s)
    _print_key(made, as_json)


@keys_app.command("rotate")
def rotate_key(context: typer.Context, key_id: KeyId, as_json: AsJson = False) -> None:
    """Give a key another secret, which is printed once. The old one ends within five seconds."""
    _print_key(context.obj.rotate_key(key_id), as_json)


@keys_app.command("revoke")
def revoke_key(context: typer.Context, key_id: KeyId) -> None:
    """End a key for good, everywhere within five seconds."""
    context.obj.revoke_key(key_id)
    typer.echo(f"{key_id} revoked")


def _print_key(made: NewKeyView, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    tell(f"{made['id']}, {made['role']} of {made['project']}; shown only now, for DISTILLERY_API_KEY:")
    typer.echo(made["key"])


@projects_app.callback()
def list_projects(context: typer.Context, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        print_list(list(context.obj.projects()), as_json, tables.project_table, "no projects")


@projects_app.command("create")
def create_project(
    context: typer.Context, name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens.")]
) -> None:
    """Make a project. Its first key: keys create NAME --project PROJECT --role admin."""
    project = context.obj.create_project(name)
    typer.echo(f"{project['name']} created")
    tell(f"its first key: distillery keys create NAME --role admin --project {project['name']}")


@projects_app.command("delete")
def delete_project(context: typer.Context, name: Annotated[str, typer.Argument()]) -> None:
    """Delete a project that has no jobs, models, data sets and uploads, and end its keys."""
    context.obj.delete_project(name)
    typer.echo(f"{name} deleted")


@keys_app.command("new")
def new_key() -> None:
    """Make the operator's key without a server. It is printed once; the server's settings get only its SHA-256."""
    key = f"distillery_{secrets.token_urlsafe(32)}"
    typer.echo(f"key, shown only now (clients: DISTILLERY_API_KEY):\n  {key}")
    typer.echo(f"for the server:\n  DISTILLERY_ADMIN_KEY_HASH={hashlib.sha256(key.encode()).hexdigest()}")


main = app
