"""How a job computes: its device, precision, threads and kernels, chosen once; and bit-exact repetition."""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from base import cores
from base.errors import SpecInvalid
from kdcore import kernels
from kdcore.models.layers import can_fold
from kdcore.spec import Training

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of CPUs that multiply bfloat16 numbers natively: two of x86, the last one of ARM."""
WINDOW_S = 3.0
"""The time of one look at the load while a job runs."""
QUIET_WINDOWS = 10
"""Looks without load after which a job takes its threads again."""
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


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
    convolutions: bool = False
    """3 × 3 convolutions are our own, where these apply, not oneDNN's."""
    folded: bool = False
    """Batch norms of the frozen teacher are folded into its convolutions."""
    step: Literal["eager", "graph"] = "eager"
    overlap: bool = False
    """The teacher sees the next batch in a thread of its own, with half of the threads of the CPU."""
    pieces: bool = False
    """The teacher runs on pieces of one size, so that its outputs can be kept and used again (`cache/teacher.py`)."""
    why: str = ""
    """What decided the number of threads."""
    note: str = ""
    """Where the fused kernels come from, or why there are none."""
    arithmetic: str = ""
    """What else decides the bits: the version of torch, the kind of CPU or the GPU, and the kernels' code. "" of a job
    that an earlier version began."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def teacher_threads(self) -> int:
        """The threads of a teacher that runs beside its student, which has the rest: at least one each."""
        return max(1, self.threads // 2)

    @property
    def student_threads(self) -> int:
        return max(1, self.threads - self.teacher_threads)

    def __str__(self) -> str:
        precision = "bf16" if self.bf16 else "fp32"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}" + (f" ({self.why})" if self.why else "")
        chosen = {"folded teacher": self.folded, "overlap": self.overlap}
        options = [name for name, is_on in chosen.items() if is_on] + ["CUDA graph"] * (self.step == "graph")
        kernels = [f"kernels: {self.note}"] if self.note else []
        return ", ".join([self.device, threads, precision, *kernels, *options, f"allocator: {allocator()}"])


def choose(training: Training) -> torch.device:
    """Return the requested device; `auto` takes a GPU if there is one. Raises SpecInvalid if it is not available."""
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise SpecInvalid("the device 'cuda' is asked for, but no GPU is visible here", hint="set 'auto' or 'cpu'")
    return torch.device("cuda" if available and training.device != "cpu" else "cpu")


def bf16(training: Training, device: torch.device) -> bool:
    """Return True if the networks compute in bfloat16: as requested, or by default where the device has it."""
    if training.precision != "auto":
        return training.precision == "bf16"
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Return True if this CPU multiplies bfloat16 numbers natively, and PyTorch's library for networks is there to use
    it. False where the system does not tell: emulated, bfloat16 is slower than float32."""
    return bool(cores.flags() & BF16_FLAGS) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def choose_threads(of_spec: int | None = None) -> tuple[int, str]:
    """Return the number of threads of a job that begins now, and why. A number that somebody has set is kept, that of
    the spec first, but no job takes more than there are cores; without one, cores that others use are left to them."""
    available = cores.cores()
    asked, name = of_spec, "training.threads"
    if asked is None:
        asked, name = cores.asked_threads(os.environ), cores.THREADS[0]
    if asked is not None:
        return (asked, name) if asked <= available else (available, f"{name} is {asked}, of {available} cores")
    share = int(os.environ.get(cores.AT_MOST) or available)
    if share == 1:
        return 1, "its share of the cores"
    free = cores.free_cores(cores.busy())
    if free < share:
        # Whole cores, which decide: a report is the same for the same bits.
        return free, f"{available - free} of {available} cores are busy"
    return share, "its share of the cores"


def threads_are_asked(training: Training) -> bool:
    """Return True if the spec or the operator has set the number of threads, which the load does not change then."""
    return training.threads is not None or cores.asked_threads(os.environ) is not None


class LoadWatch:
    """Adapts the number of threads while a job runs: threads that wait for one another lose far more than their share
    when another process takes a core.

    It looks at most once in WINDOW_S, between two steps, and sets fewer threads at once; those that the job began with
    come back after a longer time without load.
    """

    def __init__(self, threads: int, *, adapts: bool) -> None:
        self.threads = self.most = threads
        self.adapts = adapts and threads > 1
        self._quiet = 0
        self._before = cores.CpuTime.now() if self.adapts else None

    def after_step(self) -> int | None:
        """Return the number of threads that has been set now, if it is another one than before."""
        if self._before is None or time.monotonic() - self._before.at < WINDOW_S:
            return None
        now = cores.CpuTime.now()
        if now is None:
            return None
        free = min(self.most, cores.free_cores(now.others_since(self._before)))
        self._before, self._quiet = now, self._quiet + 1 if free > self.threads else 0
        if free == self.threads or (free > self.threads and self._quiet < QUIET_WINDOWS):
            return None
        self.threads, self._quiet = free, 0
        torch.set_num_threads(free)
        return free


