"""A GPU in one run of at most ten minutes: are its results equal, can every step be captured, and how fast is it?

    python -m bench.gpu --half cifar100_p0.npz [--teacher cifar100_resnet56.pth] [--out FOLDER] [--minutes 9]
    python -m bench.gpu --smoke        the parts that need no GPU, on a CPU, in seconds

    precision   views of CPU and GPU, byte by byte; the first step's loss and gradients in fp32, with and without TF32
    equality    losses and weights of 24 steps: eager against graph, with the same fused optimizer (to be equal), and
                against PyTorch's usual one (to be close)
    capture     every method, mix, optimizer and schedule: eager against graph, and the memory that a graph adds
    killed      the GPU's memory before, during and after a training that is ended by SIGKILL
    speed       images a second and memory, at several batch sizes: a plain loop, ours eagerly, ours as a graph

Each part is a process of its own with its own time limit: if one fails or hangs, its error is in the result and the
others run. A table is printed, and all figures are in `gpu.json` in the folder `--out`.

The machine needs Python 3.11 or newer with torch 2.11 or newer, and what `kdcore` imports; missing ones are named. No
index of packages is used. Where the machine has none, they travel as wheels in a folder that its working copy ignores
(here for Python 3.12):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64
        --platform manylinux2014_x86_64 -d .whl pydantic pydantic-core annotated-types typing-inspection
        typing-extensions safetensors numpy pillow          here
    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site     there

`cifar100_p0.npz` has half of CIFAR-100, as strips of WebP; a copy of 64 MiB has room for one half in a call. Without
`--teacher` the teacher's weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

NEEDED = ("torch", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions",
          "safetensors", "PIL")  # fmt: skip
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    sys.exit(f"these packages are missing here: {', '.join(MISSING)}; {__file__} says how they travel as wheels")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import DataLoader, Dataset

from kdcore import models
from kdcore.classifier import FrozenTeacher
from kdcore.graph_step import Figures, GraphStep
from kdcore.prepare import PreparedJob, Workspace, prepare
from kdcore.protocol import Lines
from kdcore.run import TrialSetup
from kdcore.spec import GIVEN, METHODS, parse
from kdcore.training import Observer, StageTraining

Json = dict[str, Any]

PREPROCESSING = {"mean": [0.5070, 0.4865, 0.4409], "std": [0.2673, 0.2564, 0.2761]}
SMALL = ("convnet8", "convnet4")
"""Teacher and student where only kinds of steps matter."""
EXACT_STEPS = 24
CAPTURE_STEPS = 6
LOADERS = 8
"""Processes of the plain loop's DataLoader, each two batches ahead."""
RECIPES: dict[str, Json] = {
    "kd, nesterov": {"optimizer": {"name": "sgd", "nesterov": True}, "schedule": {"name": "cosine"}},
    "kd, adamw": {"optimizer": {"name": "adamw"}, "schedule": {"name": "cosine", "warmup_epochs": 1}},
    "kd, average, clipping, smoothing": {"ema": 0.99, "clip_norm": 1.0, "label_smoothing": 0.1},
    "kd, mixup": {"mix": "mixup"},
    "kd, cutmix": {"mix": "cutmix"},
    "kd, boxes": {"augmentation": {"name": "random_resized_crop"}},
    "kd, fp32": {"precision": "fp32"},
}
FAULT = 3
"""The exit of a part's process that has reported an error."""
LIMIT_S = {"precision": 90, "equality": 90, "capture": 200, "killed": 60, "speed": 300}
"""The longest that a part may take; `--minutes` limits all of them together."""


class Again:
    """In place of a graph: the same work, run eagerly each time."""

    def __init__(self) -> None:
        self.work: Callable[[], Figures] = dict

    def run(self, work: Callable[[], Figures]) -> Figures:
        return work()

    def capture(self, work: Callable[[], Figures]) -> None:
        self.work = work

    def replay(self) -> Figures:
        return self.work()


