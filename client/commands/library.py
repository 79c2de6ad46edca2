"""Commands for what jobs are made of: models, data sets, uploads."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from base.wire import (
    Registered,
)
from client import tables
from client.commands.common import AsJson, Commands, ListLabels, NameOrId, NewLabels, cancelling, detachable
from client.errors import InvalidInput
from client.sdk import Distillery
from client.spec import (
    Spec,
    label_filters,
    labels_of,
    parse_numbers,
    read_class_map,
    read_class_names,
    set_data,
    upload_files,
)
from client.terminal import (
    TransferBars,
    follow,
    output,
    print_json,
    print_lines,
    print_list,
    print_report,
    print_warnings,
    tell,
)
from client.transfer import packed

app = typer.Typer(cls=Commands)
models_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Teachers: list, add, evaluate, remove.")
datasets_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Data sets: list, add, remove.")
uploads_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Uploaded files: list, remove.")
app.add_typer(models_app, name="models")
app.add_typer(datasets_app, name="datasets")
app.add_typer(uploads_app, name="uploads")
Strict = Annotated[bool, typer.Option("--strict", help="A warning is an error: nothing is registered.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the inspection.")]
FileName = Annotated[str | None, typer.Option("--name", help="Default: the file's name.")]


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
    with cancelling(), TransferBars() as bars:
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
    with cancelling("submitted"), TransferBars() as bars:
        data = upload_files(distillery, fields, bars.add, bars.add_inspection)["dataset"]
    source = data["source"] if isinstance(data, dict) else data
    job = distillery.evaluate_model(name, source, image_size=image_size, class_map=answers, strict=strict)
    console = Console(stderr=True)
    with detachable(job["id"]):
        job = follow(distillery, job["id"], console, f"evaluation of {name}")
    if as_json:
        print_json(job)
    elif job["status"] == "succeeded":
        print_report(job, output())
    else:
        print_lines(console, f"job {job['id']} {job['status']}", *tables.failure_lines(job), style="red")
    raise typer.Exit(0 if job["status"] == "succeeded" else 1)


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
    with cancelling(), TransferBars() as bars, packed(file, bars.add(packing) if packing else None) as whole:
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


def _print_doubts(entry: Registered) -> None:
    print_warnings(entry["warnings"], entry["name"])
    for line in tables.refusal_lines(entry):
        tell(line)


def _echo_use(entry: Registered, option: str, noun: str) -> None:
    if entry.get("state") == "inspecting":
        typer.echo(f"it is still being inspected; `distillery {noun}` shows its state", err=True)
    else:
        typer.echo(f"use it: {option}", err=True)


def _stem(file: Path) -> str:
    return file.name.partition(".")[0]


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
