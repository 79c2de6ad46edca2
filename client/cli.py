"""The command line. Exit codes: 0 done, 1 the job did not succeed, 2 an error, 130 interrupted.

Errors go to standard error, one line a fault. `--json` prints the service's own answer, for programs.
"""

import hashlib
import json
import os
import secrets
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from client import manual, shelves, tables
from client.answers import STUDENT_FILE, Job
from client.errors import Unusable, fault_line
from client.local_server import serve_command
from client.sdk import DEFAULT_URL, Distillery
from client.spec import Spec, assign, bring_files, feed, read_spec, seconds, teach, weighed
from client.terminal import AsJson, Commands, Transfers, output, print_json, show_list
from client.transfer import digest_of
from client.watching import follow, say, verdict

DETACHED = 130


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large image classifier into a small one, and see what the teacher was worth.",
)
keys_app = typer.Typer(cls=Commands, no_args_is_help=True, help="API keys.")
app.add_typer(shelves.models, name="models")
app.add_typer(shelves.datasets, name="datasets")
app.add_typer(keys_app, name="keys")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="DISTILLERY_URL", help=f"The server. Default: {DEFAULT_URL}")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="DISTILLERY_API_KEY", help="The API key, where the server asks for one.")
    ] = None,
) -> None:
    if context.obj is None:
        context.obj = Distillery(url, key)


# A server


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Default: this machine only. Another needs a key: keys new.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000; 0 takes any free one.")] = None,
    home: Annotated[Path | None, typer.Option(help="Where everything is kept. Default: ./distillery-data")] = None,
) -> None:
    """Serve: API, web page and a worker in one process, on SQLite. Ctrl-C saves what is being trained, and stops."""
    given = {"--host": host, "--port": port, "--home": home}
    command = serve_command([text for name, value in given.items() if value is not None for text in (name, str(value))])
    os.execv(command[0], command)  # noqa: S606 - the server takes our place: signals and exit code are its own


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Distillations, each with another seed.")] = 3,
    to: Annotated[Path, typer.Option(help="Where the student is put.")] = Path("distillery-demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the server's data there too.")] = False,
) -> None:
    """From nothing to a proven student in half a minute: a server, a teacher, distillations, the proof."""
    from client.demo import demo as run_demo

    raise typer.Exit(run_demo(Console(), seeds=seeds, to=to, keep=keep))


# Jobs