@dataclass(frozen=True)
class Bench:
    """What the parts have in common: a folder with the data set and the teachers, and the device."""

    folder: Path
    device: str
    smoke: bool
    after: str = ""
    """The last case of `capture` that is done."""

    @property
    def batches(self) -> tuple[int, ...]:
        return (16,) if self.smoke else (64, 128, 512, 2048)

    @property
    def networks(self) -> tuple[str, str]:
        """Return teacher and student, except where every method is tried."""
        return SMALL if self.smoke else ("resnet56", "resnet20")

    def prepared(
        self, training: Mapping[str, Any], method: str = "kd", networks: tuple[str, str] | None = None
    ) -> PreparedJob:
        """Return a job of the data set, by default kd."""
        teacher, name = networks or self.networks
        student = {"architecture": teacher if method == "fsp" else name, "preprocessing": PREPROCESSING}
        body: Json = {
            "dataset": f"file:{self.folder / 'data.npz'}",
            "student": [student, student] if method == "dml" else student,
            "method": method,
            "baseline": "none",
            "training": {"augmentation": "crop_flip", "device": self.device, "teacher_cache": "off", **training},
        }
        if METHODS[method].facts.teacher == "required":
            (checkpoint,) = self.folder.glob(f"{teacher}.*")
            body["teacher"] = {
                "architecture": teacher,
                "checkpoint": f"file:{checkpoint}",
                "preprocessing": PREPROCESSING,
            }
        out = Path(tempfile.mkdtemp(dir=self.folder))
        return prepare(parse(body), Workspace(out, {}, self.folder / "cache", Lines(io.StringIO())))

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0


def stages(job: PreparedJob, kind: str) -> Iterator[StageTraining]:
    """Yield the trainings of a job's last trial, with a fresh student.

    `kind`: eager, fused (eagerly, with the optimizer of a graph) or graph."""
    job.computing = replace(job.computing, step="eager" if kind == "eager" else "graph")
    trial, teacher = job.trials[-1], job.teacher
    if trial.taught_by not in (None, GIVEN):
        teacher = FrozenTeacher(job.student(trial.students[0]))
    setup = TrialSetup(trial, job, teacher)
    for number in range(len(trial.stages)):
        training = setup.training(number, Observer(metric=lambda *_: None, after_step=lambda _: None))
        if kind == "fused":
            training.graph_step = GraphStep(Again)
        training.learners.train()
        if training.objective is not None:
            training.objective.train()
        yield training


def make_step(training: StageTraining, number: int) -> None:
    """Make the step of this number; two hundred are an epoch."""
    size, rows = training.recipe.batch_size, training.training_set.rows
    training.position.epoch, training.position.step = divmod(number, 200)
    start = number * size % (len(rows) - size + 1)
    training._step(training.batches.of(rows[start : start + size]))


