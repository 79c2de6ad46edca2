"""What helps at the budgets that people have: methods against the same student alone, three paired seeds each.

    .venv/bin/python -m bench.budgets [--budgets NAME ...] [--rows ROW ...] [--precision bf16] [--threads 1]
    .venv/bin/python -m bench.budgets --table

Budgets: CIFAR-100 from a ResNet-56 to a ResNet-20 with 6,000 images for 4 epochs and 10,000 for 10; flowers with a
ResNet-56 of CIFAR-100 that is fine-tuned on them first (the teacher of `bench.own_pictures`); digits as in the demo.
`--precision` is that of CIFAR-100 and flowers; runs in one precision are compared with each other alone. Each finished
run adds a line to `bench/results/budgets.jsonl`; the same command continues. The table has the gain over the student
alone with the same seed, in points, with its 95 % interval by Student's t.

Takes hours: run it while nothing else is measured. Needs the real data beside the checkout (`../shared/data`), but for
the digits.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from bench import own_pictures
from bench.cifar100 import DATA, PREPROCESSING, TEACHER_FILE, require_data, subset
from bench.processes import exit_on_sigterm
from bench.runs import Kdcore, Results, Run, Spec, add_arguments, gains, points, run_missing
from client.demo import TEACHER as DIGITS_TEACHER

ALONE = "alone"
RULE = "kd, defaults"
"""kd without temperature, alpha and beta: the job takes its default rule. If the rule changes, delete these lines."""

KD = {"method": "kd", "temperature": 4.0, "alpha": 0.1, "beta": 0.9}
ROWS: dict[str, Spec] = {
    ALONE: {"method": "supervised"},
    "kd": KD,
    RULE: {"method": "kd"},
    "kd, T 1": {**KD, "temperature": 1.0},
    "kd, T 1, 1 + 1": {**KD, "temperature": 1.0, "alpha": 1.0, "beta": 1.0},
    "kd, T 2, 0.5 + 0.5": {**KD, "temperature": 2.0, "alpha": 0.5, "beta": 0.5},
    "kd, T 4, 1 + 0.25": {**KD, "alpha": 1.0, "beta": 0.25},
    "kd, standardized": {"method": {"name": "kd", "standardize": True}},
    "dist": {"method": "dist"},
    "nst": {"method": "nst"},
    "attention": {"method": "attention"},
    "pkt": {"method": "pkt"},
    "kd + nst": {
        "method": [{"name": "kd", "weight": 0.9}, {"name": "nst", "weight": 50.0}],
        "temperature": 4.0,
        "alpha": 0.1,
    },
    "kd, standardized + nst": {
        "method": [{"name": "kd", "standardize": True, "weight": 9.0}, {"name": "nst", "weight": 50.0}],
        "alpha": 0.1,
    },
    "dist + nst": {"method": ["dist", {"name": "nst", "weight": 50.0}]},
    "kd + attention": {"method": ["kd", "attention"]},
}
"""Fields of a job. All but `kd, defaults` state what may become a default, so that old lines stay comparable."""


@dataclass(frozen=True)
class Budget:
    """Data, networks and recipe of a comparison; rows differ in the method alone."""

    name: str
    spec: Spec
    inputs: tuple[str, ...] = ()
    """The files that its specs name, the teacher's last."""
    teacher: Spec = field(default_factory=dict)
    teacher_run: Run | None = None
    """The run that trains the teacher, if none is given."""

    def at(self, precision: str) -> "Budget":
        """Return the budget in another precision, its teacher's run, too, where it names one (digits do not)."""
        if "precision" not in self.spec["training"]:
            return self
        own = self.teacher_run
        if own is not None:
            own = replace(own, spec={**own.spec, "training": {**own.spec["training"], "precision": precision}})
        training = {**self.spec["training"], "precision": precision}
        return replace(self, spec={**self.spec, "training": training}, teacher_run=own)

    def run(self, row: str, seed: int, **training: object) -> Run:
        taught = row != ALONE
        spec = {**self.spec, **ROWS[row], **({"teacher": self.teacher} if taught else {})}
        spec["training"] = {**spec["training"], "seed": seed, **training}
        return Run(self.name, row, seed, spec, self.inputs if taught else self.inputs[:-1])


