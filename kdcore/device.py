"""How a job computes: its device, precision, threads and kernels, chosen once; and bit-exact repetition."""

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from base.errors import SpecInvalid
from kdcore.spec import Training


@dataclass(frozen=True)
class Computing:
    """How a job computes. It is chosen at the first attempt and kept in checkpoints and report: other values round
    differently. A field that a checkpoint lacks has the default, which is how earlier versions computed."""

    device: Literal["cpu", "cuda"]
    bf16: bool
    """Networks compute in bfloat16, by autocast."""
    threads: int
    """Of the CPU, for one operation."""
    kernels: bool = False
    """Batch norms of learners are fused with what follows them."""
    folded: bool = False
    """Batch norms of the frozen teacher are folded into its convolutions."""
    step: Literal["eager", "graph"] = "eager"
    overlap: bool = False
    """The teacher sees the next batch in a thread of its own, with half of the threads of the CPU."""
    pieces: bool = False
    """The teacher runs on pieces of one size, so that its outputs can be kept and used again (`teacher_cache.py`)."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def teacher_threads(self) -> int:
        """The threads of a teacher that runs beside its student, which has the rest: at least one each."""
        return max(1, self.threads // 2)

    @property
    def student_threads(self) -> int:
        return max(1, self.threads - self.teacher_threads)


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


def choose_computing(training: Training) -> Computing:
    """Return how a job computes that begins now. Raises SpecInvalid if its device is not available or has no graphs."""
    device = choose(training)
    if training.step == "graph" and device.type != "cuda":
        raise SpecInvalid(
            "training.step is 'graph', and the job would run on a CPU; only CUDA devices have graphs",
            hint="set training.step to 'eager', or run the job where a GPU is visible",
        )
    return Computing(
        device="cuda" if device.type == "cuda" else "cpu",
        bf16=bf16(training, device),
        threads=training.threads or torch.get_num_threads(),
        step=training.step,
        overlap=training.overlap and device.type == "cpu",
        pieces=device.type == "cpu",
    )


def make_exact(seed: int) -> None:
    """Make a run repeatable: the same spec, device kind and number of threads give the same bits.

    An operation that is not deterministic warns in the log.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Like torch.use_deterministic_algorithms(True, warn_only=True), which would import the compiler.
    torch.set_deterministic_debug_mode("warn")
    # Else every new tensor is first filled with NaN, to show who reads memory that nobody wrote: 590 fills in a step of
    # ResNet-20, each of them a kernel on a GPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    torch.manual_seed(seed)