def trained(job: PreparedJob, kind: str, steps: int) -> dict[str, Tensor]:
    """Return the weights and the summed figures after some steps of every stage, on the CPU."""
    found: dict[str, Tensor] = {}
    for number, training in enumerate(stages(job, kind)):
        for each in range(steps):
            make_step(training, each)
        for name, value in {**training.learners.state_dict(), **training.sums}.items():
            found[f"{number}/{name}"] = value.detach().cpu().clone()
    return found


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two states, relative to the largest value of its tensor; 0 if all bits agree."""
    worst = 0.0
    for name, value in one.items():
        if not torch.equal(value, other[name]):
            gap = (value.double() - other[name].double()).abs().max() / value.double().abs().max().clamp(min=1e-12)
            worst = max(worst, float(gap)) if torch.isfinite(gap) else float("inf")
    return worst


def precision(bench: Bench) -> Json:
    """Compare the CPU's first step with the device's, in fp32."""
    found: Json = {}
    kinds = {name: RECIPES[f"kd, {name}"] for name in ("mixup", "cutmix", "boxes")}
    for name, recipe in {"crop_flip": {}, **kinds}.items():
        views = []
        for device in ("cpu", bench.device):
            job = replace(bench, device=device).prepared({"precision": "fp32", **recipe})
            training = next(stages(job, "eager"))
            views.append(training.batches.of(training.training_set.rows[:64]).inputs.cpu())
        found[f"views, {name}"] = difference({"": views[0].float()}, {"": views[1].float()})
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            first = [_first_step(replace(bench, device=device)) for device in ("cpu", bench.device)]
            with_tf32 = "with TF32" if allowed else "without TF32"
            found[f"loss {with_tf32}"] = difference(first[0][0], first[1][0])
            found[f"gradients {with_tf32}"] = difference(first[0][1], first[1][1])
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return found


def _first_step(bench: Bench) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    job = bench.prepared({"precision": "fp32"})
    training = next(stages(job, "eager"))
    output = training.scheme.run(training.batches.of(training.training_set.rows[:64]))
    label, distillation = training._losses(output)
    loss = training.alpha * label + training.beta * distillation
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: one.grad.cpu() for name, one in training.learners.named_parameters() if one.grad is not None}
    return {"loss": loss.detach().cpu()}, gradients


def equality(bench: Bench) -> Json:
    """Compare a graph's steps with eager ones."""
    steps = 5 if bench.smoke else EXACT_STEPS
    kinds = ("eager", "fused") if bench.smoke else ("eager", "fused", "graph")
    found: Json = {}
    for name in ("fp32",) if bench.smoke else ("fp32", "bf16"):
        recipe = {"precision": name}
        results = {kind: trained(bench.prepared(recipe), kind, steps) for kind in kinds}
        again = trained(bench.prepared(recipe), "fused", steps)
        found[f"{name}: fused repeats itself"] = difference(results["fused"], again)
        found[f"{name}: usual optimizer and fused"] = difference(results["eager"], results["fused"])
        if "graph" in results:
            found[f"{name}: fused and graph"] = difference(results["fused"], results["graph"])
    return found


def capture(bench: Bench) -> Iterator[tuple[str, Json]]:
    """Yield, for every method and recipe, how its captured steps compare with eager ones."""
    cases: dict[str, tuple[str, Json]] = {name: (name, {}) for name in METHODS}
    cases |= {name: ("kd", recipe) for name, recipe in RECIPES.items()}
    names, batch = list(cases), {"batch_size": 16} if bench.smoke else {}
    for name in names[names.index(bench.after) + 1 if bench.after else 0 :]:
        method, recipe = cases[name]
        run = partial(_captured, bench, method, {"precision": "bf16", **batch, **recipe})
        began = time.monotonic()
        try:
            eager = run("fused")
            captured = run("fused" if bench.smoke else "graph")
            found: Json = {"captured": None if bench.smoke else True, "difference": difference(eager, captured)}
            if found["difference"]:
                found["difference between two eager runs"] = difference(eager, run("fused"))
        except Exception as error:  # Each case reports its own.
            found = {"captured": False, "error": f"{type(error).__name__}: {error}"[:500]}
        yield name, {**found, "seconds": round(time.monotonic() - began, 2)}
        bench.synchronize()  # Raises if a fault has ended this process's use of the GPU: another one goes on.


def _captured(bench: Bench, method: str, recipe: Json, kind: str) -> dict[str, Tensor]:
    return trained(bench.prepared(recipe, method, SMALL), kind, 2 if bench.smoke else CAPTURE_STEPS)


def hold(bench: Bench) -> None:
    """Train as a graph until the kill, a minute at most; print a line when it is replayed."""
    recipe, kind = ({"batch_size": 16}, "fused") if bench.smoke else ({"batch_size": 512, "precision": "bf16"}, "graph")
    training = next(stages(bench.prepared(recipe), kind))
    for number in range(10):
        make_step(training, number)
    bench.synchronize()
    print("ready", flush=True)
    began = time.monotonic()
    while time.monotonic() - began < 60:
        make_step(training, 10)


