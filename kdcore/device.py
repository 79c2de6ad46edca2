"""Which device a job runs on, and how exactly it repeats itself there."""

import os

import torch

from base.errors import SpecInvalid
from kdcore.spec import Recipe


def choose(training: Recipe) -> torch.device:
    """The device asked for; `auto` takes a GPU where there is one. Raises SpecInvalid for one that is not there."""
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise SpecInvalid("training.device is 'cuda', but no GPU is visible here", hint="ask for 'auto' or 'cpu'")
    return torch.device("cuda" if available and training.device != "cpu" else "cpu")


def bf16(training: Recipe, device: torch.device) -> bool:
    """Whether the networks compute in bfloat16: as asked, or by itself on a GPU that has it."""
    if training.precision != "auto":
        return training.precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def make_exact(seed: int) -> None:
    """Same spec, same device kind, same number of threads: same bits. What cannot promise that warns in the log."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Deterministic algorithms, warning only; the function of that name imports the compiler to tell it too.
    torch.set_deterministic_debug_mode("warn")
    torch.manual_seed(seed)
