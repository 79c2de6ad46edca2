"""Resumable states: everything that a training needs to go on as if nothing had happened."""

from pathlib import Path
from typing import Any

import torch

from base.errors import Internal
from base.files import Written, write_whole

KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Written:
    """Write `<folder>/<step>.pt` whole and durable, and let go of all but the last two."""
    written = write_whole(folder / f"{step:09d}.pt", lambda path: _write(path, state))
    for old in sorted(folder.glob("*.pt"))[:-KEPT]:
        old.unlink()
    return written


def _write(path: Path, state: dict[str, Any]) -> None:
    # Given a path, torch writes by itself, and does not tell a full disk from any other trouble.
    with path.open("wb") as file:
        torch.save(state, file)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """The state as it was saved; tensors of the model come to `device`, random states stay on the CPU."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise Internal(f"the checkpoint {path.name} cannot be read: {error}") from error
    return state


def random_state() -> dict[str, Any]:
    """Of the generators that dropout and initialisation draw from; views and order need none."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
