"""From the C++ files of this folder to a loaded library: the compiler, the cache, the threads of torch.

The library needs no header of torch and no OpenMP of its own. It is compiled once for its sources, a torch version and
a kind of CPU, into an entry of the cache as data sets have them (`base/data_cache.py`), or before, into `BUILT`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from base import cores
from base.data_cache import lock_of
from base.errors import StorageFull
from base.files import sha256_of, sync, write_text
from base.processes import kill_group
from kdcore.data.decoding import alone, filled

log = logging.getLogger("kdcore")

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]pp"))
"""Of the one library, with the headers."""
BUILT = Path(__file__).with_name("built")
"""Entries that were compiled at installation (`python -m kdcore.kernels`), for machines without a compiler."""
COMPILERS = ("c++", "g++", "clang++")
COMPILE_LIMIT_S = 120.0
"""Some seconds of one core, on a busy machine many times that."""

# Without contraction of a * b + c the bits do not depend on compiler and CPU.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-w")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
FLAGS_OF_CPU = {
    "AVX512_BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma"),
}
"""By the kind of CPU (`kind`). Any other one gets what its architecture always has."""
LIBRARY, DIGEST = "kernels.so", "kernels.sha256"

_OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b.*\.so")


class NotBuilt(Exception):
    """There is no library, for the reason in the message."""


def load(cache: Path) -> ctypes.CDLL:
    """Return the library, compiled into `cache` if it is not there. Raises NotBuilt, with one line as the reason."""
    try:
        return _opened(_library(cache, kind()))
    except StorageFull as error:
        raise NotBuilt(str(error)) from error
    except OSError as error:
        raise NotBuilt(f"the library cannot be used: {error}") from error


def build(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Compile entries for several kinds of CPU. Returns their libraries. Raises NotBuilt."""
    return [_made(folder / entry_of(name), name) for name in kinds]


def kind() -> str:
    """Return the kind of this CPU: torch's name of what it can do, and whether it multiplies bfloat16."""
    name = torch.backends.cpu.get_cpu_capability()
    return "AVX512_BF16" if name == "AVX512" and "avx512_bf16" in cores.flags() else name


def entry_of(name: str) -> str:
    """Return the name of the entry for a kind of CPU: different bytes or flags have different names."""
    parts = [torch.__version__, platform.machine(), *_flags(name)]
    digest = hashlib.sha256(b"".join(one.read_bytes() for one in SOURCES) + repr(parts).encode()).hexdigest()
    return f"kernels-{digest[:32]}"


def _flags(name: str) -> tuple[str, ...]:
    return (*FLAGS, *FLAGS_OF_CPU.get(name, ()))


def _library(cache: Path, name: str) -> Path:
    installed = BUILT / entry_of(name)
    return installed / LIBRARY if _is_whole(installed) else _made(cache / installed.name, name)


def _made(folder: Path, name: str) -> Path:
    """Return the library of an entry, which is made if it is absent or damaged. One process makes it, others wait."""
    if folder.exists() and not _is_whole(folder):
        with alone(lock_of(folder)):
            if not _is_whole(folder):
                shutil.rmtree(folder)
    filled(folder, lambda unfinished: _compile(unfinished, name))
    return folder / LIBRARY


def _is_whole(folder: Path) -> bool:
    """Return whether the library is the one that was compiled. One that was cut off would end the process."""
    try:
        return sha256_of(folder / LIBRARY) == (folder / DIGEST).read_text()
    except OSError:
        return False


def _compile(folder: Path, name: str) -> None:
    """Compile with the first compiler that can, all sources at once. Raises NotBuilt with the complaint of the first
    one."""
    compilers = [found for compiler in COMPILERS if (found := shutil.which(compiler)) is not None]
    if not compilers:
        raise NotBuilt(f"no C++ compiler is installed ({', '.join(COMPILERS)})")
    # A name of this process: a compiler whose engine was killed may still write.
    output = folder / f"{os.getpid()}.so"
    objects = {str(one): f"{output}.{one.stem}.o" for one in SOURCES if one.suffix == ".cpp"}
    complaints = []
    for compiler in compilers:
        started = time.monotonic()
        commands = [[compiler, *_flags(name), "-c", one, "-o", made] for one, made in objects.items()]
        with ThreadPoolExecutor(len(commands)) as pool:
            complaint = next(filter(None, pool.map(_run, commands)), None)
        complaint = complaint or _run([compiler, "-shared", *objects.values(), "-o", str(output)])
        for made in objects.values():
            Path(made).unlink(missing_ok=True)
        if complaint is None and output.is_file():
            log.info("kernels: compiled for %s by %s in %.1f s", name, compiler, time.monotonic() - started)
            output.replace(folder / LIBRARY)
            write_text(folder / DIGEST, sha256_of(folder / LIBRARY))
            sync(folder)
            return
        complaints.append(f"{compiler}: {complaint or 'it wrote no library'}")
    raise NotBuilt(complaints[0])


