"""The devices of this host, found without importing torch, and what an engine's environment must say about its own."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

KEPT = ("PATH", "HOME", "USER", "LANG", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "HF_HOME")
KEPT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH", "PYTORCH_", "SSL_", "REQUESTS_CA")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Device:
    """Where one job at a time runs. `visible`: what CUDA may see, "" for a CPU."""

    name: str
    visible: str
    threads: int


def discover(
    slots: int | None = None, threads: int | None = None, environment: Mapping[str, str] = os.environ
) -> list[Device]:
    """One a GPU, or a single CPU; `slots` asks for another number, shared out among what is there.

    Threads of one engine: as asked, or as OMP_NUM_THREADS has it for every program, or the cores shared by the slots.
    """
    gpus = _gpus(environment)
    number = slots or len(gpus) or 1
    asked = environment.get(THREADS[0], "")
    threads = threads or (int(asked) if asked.isdecimal() else 0) or max(1, cores() // number)
    if not gpus:
        return [Device("cpu" if number == 1 else f"cpu:{slot}", "", threads) for slot in range(number)]
    return [Device(f"cuda:{slot % len(gpus)}", gpus[slot % len(gpus)], threads) for slot in range(number)]


def engine_environment(device: Device, temporary: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the engine may know: nothing of our database, broker or keys, since it reads files from outside."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in (*KEPT, *PROXIES) or name.startswith(KEPT_PREFIXES)
    }
    paths = [str(_engine_home()), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        **dict.fromkeys(THREADS, str(device.threads)),
        "CUDA_VISIBLE_DEVICES": device.visible,
        "PYTHONPATH": os.pathsep.join(paths),
        # The working folder holds files from outside: no module is to be imported from there.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TMPDIR": str(temporary),
    }


def cores() -> int:
    """Cores that this process may use, by affinity and by the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota(Path("/sys/fs/cgroup/cpu.max")) or allowed))


def _quota(path: Path) -> int | None:
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, round(int(quota) / int(period)))


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES understands. An operator's own choice is kept to; "" and "-1" mean none."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA itself stops reading at the first name that it does not know.
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    return _ask_driver()


def _ask_driver() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.startswith("GPU-")]


def _engine_home() -> Path:
    """The folder that `kdcore` is imported from, whatever the engine's working folder is."""
    found = find_spec("kdcore")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the engine (kdcore) is not installed beside the worker")
    return Path(found.origin).parents[1]