def begin(training: Training, cache: Path | None, threads: tuple[int, str] | None = None) -> Computing:
    """Return how a job computes that begins now, and enable what it uses. Raises SpecInvalid if its device is not
    available.

    `cache`: the folder of compiled kernels; None for PyTorch's operators alone. `threads`: their number, and why; None
    to choose it by what is free.
    """
    device = choose(training)
    if training.step == "graph" and device.type != "cuda":
        raise SpecInvalid(
            "training.step is 'graph', and the job would run on a CPU; only CUDA devices have graphs",
            hint="set training.step to 'eager', or run the job where a GPU is visible",
        )
    number, why = threads or choose_threads(training.threads)
    own = device.type == "cpu" and training.kernels == "auto"
    in_bf16 = bf16(training, device)
    support = _kernels(cache if own else None, convolutions=True)
    convolutions = _convolves(support, in_bf16)
    if support.convolutions and not convolutions:
        # Evaluations are in float32: a later attempt that enables what is recorded must compute them alike.
        support = _kernels(cache, convolutions=False)
    return Computing(
        device="cuda" if device.type == "cuda" else "cpu",
        bf16=in_bf16,
        threads=number,
        kernels=support.enabled,
        convolutions=convolutions,
        folded=own and can_fold(in_bf16),
        step=training.step,
        overlap=training.overlap and device.type == "cpu",
        pieces=device.type == "cpu",
        why=why,
        note=support.note,
        arithmetic=_arithmetic(device, support),
    )


def _arithmetic(device: torch.device, support: kernels.Support) -> str:
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    kind = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {support.code}" if support.code else kind


def _convolves(support: kernels.Support, in_bf16: bool) -> bool:
    return (torch.bfloat16 if in_bf16 else torch.float32) in support.convolutions


def _kernels(cache: Path | None, convolutions: bool) -> kernels.Support:
    """Enable the fused kernels in this process, with the convolutions or without them, or disable them."""
    if cache is not None:
        return kernels.enable(cache, convolutions)
    kernels.disable()
    return kernels.Support(False, "")


def resume(begun: Computing | None, training: Training, cache: Path) -> tuple[Computing, str]:
    """Return how a resumed job computes, and in words what this machine cannot do as the job began; "" if nothing.
    Enables what it uses.

    `begun` is None if the version that began the job did not record it: that one had one way to compute, and took bf16
    on a CPU only when asked.
    """
    device = choose(training)
    own = begun is not None and begun.kernels and device.type == "cpu"
    support = _kernels(cache if own else None, begun is not None and begun.convolutions)
    if begun is None:
        kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
        asked = training.precision == "bf16" or (kind == "cuda" and bf16(training, device))
        return Computing(kind, asked, torch.get_num_threads(), why="a checkpoint of an earlier version"), ""
    changes = {}
    if begun.device != device.type:
        changes["device"] = f"on {device.type} instead of {begun.device}"
    asked_threads = cores.asked_threads(os.environ)
    threads = min(begun.threads, cores.cores(), asked_threads or begun.threads)
    if threads != begun.threads:
        changes["threads"] = f"with {threads} instead of {begun.threads} threads"
    if begun.kernels and not support.enabled and device.type == begun.device:
        changes["kernels"] = f"without the fused kernels ({support.note})"
    elif begun.convolutions and not _convolves(support, begun.bf16) and device.type == begun.device:
        changes["convolutions"] = "with other 3 × 3 convolutions"
    arithmetic = _arithmetic(device, support)
    if begun.arithmetic not in ("", arithmetic) and device.type == begun.device and "kernels" not in changes:
        changes["arithmetic"] = f"by {arithmetic} instead of {begun.arithmetic}"
    folded = begun.folded and device.type == "cpu" and can_fold(begun.bf16)
    if begun.folded and not folded and device.type == begun.device:
        changes["folded"] = "with a teacher that is not folded"
    here = replace(
        begun,
        device="cuda" if device.type == "cuda" else "cpu",
        threads=threads,
        kernels=support.enabled,
        convolutions=begun.convolutions and _convolves(support, begun.bf16),
        folded=folded,
        # Graphs are for GPUs, a teacher that runs ahead is for CPUs; the job may have moved.
        step=begun.step if device.type == "cuda" else "eager",
        overlap=begun.overlap and device.type == "cpu",
        # A job that began without the kernels keeps the reason.
        note=support.note if begun.kernels else begun.note,
        arithmetic=arithmetic if begun.arithmetic else "",
    )
    return here, " and ".join(changes.values())


def allocator() -> str:
    """Return the name of the memory allocator that this process uses: `system`, or one that was preloaded."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        loaded = ""
    return next((name for name in ALLOCATORS if f"/lib{name}" in loaded), "system")


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