def killed(bench: Bench) -> Json:
    """Return the device's memory in MiB before, during and after a training that is killed."""
    before = used_mib()
    command = [sys.executable, "-m", "bench.gpu", "--part", "hold", "--folder", str(bench.folder)]
    command += ["--smoke"] * bench.smoke
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline().strip()
        during, began = used_mib(), time.monotonic()
        child.send_signal(signal.SIGKILL)
    found: Json = {"reached": line == "ready", "before": before, "during": during, "after": used_mib()}
    while before is not None and (found["after"] or 0) > before + 16 and time.monotonic() - began < 20:
        time.sleep(0.25)
        found["after"] = used_mib()
    found["seconds until free"] = round(time.monotonic() - began, 2)
    return found


def used_mib() -> int | None:
    """Return the used memory of the first GPU, as nvidia-smi says; None if it says nothing."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


class Plain(Dataset[tuple[Tensor, int]]):
    """Images as people augment them: one after the other, in the processes of a DataLoader."""

    def __init__(self, pixels: Any, labels: Any) -> None:
        self.pixels, self.labels = pixels, labels
        self.mean, self.std = (torch.tensor(PREPROCESSING[name]).view(3, 1, 1) for name in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        padded = np.pad(self.pixels[row], ((4, 4), (4, 4), (0, 0)))
        top, left = np.random.randint(0, 9, 2)
        image = padded[top : top + 32, left : left + 32]
        image = image[:, ::-1] if np.random.rand() < 0.5 else image
        return (torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 - self.mean) / self.std, int(
            self.labels[row]
        )


def plain_loop(bench: Bench, size: int, bf16: bool) -> Iterator[None]:
    """Yield after each step of the loop that people write, without an end."""
    with np.load(bench.folder / "data.npz") as data:
        images = Plain(data["x_train"], data["y_train"])
    workers = 0 if bench.smoke else LOADERS
    loader = DataLoader(images, size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=not bench.smoke,
                        persistent_workers=workers > 0)  # fmt: skip
    teacher, student = (models.build(name, 100, 3).to(bench.device) for name in bench.networks)
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4)
    total = 0.0
    while True:
        for given, wanted in loader:
            pixels, labels = given.to(bench.device, non_blocking=True), wanted.to(bench.device, non_blocking=True)
            with torch.autocast(bench.device, torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    taught = teacher(pixels)
                logits = student(pixels)
            logits, taught = logits.float(), taught.float()
            soft = kl_div(
                log_softmax(logits / 4, 1), log_softmax(taught / 4, 1), reduction="batchmean", log_target=True
            )
            loss = 0.1 * cross_entropy(logits, labels) + 0.9 * 16 * soft
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            yield


def take_turn(name: str, turn: Iterator[None], steps: int) -> None:
    """Make some steps of a contestant. Only ours are in PyTorch's deterministic mode, as in a job."""
    torch.set_deterministic_debug_mode("default" if name.startswith("plain") else "warn")
    for _ in range(steps):
        next(turn)


def our_steps(training: StageTraining) -> Iterator[None]:
    number = 0
    while True:
        make_step(training, number)
        number += 1
        yield


