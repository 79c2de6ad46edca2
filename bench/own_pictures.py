"""A user's own pictures from the first upload to two small students, through REST: docs/own_pictures.md as one command.

    .venv/bin/python -m bench.own_pictures [--epochs 10] [--image-size 64] [--pretrained FILE] [--keep FOLDER] [--smoke]

Starts a server (`python -m serve`), registers photographs of five flowers and published weights, and runs these jobs
one after the other: MobileNetV3-small on CIFAR-100, for weights to start from (not with `--pretrained`, which takes a
file of such weights); a teacher, a ResNet-56 of CIFAR-100 that is fine-tuned on the flowers; then MobileNetV3-small and
ResNet-20, each from nothing and from weights, alone and by two methods. Prints a Markdown table: accuracy on all test
images, the gain over the same student alone from the same start, what the report says of that gain, and minutes.

With `--keep` the server's home stays in that folder, and the same command continues with the next job: an interrupted
job continues from its checkpoint. `--smoke` takes 300 pictures, 32 pixels and one epoch: it shows that all jobs run.
Needs the real data beside the checkout (`../shared/data`). On two idle cores the whole takes about an hour and a half.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cifar100 import DATA, PREPROCESSING, TEACHER_FILE, require_data
from bench.processes import exit_on_sigterm
from bench.service import embedded, open_folder
from client.sdk import Distillery
from client.transfer import digest_of
from kdcore.measure.chance import wilson

Spec = dict[str, Any]

FLOWERS = DATA / "flowers128.zip"
WEIGHTS = {"resnet56": TEACHER_FILE, "resnet20": DATA / "teachers" / "cifar100_resnet20.pth"}
MOBILENET = "torchvision/mobilenet_v3_small"
STUDENTS = (MOBILENET, "resnet20")
STARTS = ("nothing", "weights")
ALONE, METHODS = "supervised", ("kd", "pkt")
"""Logits, and activations: `pkt` compares the embeddings of a batch, whatever the networks. `nst` harms MobileNet."""
BATCH = 32
"""Half the default: a few thousand pictures make few steps."""
PRETRAINING, TEACHER = "pretraining", "teacher"
PRETRAINED_MODEL = "mobilenet-cifar100"


@dataclass(frozen=True)
class Row:
    """One student of the table."""

    student: str
    start: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.student} from {self.start}, {self.method}"

    @property
    def alone(self) -> "Row":
        return Row(self.student, self.start, ALONE)


@dataclass(frozen=True)
class Budget:
    """What a run costs: epochs, pixels and images."""

    epochs: int = 10
    teacher_epochs: int = 10
    pretraining_epochs: int = 8
    image_size: int = 64
    images: int | None = None
    pretraining_images: int = 25_000
    precision: str = "bf16"


SMOKE = Budget(epochs=1, teacher_epochs=1, pretraining_epochs=2, image_size=32, images=300, pretraining_images=500)
ROWS = [Row(student, start, method) for student in STUDENTS for start in STARTS for method in (ALONE, *METHODS)]
"""Each student alone comes before those that have its job as their baseline."""


def main() -> int:
    arguments = _arguments()
    require_data()
    exit_on_sigterm()
    # One thread: with more, a training on a machine that others use waits for the slowest of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done = dict[str, Spec]()
    try:
        with _folder(arguments.keep) as folder, embedded(folder) as url, Distillery(url) as service:
            _run(service, folder, arguments.pretrained, arguments.budget, done)
    finally:  # Also the part of a run that was stopped.
        print(f"\n{table(done, arguments.budget)}")
    return 0


def _run(service: Distillery, folder: Path, pretrained: Path | None, budget: Budget, done: dict[str, Spec]) -> None:
    """Run all jobs that have not run in this home. Adds each job to `done`, by name, when it has succeeded."""
    _register(service, folder, pretrained)
    weights = {MOBILENET: f"model:{PRETRAINED_MODEL}", "resnet20": "model:resnet20-cifar100"}
    if pretrained is None:
        done[PRETRAINING] = finished(service, PRETRAINING, pretraining_spec(budget))
        weights[MOBILENET] = f"job:{done[PRETRAINING]['id']}"
    done[TEACHER] = finished(service, TEACHER, teacher_spec(budget))
    for row in ROWS:
        ids = {name: job["id"] for name, job in done.items()}
        done[row.name] = finished(service, row.name, row_spec(row, ids, weights[row.student], budget))


def _register(service: Distillery, folder: Path, pretrained: Path | None) -> None:
    """Register what an earlier run in this home has not."""
    known = {row["name"] for row in (*service.models(), *service.datasets())}
    for architecture, file in WEIGHTS.items():
        if (name := f"{architecture}-cifar100") not in known:
            service.register_model(name, file, architecture=architecture, preprocessing=PREPROCESSING)
    if "flowers" not in known:
        service.register_dataset("flowers", FLOWERS)
    if pretrained is not None and PRETRAINED_MODEL not in known:
        service.register_model(PRETRAINED_MODEL, pretrained, architecture=MOBILENET)
    elif pretrained is not None and service.model(PRETRAINED_MODEL)["blob"] != f"sha256:{digest_of(pretrained)}":
        raise SystemExit(f"--keep: this folder was begun with other weights than --pretrained {pretrained}")
    if pretrained is None and "cifar100-all" not in known:
        subprocess.run([sys.executable, DATA / "unpack.py", folder], check=True, stdout=subprocess.DEVNULL)
        service.register_dataset("cifar100-all", folder / "cifar100.npz")


def finished(service: Distillery, name: str, spec: Spec) -> Spec:
    """Return the job of a spec when it has succeeded. A second run in the same home gets the same job."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    job = service.submit({"name": name, **spec}, idempotency_key=digest)
    job = service.wait(job["id"])
    if job["status"] != "succeeded":
        raise SystemExit(f"{name}: job {job['id']} ended {job['status']}: {job['error']}")
    assert job["result"] is not None
    print(
        f"{name:<55}{job['result']['student']['accuracy']:>8.1%}{job['result']['seconds'] / 60:>7.1f} min", flush=True
    )
    return dict(job)


