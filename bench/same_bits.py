"""Whether this checkout trains the same students as another one, bit for bit.

    python -m bench.same_bits --old PATH [--folder DIR] [--processes N] [JOB ...]

Small jobs run by `python -m kdcore run`, each in both checkouts; nothing is shared with either but the command line
and the files that it reads and writes. Compared are the students' files, which are of the best epochs; all tensors of
the last checkpoint, which are of the last epochs too; the points of the metrics, the resolved spec, and the report but
for its seconds. Of each job that can be stopped in an interesting place, two lines more:

- resumed: stopped twice by SIGTERM in this checkout, and resumed there, has to end as the other's did undisturbed;
- taken over: stopped in the other checkout, resumed in this one. It ends the same, or is refused with a message, which
  is printed.

`--folder` keeps the inputs and what the other checkout made, until its code or this page changes. JOB is part of a
job's name. Exit code 1 if anything differs. Expect four minutes on one core, less where the folder was kept.
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

HERE = Path(__file__).parents[1]
STOPPED = 75
"""What an engine leaves with that was asked to stop, once its state is safe."""
TRIES = 3

Spec = dict[str, Any]
Line = dict[str, Any]

DATA, POOL, TEACHER, OTHER = (f"blob:sha256:{digit * 64}" for digit in "0123")
"""What the specs call the inputs: no path gets into a student's file."""
FILES = {DATA: "data.npz", POOL: "pool.npz", TEACHER: "teacher.safetensors", OTHER: "other.safetensors"}

RECIPE = {
    "epochs": 4, "batch_size": 18, "seed": 3, "device": "cpu", "checkpoint_every_s": 0,
    "augmentation": {"name": "crop_flip", "padding": 1}, "optimizer": {"name": "sgd", "lr": 0.1},
}  # fmt: skip
"""Six steps an epoch, a checkpoint after each: a job can be stopped anywhere."""
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
    """Each of a weight at which it can be seen beside the others."""
    return [{"weight": 1, **({"name": method} if isinstance(method, str) else method)} for method in methods]


