"""Checkpoints of a job in training: all that it needs to continue as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.errors import Internal
from base.files import Written, write_whole
from kdcore.training import Outcome

KEPT = 2


@dataclass
class Progress:
    """The state of a job: outcomes of trials that have ended, by trial and model; what the ended stages of the current
    trial have learned, by stage; and the state of the stage in training."""

    finished: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    prepared: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


def save(folder: Path, step: int, progress: Progress) -> Written:
    """Write `<folder>/<step>.pt` whole and durable, and delete all but the last two."""
    finished = {
        trial: {model: vars(outcome) for model, outcome in outcomes.items()}
        for trial, outcomes in progress.finished.items()
    }
    state = {"finished": finished, "prepared": progress.prepared, "training": progress.training}

    def write(path: Path) -> None:
        # Given a path, torch's own writer hides the error of a full disk.
        with path.open("wb") as file:
            torch.save(state, file)

    written = write_whole(folder / f"{step:09d}.pt", write)
    for old in sorted(folder.glob("*.pt"))[:-KEPT]:
        old.unlink()
    return written


def load(path: Path, device: torch.device) -> Progress:
    """Read a checkpoint. Tensors of models come to `device`; random states stay on the CPU."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        finished = {
            trial: {model: Outcome(**saved) for model, saved in outcomes.items()}
            for trial, outcomes in state["finished"].items()
        }
        return Progress(finished, dict(state["prepared"]), state["training"])
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise Internal(f"the checkpoint {path.name} cannot be read: {type(error).__name__}: {error}") from error