def cifar100(images: int, epochs: int) -> Budget:
    """Return the budget of so many images of CIFAR-100, evenly over the classes."""
    # The statistics are named, so that lines of runs that measured them on other images are not used.
    recipe = {"epochs": epochs, "batch_size": 64, "schedule": "cosine", "precision": "bf16", "batch_norm": "views"}
    data, teacher = f"blob:cifar100-{images}", "model:cifar100-resnet56"
    spec = {
        "dataset": data,
        "student": {"architecture": "resnet20", "preprocessing": PREPROCESSING},
        "training": recipe,
    }
    known = {"architecture": "resnet56", "checkpoint": teacher, "preprocessing": PREPROCESSING}
    return Budget(f"cifar100 {images} x {epochs}", spec, (data, teacher), known)


def flowers(student: str, epochs: int = 10) -> Budget:
    """Return the budget of photographs of five flowers. Its teacher is fine-tuned on them first."""
    recipe = {"epochs": epochs, "batch_size": 32, "schedule": "cosine", "precision": "bf16", "batch_norm": "views"}
    data = {"source": "blob:flowers", "image_size": 64}
    spec = {"dataset": data, "student": student, "training": recipe}
    inputs = ("blob:flowers", "model:flowers-teacher")
    wanted = own_pictures.teacher_spec(own_pictures.Budget())
    published = "model:cifar100-resnet56"
    start = {"architecture": "resnet56", "checkpoint": published, "preprocessing": PREPROCESSING}
    teacher = Run("flowers", "teacher", 0, {**wanted, "dataset": data, "student": start}, (inputs[0], published))
    return Budget(f"flowers x {epochs}, {student.rpartition('/')[2]}", spec, inputs, {"checkpoint": inputs[1]}, teacher)


def digits(epochs: int = 10, student: str = "convnet4") -> Budget:
    """Return the demo's budget, for a student of any size. Its teacher is trained first."""
    wanted = {name: value for name, value in DIGITS_TEACHER.items() if name != "name"}
    spec = {"dataset": "digits", "student": student, "training": {"epochs": epochs}}
    name = f"digits x {epochs}" + (f", {student}" if student != "convnet4" else "")
    teacher = Run(name, "teacher", 0, wanted)
    return Budget(name, spec, ("model:digits-teacher",), {"checkpoint": "model:digits-teacher"}, teacher)


SMOKE = Budget(
    "smoke",
    {"dataset": "digits", "student": "convnet4", "training": {"epochs": 1}},
    ("model:digits-teacher",),
    {"checkpoint": "model:digits-teacher"},
    Run("smoke", "teacher", 0, {"dataset": "digits", "student": "convnet4", "method": "supervised",
                                "training": {"epochs": 1}}),
)  # fmt: skip
BUDGETS = {
    "cifar100-6000x4": cifar100(6_000, 4),
    "cifar100-10000x10": cifar100(10_000, 10),
    "flowers": flowers("resnet20"),
    "flowers-mobilenet": flowers("torchvision/mobilenet_v3_small"),
    "digits-2": digits(2),
    "digits-5": digits(5),
    "digits": digits(),
    "digits-convnet8": digits(student="convnet8"),
    "digits-convnet16": digits(student="convnet16"),
}


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    if arguments.smoke:
        with tempfile.TemporaryDirectory(prefix="distillery-budgets-") as name:
            results = Results(Path(name) / "results.jsonl")
            fine = _run([SMOKE], ["alone", "kd"], 1, results, Path(name), arguments)
            print(table([SMOKE], ["alone", "kd"], 1, results))
        return 0 if fine else 1
    budgets = [BUDGETS[name].at(arguments.precision) for name in arguments.budgets]
    results = Results(arguments.results)
    fine = arguments.table or _run(budgets, arguments.rows, arguments.seeds, results, arguments.state, arguments)
    print(table(budgets, arguments.rows, arguments.seeds, results))
    return 0 if fine else 1