CRD = {"name": "crd", "negatives": 8}
TWO_HINTS = _staged("fitnet", stages="two")
TO_STOP: dict[str, Spec] = {
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
WHOLE: dict[str, Spec] = {
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
JOBS = {**TO_STOP, **WHOLE}


@dataclass
class Ran:
    """What one process, or one after the other, made of a job."""

    out: Path
    lines: list[Line]
    seconds: float
    exit: int

    @property
    def metrics(self) -> dict[tuple[str, int], list[Line]]:
        """By trial and step. A process that went on from before a point says it again."""
        found: dict[tuple[str, int], list[Line]] = {}
        for line in _events(self.lines, "metric"):
            found.setdefault((line["trial"], line["step"]), []).append(line)
        return found

    @property
    def report(self) -> dict[str, Any]:
        return {**json.loads((self.out / "report.json").read_text()), "seconds": None}

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return int(_events(self.lines, "checkpoint")[-1]["step"])

    @property
    def checkpoint(self) -> Path:
        return self.out / str(_events(self.lines, "checkpoint")[-1]["path"])

    @property
    def tensors(self) -> Counter[str]:
        """All that the last checkpoint holds, whatever its entries are called."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return Counter(_sha256(f"{one.dtype} {one.shape}".encode() + one.numpy().tobytes()) for one in _leaves(state))

    @property
    def error(self) -> Line:
        return next(iter(_events(self.lines, "error")), {"code": "internal", "message": "no line says what is wrong"})


@dataclass
class Checkout:
    """One side: where its code is, and where what it makes goes."""

    name: str
    tree: Path
    folder: Path
    inputs: Path

    def run(self, spec: Spec, name: str, resume: Path | None = None, stop_at: int | None = None) -> Ran:
        """One process, from its start to its end; asked to stop once a checkpoint of the step `stop_at` is there."""
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
        return Ran(out, lines, time.monotonic() - began, engine.returncode)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.tree)}

    def whole(self, spec: Spec, name: str) -> Ran:
        ran = self.run(spec, name)
        if ran.exit:
            raise Broken(f"{self.name}: {ran.error['message']}")
        return ran

    def stopped(self, spec: Spec, name: str, stop_at: int, resume: Path | None = None) -> Ran:
        """Stopped by SIGTERM. A training that has ended before it hears of it is run again."""
        for _ in range(TRIES):
            ran = self.run(spec, name, resume, stop_at)
            if ran.exit == STOPPED:
                return ran
        raise Broken(f"{self.name}: asked to stop at step {stop_at}, it left with {ran.exit}: {ran.error['message']}")

    def kept(self, make: partial[Ran], name: str) -> Ran:
        """What was made before, with the same inputs by the same code; else it is made."""
        note = self.folder / f"{name}.ran"
        if note.exists():
            return Ran(self.folder / name, **json.loads(note.read_text()))
        ran = make()
        note.write_text(json.dumps({"lines": ran.lines, "seconds": ran.seconds, "exit": ran.exit}))
        return ran

    def says_where(self) -> None:
        """An installed copy must not stand in for the checkout."""
        look = [sys.executable, "-c", "import kdcore; print(kdcore.__file__)"]
        found = subprocess.run(look, cwd=self.tree, env=self.environment, check=True, capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_relative_to(self.tree):
            raise Broken(f"in {self.tree} Python imports {found.stdout.strip()}")


class Broken(Exception):
    """A job did not come to the end that was to be compared."""


@dataclass
class Check:
    """One line of the answer."""

    name: str
    differences: list[str] = field(default_factory=list)
    seconds: float = 0
    note: str = ""
    word: str = ""

    def __str__(self) -> str:
        word = self.word or ("differs" if self.differences else "equal")
        line = f"{word:8} {self.name:48} {self.seconds:5.1f} s  {self.note}".rstrip()
        return "\n".join([line, *(f"           {difference}" for difference in self.differences)])


def checks(name: str, old: Checkout, new: Checkout) -> Iterator[Check]:
    """All lines of one job."""
    job = _Job(name, JOBS[name], "".join(letter if letter.isalnum() else "-" for letter in name), old, new)
    kinds = {"": _whole, ", resumed": _resumed, ", taken over": _taken_over}
    for kind, check in kinds.items() if name in TO_STOP else [("", _whole)]:
        try:
            yield check(f"{name}{kind}", job)
        except Broken as broken:
            yield Check(f"{name}{kind}", [str(broken)])


@dataclass(frozen=True)
class _Job:
    name: str
    spec: Spec
    slug: str
    old: Checkout
    new: Checkout

    @property
    def expected(self) -> Ran:
        return self.old.kept(partial(self.old.whole, self.spec, self.slug), self.slug)


def _whole(name: str, job: _Job) -> Check:
    expected, ran = job.expected, job.new.whole(job.spec, job.slug)
    return Check(name, list(differences(expected, ran)), ran.seconds, f"{expected.seconds:.1f} s in the other")


def _resumed(name: str, job: _Job) -> Check:
    """Stopped early, which is in a first stage or trial where there are several, and again late."""
    total = job.expected.step
    first = job.new.stopped(job.spec, f"{job.slug}-first", total // 6)
    second = job.new.stopped(job.spec, f"{job.slug}-second", total * 6 // 10, first.checkpoint)
    last = job.new.run(job.spec, f"{job.slug}-last", second.checkpoint)
    seconds = first.seconds + second.seconds + last.seconds
    note = f"stopped at {first.step} and {second.step} of {total}"
    if last.exit:
        return Check(name, [f"it was not resumed: {last.error['message']}"], seconds, note)
    ran = Ran(last.out, first.lines + second.lines + last.lines, seconds, 0)
    return Check(name, list(differences(job.expected, ran)), seconds, note)


def _taken_over(name: str, job: _Job) -> Check:
    total, stopped = job.expected.step, f"{job.slug}-stopped"
    first = job.old.kept(partial(job.old.stopped, job.spec, stopped, total * 4 // 10), stopped)
    last = job.new.run(job.spec, f"{job.slug}-taken-over", first.checkpoint)
    seconds, note = first.seconds + last.seconds, f"stopped at {first.step} of {total}"
    if last.exit:
        what, refused = f"{last.error['code']}: {last.error['message']}", last.error["code"] != "internal"
        return Check(name, [] if refused else [what], seconds, what if refused else note, "refused" if refused else "")
    ran = Ran(last.out, first.lines + last.lines, seconds, 0)
    return Check(name, list(differences(job.expected, ran)), seconds, note)


def differences(expected: Ran, ran: Ran) -> Iterator[str]:
    names = {path.name for out in (expected.out, ran.out) for path in out.glob("*.safetensors")}
    for name in sorted(names):
        one, other = expected.out / name, ran.out / name
        if not one.exists() or not other.exists():
            yield f"{name}: only in {one.parent if one.exists() else other.parent}"
        elif _sha256(one.read_bytes()) != _sha256(other.read_bytes()):
            yield f"{name}: {'its notes alone differ' if _tensors(one) == _tensors(other) else 'its weights differ'}"
    missing, more = expected.tensors - ran.tensors, ran.tensors - expected.tensors
    if missing or more:
        yield f"last checkpoint: {missing.total()} tensors of the other's are not here, {more.total()} others are"
    yield from _metric_differences(expected, ran)
    for what, one, other in (
        ("report.json", expected.report, ran.report),
        ("spec.json", *(json.loads((each.out / "spec.json").read_text()) for each in (expected, ran))),
    ):
        yield from _document_differences(what, one, other)


def _metric_differences(expected: Ran, ran: Ran) -> Iterator[str]:
    one, other = expected.metrics, ran.metrics
    if one.keys() != other.keys():
        yield f"metrics: points {sorted(one.keys() ^ other.keys())} are not in both"
    wrong = [(key, line) for key in one if key in other for line in other[key] if line != one[key][0]]
    if wrong:
        (trial, step), line = wrong[0]
        first = next(_document_differences(f"{trial}, step {step},", one[trial, step][0], line))
        yield f"metrics: {len({key for key, _ in wrong})} of {len(one)} points differ, first {first}"


def _document_differences(where: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from _document_differences(f"{where} {name}", one.get(name, "absent"), other.get(name, "absent"))
    elif one != other:
        yield f"{where}: {one}, here {other}"


def _leaves(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state.detach().contiguous()
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)


def _tensors(path: Path) -> tuple[Mapping[str, Any], bytes]:
    """The part of a safetensors file that is not notes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return {name: value for name, value in header.items() if name != "__metadata__"}, content[end:]


def _events(lines: Sequence[Line], event: str) -> list[Line]:
    return [line for line in lines if line["event"] == event]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_inputs(old: Checkout) -> None:
    """Three kinds of grey blobs, images that nobody has labelled, and two teachers that the other checkout trains."""
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
        ran = old.whole(_job("supervised", None, student, training={"seed": 1}), f"teacher-{student}")
        shutil.copy(ran.out / "student.safetensors", old.inputs / FILES[reference])


def main() -> int:
    arguments = _arguments()
    names = [name for name in JOBS if not arguments.jobs or any(part in name for part in arguments.jobs)]
    with tempfile.TemporaryDirectory(prefix="distillery-bits-") as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        tree = arguments.old.resolve()
        kept = folder / _sha256(b"".join(map(Path.read_bytes, [Path(__file__), *_code(tree)])))[:12]
        old = Checkout("the other", tree, kept / "old", kept / "inputs")
        new = Checkout("this one", HERE, Path(temporary) / "new", kept / "inputs")
        for side in (old, new):
            side.says_where()
        make_inputs(old)
        failed, began, count = 0, time.monotonic(), 0
        with ThreadPoolExecutor(arguments.processes) as pool:
            for found in pool.map(lambda name: list(checks(name, old, new)), names):
                for check in found:
                    print(check, flush=True)
                    count, failed = count + 1, failed + bool(check.differences)
    print(f"{count - failed} of {count} as they were, {time.monotonic() - began:.0f} s")
    return 1 if failed or not count else 0


def _code(tree: Path) -> list[Path]:
    """What a checkout made is kept for the same code alone."""
    folders = (folder for folder in tree.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits")
    parser.add_argument("--old", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--folder", type=Path, help="where inputs and the other's results are kept")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="part of a job's name; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
