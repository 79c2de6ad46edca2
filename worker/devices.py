"""The devices of this host, found without importing torch, and the environment of an engine on one of them."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Literal

from base.cores import AT_MOST, THREADS, asked_threads, cores
from base.memory import host_memory

log = logging.getLogger("distillery.engine")

PASSED_ON = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TZ",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONPATH",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "DISTILLERY_WEIGHTS",
)
PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH", "PYTORCH_", "SSL_", "REQUESTS_CA")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
Allocator = Literal["auto", "off"]
ALLOCATORS = ("libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""Memory allocators that are faster than the system's at the sizes of activations, the best first."""
KEPT = {
    "MALLOC_CONF": "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:"
    "glibc.malloc.trim_threshold=4294967296",
}
"""Makes jemalloc and the system's own allocator keep freed memory, in pages of 2 MB: each step allocates the same sizes
again, and would pay for page faults each time. An engine runs one job and ends."""
LIBRARIES = (f"{sys.prefix}/lib", "/usr/local/lib", "/usr/lib64", "/usr/lib/*-linux-gnu", "/usr/lib")


@dataclass(frozen=True)
class Device:
    """A device that runs one job at a time. `visible`: its value of CUDA_VISIBLE_DEVICES, "" for a CPU."""

    name: str
    visible: str
    threads: int
    memory_bytes: int | None = None
    """Memory of the GPU, or of the host for a CPU; None if it is not known. Slots of one device share it."""
    threads_are_asked: bool = False
    """True if the operator has set their number; else a job takes fewer while other processes need the cores."""


def discover(
    slots: int | None = None, threads: int | None = None, environment: Mapping[str, str] = os.environ
) -> list[Device]:
    """Return one device for each GPU, or a single CPU; with `slots` that many, which share the GPUs or the CPU.

    Threads of one engine: `threads`, else OMP_NUM_THREADS, which applies to every program, else the cores divided by
    the slots.
    """
    gpus = _gpus(environment)
    number = slots or len(gpus) or 1
    asked = threads or asked_threads(environment)
    threads = asked or max(1, cores() // number)
    if not gpus:
        names = ["cpu" if number == 1 else f"cpu:{slot}" for slot in range(number)]
        memory = host_memory()
        return [Device(name, "", threads, memory, threads_are_asked=asked is not None) for name in names]
    turns = [slot % len(gpus) for slot in range(number)]
    memories = _gpu_memories()
    return [
        Device(f"cuda:{turn}", gpus[turn], threads, memories.get(gpus[turn]), threads_are_asked=asked is not None)
        for turn in turns
    ]


def engine_environment(
    device: Device, temporary: Path, environment: Mapping[str, str] = os.environ, *, allocator: Allocator
) -> dict[str, str]:
    """Return the engine's environment, without addresses and keys of our services, because it reads untrusted files.

    `allocator`: `auto` lets the memory allocator keep freed memory, and preloads a faster one where it is installed,
    unless the operator preloads another.
    """
    passed_on = {
        name: value
        for name, value in environment.items()
        if name in (*PASSED_ON, *PROXIES) or name.startswith(PASSED_ON_PREFIXES)
    }
    library = find_allocator() if allocator == "auto" and "LD_PRELOAD" not in passed_on else None
    paths = [str(_engine_home()), *filter(None, [passed_on.get("PYTHONPATH")])]
    return {
        **passed_on,
        **(KEPT if allocator == "auto" else {}),
        **({"LD_PRELOAD": library} if library is not None else {}),
        **dict.fromkeys(THREADS, str(device.threads)),
        **({} if device.threads_are_asked else {AT_MOST: str(device.threads)}),
        "CUDA_VISIBLE_DEVICES": device.visible,
        "PYTHONPATH": os.pathsep.join(paths),
        # The working folder holds untrusted files: no module may be imported from there.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TMPDIR": str(temporary),
    }


@cache
def find_allocator(folders: tuple[str, ...] = LIBRARIES) -> str | None:
    """Return the path of a memory allocator that is installed and can be preloaded here; None without one.

    It is tried on a small program: one for another page size would end every engine at its start.
    """
    for name, pattern in product(ALLOCATORS, folders):
        for path in sorted(Path("/").glob(f"{pattern.lstrip('/')}/{name}")):
            try:
                tried = subprocess.run(
                    [sys.executable, "-I", "-S", "-c", ""],
                    env={"LD_PRELOAD": str(path)},
                    capture_output=True,
                    timeout=30,
                    check=False,
                )
            except (OSError, subprocess.SubprocessError) as error:
                log.warning("the allocator %s cannot be tried: %s", path, error)
                continue
            if tried.returncode == 0 and not tried.stderr:
                return str(path)
            log.warning("the allocator %s cannot be used: %s", path, tried.stderr.decode(errors="replace").strip())
    return None


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Return names for CUDA_VISIBLE_DEVICES. If the operator has set it, only its GPUs; "" and "-1" mean none."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores all names after the first that is not valid.
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    return _query_driver()


def _query_driver() -> list[str]:
    return [uuid for _, uuid, _ in _gpu_rows() if uuid.startswith("GPU-")]


def _gpu_memories() -> dict[str, int]:
    """Return each GPU's memory in bytes, by both names that CUDA_VISIBLE_DEVICES may have for it."""
    mebibytes = [(names, size) for *names, size in _gpu_rows() if size.isdecimal()]
    return {name: int(size) << 20 for names, size in mebibytes for name in names}


def _gpu_rows() -> list[tuple[str, str, str]]:
    """Return number, UUID and memory in MiB of each GPU, as the driver prints them; none without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        output = subprocess.run(
            [program, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (tuple(field.strip() for field in line.split(",")) for line in output.stdout.splitlines())
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def _engine_home() -> Path:
    """Return the folder that `kdcore` is imported from, because the engine works in another folder."""
    engine = find_spec("kdcore")
    if engine is None or engine.origin is None:
        raise ModuleNotFoundError("the engine (kdcore) is not installed beside the worker")
    return Path(engine.origin).parents[1]
