"""`distillery models` and `distillery datasets`: what jobs are made of, by name."""

from pathlib import Path
from typing import Annotated

import typer

from client import tables
from client.terminal import AsJson, Commands, Transfers, output, show_list

models = typer.Typer(cls=Commands, invoke_without_command=True, help="Teachers: list, add, remove.")
datasets = typer.Typer(cls=Commands, invoke_without_command=True, help="Data sets: list, add, remove.")


@models.callback()
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """Teachers: without a command, list them."""
    if context.invoked_subcommand is None:
        none_yet = "no models yet: distillery models add FILE --architecture resnet56"
        show_list(list(context.obj.models()), as_json, tables.model_list, none_yet)


@models.command("add")
def add_model(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A PyTorch or safetensors checkpoint.")],
    architecture: Annotated[str | None, typer.Option(help="Where the file does not say it.")] = None,
    name: Annotated[str | None, typer.Option(help="Default: the file's name.")] = None,
) -> None:
    """Upload a checkpoint, have it inspected, and register it as a teacher."""
    with Transfers() as transfers:
        model = context.obj.register_model(name or _name_of(file), file, architecture, tell=transfers.file(file.name))
    output().print(tables.model_list([model]))
    typer.echo(f"use it: --teacher model:{model['name']}", err=True)


@models.command("remove")
def remove_model(context: typer.Context, name: Annotated[str, typer.Argument(help="Name or id.")]) -> None:
    """Forget a teacher. Jobs that were accepted with it are not disturbed."""
    context.obj.delete_model(name)
    typer.echo(f"{name} removed")


@datasets.callback()
def list_datasets(context: typer.Context, as_json: AsJson = False) -> None:
    """Data sets: without a command, list them."""
    if context.invoked_subcommand is None:
        show_list(list(context.obj.datasets()), as_json, tables.dataset_list, "no data sets")


@datasets.command("add")
def add_dataset(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help=".npz arrays, or a .zip or .tar with one folder a class.")],
    name: Annotated[str | None, typer.Option(help="Default: the file's name.")] = None,
    image_size: Annotated[int | None, typer.Option(help="For images of differing sizes.")] = None,
) -> None:
    """Upload a data set, have every row of it read, and register it."""
    with Transfers() as transfers:
        dataset = context.obj.register_dataset(
            name or _name_of(file), file, image_size=image_size, tell=transfers.file(file.name)
        )
    output().print(tables.dataset_list([dataset]))
    typer.echo(f"use it: --dataset {dataset['name']}", err=True)


@datasets.command("remove")
def remove_dataset(context: typer.Context, name: Annotated[str, typer.Argument(help="Name or id.")]) -> None:
    """Forget a data set. Jobs that were accepted with it are not disturbed."""
    context.obj.delete_dataset(name)
    typer.echo(f"{name} removed")


def _name_of(file: Path) -> str:
    return file.name.partition(".")[0]
