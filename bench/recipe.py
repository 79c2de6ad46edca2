"""The full published recipe, ResNet-56 → ResNet-20 on CIFAR-100, beside the published figures. For a GPU.

    python -m bench.recipe --data cifar100.npz --teacher cifar100_resnet56.pth --state STATE [--minutes 9]
                           [--methods kd dkd dist attention rkd crd] [--seeds 1] [--epochs 240]

240 epochs, batch 64, SGD at 0.05 with drops at 150, 180 and 210, weight decay 5e-4: CRD's recipe and the engine's own
defaults. Every method and seed is a `python -m kdcore run` of its own; all run side by side on one GPU. After
`--minutes` the unfinished runs are stopped, each with a checkpoint in STATE; the same command continues them, bit for
bit, so that a machine for ten minutes at a time is enough. The table and the reports are written to `--out`.

The published column is the best epoch on the test set, means of 3 to 5 runs (Tian et al., ICLR 2020, table 1; Zhao et
al., CVPR 2022, table 6; Huang et al., NeurIPS 2022, table 6). Our column is the epoch chosen on held-out images, which
tends to be a little lower, with 45,000 training images instead of 50,000; the next column is the last epoch.

Runs wherever `kdcore` does (Python 3.11 or newer, torch 2.11 or newer, pydantic, safetensors, numpy); no service.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdcore.spec import METHODS

PUBLISHED = {
    "supervised": 69.06,
    "kd": 70.66,
    "dkd": 71.97,
    "dist": 71.75,
    "attention": 70.55,
    "rkd": 69.61,
    "crd": 71.16,
}
PREPROCESSING = {"mean": [0.5070, 0.4865, 0.4409], "std": [0.2673, 0.2564, 0.2761]}
GRACE_S = 30


@dataclass
class Run:
    """The run of one method and seed, in a folder of its own."""

    method: str
    seed: int
    folder: Path

    @property
    def report(self) -> Any:
        path = self.folder / "report.json"
        return json.loads(path.read_text()) if path.exists() else None

    def start(self, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = self.folder / "requested.json"
        spec.write_text(json.dumps(_spec(self, arguments)))
        cache = arguments.state / "cache"
        command = [sys.executable, "-m", "kdcore", "run", str(spec), "--out", str(self.folder), "--cache", str(cache)]
        checkpoints = sorted((self.folder / "checkpoints").glob("*.pt"))
        if checkpoints:
            command += ["--resume", str(checkpoints[-1])]
        with (self.folder / "lines").open("ab") as lines, (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=lines, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "2"})

    def progress(self) -> Any:
        """The last progress line, or None."""
        path = self.folder / "lines"
        lines = path.read_text().splitlines() if path.exists() else []
        progress = [json.loads(line) for line in lines if line.startswith('{"event": "progress"')]
        return progress[-1] if progress else None


def main() -> int:
    arguments = _arguments()
    runs = [
        Run(method, seed, arguments.state / f"{method}-{seed}")
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    end = time.monotonic() + 60 * arguments.minutes
    failed = _train([run for run in runs if run.report is None], end, arguments)
    print(table(runs))
    if arguments.out is not None:
        _write_results(runs, arguments.out)
    return 1 if failed else 0


def _train(runs: list[Run], end: float, arguments: argparse.Namespace) -> bool:
    """Train all side by side until all are done or the time is over. Returns True if one of them failed."""
    began = {id(run): run.progress() for run in runs}
    children = {id(run): run.start(arguments) for run in runs}
    while time.monotonic() < end and any(child.poll() is None for child in children.values()):
        time.sleep(1)
    stopped = [child for child in children.values() if child.poll() is None]
    for child in stopped:
        child.send_signal(signal.SIGTERM)
    for child in stopped:
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
    failed = False
    for run in runs:
        child, before, now = children[id(run)], began[id(run)], run.progress()
        if run.report is None and child not in stopped:
            failed = True
            print(f"{run.folder.name} failed: " + " | ".join((run.folder / "log").read_text().splitlines()[-3:]))
        elif run.report is None and now is not None:
            steps = now["step"] - (before["step"] if before else 0)
            print(f"{run.folder.name}: epoch {now['epoch']} of {now['epochs']}, {steps} steps in this call")
    return failed


def _spec(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    spec = {
        "name": f"{run.method}, seed {run.seed}",
        "dataset": f"file:{arguments.data}",
        "student": {"architecture": "resnet20", "preprocessing": PREPROCESSING},
        "method": run.method,
        "training": {"epochs": arguments.epochs, "seed": run.seed, "checkpoint_every_s": 120},
    }
    if METHODS[run.method].facts.teacher == "required":
        checkpoint = f"file:{arguments.teacher}"
        spec["teacher"] = {"architecture": "resnet56", "checkpoint": checkpoint, "preprocessing": PREPROCESSING}
    return spec


def table(runs: list[Run]) -> str:
    """A Markdown table of our chosen and last epochs and the published figures."""
    lines = [
        "| method | runs | top-1 at the chosen epoch, % | top-1 at the last, % | published, % |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(run.method for run in runs):
        students = [run.report["student"] for run in runs if run.method == method and run.report]
        chosen = _mean([student["accuracy"] for student in students])
        last = _mean([student["last"]["accuracy"] for student in students])
        lines.append(f"| {method} | {len(students)} | {chosen} | {last} | {PUBLISHED.get(method, '–')} |")
    return "\n".join(lines)


def _mean(accuracies: list[float]) -> str:
    if not accuracies:
        return "not done"
    spread = f" ± {100 * stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.2f}{spread}"


def _write_results(runs: list[Run], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(runs) + "\n")
    for run in runs:
        if run.report is not None:
            shutil.copy(run.folder / "report.json", out / f"{run.folder.name}.json")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The full recipe, ResNet-56 to ResNet-20 on CIFAR-100.")
    parser.add_argument("--data", type=Path, required=True, help=".npz of uint8 x_train, y_train, x_test, y_test")
    parser.add_argument("--teacher", type=Path, required=True, help="the checkpoint of the ResNet-56")
    parser.add_argument("--state", type=Path, required=True, help="a folder that is kept between calls")
    parser.add_argument("--out", type=Path, help="folder for table.md and the reports")
    parser.add_argument("--methods", nargs="+", default=["kd", "dkd", "dist", "attention", "rkd", "crd"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--minutes", type=float, default=9, help="stop with checkpoints after so many minutes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
