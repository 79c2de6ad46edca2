"""A program that runs one file of a student by the file's own runtime, and imports that alone: it is started by
`measuring.py` as `python -P child.py REQUEST`, a JSON object with the fields of `measuring.Request`.

Standard output: one JSON line (version, latency, peak memory), then the logits of each batch, float32 N × K.
Standard input: for each batch the number of its images, 4 bytes little-endian, and its pixels, uint8 N × C × H × W. A
number of 0 ends the program.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

Request = dict[str, Any]
Inputs = Callable[[bytearray, int], Any]
"""Makes a runtime's input of pixels and their number of images."""
Run = Callable[[Any], bytes]
"""Makes logits of inputs."""

WARM_UP = 5
MOST_RUNS = 200
LATENCY_S = 1.0
"""The time of one latency's runs: as many as fit, at most MOST_RUNS, at least FEWEST_RUNS."""
FEWEST_RUNS = 3


def main(request: Request) -> None:
    answers, questions = _own_streams()
    _limit_memory(request["memory_bytes"])
    version, inputs, run = RUNTIMES[request["runtime"]](request)
    image_bytes = math.prod(request["shape"])
    latency = [_latency(run, inputs, size, image_bytes) for size in request["batch_sizes"]]
    found = {"version": version, "latency": latency, "peak_memory_bytes": _peak_bytes()}
    answers.write(json.dumps(found).encode() + b"\n")
    answers.flush()
    while count := int.from_bytes(questions.read(4), "little"):
        pixels = bytearray(questions.read(count * image_bytes))
        answers.write(run(inputs(pixels, count)))
        answers.flush()


def _own_streams() -> tuple[BinaryIO, BinaryIO]:
    """Return the streams of questions and answers. What else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers, sys.stdin.buffer


def _limit_memory(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):  # Not every system has this limit.
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _latency(run: Run, inputs: Inputs, size: int, image_bytes: int) -> dict[str, float]:
    """Return the latency of a batch, and the share of the time in which this process had the CPU."""
    images = inputs(bytearray(os.urandom(size * image_bytes)), size)
    computed, began = time.process_time(), time.perf_counter()
    found = percentiles(partial(run, images), size)
    share = (time.process_time() - computed) / (time.perf_counter() - began)
    return {**found, "cpu_share": round(min(1.0, share), 3)}


def percentiles(
    run: Callable[[], object], size: int, after_run: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """Return the latency: percentiles of the time of one run of a batch of this size, which is prepared already.
    `after_run` is called between two runs with the number of those that were measured."""
    _times(run, 1, WARM_UP, lambda _: after_run(0))
    times = sorted(_times(run, FEWEST_RUNS, MOST_RUNS, after_run))
    p50, p95 = (times[round(share * (len(times) - 1))] for share in (0.5, 0.95))
    return {"batch": size, "p50_ms": round(p50, 4), "p95_ms": round(p95, 4)}


def _times(run: Callable[[], object], fewest: int, most: int, after_run: Callable[[int], None]) -> list[float]:
    """Return the milliseconds of runs: as many as fit in LATENCY_S, within these numbers."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < fewest or (len(times) < most and time.perf_counter() - began < LATENCY_S):
        before = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - before))
        after_run(len(times))
    return times


def _peak_bytes() -> int:
    """Return the most resident memory of this process so far; getrusage would count the program that started it."""
    try:
        with open("/proc/self/status") as lines:  # noqa: PTH123 - pathlib is no part of what is measured
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


def _with_student_py(request: Request) -> tuple[str, Inputs, Run]:
    """Plain PyTorch, with the `student.py` beside the weights."""
    import importlib.util

    import torch

    torch.set_num_threads(request["threads"])
    spec = importlib.util.spec_from_file_location("student", request["source"])
    assert spec is not None and spec.loader is not None
    student: Any = importlib.util.module_from_spec(spec)
    sys.modules["student"] = student
    spec.loader.exec_module(student)
    network = student.load(request["path"])

    def inputs(pixels: bytearray, count: int) -> Any:
        return student.preprocess(torch.frombuffer(pixels, dtype=torch.uint8).view(count, *request["shape"]))

    return torch.__version__, inputs, _of_torch(network)


def _exported_program(request: Request) -> tuple[str, Inputs, Run]:
    import torch

    torch.set_num_threads(request["threads"])
    return (
        torch.__version__,
        _normalized(request, torch.from_numpy),
        _of_torch(torch.export.load(request["path"]).module()),
    )


def _of_torch(network: Any) -> Run:
    import torch

    def run(images: Any) -> bytes:
        with torch.no_grad():
            logits: bytes = network(images).numpy().tobytes()
        return logits

    return run


def _onnxruntime(request: Request) -> tuple[str, Inputs, Run]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not request["fused"]:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
    return (
        onnxruntime.__version__,
        _normalized(request),
        lambda images: session.run(None, {"images": images})[0].tobytes(),
    )


def _openvino(request: Request) -> tuple[str, Inputs, Run]:
    # Its import reports itself to its vendor, unless this package is missing.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import tempfile
    import zipfile

    import openvino

    # float32, as all other files compute; its default on newer processors is bfloat16.
    options = {"INFERENCE_NUM_THREADS": request["threads"], "INFERENCE_PRECISION_HINT": "f32"}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(request["path"])) as folder:  # noqa: PTH120
        zipfile.ZipFile(request["path"]).extractall(folder)
        model = openvino.Core().compile_model(f"{folder}/student.xml", "CPU", options)

    def run(images: Any) -> bytes:
        logits: bytes = model(images)[0].tobytes()
        return logits

    return openvino.__version__.partition("-")[0], _normalized(request), run


def _normalized(request: Request, convert: Callable[[Any], Any] = lambda images: images) -> Inputs:
    """Return what makes a file's input of pixels: float32, in 0..1, normalised unless the file does that itself."""
    import numpy as np

    mean, std = (np.array(request[name], np.float32)[:, None, None] for name in ("mean", "std"))

    def inputs(pixels: bytearray, count: int) -> Any:
        images = np.frombuffer(pixels, np.uint8).reshape(count, *request["shape"]).astype(np.float32) / 255
        return convert(images if request["normalizes"] else (images - mean) / std)

    return inputs


RUNTIMES: dict[str, Callable[[Request], tuple[str, Inputs, Run]]] = {
    "torch": _with_student_py,
    "torch.export": _exported_program,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""What runs a file, by name: returns its version, what makes inputs of pixels, and what makes logits of inputs."""

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
