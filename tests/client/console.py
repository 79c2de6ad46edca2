"""A console that writes to memory, and the text that was printed on it."""

import io

from rich.console import Console


def console(width: int = 150, is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)


def printed(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()
