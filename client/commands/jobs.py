"""Commands for jobs: submit, list, follow, steer, download."""

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from base.references import STUDENT_FILE
from base.wire import (
    JobFilters,
    JobView,
    WarningView,
)
from client import tables
from client.commands.common import AsJson, Commands, JobId, ListLabels, NewLabels, cancelling, detachable
from client.errors import InvalidInput, fault_line
from client.sdk import Distillery
from client.spec import (
    Spec,
    label_filters,
    labels_of,
    parse_duration,
    parse_methods,
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
from client.transfer import digest_of

app = typer.Typer(cls=Commands)


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
    with cancelling("submitted"), TransferBars() as bars:
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
    """List jobs, newest first. Filters combine. The gap closed is that of the report's sentence: of several seeds the
    mean, unless the images leave open whether distilling helped. The accuracy is the delivered student's."""
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
    with detachable(job_id):
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
