"""Compares the students that this checkout and another one train, bit for bit.

    python -m bench.same_bits --old PATH [--folder DIR] [--processes N] [JOB ...]

Small jobs are run by `python -m kdcore run` in both checkouts; only the command line and its files are used. This
checkout's have `training.batch_norm: running`, which was the only kind before there was an option. Compared are the
students' files (best epochs), all tensors of the last checkpoint (last epochs), the points of the metrics, the resolved
spec, and the report without its cost. A file or a field of a document that only this checkout has is no difference.
Jobs that can be stopped in an interesting place have two more lines:

- resumed: stopped twice by SIGTERM and resumed in this checkout; the result must equal the uninterrupted run of the
  other checkout;
- taken over: stopped in the other checkout and resumed in this one, with the other's spec; the result must be equal, or
  the checkpoint is refused with a message, which is printed.

`--folder` keeps the inputs and the results of the other checkout, until its code or this file changes. JOB is part of a
job's name. Exit code 1 if anything differs. Takes four minutes on one core, less with a kept folder.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.processes import REPOSITORY

STOPPED = 75
"""Exit code of an engine that was stopped and has saved its state."""
TRIES = 3

Spec = dict[str, Any]
Line = dict[str, Any]

DATA, POOL, TEACHER, OTHER = (f"blob:sha256:{digit * 64}" for digit in "0123")
"""References of the inputs in the specs: a path would be written into the student's file."""
FILES = {DATA: "data.npz", POOL: "pool.npz", TEACHER: "teacher.safetensors", OTHER: "other.safetensors"}

RECIPE = {
    "epochs": 4, "batch_size": 18, "seed": 3, "device": "cpu", "checkpoint_every_s": 0,
    "augmentation": {"name": "crop_flip", "padding": 1}, "optimizer": {"name": "sgd", "lr": 0.1},
}  # fmt: skip
"""Six steps an epoch and a checkpoint after each step: a job can be stopped anywhere."""
SWITCHES = {
    "ema": 0.8, "clip_norm": 1.0, "label_smoothing": 0.1, "mix": "mixup", "schedule": {"name": "cosine"},
    "optimizer": {"name": "adamw"},
}  # fmt: skip
ONE_TEACHER = {"checkpoint": TEACHER, "architecture": "convnet4"}
TWO_TEACHERS = [{**ONE_TEACHER, "weight": 2}, {"checkpoint": OTHER, "architecture": "convnet8", "weight": 1}]


def _staged(name: str, **options: Any) -> Spec:
    return {"name": name, "pretraining_epochs": 3, **options}


def _job(method: Any, teacher: Any = ONE_TEACHER, student: Any = "convnet4", **changes: Any) -> Spec:
    training = {**RECIPE, **changes.pop("training", {})}
    spec = {"dataset": DATA, "student": student, "method": method, "training": training, **changes}
    return spec if teacher is None else {**spec, "teacher": teacher}


def _sum(*methods: Any) -> list[Any]:
    """A sum with a weight of 1 for each method, so that each changes the result."""
    return [{"weight": 1, **({"name": method} if isinstance(method, str) else method)} for method in methods]


CRD = {"name": "crd", "negatives": 8}
TWO_HINTS = _staged("fitnet", stages="two")
RESUMABLE: dict[str, Spec] = {
    "kd and its baseline": _job("kd", baseline="train"),
    "kd with ema, mixup, clipping, adamw": _job("kd", training=SWITCHES),
    "sum of kd, crd and factor_transfer": _job(_sum("kd", CRD, _staged("factor_transfer"))),
    "fitnet in two stages": _job(TWO_HINTS, baseline="train", training={"ema": 0.8}),
    "activation_boundary": _job(_staged("activation_boundary")),
    "crd": _job(CRD, training={"ema": 0.8}),
    "ofd": _job("ofd"),
    "dml of three": _job("dml", None, ["convnet4", "convnet8", "convnet4"], training={"ema": 0.8}),
    "one": _job("one", None, training={"ema": 0.8}),
    "born_again of two": _job({"name": "born_again", "generations": 2}, baseline="train"),
    "assistants": _job("kd", assistants=["convnet8", "convnet4"], baseline="train"),
}
UNINTERRUPTED: dict[str, Spec] = {
    "supervised": _job("supervised", None),
    "sum of five on logits": _job(_sum("kd", "dkd", "nkd", "dist", "ttm")),
    "sum of eight on activations": _job(_sum("attention", "nst", "feature", "vid", "rkd", "sp", "pkt", "cc")),
    "factor_transfer": _job(_staged("factor_transfer")),
    "fsp": _job(_staged("fsp")),
    "reviewkd": _job({"name": "reviewkd", "mid_channels": 8}),
    "attention by gradient": _job({"name": "attention", "mapping": "gradient"}),
    "byot": _job("byot", None),
    "born_again and attention, an ensemble": _job(
        [{"name": "born_again", "generations": 2, "answer": "ensemble"}, "attention"]
    ),
    "several teachers, unlabelled images": _job("kd", TWO_TEACHERS, unlabelled=POOL, baseline="train"),
}
JOBS = {**RESUMABLE, **UNINTERRUPTED}


