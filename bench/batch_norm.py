"""Compares what a report says of a student with what plain PyTorch measures of the file, as it is and calibrated anew.

    python -m bench.batch_norm [--quick] [--epochs N] [JOB ...]

Small trainings of MobileNetV3-small, whose batch norms have a momentum of 0.01, on photographs of five flowers at 64
pixels: alone, distilled, averaged (EMA), born again, in mutual learning and with an assistant; and a network without
batch norm. Each job is a `python -m kdcore run`. Its files are then measured by torchvision's network, Pillow and
safetensors alone: `as it is`, and `anew` after taking the batch norms' statistics from all training images.

Needs the flowers beside the checkout (`../shared/data/flowers128.zip`). JOB is part of a job's name. Exit code 1 if a
report is off by more than one image, or if `anew` differs by more than noise (McNemar's test, p < 0.01). Takes ten
minutes on one core, two with `--quick`.
"""

import argparse
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.engine_run import EngineRun, run_engine
from kdcore import vision
from kdcore.measure.evaluate import paired_p

FLOWERS = Path(__file__).parents[2] / "shared" / "data" / "flowers128.zip"
SIDE, BATCH = 64, 64
NETWORK, WITHOUT = "torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1"
FIRST = "supervised"
"""Its student is the teacher of the others."""
NOISE_P = 0.01

Spec = dict[str, Any]
JOBS: dict[str, Spec] = {
    FIRST: {"method": "supervised"},
    "kd and its baseline": {"method": "kd", "baseline": "train"},
    "kd with EMA": {"method": "kd", "training": {"ema": 0.99}},
    "supervised, AdamW": {"method": "supervised", "training": {"optimizer": "adamw", "schedule": "cosine"}},
    "born_again": {"method": {"name": "born_again", "generations": 2}},
    "dml": {"method": "dml", "student": [NETWORK, NETWORK]},
    "assistants": {"method": "kd", "assistants": [NETWORK]},
    "no batch norm": {
        "method": "supervised", "student": WITHOUT, "training": {"optimizer": {"name": "sgd", "lr": 0.01}},
    },
}  # fmt: skip
WITH_TEACHER = ("kd", "assistants")


@dataclass(frozen=True)
class Split:
    """Decoded images, uint8 n x 3 x 64 x 64, and their labels."""

    pixels: Tensor
    labels: Tensor


def main() -> int:
    arguments = _arguments()
    if not FLOWERS.exists():
        print(f"{FLOWERS.name} is not beside this checkout (../shared/data)", file=sys.stderr)
        return 2
    train, test = _split("train"), _split("test")
    names = [name for name in JOBS if name == FIRST or not arguments.jobs or any(one in name for one in arguments.jobs)]
    wrong = 0
    print(f"{'job':20} {'file':23} {'report':>7} {'as it is':>9} {'anew':>7} {'p':>6}  with running averages")
    with tempfile.TemporaryDirectory(prefix="distillery-batch-norm-") as temporary:
        folder = Path(temporary)
        for number, name in enumerate(names):
            out = folder / str(number)
            run = run_engine(_spec(name, arguments.epochs, folder), out)
            for file, row in _delivered(run, out / "out"):
                wrong += _compare(name, file, row, train, test)
    print("all as reported" if not wrong else f"{wrong} files are not as reported")
    return 1 if wrong else 0


def _spec(name: str, epochs: int, folder: Path) -> Spec:
    changes = JOBS[name]
    recipe = {"epochs": epochs, "seed": 1, "batch_size": BATCH, "device": "cpu", **changes.get("training", {})}
    data = {"source": f"file:{FLOWERS}", "image_size": SIDE}
    spec = {"dataset": data, "student": NETWORK, **changes, "training": recipe}
    if name.startswith(WITH_TEACHER):
        spec["teacher"] = {"checkpoint": f"file:{folder / '0' / 'out' / 'student.safetensors'}"}
    return spec


def _delivered(run: EngineRun, out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every network that the job delivers, with its row of the report."""
    report = run.lines[-1]["report"]
    rows = {"student": report["student"], "alone": report["alone"], **report["models"]}
    for file in sorted(out.glob("*.safetensors")):
        yield file, rows[file.stem]


def _compare(name: str, file: Path, row: dict[str, Any], train: Split, test: Split) -> bool:
    """Print the line of one file. Returns True if it is not as reported."""
    network, mean, std = _load(file)
    before = _logits(network, test, mean, std)
    _calibrate(network, train, mean, std)
    anew = _logits(network, test, mean, std)
    right = [int((logits.argmax(1) == test.labels).sum()) for logits in (before, anew)]
    reported, p = round(row["accuracy"] * len(test.labels)), paired_p(before, anew, test.labels)
    running = f"{row['accuracy_running_averages']:.1%}" if "accuracy_running_averages" in row else "the same"
    shares = [count / len(test.labels) for count in right]
    print(
        f"{name:20} {file.name:23} {row['accuracy']:7.2%} {shares[0]:9.2%} {shares[1]:7.2%} {p:6.3f}  {running}",
        flush=True,
    )
    return abs(reported - right[0]) > 1 or p < NOISE_P


def _load(file: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network of a file in eval mode, with mean and std of its channels."""
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["distillery"])
    name = facts["architecture"].removeprefix("torchvision/")
    network: nn.Module = vision.torchvision().models.get_model(name, weights=None, num_classes=facts["num_classes"])
    network.load_state_dict(load_file(file))
    mean, std = (torch.tensor(facts[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return network.eval(), mean, std


@torch.no_grad()
def _logits(network: nn.Module, split: Split, mean: Tensor, std: Tensor) -> Tensor:
    batches = torch.split(split.pixels, BATCH)  # type: ignore[no-untyped-call]
    return torch.cat([network((batch / 255 - mean) / std) for batch in batches])


def _calibrate(network: nn.Module, train: Split, mean: Tensor, std: Tensor) -> None:
    """Take the statistics of the batch norms from all training images, in whole batches and random order."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # The average of all batches.
            module.train()
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(7))
    chosen = chosen[: len(chosen) // BATCH * BATCH]
    _logits(network, Split(train.pixels[chosen], train.labels[chosen]), mean, std)
    network.eval()


def _split(part: str) -> Split:
    """Decode one part of the archive, whose images are in folders named by class."""
    images, labels = [], []
    with zipfile.ZipFile(FLOWERS) as archive:
        names = sorted(name for name in archive.namelist() if f"/{part}/" in name and not name.endswith("/"))
        classes = sorted({name.split("/")[-2] for name in names})
        for name in names:
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            resized = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            images.append(torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3))
            labels.append(classes.index(name.split("/")[-2]))
    return Split(torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.batch_norm")
    parser.add_argument("--quick", action="store_true", help="two epochs in the place of six")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="part of a job's name; default: all")
    arguments = parser.parse_args()
    arguments.epochs = arguments.epochs or (2 if arguments.quick else 6)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