def _run(command: list[str]) -> str | None:
    """Run a compiler. Returns None, or in one line why it failed."""
    try:
        # A session of its own, because a compiler starts other programs.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        return str(error)
    with process:
        try:
            _, said = process.communicate(timeout=COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            return f"it had not ended after {COMPILE_LIMIT_S:g} s"
    if process.returncode == 0:
        return None
    lines = said.decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), f"exit code {process.returncode}")


def _opened(path: Path) -> ctypes.CDLL:
    owner = path.stat().st_uid
    if owner not in {0, os.geteuid()}:
        raise NotBuilt(f"{path.name} in the cache belongs to another user ({owner})")
    library = ctypes.CDLL(str(path))
    pointer, whole, real, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
    library.norm_relu_forward.restype = library.norm_relu_backward.restype = library.use_threads.restype = None
    library.norm_relu_forward.argtypes = [
        *(number, pointer, pointer, pointer, whole, whole),  # is_bfloat16, x, shortcut, y, rows, channels
        *(pointer, pointer, real, pointer, pointer),  # weight, bias, epsilon, mean, inverse_std
        *(pointer, pointer, real, number, pointer, number),  # running_…, momentum, relu, partial, threads
    ]
    library.norm_relu_backward.argtypes = [
        *(number, pointer, pointer, pointer, whole, whole),  # is_bfloat16, x, y, grad_y, rows, channels
        *(pointer, pointer, pointer, pointer, pointer),  # weight, mean, inverse_std, grad_x, grad_shortcut
        *(pointer, pointer, pointer, number),  # grad_weight, grad_bias, partial, threads
    ]
    if torch.bfloat16 in convolutions(library):
        library.conv3x3_packed.restype, library.conv3x3_packed.argtypes = whole, [whole, whole]
        library.conv3x3_pack.restype = library.conv3x3_forward.restype = None
        library.conv3x3_strided_gradient.restype = library.conv3x3_weight_gradient.restype = None
        # weight, the channels of output and input, the weight's strides, turned, packed
        library.conv3x3_pack.argtypes = [pointer, *[whole] * 6, number, pointer]
        library.conv3x3_forward.argtypes = [
            *(pointer, number, whole, whole, whole, whole),  # x, x_is_float, images, height, width, channels
            *(whole, number, pointer, pointer, pointer, number),  # out_channels, stride, packed, bias, shortcut, relu
            *(pointer, number),  # y, threads
        ]
        library.conv3x3_strided_gradient.argtypes = [
            *(pointer, whole, whole, whole, whole, whole),  # grad_y, images, height, width, channels, out_channels
            *(pointer, pointer, number),  # packed, grad_x, threads
        ]
        shape = [whole, whole, whole, whole, whole, number]  # images, height, width, channels, out_channels, stride
        library.conv3x3_weight_room.restype, library.conv3x3_weight_room.argtypes = whole, [*shape, number]  # threads
        # x, grad_y, grad_w, its shape, partial, threads
        library.conv3x3_weight_gradient.argtypes = [pointer, pointer, pointer, *shape, pointer, number]
    if torch.float32 in convolutions(library):
        library.winograd_packed.restype, library.winograd_packed.argtypes = whole, [whole, whole]
        library.winograd_pack.restype = library.winograd_forward.restype = None
        # as conv3x3_pack
        library.winograd_pack.argtypes = [pointer, *[whole] * 6, number, pointer]
        library.winograd_forward.argtypes = [
            *(pointer, whole, whole, whole, whole, whole),  # x, images, height, width, channels, out_channels
            *(pointer, pointer, pointer, number, pointer, number),  # packed, bias, shortcut, relu, y, threads
        ]
        shape = [whole, whole, whole, whole, whole]  # images, height, width, channels, out_channels
        library.winograd_weight_room.restype, library.winograd_weight_room.argtypes = whole, shape
        library.winograd_weight_gradient.restype = None
        # x, grad_y, grad_w, its shape, partial, threads
        library.winograd_weight_gradient.argtypes = [pointer, pointer, pointer, *shape, pointer, number]
    if (openmp := openmp_of_torch()) is not None:
        runtime = ctypes.CDLL(openmp)
        library.use_threads.argtypes = [pointer, pointer, pointer]
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        library.use_threads(*(ctypes.cast(getattr(runtime, name), pointer) for name in names))
    return library


def convolutions(library: ctypes.CDLL) -> frozenset[torch.dtype]:
    """Return the precisions in which the library has convolutions: bfloat16 where the CPU multiplies it, float32 where
    it has AVX2."""
    names = {torch.bfloat16: "conv3x3_forward", torch.float32: "winograd_forward"}
    return frozenset(precision for precision, name in names.items() if hasattr(library, name))


def openmp_of_torch() -> str | None:
    """Return the file of the OpenMP runtime that torch has loaded. A second one would start threads of its own, and
    both would wait for cores by spinning. None if there is none, or if nobody can say which of several is torch's."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if _OPENMP.search(line)}
    own = {path for path in loaded if Path(path).is_relative_to(Path(torch.__file__).parent)}
    candidates = [path for path in own or loaded if hasattr(ctypes.CDLL(path), "GOMP_parallel")]
    return candidates[0] if len(candidates) == 1 else None
