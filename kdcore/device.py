"""The device and precision of a job, and bit-exact repetition."""

import os

import torch

from base.errors import SpecInvalid
from kdcore.spec import Training


def choose(training: Training) -> torch.device:
    """Return the requested device; `auto` takes a GPU if there is one. Raises SpecInvalid if it is not available."""
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise SpecInvalid("training.device is 'cuda', but no GPU is visible here", hint="set 'auto' or 'cpu'")
    return torch.device("cuda" if available and training.device != "cpu" else "cpu")


def bf16(training: Training, device: torch.device) -> bool:
    """Return True if the networks compute in bfloat16: as requested, or by default on a GPU that supports it."""
    if training.precision != "auto":
        return training.precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def make_exact(seed: int) -> None:
    """Make a run repeatable: the same spec, device kind and number of threads give the same bits.

    An operation that is not deterministic warns in the log.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Like torch.use_deterministic_algorithms(True, warn_only=True), which would import the compiler.
    torch.set_deterministic_debug_mode("warn")
    torch.manual_seed(seed)
