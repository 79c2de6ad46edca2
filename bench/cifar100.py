"""CIFAR-100, ResNet-56 → ResNet-20, through the whole service as a host runs it.

    .venv/bin/python -m bench.cifar100 [--epochs 8] [--train 10000] [--method kd] [--seeds 1]

Starts PostgreSQL, Valkey, the API and a Celery worker as processes of their own (`local.cluster`), uploads and
registers the data and the teacher, submits the job over REST, waits, downloads the student, loads it into a plain
PyTorch network and evaluates it there again. Prints teacher, student and the same student alone after equal training.

Needs the real data beside the checkout (`../shared/data`). `--train` is the number of training images out of 50,000,
evenly over the classes, so that a laptop finishes. All 10,000 test images are used.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from bench.service import cluster
from client.sdk import Distillery

DATA = Path(__file__).parents[2] / "shared" / "data"
TEACHER_FILE = DATA / "teachers" / "cifar100_resnet56.pth"
PREPROCESSING = {"mean": [0.5070, 0.4865, 0.4409], "std": [0.2673, 0.2564, 0.2761]}


def main() -> int:
    arguments = _arguments()
    require_data()
    with tempfile.TemporaryDirectory(prefix="distillery-cifar100-") as name, cluster(Path(name)) as url:
        folder, service = Path(name), Distillery(url)
        register(service, subset(folder, arguments.train))
        reports = [_distil(service, arguments, seed, folder) for seed in range(arguments.seeds)]
    _print(reports, arguments)
    return 0


def require_data() -> None:
    """Exit with status 2 if the data is not there."""
    if not TEACHER_FILE.exists():
        print("the real CIFAR-100 and its teachers are not beside this checkout (../shared/data)", file=sys.stderr)
        sys.exit(2)


def subset(folder: Path, count: int) -> Path:
    """Write an .npz file with `count` training images, evenly over the classes, and all test images."""
    subprocess.run([sys.executable, DATA / "unpack.py", folder], check=True, stdout=subprocess.DEVNULL)
    whole = np.load(folder / "cifar100.npz")
    labels = whole["y_train"]
    each = count // 100
    chosen = np.concatenate([np.flatnonzero(labels == k)[:each] for k in range(100)])
    path = folder / "subset.npz"
    rest = {name: whole[name] for name in ("x_test", "y_test", "class_names")}
    np.savez(path, x_train=whole["x_train"][chosen], y_train=labels[chosen], **rest)
    return path


def register(service: Distillery, data: Path) -> None:
    service.register_model("cifar100-resnet56", TEACHER_FILE, architecture="resnet56", preprocessing=PREPROCESSING)
    service.register_dataset("cifar100-subset", data)


def _distil(service: Distillery, arguments: argparse.Namespace, seed: int, folder: Path) -> Any:
    job = service.submit(
        {
            "name": f"resnet56-to-resnet20, seed {seed}",
            "dataset": "cifar100-subset",
            "teacher": {"architecture": "resnet56", "checkpoint": "model:cifar100-resnet56"},
            "student": {"architecture": "resnet20"},
            "method": arguments.method,
            "training": {
                "epochs": arguments.epochs,
                "batch_size": 64,
                "seed": seed,
                "schedule": "cosine",
                "precision": arguments.precision,
            },
            "baseline": "train",
        }
    )
    began = time.monotonic()
    job = service.wait(job["id"])
    if job["status"] != "succeeded":
        raise SystemExit(f"job {job['id']} ended {job['status']}: {job['error']}")
    path = service.download(job["id"], to=folder / f"student-{seed}.safetensors")
    report: Any = job["result"]
    accuracy = _accuracy_in_plain_pytorch(path, folder / "cifar100.npz", job["resolved_spec"])
    print(f"seed {seed}: {time.monotonic() - began:.0f} s; the downloaded file in plain PyTorch: {accuracy:.2%}")
    if abs(accuracy - report["student"]["accuracy"]) > 0.002:
        raise SystemExit(f"the report has {report['student']['accuracy']:.2%}: the file is not the measured student")
    return report


def _accuracy_in_plain_pytorch(path: Path, data: Path, spec: dict[str, Any]) -> float:
    """The test accuracy, computed with the network's definition only: load_file, load_state_dict, argmax."""
    import torch
    from safetensors.torch import load_file

    from kdcore.models import build

    network = build("resnet20", num_classes=100)
    network.load_state_dict(load_file(path))
    network.eval()
    arrays = np.load(data)
    shape = (1, 3, 1, 1)
    mean_, std = (torch.tensor(spec["student"]["preprocessing"][name]).view(shape) for name in ("mean", "std"))
    correct = 0
    with torch.no_grad():
        for at in range(0, 10_000, 500):
            pixels = torch.from_numpy(arrays["x_test"][at : at + 500]).permute(0, 3, 1, 2).float() / 255
            predicted = network((pixels - mean_) / std).argmax(1)
            correct += int((predicted == torch.from_numpy(arrays["y_test"][at : at + 500])).sum())
    return correct / 10_000


def _print(reports: list[Any], arguments: argparse.Namespace) -> None:
    print(f"\nCIFAR-100, {arguments.train} training images, {arguments.epochs} epochs, {arguments.method}")
    print(f"{'':<10}{'network':<10}{'parameters':>12}{'top-1':>9}{'top-5':>9}{'agreement':>11}")
    for name in ("teacher", "student", "alone"):
        rows = [report[name] for report in reports]
        agreement = "–" if name == "teacher" else f"{mean(row['agreement'] for row in rows):.2%}"
        print(
            f"{name:<10}{rows[0]['architecture']:<10}{rows[0]['parameters']:>12,}"
            f"{mean(row['accuracy'] for row in rows):>9.2%}{mean(row['accuracy_top5'] for row in rows):>9.2%}"
            f"{agreement:>11}"
        )
    gains = [report["gain"] for report in reports]
    print(f"gain over the student alone: {mean(gains):+.2%} (seeds: {', '.join(f'{gain:+.2%}' for gain in gains)})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CIFAR-100, ResNet-56 to ResNet-20, through the whole service.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train", type=int, default=10_000, help="training images, out of 50,000")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=["auto", "fp32", "bf16"])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