@app.command()
def submit(
    context: typer.Context,
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="JSON or YAML file; - reads it.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A name (digits, ...), a registered set, or a file here.")] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="Images to distil onto, without labels: named as --dataset is.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="model:<name>, job:<id>, weights:<name>, or a file here: a checkpoint, or a .pt2 program of "
            "torch.export. Several times: their probabilities are averaged."
        ),
    ] = None,
    teacher_architecture: Annotated[
        list[str] | None, typer.Option(help="Where the checkpoint does not say it; one for each --teacher.")
    ] = None,
    assistant: Annotated[
        list[str] | None, typer.Option(help="An architecture between teacher and student. Several: largest first.")
    ] = None,
    student: Annotated[
        list[str] | None, typer.Option(help="The student's architecture. Several times: peers, for dml.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="kd, attention, ...: see `distillery methods`. Several times: their sum, such as kd=0.9.",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the labels' loss.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the distillation loss.")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    baseline: Annotated[str | None, typer.Option(help="none, train or job:<id>.")] = None,
    name: Annotated[str | None, typer.Option(help="What you call the job.")] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100: the higher goes first. Default: 0.")] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="It must have ended so long from now: seconds, 30m, 8h, 2d.")
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
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job to its end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the spec, and show it resolved.")] = False,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key again is the same job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job from a spec file, from flags, or both: flags win. Files of yours are uploaded first."""
    distillery: Distillery = context.obj
    asked = read_spec(spec) if spec else {}
    plain = {
        "student": _one_or_several(student),
        "assistants": assistant or None,
        "method": weighed(method) if method else None,
        "temperature": temperature,
        "alpha": alpha,
        "beta": beta,
        "baseline": baseline,
        "name": name,
    }
    asked.update({field: value for field, value in plain.items() if value is not None})
    if dataset is not None:
        feed(asked, dataset)
    if unlabelled is not None:
        feed(asked, unlabelled, "unlabelled")
    if teacher or teacher_architecture:
        teach(asked, teacher or [], teacher_architecture or [])
    inner = {
        "training.epochs": epochs,
        "training.seed": seed,
        "scheduling.priority": priority,
        "scheduling.deadline_s": None if deadline is None else seconds(deadline),
        "scheduling.max_attempts": max_attempts,
    }
    for setting in [f"{path}={value}" for path, value in inner.items() if value is not None] + (settings or []):
        assign(asked, setting)
    if not asked:
        raise Unusable("nothing to submit: give a spec file, or flags such as --dataset, --student and --method")
    with Transfers() as transfers:
        ready = bring_files(distillery, asked, transfers.file)
    if dry_run:
        _show_validation(distillery, ready, as_json)
        return
    job = distillery.submit(ready, idempotency_key=idempotency_key)
    if as_json and not watch:
        print_json(job)
        return
    typer.echo(job["id"])
    if watch:
        _follow(distillery, job["id"], as_json)
    else:
        typer.echo(f"follow it: distillery watch {job['id']}", err=True)


@app.command("list")
def list_jobs(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="queued, running, paused, succeeded, failed or cancelled.")] = None,
    method: Annotated[str | None, typer.Option(help="Of this one; a sum is named as it is listed: kd+dkd.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Jobs, newest first."""
    distillery: Distillery = context.obj
    found = islice(distillery.jobs(status=status, method=method, limit=min(limit, 100)), limit)
    show_list(list(found), as_json, tables.job_list, "no jobs yet: distillery submit --help")


@app.command()
def show(
    context: typer.Context,
    job_id: JobId,
    logs: Annotated[bool, typer.Option("--logs", help="What the job's process printed.")] = False,
    events: Annotated[bool, typer.Option("--events", help="What happened to the job.")] = False,
    as_json: AsJson = False,
) -> None:
    """A job: where it stands, what it proved, or why it failed; and its attempts."""
    distillery: Distillery = context.obj
    if logs:
        typer.echo(distillery.logs(job_id), nl=False)
        return
    if events:
        from client.watching import event_line

        found = distillery.events(job_id)
        for event in found:
            typer.echo(json.dumps(event) if as_json else event_line(event))
        return
    job = distillery.job(job_id)
    if as_json:
        print_json(job)
        return
    console = output()
    console.print(tables.job_facts(job))
    if attempts := distillery.attempts(job_id):
        console.print(tables.attempt_list(attempts))
    if job["result"]:
        console.print(tables.proof([job["result"]]))
        say(console, tables.gain_sentence([job["result"]]))
    say(console, *tables.failure_lines(job), style="red")


@app.command()
def watch(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end; exit 0 if it succeeds, 1 if not. Ctrl-C detaches, and the job goes on."""
    _follow(context.obj, job_id, as_json)


@app.command()
def cancel(context: typer.Context, job_id: JobId) -> None:
    """Stop a job. A running one is cancelled when its process has really ended."""
    _say_moved(context.obj.cancel(job_id))


@app.command()
def pause(context: typer.Context, job_id: JobId) -> None:
    """Set a job aside. A running one saves its state, and goes on from there."""
    _say_moved(context.obj.pause(job_id))


@app.command()
def resume(context: typer.Context, job_id: JobId) -> None:
    """Put a paused job back into the queue."""
    _say_moved(context.obj.resume(job_id))


@app.command()
def retry(
    context: typer.Context,
    job_id: JobId,
    start: Annotated[
        Literal["checkpoint", "scratch"], typer.Option("--from", help="scratch: as if it had never run.")
    ] = "checkpoint",
) -> None:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint, or begins anew."""
    _say_moved(context.obj.retry(job_id, from_scratch=start == "scratch"))


@app.command()
def delete(context: typer.Context, job_id: JobId) -> None:
    """Forget a job that has ended, and all that it left behind."""
    context.obj.delete(job_id)
    typer.echo(f"{job_id} deleted")


@app.command()
def download(
    context: typer.Context,
    job_id: JobId,
    file: Annotated[str, typer.Argument(help="Which file of the job.")] = STUDENT_FILE,
    to: Annotated[Path | None, typer.Option(help="Path or folder. Default: the file's name, here.")] = None,
) -> None:
    """Fetch a job's file, checked by its SHA-256. What breaks off goes on from there the next time."""
    distillery: Distillery = context.obj
    with Transfers() as transfers:
        path = distillery.download(job_id, file, to=to, tell=transfers.file(file))
    typer.echo(f"{path}  {path.stat().st_size:,} bytes  sha256:{digest_of(path)}")


# The catalogue, what an operator looks at, keys


@app.command()
def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Show one, with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """What can be taught, each method with its paper; or one of them in full."""
    if name is None:
        show_list(context.obj.methods(), as_json, tables.method_list, "no methods")
        return
    method = context.obj.method(name)
    if as_json:
        print_json(method)
    else:
        output().print(*manual.page(method), sep="\n")


@app.command()
def architectures(
    context: typer.Context,
    family: Annotated[str | None, typer.Option()] = None,
    source: Annotated[str | None, typer.Option(help="kdcore, torchvision or timm.")] = "kdcore",
    classes: Annotated[int, typer.Option(min=2, help="To count parameters for.")] = 10,
    channels: Annotated[int, typer.Option(min=1, help="To count parameters for.")] = 3,
    as_json: AsJson = False,
) -> None:
    """The networks that may teach or learn."""
    found = context.obj.architectures(family=family, source=source or None, classes=classes, channels=channels)
    show_list(found, as_json, tables.architecture_list, "no such architectures")


@app.command()
def workers(context: typer.Context, as_json: AsJson = False) -> None:
    """Who works, on what devices, and whether each takes jobs."""
    show_list(
        context.obj.workers(), as_json, tables.worker_list, "no workers: distillery up starts one with the server"
    )


@app.command()
def storage(context: typer.Context, as_json: AsJson = False) -> None:
    """How much is kept, how much room is left, and what the collector removed lately."""
    kept = context.obj.storage()
    if as_json:
        print_json(kept)
        return
    console = output()
    console.print(tables.usage(kept))
    say(console, tables.room(kept))
    if kept["collections"]:
        console.print(tables.collection_list(kept["collections"]))


@keys_app.command("new")
def new_key() -> None:
    """Make an administrator's key. It is shown once; the server keeps its SHA-256 only."""
    key = f"distillery_{secrets.token_urlsafe(32)}"
    typer.echo(f"key, shown only now (clients: DISTILLERY_API_KEY):\n  {key}")
    typer.echo(f"for the server:\n  DISTILLERY_ADMIN_KEY_HASH={hashlib.sha256(key.encode()).hexdigest()}")


def _follow(distillery: Distillery, job_id: str, as_json: bool) -> None:
    """Exit with the job: 0 where it succeeded, 1 where not."""
    console = Console()
    try:
        if as_json:
            for event in distillery.watch(job_id):
                typer.echo(json.dumps(event))
            job = distillery.job(job_id)
        else:
            job = follow(distillery, job_id, console)
    except KeyboardInterrupt:
        typer.echo(
            f"detached; the job goes on. Again: distillery watch {job_id}   stop it: distillery cancel {job_id}",
            err=True,
        )
        raise typer.Exit(DETACHED) from None
    good = job["status"] == "succeeded" if as_json else verdict(job, console, _fetch_hint)
    raise typer.Exit(0 if good else 1)


def _one_or_several(named: list[str] | None) -> str | list[str] | None:
    return named[0] if named and len(named) == 1 else named or None


def _fetch_hint(job: Job) -> str:
    return f"fetch the student: distillery download {job['id']}"


def _show_validation(distillery: Distillery, spec: Spec, as_json: bool) -> None:
    told = distillery.validate(spec)
    if as_json or told["valid"]:
        print_json(told if as_json else {"resolved_spec": told["resolved_spec"], "estimate": told["estimate"]})
    else:
        for fault in told["errors"]:
            typer.echo(fault_line(fault), err=True)
    if not told["valid"]:
        raise typer.Exit(2)


def _say_moved(job: Job) -> None:
    asked = f", {job['requested']} asked" if job["requested"] else ""
    typer.echo(f"{job['id']} is {job['status']}{asked}")


main = app