def pretraining_spec(budget: Budget) -> Spec:
    """Return the job that trains MobileNetV3-small on CIFAR-100, in the size of 64 pixels."""
    data = {"source": "cifar100-all", "image_size": 64, "limit": budget.pretraining_images}
    return {
        "dataset": data,
        "student": MOBILENET,
        "method": ALONE,
        "training": {
            "epochs": budget.pretraining_epochs,
            "batch_size": 128,
            "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4, "nesterov": True},
            "schedule": {"name": "cosine", "warmup_epochs": 1},
            "augmentation": {"name": "crop_flip", "padding": 8},
        },
    }


def teacher_spec(budget: Budget) -> Spec:
    """Return the job that fine-tunes the published ResNet-56 on the flowers."""
    return {
        "dataset": _flowers(budget),
        "student": _student("resnet56", "model:resnet56-cifar100"),
        "method": ALONE,
        # A few thousand pictures are soon learned by heart: boxes and smoothed labels gave 3 points more.
        "training": _recipe(budget.teacher_epochs, budget)
        | {"augmentation": {"name": "random_resized_crop", "scale": [0.4, 1.0]}, "label_smoothing": 0.1},
    }


def row_spec(row: Row, ids: Mapping[str, str], weights: str, budget: Budget) -> Spec:
    """Return the job of one row. `ids`: the jobs so far, by name; `weights`: where a student from weights has them."""
    started = row.start == "weights"
    spec = {
        "dataset": _flowers(budget),
        "student": _student(row.student, weights) if started else row.student,
        "method": row.method,
        # From weights, the defaults are those of fine-tuning, which have a cosine, too.
        "training": _recipe(budget.epochs, budget) | ({} if started else {"schedule": "cosine"}),
    }
    if row.method != ALONE:
        spec |= {"teacher": {"checkpoint": f"job:{ids[TEACHER]}"}, "baseline": f"job:{ids[row.alone.name]}"}
    return spec


def _flowers(budget: Budget) -> Spec:
    limit = {} if budget.images is None else {"limit": budget.images}
    return {"source": "flowers", "image_size": budget.image_size, **limit}


def _student(architecture: str, weights: str) -> Spec:
    return {"architecture": architecture, "checkpoint": weights}


def _recipe(epochs: int, budget: Budget) -> Spec:
    return {"epochs": epochs, "batch_size": BATCH, "seed": 1, "precision": budget.precision}


def table(done: Mapping[str, Spec], budget: Budget) -> str:
    """A Markdown table of the jobs by name, in the order of `ROWS`, after a caption. What did not run has no row."""
    images = f"{budget.images} training images" if budget.images else "all training images"
    lines = [
        f"Flowers at {budget.image_size} pixels, {images}, {budget.epochs} epochs (the teacher "
        f"{budget.teacher_epochs}), batch {BATCH}, {budget.precision}, one seed. In brackets: the 95 % interval of the "
        "accuracy (Wilson).",
        "",
        "| network | starts from | method | accuracy, % | gain over alone, points | the report says | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {TEACHER: ("resnet56, the teacher", "weights", "fine-tuned")}
    names |= {row.name: (row.student, row.start, "alone" if row.method == ALONE else row.method) for row in ROWS}
    return "\n".join(lines + [_line(*names[name], done[name]["result"]) for name in names if name in done])


def _line(network: str, start: str, method: str, report: Mapping[str, Any]) -> str:
    accuracy = report["student"]["accuracy"]
    low, high = wilson(accuracy, report["test_samples"])
    gain = "–" if report["gain"] is None else f"{100 * report['gain']:+.1f}"
    cells = (
        network,
        start,
        method,
        f"{100 * accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})",
        gain,
        "–" if report["gain"] is None else _finding(report["verdict"]),
        f"{report['seconds'] / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _finding(verdict: str) -> str:
    """Return in a word what a verdict says of the gain: whether its 95 % interval holds 0."""
    for finding in ("helped", "harmed"):
        if f"distilling {finding}" in verdict.lower():
            return finding
    return "not measurable"


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder of server and files: `keep`, or one that is deleted at the end."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / "ready.json").unlink(missing_ok=True)  # The address of the server of an earlier run.
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="distillery-own-pictures-") as name:
        open_folder(Path(name))
        yield Path(name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.own_pictures")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, help="default: those of the students")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="MobileNetV3-small to start from")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="the server's home, which a second run continues")
    parser.add_argument("--smoke", action="store_true", help="few pictures, one epoch; the other numbers do not count")
    arguments = parser.parse_args()
    arguments.budget = SMOKE if arguments.smoke else _budget(arguments)
    return arguments


def _budget(arguments: argparse.Namespace) -> Budget:
    return Budget(
        epochs=arguments.epochs,
        teacher_epochs=arguments.teacher_epochs or arguments.epochs,
        image_size=arguments.image_size,
        precision=arguments.precision,
    )


if __name__ == "__main__":
    sys.exit(main())
