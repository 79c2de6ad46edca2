"""Which images batch-norm statistics are best measured on: augmented ones, or those as they are; or running averages.

    .venv/bin/python -m bench.batch_norm_images [--seeds 2] [--budgets cifar100 flowers] [--threads 1]
    .venv/bin/python -m bench.batch_norm_images --table

First published networks of CIFAR-100, which were trained long with `crop_flip`: with their own averages, and with the
statistics of 2,048 training images. Then ResNet-20 from nothing on labels alone: CIFAR-100, 6,000 images and 10 epochs,
augmented by `crop_flip`; photographs of flowers at 64 pixels, 10 epochs, by `random_resized_crop`. The runs of a seed
differ in `training.batch_norm` alone, so that their weights are the same at each epoch; the epoch that is chosen may be
another. Top-1 on all test images.

Each finished run adds a line to `bench/results/batch_norm_images.jsonl`; the same command continues. Takes a quarter of
an hour on one core. Needs the real data beside the checkout (`../shared/data`).
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from bench.budgets import ALONE, SMOKE, Budget, cifar100, cifar100_data, files, flowers
from bench.cifar100 import DATA, PREPROCESSING
from bench.processes import exit_on_sigterm
from bench.runs import Kdcore, Results, Run, add_arguments, gains, points, run_missing
from kdcore import models
from kdcore.classifier import Classifier
from kdcore.data.images import Images, TrainingSet
from kdcore.measure import batch_norm, evaluate
from kdcore.spec import CropFlip, Training

BUDGETS = {"cifar100": cifar100(6_000, 10), "flowers": flowers("resnet20")}
PUBLISHED = ("resnet20", "resnet32", "resnet56")
KINDS = ("measured", "views", "running")
"""`training.batch_norm`; all are compared with the first."""


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    if arguments.smoke:
        with tempfile.TemporaryDirectory(prefix="distillery-batch-norm-images-") as name:
            results = Results(Path(name) / "results.jsonl")
            fine = run_missing(runs(SMOKE, 1), results, Kdcore(Path(name), {}, arguments.threads))
            print(table([SMOKE], 1, results))
        return 0 if fine else 1
    if not arguments.table:
        print("\n".join(published(arguments.state)), flush=True)
    budgets, results, fine = [BUDGETS[name] for name in arguments.budgets], Results(arguments.results), True
    for budget in budgets if not arguments.table else ():
        engine = Kdcore(arguments.state, files(budget, arguments.state), arguments.threads)
        fine &= run_missing(runs(budget, arguments.seeds), results, engine)
    print(table(budgets, arguments.seeds, results))
    return 0 if fine else 1


def published(state: Path) -> Iterator[str]:
    """Yield a Markdown table of published networks by their statistics."""
    with np.load(cifar100_data(6_000, state)) as arrays:
        train, test = (
            Images(
                torch.from_numpy(arrays[f"x_{part}"]).permute(0, 3, 1, 2).contiguous(),
                torch.from_numpy(arrays[f"y_{part}"]).long(),
            )
            for part in ("train", "test")
        )
    shown = TrainingSet(train, torch.arange(len(train)), test)
    yield from ("| published network | its own | `measured` | `views` |", "|---|---|---|---|")
    for name in PUBLISHED:
        classifier = Classifier(models.build(name, 100, 3), PREPROCESSING["mean"], PREPROCESSING["std"])
        state_dict = torch.load(DATA / "teachers" / f"cifar100_{name}.pth", weights_only=True)
        classifier.network.load_state_dict(state_dict)
        cells = [_accuracy(classifier, test)]
        for kind in KINDS[:2]:
            recipe = Training(augmentation=CropFlip(), batch_norm=kind, batch_size=64)
            statistics = batch_norm.measured(classifier, batch_norm.of_recipe(shown, recipe))
            classifier.network.load_state_dict({**state_dict, **statistics})
            cells.append(_accuracy(classifier, test))
        yield f"| {name} | {' | '.join(f'{100 * one:.2f}' for one in cells)} |"


def _accuracy(classifier: Classifier, test: Images) -> float:
    classifier.eval()
    return evaluate.score(evaluate.logits_on(classifier, test), test.labels).accuracy


def runs(budget: Budget, seeds: int) -> list[Run]:
    return [_run(budget, kind, seed) for seed in range(seeds) for kind in KINDS]


def _run(budget: Budget, kind: str, seed: int) -> Run:
    run = budget.run(ALONE, seed, batch_norm=kind)
    return Run(run.budget, kind, seed, run.spec, run.inputs)


def table(budgets: Iterable[Budget], seeds: int, results: Results) -> str:
    """Return a Markdown table of what is done."""
    lines = ["| data | statistics | seeds | accuracy, % | above 'measured', points (95 %) |", "|---|---|---|---|---|"]
    for budget in budgets:
        found = {kind: results.accuracies(_run(budget, kind, seed) for seed in range(seeds)) for kind in KINDS}
        for kind, accuracies in found.items():
            if accuracies:
                above = "–" if kind == KINDS[0] else points(gains(accuracies, found[KINDS[0]]))
                accuracy = f"{100 * mean(accuracies.values()):.2f}"
                lines.append(f"| {budget.name} | `{kind}` | {len(accuracies)} | {accuracy} | {above} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.batch_norm_images", description=__doc__)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=2)
    add_arguments(parser, "batch_norm_images.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
