"""Whether short benches say what the whole data says, and whether bf16 is as good as fp32.

    .venv/bin/python -m bench.fidelity [--best "dist + nst" "kd + nst"] [--threads 1]
    .venv/bin/python -m bench.fidelity --table

1. All 50,000 images of CIFAR-100, ResNet-56 to ResNet-20, 10 epochs, bf16, two seeds: alone, kd, and the best two rows
   of `bench.budgets`, which `--best` names. Top-1 at the epoch that was chosen on held-out images, and at the last.
2. bf16 against fp32 by eight paired seeds of kd and of the student alone, 6,000 images and 10 epochs: the mean
   difference with its 95 % interval.

Each finished run adds a line to `bench/results/fidelity.jsonl`; the same command continues, also in the middle of a
run. Takes hours: run it while nothing else is measured. Needs the real data beside the checkout (`../shared/data`).
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from bench.budgets import ALONE, ROWS, SMOKE, Budget, cifar100, files
from bench.processes import exit_on_sigterm
from bench.runs import Kdcore, Results, Run, add_arguments, gains, points, run_missing

WHOLE = cifar100(50_000, 10)
SHORT = cifar100(6_000, 10)
PRECISION_ROWS = ("kd", ALONE)
BF16, FP32 = "bf16", "fp32"


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    if arguments.smoke:
        with tempfile.TemporaryDirectory(prefix="distillery-fidelity-") as name:
            results = Results(Path(name) / "results.jsonl")
            engine = Kdcore(Path(name), files(SMOKE, Path(name)), arguments.threads)
            assert SMOKE.teacher_run is not None
            engine(SMOKE.teacher_run)
            fine = run_missing(precision_runs(SMOKE, 1, ["kd"]), results, engine)
            print(precision_table(SMOKE, 1, results, ["kd"]))
        return 0 if fine else 1
    results, rows = Results(arguments.results), rows_of(arguments.best)
    fine = True
    if not arguments.table:
        for budget, runs in (
            (WHOLE, whole_runs(rows, arguments.seeds)),
            (SHORT, precision_runs(SHORT, arguments.pairs)),
        ):
            engine = Kdcore(arguments.state, files(budget, arguments.state), arguments.threads)
            fine &= run_missing(runs, results, engine)
    print(f"{whole_table(rows, arguments.seeds, results)}\n\n{precision_table(SHORT, arguments.pairs, results)}")
    return 0 if fine else 1


def rows_of(best: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((ALONE, "kd", *best)))


def whole_runs(rows: Sequence[str], seeds: int) -> list[Run]:
    return [WHOLE.run(row, seed) for seed in range(seeds) for row in rows]


def precision_runs(budget: Budget, seeds: int, rows: Sequence[str] = PRECISION_ROWS) -> list[Run]:
    """Return both precisions of each seed, one after the other, so that an interrupted bench has whole pairs."""
    return [
        budget.run(row, seed, precision=precision)
        for row in rows
        for seed in range(seeds)
        for precision in (FP32, BF16)
    ]


def whole_table(rows: Sequence[str], seeds: int, results: Results) -> str:
    """Return a Markdown table of the runs on all images."""
    alone = results.accuracies([WHOLE.run(ALONE, seed) for seed in range(seeds)])
    lines = [
        f"{WHOLE.name}, batch 64, cosine, bf16",
        "",
        "| method | seeds | top-1, % | top-1 at the last epoch, % | gain, points (95 % interval) | minutes a run |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = [WHOLE.run(row, seed) for seed in range(seeds)]
        accuracies = results.accuracies(runs)
        if not accuracies:
            lines.append(f"| {row} | 0 | not done | | | |")
            continue
        last, seconds = results.accuracies(runs, "last"), results.accuracies(runs, "seconds")
        gain = "–" if row == ALONE else points(gains(accuracies, alone))
        lines.append(
            f"| {row} | {len(accuracies)} | {100 * mean(accuracies.values()):.2f} | {100 * mean(last.values()):.2f} "
            f"| {gain} | {min(seconds.values()) / 60:.1f} |"
        )
    return "\n".join(lines)


def precision_table(budget: Budget, seeds: int, results: Results, rows: Sequence[str] = PRECISION_ROWS) -> str:
    """Return a Markdown table of bf16 against fp32."""
    lines = [
        f"{budget.name}: bf16 against fp32, paired by seed",
        "",
        "| method | pairs | fp32, % | bf16, % | difference, points (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        exact, rounded = (
            results.accuracies([budget.run(row, seed, precision=precision) for seed in range(seeds)])
            for precision in (FP32, BF16)
        )
        pairs = exact.keys() & rounded.keys()
        if not pairs:
            lines.append(f"| {row} | 0 | not done | | |")
            continue
        means = (100 * mean(one[seed] for seed in pairs) for one in (exact, rounded))
        cells = " | ".join(f"{value:.2f}" for value in means)
        lines.append(f"| {row} | {len(pairs)} | {cells} | {points(gains(rounded, exact))} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description="All images; bf16 against fp32.")
    add_arguments(parser, "fidelity.jsonl")
    parser.add_argument("--best", nargs="+", choices=list(ROWS), default=["dist + nst", "kd + nst"], metavar="ROW")
    parser.add_argument("--seeds", type=int, default=2, help="of the runs on all images")
    parser.add_argument("--pairs", type=int, default=8, help="seeds of bf16 against fp32")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