def speed(bench: Bench) -> Iterator[tuple[str, Json]]:
    """Yield images a second of each contestant at each batch size: the median of rounds in which they take turns."""
    rounds, warm = (2, 1) if bench.smoke else (5, 2 * LOADERS + 2)
    for size in bench.batches:
        steps = 3 if bench.smoke else max(10, 4000 // size)
        turns: dict[str, Iterator[None]] = {}
        memory: dict[str, int] = {}
        for precision_ in ("fp32",) if bench.smoke else ("fp32", "bf16"):
            turns[f"plain, {precision_}"] = plain_loop(bench, size, precision_ == "bf16")
            recipe = {"batch_size": size, "precision": precision_}
            for kind in ("eager",) if bench.smoke else ("eager", "fused", "graph"):
                turns[f"ours {kind}, {precision_}"] = our_steps(next(stages(bench.prepared(recipe), kind)))
        for kind in ("eager",) if bench.smoke else ("eager", "graph"):
            recipe = {"batch_size": size, "precision": "fp32" if bench.smoke else "bf16"}
            turns[f"ours {kind}, without a teacher"] = our_steps(
                next(stages(bench.prepared(recipe, "supervised"), kind))
            )
        for name, turn in turns.items():
            before = bench.memory()
            take_turn(name, turn, warm)
            memory[name] = bench.memory() - before
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(rounds):
            for name, turn in turns.items():
                # The plain loop's loader has prepared batches meanwhile, which must not count.
                take_turn(name, turn, warm if name.startswith("plain") else 1)
                bench.synchronize()
                began = time.perf_counter()
                take_turn(name, turn, steps)
                bench.synchronize()
                rates[name].append(steps * size / (time.perf_counter() - began))
        base = median(rates["plain, fp32"])
        for name, all_rates in rates.items():
            yield (
                f"batch {size}: {name}",
                {
                    "images/s": round(median(all_rates), 1),
                    "range": [round(min(all_rates), 1), round(max(all_rates), 1)],
                    "x plain fp32": round(median(all_rates) / base, 2),
                    "MiB": round(memory[name] / 2**20, 1),
                },
            )


PARTS: dict[str, Callable[[Bench], Json | Iterator[tuple[str, Json]]]] = {
    "precision": precision,
    "equality": equality,
    "capture": capture,
    "killed": killed,
    "speed": speed,
}
WITHOUT_A_GPU = ("precision", "equality", "capture", "speed")


def run_part(name: str, bench: Bench) -> Iterator[Json]:
    """Yield a part's findings, each with its name; an error is one of them."""
    began = time.monotonic()
    try:
        found = PARTS[name](bench)
        for what, figures in found.items() if isinstance(found, dict) else found:
            yield {"part": name, "what": what, "found": figures}
    except Exception as error:  # The other parts go on.
        yield {"part": name, "what": "error", "found": f"{type(error).__name__}: {error}"[:1000]}
    yield {"part": name, "what": "seconds", "found": round(time.monotonic() - began, 1)}


def run_apart(name: str, bench: Bench, limit_s: float) -> Iterator[Json]:
    """Yield the same from a process of its own, which a fault of the GPU or the time limit may end. Cases of `capture`
    after a fault are run by another one."""
    command = [sys.executable, "-m", "bench.gpu", "--part", name, "--folder", str(bench.folder)]
    command += ["--after", bench.after] if bench.after else []
    began, last_case = time.monotonic(), ""
    lines, log = bench.folder / f"{name}.lines", bench.folder / f"{name}.log"
    with lines.open("w") as to_lines, log.open("w") as to_log:
        try:
            code = subprocess.run(command, stdout=to_lines, stderr=to_log, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
    for line in lines.read_text().splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            yield one
            last_case = one["what"] if name == "capture" and isinstance(one["found"], dict) else last_case
    left = limit_s - (time.monotonic() - began)
    if code == FAULT and last_case and left > 5:
        yield from run_apart(name, replace(bench, after=last_case), left)
    elif code not in (0, FAULT):
        ended = f"ended after the limit of {limit_s:.0f} s" if code is None else f"ended with {code}"
        last = " | ".join(log.read_text().splitlines()[-4:])
        yield {"part": name, "what": "error", "found": f"the process {ended}: {last}"[:1500]}


def machine() -> Json:
    """Return what the figures were measured on."""
    found: Json = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "memory used, MiB": used_mib()}
    return found


def write_inputs(folder: Path, half: Path | None, teacher: Path | None) -> None:
    """Write the data set and the teachers. Without a half, noise in a hundred classes."""
    folder.mkdir(parents=True, exist_ok=True)
    if half is not None:
        with np.load(half) as packed:
            arrays: Json = {}
            for split in ("train", "test"):
                offsets, blob = packed[f"off_{split}"], packed[f"webp_{split}"]
                strips = (blob[start:end].tobytes() for start, end in pairwise(offsets))
                pictures = [np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")) for strip in strips]
                shuffled = np.random.default_rng(0).permutation(len(packed[f"y_{split}"]))
                arrays[f"x_{split}"] = np.concatenate([one.reshape(-1, 32, 32, 3) for one in pictures])[shuffled]
                arrays[f"y_{split}"] = packed[f"y_{split}"].astype(np.int64)[shuffled]
    else:
        rng = np.random.default_rng(0)
        arrays = {"x_train": rng.integers(0, 256, (400, 32, 32, 3)), "x_test": rng.integers(0, 256, (100, 32, 32, 3))}
        arrays = {name: pixels.astype(np.uint8) for name, pixels in arrays.items()}
        arrays |= {f"y_{split}": np.arange(len(arrays[f"x_{split}"])) % 100 for split in ("train", "test")}
    np.savez(folder / "data.npz", **arrays)
    torch.manual_seed(0)
    for name in ("resnet56", SMALL[0]):
        if name == "resnet56" and teacher is not None:
            shutil.copy(teacher, folder / f"{name}{teacher.suffix}")
            continue
        about = {"distillery": json.dumps({"architecture": name})}
        save_file(models.build(name, 100, 3).state_dict(), folder / f"{name}.safetensors", about)


def report(findings: list[Json]) -> str:
    """Return the findings as lines, a part after the other."""
    lines: list[str] = []
    for name in dict.fromkeys(one["part"] for one in findings):
        lines += ["", name]
        for one in findings:
            if one["part"] == name:
                found = one["found"]
                text = ", ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, dict) else found
                lines.append(f"  {one['what']:45} {text}")
    return "\n".join(lines)


def main() -> int:
    arguments = _arguments()
    on_gpu = torch.cuda.is_available() and not arguments.smoke
    if not on_gpu and not arguments.smoke:
        print("no GPU is visible to torch here; --smoke runs the parts that need none", file=sys.stderr)
        return 2
    if arguments.part is not None:
        device = "cpu" if arguments.smoke else "cuda"
        bench, failed = Bench(arguments.folder, device, smoke=arguments.smoke, after=arguments.after), False
        if arguments.part == "hold":
            hold(bench)
            return 0
        for one in run_part(arguments.part, bench):
            print(json.dumps(one), flush=True)
            failed = failed or one["what"] == "error"
        return FAULT if failed else 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distillery-gpu-") as temporary:
        bench = Bench(Path(temporary), "cuda" if on_gpu else "cpu", arguments.smoke)
        write_inputs(bench.folder, arguments.half, arguments.teacher)
        findings: list[Json] = [{"part": "machine", "what": name, "found": value} for name, value in machine().items()]
        for name in arguments.parts or (PARTS if on_gpu else WITHOUT_A_GPU):
            left = 60 * arguments.minutes - (time.monotonic() - began)
            if on_gpu and left < 5:
                new = [{"part": name, "what": "error", "found": "no time was left"}]
            else:
                new = list(run_apart(name, bench, min(left, LIMIT_S[name])) if on_gpu else run_part(name, bench))
            findings += new
            print(report(new), flush=True)
            if (
                arguments.out is not None
            ):  # After each part: what is done is kept if the next one takes the machine down.
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "gpu.json").write_text(json.dumps(findings, indent=1))
    print(f"\nin {time.monotonic() - began:.0f} s on {json.dumps(machine())}")
    return 1 if any(one["what"] == "error" for one in findings) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--half", type=Path, help="cifar100_p0.npz or cifar100_p1.npz; without it, noise")
    parser.add_argument("--teacher", type=Path, help="cifar100_resnet56.pth; without it, random weights")
    parser.add_argument("--out", type=Path, help="the folder for gpu.json")
    parser.add_argument("--minutes", type=float, default=9, help="stop beginning or running parts after this time")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, in seconds")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="by default all")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--after", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
