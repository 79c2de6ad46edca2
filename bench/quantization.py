"""int8 after training and int8 that was trained for: CIFAR-100, ResNet-56 → ResNet-20, three paired seeds.

    .venv/bin/python -m bench.quantization [--images 10000] [--epochs 3] [--rows ROW ...] [--threads 1]
    .venv/bin/python -m bench.quantization --table

Students begin with the published `cifar100_resnet20.pth` and are taught by the published ResNet-56; `--new` begins
with random weights. The rows of one seed have the same images, views and learning rates, and the same bits until the
first epoch for int8. Each figure is that of a file that a job has exported, measured here with onnxruntime alone on all
10,000 test images: `student.int8.onnx` and, for the same weights, `student.onnx`. The table says which way wins, and by
how much, with a 95 % interval over paired seeds by Student's t.

Each finished run adds a line to `bench/results/quantization.jsonl`; the same command continues. Takes hours: run it
while nothing else is measured. Needs the real data beside the checkout (`../shared/data`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

from bench.budgets import cifar100_data
from bench.cifar100 import DATA, PREPROCESSING, TEACHER_FILE
from bench.processes import REPOSITORY, exit_on_sigterm
from bench.runs import Kdcore, Line, Results, Run, Spec, add_arguments, gains, interval, points, run_missing

AFTER = "after training"
AWARE = "aware"
ROWS: dict[str, Spec | None] = {AFTER: None, AWARE: {}, "aware, half": {"epochs": 0.5}, "aware, all": {"epochs": 1.0}}
"""`quantization` of the spec; `epochs` as a part of all. That of `aware` is the default: a tenth."""
EXPORT = {"export": ["onnx", "onnx_int8"], "export_options": {"measure": False}}
CAREFUL = {"optimizer": {"name": "sgd", "lr": 0.0005}, "batch_norm": "running"}
"""For students that are trained already. The default rate of a fine-tuning, 0.01, took one from 69 to 52 % in an epoch
of 10,000 images. Statistics measured anew, on images without augmentation, cost the published student 7 points: it has
learned from images with black borders, as `crop_flip` makes them."""
START = DATA / "teachers" / "cifar100_resnet20.pth"
BATCH = 250


@dataclass(frozen=True)
class Budget:
    """Data, networks and recipe of a comparison; rows differ in `quantization` alone."""

    name: str
    spec: Spec
    inputs: tuple[str, ...]
    """The files that its specs name."""

    def run(self, row: str, seed: int) -> Run:
        training = self.spec["training"]
        spec = {**self.spec, **EXPORT, "training": {**training, "seed": seed}}
        asked = ROWS[row]
        if asked is not None:
            spec["quantization"] = {**asked}
            if "epochs" in asked:
                spec["quantization"]["epochs"] = max(1, round(asked["epochs"] * training["epochs"]))
        return Run(self.name, row, seed, spec, self.inputs)


def cifar100(images: int, epochs: int, new: bool) -> Budget:
    """Return the budget of so many images of CIFAR-100, evenly over the classes."""
    data, teacher, start = f"blob:cifar100-{images}", "model:cifar100-resnet56", "model:cifar100-resnet20"
    student = {"architecture": "resnet20", "preprocessing": PREPROCESSING}
    spec = {
        "dataset": data,
        "teacher": {"architecture": "resnet56", "checkpoint": teacher, "preprocessing": PREPROCESSING},
        "student": student if new else {**student, "checkpoint": start},
        "method": "kd",
        "training": {"epochs": epochs, "batch_size": 64, "schedule": "cosine", **({} if new else CAREFUL)},
    }
    name = f"cifar100 {images} x {epochs}{', from nothing' if new else ''}"
    return Budget(name, spec, (data, teacher) if new else (data, teacher, start))


SMOKE = Budget(
    "smoke",
    {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 2}},
    (),
)


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    if arguments.smoke:
        with tempfile.TemporaryDirectory(prefix="distillery-quantization-") as name:
            results = Results(Path(name) / "results.jsonl")
            fine = _run(SMOKE, [AFTER, AWARE], 1, results, Path(name), {}, 1)
            print(table(SMOKE, [AFTER, AWARE], 1, results))
        return 0 if fine else 1
    budget, results = cifar100(arguments.images, arguments.epochs, arguments.new), Results(arguments.results)
    fine = True
    if not arguments.table:
        files = {
            f"blob:cifar100-{arguments.images}": cifar100_data(arguments.images, arguments.state),
            "model:cifar100-resnet56": TEACHER_FILE,
            "model:cifar100-resnet20": START,
        }
        fine = _run(budget, arguments.rows, arguments.seeds, results, arguments.state, files, arguments.threads)
    print(table(budget, arguments.rows, arguments.seeds, results))
    return 0 if fine else 1


def _run(
    budget: Budget,
    rows: Sequence[str],
    seeds: int,
    results: Results,
    state: Path,
    files: Mapping[str, Path],
    threads: int,
) -> bool:
    engine = Kdcore(state, files, threads)
    test = state / f"test of {budget.name}.safetensors"
    if not test.exists():
        state.mkdir(parents=True, exist_ok=True)
        data = budget.spec["dataset"]
        command = [sys.executable, "-m", "kdcore", "images", str(test), "--dataset", data]
        command += ["--cache", str(state / "cache"), *([f"--input={data}={files[data]}"] if data in files else [])]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)

    def measured(run: Run) -> Line:
        line = engine(run)
        folder = engine.folder(run)
        exact = answers(folder / "student.onnx", test)
        rounded = answers(folder / "student.int8.onnx", test)
        return {
            "accuracy": rounded.accuracy,
            "float": exact.accuracy,
            "agreement": sum(a == b for a, b in zip(rounded.classes, exact.classes, strict=True)) / len(exact.classes),
            "bytes": (folder / "student.int8.onnx").stat().st_size,
            "float_bytes": (folder / "student.onnx").stat().st_size,
            "test_samples": len(exact.classes),
            **{name: line[name] for name in ("teacher", "seconds", "threads", "precision")},
        }

    runs = [budget.run(row, seed) for seed in range(seeds) for row in rows]
    return run_missing(runs, results, measured)


@dataclass(frozen=True)
class Answers:
    """What a file answers to the test images."""

    accuracy: float
    classes: list[int]


def answers(file: Path, images: Path) -> Answers:
    """Return the answers of an ONNX file by onnxruntime alone, which has the normalisation in its metadata. `images`:
    what `python -m kdcore images` has written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    facts: Any = json.loads(session.get_modelmeta().custom_metadata_map["distillery"])
    middle, width = (np.array(facts[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    loaded = load_file(images)
    classes: list[int] = []
    for at in range(0, len(loaded["images"]), BATCH):
        pixels = loaded["images"][at : at + BATCH].astype(np.float32) / 255
        (logits,) = session.run(None, {session.get_inputs()[0].name: (pixels - middle) / width})
        classes += logits.argmax(1).tolist()
    return Answers(float((np.array(classes) == loaded["labels"]).mean()), classes)


def table(budget: Budget, rows: Sequence[str], seeds: int, results: Results) -> str:
    """Return a Markdown table of what is done, and a sentence for each row that is compared with `after training`."""
    runs = {row: [budget.run(row, seed) for seed in range(seeds)] for row in dict.fromkeys((AFTER, *rows))}
    after = results.accuracies(runs[AFTER])
    lines = [
        budget.name,
        "",
        "| int8 | seeds | float, % | int8, % | int8 lost, points | agreement with float, % | int8 above 'after "
        "training', points (95 %) | s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sentences = []
    for row, its in runs.items():
        found = {name: results.accuracies(its, name) for name in ("accuracy", "float", "agreement", "seconds")}
        if not found["accuracy"]:
            continue
        lost = gains(found["float"], found["accuracy"])
        above = gains(found["accuracy"], after)
        cells = (
            row,
            str(len(found["accuracy"])),
            f"{100 * mean(found['float'].values()):.2f}",
            f"{100 * mean(found['accuracy'].values()):.2f}",
            points(lost),
            f"{100 * mean(found['agreement'].values()):.2f}",
            "–" if row == AFTER else points(above),
            f"{min(found['seconds'].values()):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
        if row != AFTER and above:
            sentences.append(f"{row}: {winner(above)}")
    return "\n".join([*lines, "", *sentences])


def winner(above: Sequence[float]) -> str:
    """Return in words which of two ways wins, given the differences of paired seeds."""
    found = interval(above)
    if found is None:
        return f"{points(above)} points, which say nothing about other seeds"
    low, high = found
    if low > 0:
        return f"training for int8 wins by {points(above)} points"
    if high < 0:
        return f"int8 after training wins by {points([-one for one in above])} points"
    return f"no certain difference: {points(above)} points, and the interval holds 0"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quantization", description="int8, trained for or not.")
    add_arguments(parser, "quantization.jsonl")
    parser.add_argument("--images", type=int, default=10_000, help="training images, out of 50,000")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--new", action="store_true", help="students of random weights")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=[AFTER, AWARE], metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
