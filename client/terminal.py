"""What every command needs of the terminal: errors as lines, tables or JSON, progress bars."""

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from typer.core import TyperGroup

from client.errors import DistilleryError
from client.transfer import Tell

AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]


class Commands(TyperGroup):
    """Commands whose errors are lines on standard error and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DistilleryError as error:
            for number, line in enumerate(error.lines()):
                typer.echo(line if number else f"error: {line}", err=True)
            raise typer.Exit(2) from None


def show_list(found: list[Any], as_json: bool, as_table: Callable[[Iterable[Any]], Any], none_yet: str) -> None:
    if as_json:
        print_json(found)
    elif found:
        output().print(as_table(found))
    else:
        typer.echo(none_yet, err=True)


def output() -> Console:
    """Standard output; where that is no terminal, with room for a row on one line."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=200)


def print_json(answer: Any) -> None:
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))


class Transfers:
    """Progress bars for files on their way; on standard error, only on a terminal, and gone when they are through."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def file(self, name: str) -> Tell:
        """A new bar; the display starts with the first."""
        self.progress.start()
        bar = self.progress.add_task(name, total=None)
        return lambda done, total: self.progress.update(bar, completed=done, total=total)
