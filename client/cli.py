"""The command line `distillery`. Exit codes: 0 success, 1 the job did not succeed, 2 an error, 130 interrupted.

Errors are lines on standard error, one for each fault. Warnings are blocks of lines there, and change no exit code.
`--json` prints the service's answer for programs.
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from base.defaults import DEFAULT_URL, PORT
from client.commands import jobs, library, service, students
from client.commands.common import (
    Commands,
)
from client.local_server import serve_command
from client.sdk import Distillery

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large image classifier into a small one, and measure what the teacher was worth.",
)


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


for subject in (jobs, students, library, service):
    app.add_typer(subject.app)
main = app
