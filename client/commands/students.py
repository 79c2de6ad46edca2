"""Commands for what a job has trained: more files of it, its speed, what fits, and what it sees."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from base.jobs import TERMINAL
from base.wire import (
    Benchmark,
    BenchmarkView,
)
from client import tables
from client.commands.common import AsJson, Commands, JobId, detachable
from client.errors import InvalidInput
from client.sdk import Distillery
from client.terminal import (
    TransferBars,
    follow,
    output,
    print_json,
    print_lines,
    print_report,
    tell,
)

app = typer.Typer(cls=Commands)


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
        with detachable(job["id"]):
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
        with detachable(found["job"]):
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