@dataclass
class RunResult:
    """The result of a job, from one engine process or several that continued each other."""

    out: Path
    lines: list[Line]
    seconds: float
    exit: int

    @property
    def metrics(self) -> dict[tuple[str, int], list[Line]]:
        """Lines by trial and step. A resumed process repeats the points since its checkpoint."""
        points: dict[tuple[str, int], list[Line]] = {}
        for line in _events(self.lines, "metric"):
            points.setdefault((line["trial"], line["step"]), []).append(line)
        return points

    @property
    def report(self) -> dict[str, Any]:
        return {
            **json.loads((self.out / "report.json").read_text()),
            "seconds": None,
            "cost": None,
            "timings": None,
            "teacher_cache": None,
        }

    @property
    def step(self) -> int:
        """The step of the last checkpoint."""
        return int(_events(self.lines, "checkpoint")[-1]["step"])

    @property
    def checkpoint(self) -> Path:
        return self.out / str(_events(self.lines, "checkpoint")[-1]["path"])

    @property
    def tensors(self) -> Counter[str]:
        """Digests of all tensors in the last checkpoint, without the names of its entries."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return Counter(
            _sha256(f"{leaf.dtype} {leaf.shape}".encode() + leaf.numpy().tobytes()) for leaf in _leaves(state)
        )

    @property
    def error(self) -> Line:
        return next(
            iter(_events(self.lines, "error")), {"code": "internal", "message": "the engine wrote no error line"}
        )


@dataclass
class Checkout:
    """One of the two checkouts: the folders of its code, its results and the inputs, and additions to recipes."""

    name: str
    tree: Path
    folder: Path
    inputs: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def run(self, spec: Spec, name: str, resume: Path | None = None, stop_at: int | None = None) -> RunResult:
        """Run one engine process to its end, or stop it by SIGTERM at the first checkpoint from step `stop_at` on."""
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out.with_suffix(".json")).write_text(json.dumps(spec))
        command = [sys.executable, "-m", "kdcore", "run", str(out.with_suffix(".json")), "--out", str(out)]
        for reference, file in FILES.items():
            command += ["--input", f"{reference}={self.inputs / file}"]
        command += ["--resume", str(resume)] if resume else []
        began, lines = time.monotonic(), []
        with (
            out.with_suffix(".log").open("w") as log,
            subprocess.Popen(
                command, cwd=self.tree, env=self.environment, stdout=subprocess.PIPE, stderr=log
            ) as engine,
        ):
            assert engine.stdout is not None
            for text in engine.stdout:
                lines.append(json.loads(text))
                if stop_at is not None and lines[-1]["event"] == "checkpoint" and lines[-1]["step"] >= stop_at:
                    engine.send_signal(signal.SIGTERM)
                    stop_at = None
        return RunResult(out, lines, time.monotonic() - began, engine.returncode)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.tree)}

    def run_to_end(self, spec: Spec, name: str) -> RunResult:
        result = self.run(spec, name)
        if result.exit:
            raise RunFailed(f"{self.name}: {result.error['message']}")
        return result

    def run_until(self, spec: Spec, name: str, stop_at: int, resume: Path | None = None) -> RunResult:
        """Run and stop by SIGTERM. A training that ends before the signal arrives is run again."""
        for _ in range(TRIES):
            result = self.run(spec, name, resume, stop_at)
            if result.exit == STOPPED:
                return result
        raise RunFailed(
            f"{self.name}: stopped at step {stop_at}, it exited with {result.exit}: {result.error['message']}"
        )

    def cached(self, make: partial[RunResult], name: str) -> RunResult:
        """Return the kept result of the same code with the same inputs, or make it."""
        note = self.folder / f"{name}.result"
        if note.exists():
            return RunResult(self.folder / name, **json.loads(note.read_text()))
        result = make()
        note.write_text(json.dumps({"lines": result.lines, "seconds": result.seconds, "exit": result.exit}))
        return result

    def check_import(self) -> None:
        """Raise RunFailed if Python imports an installed copy in place of the checkout."""
        command = [sys.executable, "-c", "import kdcore; print(kdcore.__file__)"]
        done = subprocess.run(command, cwd=self.tree, env=self.environment, check=True, capture_output=True, text=True)
        if not Path(done.stdout.strip()).is_relative_to(self.tree):
            raise RunFailed(f"in {self.tree} Python imports {done.stdout.strip()}")


class RunFailed(Exception):
    """A job did not reach the end that is compared."""


@dataclass
class Check:
    """One line of the output."""

    name: str
    differences: list[str] = field(default_factory=list)
    seconds: float = 0
    note: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        verdict = self.verdict or ("differs" if self.differences else "equal")
        line = f"{verdict:8} {self.name:48} {self.seconds:5.1f} s  {self.note}".rstrip()
        return "\n".join([line, *(f"           {difference}" for difference in self.differences)])


def checks(name: str, old: Checkout, new: Checkout) -> Iterator[Check]:
    """Yield all lines of one job."""
    job = _Job(name, JOBS[name], "".join(letter if letter.isalnum() else "-" for letter in name), old, new)
    kinds = {"": _uninterrupted, ", resumed": _resumed, ", taken over": _taken_over}
    for kind, check in kinds.items() if name in RESUMABLE else [("", _uninterrupted)]:
        try:
            yield check(f"{name}{kind}", job)
        except RunFailed as failed:
            yield Check(f"{name}{kind}", [str(failed)])


@dataclass(frozen=True)
class _Job:
    name: str
    spec: Spec
    slug: str
    old: Checkout
    new: Checkout

    @property
    def new_spec(self) -> Spec:
        return {**self.spec, "training": {**self.spec["training"], **self.new.recipe}}

    @property
    def expected(self) -> RunResult:
        return self.old.cached(partial(self.old.run_to_end, self.spec, self.slug), self.slug)


def _uninterrupted(name: str, job: _Job) -> Check:
    expected, result = job.expected, job.new.run_to_end(job.new_spec, job.slug)
    return Check(name, list(differences(expected, result)), result.seconds, f"{expected.seconds:.1f} s in the other")


def _resumed(name: str, job: _Job) -> Check:
    """Stop early, in the first of several stages or trials, and again late."""
    total = job.expected.step
    first = job.new.run_until(job.new_spec, f"{job.slug}-first", total // 6)
    second = job.new.run_until(job.new_spec, f"{job.slug}-second", total * 6 // 10, first.checkpoint)
    last = job.new.run(job.new_spec, f"{job.slug}-last", second.checkpoint)
    seconds = first.seconds + second.seconds + last.seconds
    note = f"stopped at {first.step} and {second.step} of {total}"
    if last.exit:
        return Check(name, [f"not resumed: {last.error['message']}"], seconds, note)
    result = RunResult(last.out, first.lines + second.lines + last.lines, seconds, 0)
    return Check(name, list(differences(job.expected, result)), seconds, note)


def _taken_over(name: str, job: _Job) -> Check:
    total, stopped = job.expected.step, f"{job.slug}-stopped"
    first = job.old.cached(partial(job.old.run_until, job.spec, stopped, total * 4 // 10), stopped)
    last = job.new.run(job.spec, f"{job.slug}-taken-over", first.checkpoint)
    seconds, note = first.seconds + last.seconds, f"stopped at {first.step} of {total}"
    if last.exit:
        message, refused = f"{last.error['code']}: {last.error['message']}", last.error["code"] != "internal"
        if refused:
            return Check(name, [], seconds, message, "refused")
        return Check(name, [message], seconds, note)
    result = RunResult(last.out, first.lines + last.lines, seconds, 0)
    return Check(name, list(differences(job.expected, result)), seconds, note)


def differences(expected: RunResult, result: RunResult) -> Iterator[str]:
    for old in sorted(expected.out.glob("*.safetensors")):
        new = result.out / old.name
        if not new.exists():
            yield f"{old.name}: only in {old.parent}"
        elif _tensors(old) != _tensors(new):
            yield f"{old.name}: the weights differ"
        else:
            yield from _document_differences(f"{old.name}, metadata", _metadata(old), _metadata(new))
    missing, added = expected.tensors - result.tensors, result.tensors - expected.tensors
    if missing or added:
        yield f"last checkpoint: {missing.total()} tensors of the other are missing here, {added.total()} are new"
    yield from _metric_differences(expected, result)
    for name, old_document, new_document in (
        ("report.json", expected.report, result.report),
        ("spec.json", *(json.loads((side.out / "spec.json").read_text()) for side in (expected, result))),
    ):
        yield from _document_differences(name, old_document, new_document)


def _metric_differences(expected: RunResult, result: RunResult) -> Iterator[str]:
    old, new = expected.metrics, result.metrics
    if old.keys() != new.keys():
        yield f"metrics: points {sorted(old.keys() ^ new.keys())} are not in both"
    wrong = [(key, line) for key in old if key in new for line in new[key] if line != old[key][0]]
    if wrong:
        (trial, step), line = wrong[0]
        first = next(_document_differences(f"{trial}, step {step},", old[trial, step][0], line))
        yield f"metrics: {len({key for key, _ in wrong})} of {len(old)} points differ, first {first}"


def _document_differences(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            yield from _document_differences(f"{path} {name}", old[name], new.get(name, "absent"))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _document_differences(f"{path} {place}", one, other)
    elif old != new:
        yield f"{path}: {old}, here {new}"


def _leaves(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state.detach().contiguous()
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)


def _tensors(path: Path) -> tuple[Mapping[str, Any], bytes]:
    """A safetensors file without its metadata."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return {name: value for name, value in header.items() if name != "__metadata__"}, content[end:]