def _run(
    budgets: Sequence[Budget],
    rows: Sequence[str],
    seeds: int,
    results: Results,
    state: Path,
    arguments: argparse.Namespace,
) -> bool:
    fine = True
    for budget in budgets:
        engine = Kdcore(state, files(budget, state), arguments.threads)
        if budget.teacher_run is not None:
            engine(budget.teacher_run)
        runs = [budget.run(row, seed) for seed in range(seeds) for row in dict.fromkeys((ALONE, *rows))]
        fine &= run_missing(runs, results, engine)
    return fine


def files(budget: Budget, state: Path) -> Mapping[str, Path]:
    """Return the files that a budget's specs name. Data that does not exist is made in `state`."""
    known = dict[str, Path]()
    for name in {*budget.inputs, *(budget.teacher_run.inputs if budget.teacher_run else ())}:
        if name.startswith("blob:cifar100-"):
            known[name] = cifar100_data(int(name.rpartition("-")[2]), state)
        elif name == "blob:flowers":
            require_data()
            known[name] = DATA / "flowers128.zip"
        elif name == "model:cifar100-resnet56":
            known[name] = TEACHER_FILE
        elif budget.teacher_run is not None:
            known[name] = Kdcore(state, {}, 1).folder(budget.teacher_run) / "student.safetensors"
    return known


def cifar100_data(images: int, state: Path) -> Path:
    """Return the file of so many training images and all test images; it is made once."""
    require_data()
    folder = state / "data" / f"cifar100-{images}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subset(folder, images)
        (folder / "cifar100.npz").unlink()
        (folder / "done").touch()
    return folder / "subset.npz"


def table(budgets: Sequence[Budget], rows: Sequence[str], seeds: int, results: Results) -> str:
    """Return a Markdown table for each budget that has results, best gain first."""
    return "\n\n".join("\n".join(lines) for budget in budgets if (lines := list(_lines(budget, rows, seeds, results))))


def _lines(budget: Budget, rows: Sequence[str], seeds: int, results: Results) -> Iterator[str]:
    runs = {row: [budget.run(row, seed) for seed in range(seeds)] for row in dict.fromkeys((ALONE, *rows))}
    alone = results.accuracies(runs[ALONE])
    if not alone:
        return
    yield f"{budget.name}: {', '.join(f'{name} {value}' for name, value in _recipe(budget, runs, results))}"
    yield ""
    yield "| method | top-1, % | gain, points (95 % interval) | seeds that gained | top-1 at the last, % | s a run |"
    yield "|---|---|---|---|---|---|"
    found = []
    for row, its in runs.items():
        if refused := [line["refused"] for run in its if (line := results.of(run)) is not None and "refused" in line]:
            found.append((-1.0, f"| {row} | refused: {refused[0]} | | | | |"))
        accuracies = results.accuracies(its)
        if not accuracies:
            continue
        differences = gains(accuracies, alone)
        last, seconds = results.accuracies(its, "last"), results.accuracies(its, "seconds")
        gained = "–" if row == ALONE else f"{sum(one > 0 for one in differences)} of {len(differences)}"
        cells = (
            f"**{row}**" if row == ALONE else row,
            f"{100 * mean(accuracies.values()):.2f}",
            "–" if row == ALONE else points(differences),
            gained,
            f"{100 * mean(last.values()):.2f}",
            f"{min(seconds.values()):.0f}",
        )
        order = 0.0 if row == ALONE else mean(differences) if differences else -1.0
        found.append((order, f"| {' | '.join(cells)} |"))
    yield from (cells for _, cells in sorted(found, key=lambda pair: -pair[0]))


def _recipe(budget: Budget, runs: Mapping[str, Sequence[Run]], results: Results) -> Iterator[tuple[str, object]]:
    """Yield what a caption says: batch, precision and the teacher's accuracy."""
    lines = [line for its in runs.values() for run in its if (line := results.of(run)) is not None]
    yield "batch", budget.spec["training"].get("batch_size", 64)
    yield "precision", " and ".join(sorted({line["precision"] for line in lines if "precision" in line}))
    teachers = [line["teacher"] for line in lines if line.get("teacher") is not None]
    if teachers:
        yield "teacher", f"{100 * teachers[0]:.2f} %"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.budgets", description="What helps at small budgets.")
    add_arguments(parser, "budgets.jsonl")
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of CIFAR-100 and flowers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
