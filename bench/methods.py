"""Every method on CIFAR-100, ResNet-56 → ResNet-20, through the whole service, on one short budget.

    .venv/bin/python -m bench.methods [--train 6000] [--epochs 4] [--seeds 2] [--only kd crd] [--keep results.json]

Starts PostgreSQL, Valkey, the API and Celery workers (`local.cluster`), uploads and registers the data and the real
teacher, submits a job for each method and seed over REST, and prints a table: top-1 on all 10,000 test images (mean
and spread over the seeds), the gain over the same student alone with the same seed, and seconds for an epoch of the
student, first stages and peers included (the minimum of the seeds: other load only adds time). Jobs run side by side,
one thread each: the seconds compare methods, not machines.

With `--keep` each result is written at once, and an interrupted run continues with the next job.
Needs the real data beside the checkout (`../shared/data`). `--train` is the number of training images out of 50,000,
evenly over the classes.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.cifar100 import register, require_data, subset
from bench.service import cluster
from client.sdk import Distillery
from kdcore.spec import METHODS

Row = dict[str, Any]

ALONE = "supervised"
TEACHER = {"architecture": "resnet56", "checkpoint": "model:cifar100-resnet56"}

# Rows with options of their own; every other method runs with its defaults.
VARIANTS: dict[str, Row] = {
    "kd, standardized": {"method": {"name": "kd", "standardize": True}},
    "born_again": {"method": {"name": "born_again", "generations": 2}},
    "kd + attention": {"method": ["kd", "attention"]},
}


def _row(name: str) -> Row:
    """The fields of a job of one method."""
    facts = METHODS[name].facts
    peers = {"student": ["resnet20", "resnet20"]} if facts.scheme == "mutual" else {}
    return {"method": name, **peers, **({"teacher": None} if facts.teacher == "none" else {})}


ROWS: dict[str, Row] = {**{name: _row(name) for name in METHODS}, **VARIANTS}


def main() -> int:
    arguments = _arguments()
    require_data()
    # One thread each: two trainings that share cores slow each other down many times.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done = _read_results(arguments)
    missing = [
        (row, seed)
        for seed in range(arguments.seeds)
        for row in ROWS
        if (row in arguments.only or not arguments.only) and _key(row, seed) not in done
    ]
    if missing:
        with (
            tempfile.TemporaryDirectory(prefix="distillery-methods-") as name,
            cluster(Path(name), arguments.workers) as url,
        ):
            _run(missing, done, Path(name), url, arguments)
    print(table(done, arguments))
    return 0


def _run(
    missing: list[tuple[str, int]], done: dict[str, Row], folder: Path, url: str, arguments: argparse.Namespace
) -> None:
    service = Distillery(url)
    register(service, subset(folder, arguments.train))
    jobs = {_key(row, seed): service.submit(_spec(row, seed, arguments))["id"] for row, seed in missing}
    for key, job_id in jobs.items():
        job = service.wait(job_id)
        if job["status"] != "succeeded":
            print(f"{key}: job {job_id} ended {job['status']}: {job['error']}", flush=True)
            continue
        done[key] = {
            "accuracy": job["result"]["student"]["accuracy"],
            "last": job["result"]["student"]["last"]["accuracy"],
            "seconds": _training_seconds(service, job_id) / arguments.epochs,
        }
        print(f"{key:<40}{done[key]['accuracy']:>8.2%}{done[key]['seconds']:>8.1f} s/epoch", flush=True)
        if arguments.keep:
            arguments.keep.write_text(json.dumps({"budget": _budget(arguments), "done": done}, indent=1))


def _spec(row: str, seed: int, arguments: argparse.Namespace) -> Row:
    spec = {
        "name": f"{row}, seed {seed}",
        "dataset": "cifar100-subset",
        "teacher": TEACHER,
        "student": "resnet20",
        "training": {
            "epochs": arguments.epochs,
            "batch_size": 64,
            "seed": seed,
            "schedule": "cosine",
            "precision": arguments.precision,
        },
        **ROWS[row],
    }
    return {name: value for name, value in spec.items() if value is not None}


def _training_seconds(service: Distillery, job_id: str) -> float:
    """Seconds from the phase `training` to the phase `evaluating`."""
    at = {event["data"]["phase"]: event["at"] for event in service.events(job_id) if event["type"] == "phase"}
    began, ended = (datetime.fromisoformat(at[phase]) for phase in ("training", "evaluating"))
    return (ended - began).total_seconds()


def table(done: dict[str, Row], arguments: argparse.Namespace) -> str:
    """A Markdown table, best method first; the student alone is one of the rows."""
    seeds = range(arguments.seeds)
    lines = []
    for row in ROWS:
        runs = [done[_key(row, seed)] for seed in seeds if _key(row, seed) in done]
        alone = [done[_key(ALONE, seed)] for seed in seeds if _key(row, seed) in done and _key(ALONE, seed) in done]
        if not runs or len(alone) != len(runs):
            continue
        accuracies = [run["accuracy"] for run in runs]
        gains = [run["accuracy"] - one["accuracy"] for run, one in zip(runs, alone, strict=True)]
        gain = f"{100 * mean(gains):+.2f}{_spread(gains)}" if row != ALONE else "–"
        name = f"**{row}: the student alone**" if row == ALONE else row
        seconds = min(run["seconds"] for run in runs)
        cells = f"| {name} | {100 * mean(accuracies):.2f}{_spread(accuracies)} | {gain} | {seconds:.1f} |"
        lines.append((mean(accuracies), cells))
    head = "| method | top-1, % | gain, points | s/epoch |\n|---|---|---|---|\n"
    return f"{_caption(arguments)}\n\n{head}" + "\n".join(cells for _, cells in sorted(lines, reverse=True))


def _spread(values: list[float]) -> str:
    return f" ± {100 * stdev(values):.2f}" if len(values) > 1 else " (one seed)"


def _caption(arguments: argparse.Namespace) -> str:
    return (
        f"CIFAR-100, ResNet-56 → ResNet-20, {arguments.train} training images, {arguments.epochs} epochs, batch 64, "
        f"cosine, {arguments.precision}, {arguments.seeds} seeds (± is their standard deviation)"
    )


def _key(row: str, seed: int) -> str:
    return f"{row} #{seed}"


def _budget(arguments: argparse.Namespace) -> Row:
    return {name: getattr(arguments, name) for name in ("train", "epochs", "precision")}


def _read_results(arguments: argparse.Namespace) -> dict[str, Row]:
    """Results of an earlier run. Raises SystemExit if they have another budget."""
    if not arguments.keep or not arguments.keep.exists():
        return {}
    results = json.loads(arguments.keep.read_text())
    if results["budget"] != _budget(arguments):
        raise SystemExit(f"{arguments.keep} holds results of another budget: {results['budget']}")
    done: dict[str, Row] = results["done"]
    return done


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every method on CIFAR-100, through the whole service.")
    parser.add_argument("--train", type=int, default=6_000, help="training images, out of 50,000")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, one thread each")
    parser.add_argument("--only", nargs="*", default=[], choices=list(ROWS), metavar="ROW")
    parser.add_argument("--precision", default="bf16", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--keep", type=Path, help="a JSON file of results; an existing one is continued")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