def _metadata(path: Path) -> Any:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["distillery"])


def _events(lines: Sequence[Line], event: str) -> list[Line]:
    return [line for line in lines if line["event"] == event]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_inputs(old: Checkout) -> None:
    """Write a data set of three classes of grey blobs, unlabelled images, and two teachers of the other checkout."""
    old.inputs.mkdir(parents=True, exist_ok=True)
    if (old.inputs / FILES[OTHER]).exists():
        return
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 120), ("test", 30)):
        labels = np.arange(count) % 3
        pixels = rng.integers(0, 120, (count, 8, 8, 1))
        corners = [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(4, 8)), (slice(0, 4), slice(4, 8))]
        for row, label in enumerate(labels):
            pixels[row][corners[label]] += 120
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
    np.savez(old.inputs / FILES[DATA], **arrays)
    np.savez(old.inputs / FILES[POOL], x_train=rng.integers(0, 220, (60, 8, 8, 1)).astype(np.uint8))
    for reference, student in ((TEACHER, "convnet4"), (OTHER, "convnet8")):
        result = old.run_to_end(_job("supervised", None, student, training={"seed": 1}), f"teacher-{student}")
        shutil.copy(result.out / "student.safetensors", old.inputs / FILES[reference])


def main() -> int:
    arguments = _arguments()
    names = [name for name in JOBS if not arguments.jobs or any(part in name for part in arguments.jobs)]
    with tempfile.TemporaryDirectory(prefix="distillery-bits-") as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        tree = arguments.old.resolve()
        cache = folder / _sha256(b"".join(map(Path.read_bytes, [Path(__file__), *_code(tree)])))[:12]
        old = Checkout("the other", tree, cache / "old", cache / "inputs")
        running = {"batch_norm": "running"}
        new = Checkout("this one", REPOSITORY, Path(temporary) / "new", cache / "inputs", running)
        for side in (old, new):
            side.check_import()
        make_inputs(old)
        failed, began, count = 0, time.monotonic(), 0
        with ThreadPoolExecutor(arguments.processes) as pool:
            for job_checks in pool.map(lambda name: list(checks(name, old, new)), names):
                for check in job_checks:
                    print(check, flush=True)
                    count, failed = count + 1, failed + bool(check.differences)
    print(f"{count - failed} of {count} checks passed, {time.monotonic() - began:.0f} s")
    return 1 if failed or not count else 0


def _code(tree: Path) -> list[Path]:
    """All Python files of a checkout: its results are kept until one of them changes."""
    folders = (folder for folder in tree.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits")
    parser.add_argument("--old", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--folder", type=Path, help="keep the inputs and the other checkout's results here")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="part of a job's name; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
