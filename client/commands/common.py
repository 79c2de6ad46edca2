"""What all commands share: how an error is printed, and the options that several have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from client.errors import DistilleryError
from client.terminal import (
    tell,
)

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


JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]
NameOrId = Annotated[str, typer.Argument(help="Name or id.")]
ListLabels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="Only with this label, or a NAME. Repeat it.")
]
NewLabels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label to find it by. Repeat it.")
]


@contextmanager
def detachable(job_id: str) -> Iterator[None]:
    """Let Ctrl-C end the command, and not the job that it follows."""
    try:
        yield
    except KeyboardInterrupt:
        again = f"follow it again: distillery watch {job_id}   stop it: distillery cancel {job_id}"
        typer.echo(f"detached; the job continues. {again}", err=True)
        raise typer.Exit(DETACHED) from None


@contextmanager
def cancelling(done: str = "registered") -> Iterator[None]:
    """Say on Ctrl-C that the command is cancelled. The SDK has cancelled the registration that it waited for."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"cancelled; nothing is {done}", err=True)
        raise typer.Exit(DETACHED) from None
