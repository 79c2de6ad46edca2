"""What a distilled student costs and keeps as each file that ships: flowers through REST, float and int8.

    .venv/bin/python -m bench.shipping [--teacher FILE] [--epochs 10] [--keep FOLDER] [--smoke]

Starts a server (`python -m serve`), registers photographs of five flowers and a teacher (`--teacher`: the student's
file of a job that fine-tuned one on them, docs/own_pictures.md; else it is trained first), and distils a ResNet-20 that
starts from weights of CIFAR-100 twice: plainly, with the same student alone, and with the last epochs trained for int8.
Each job exports every format. Prints a Markdown table of what the service has measured on each file. Then the files are
downloaded, and `bench/measure_files.py`, which knows nothing of the service, measures the ONNX files again by
onnxruntime alone: accuracy and agreement must be the same but for one image, bytes the same, latencies are compared as
ratios. Exit status 1 if they are not.

`--keep` keeps the server's home and the files; the same command then continues. `--smoke` takes small random patterns
in the place of photographs. Needs the real data beside the checkout (`../shared/data`), but for `--smoke`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.cifar100 import DATA, PREPROCESSING, TEACHER_FILE, require_data
from bench.own_pictures import BATCH, FLOWERS, Budget, Spec, finished, teacher_spec
from bench.processes import REPOSITORY, exit_on_sigterm
from bench.service import embedded, open_folder
from client.sdk import Distillery

FORMATS = ["safetensors", "onnx", "onnx_int8", "torch_export", "openvino"]
TEACHER_MODEL, DATASET = "flowers-teacher", "flowers"
JOBS: Mapping[str, Spec] = {
    "plain": {"baseline": "train"},
    "aware": {"quantization": {"aware": True}},
}
"""What the two jobs differ in. The student alone is the same for both, and is trained once."""
SIZE = 48


@dataclass(frozen=True)
class Plan:
    """Data, networks and recipe of both jobs."""

    archive: Path
    image_size: int | None
    teacher: Spec
    student: Spec
    training: Spec

    def spec(self, job: str) -> Spec:
        data = {"source": DATASET} | ({} if self.image_size is None else {"image_size": self.image_size})
        return {
            "dataset": data,
            "teacher": self.teacher,
            "student": self.student,
            "method": "kd",
            "training": self.training,
            "export": FORMATS,
            **JOBS[job],
        }


def flowers(epochs: int, teacher: str) -> Plan:
    student = {"architecture": "resnet20", "checkpoint": "model:resnet20-cifar100"}
    recipe = {"epochs": epochs, "batch_size": BATCH, "seed": 1}
    return Plan(FLOWERS, SIZE, {"checkpoint": teacher}, student, recipe)


def smoke(folder: Path) -> Plan:
    """Return a plan on patterns of four directions, which `folder` gets."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    angles = np.arange(4) * np.pi / 4
    waves = np.stack([np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.9) for angle in angles])
    arrays = {}
    for split, count in (("train", 400), ("test", 100)):
        labels = np.arange(count) % 4
        pixels = 128 + 60 * waves[labels][..., None] + rng.normal(0, 30, (count, 16, 16, 3))
        arrays |= {f"x_{split}": pixels.clip(0, 255).astype("uint8"), f"y_{split}": labels}
    archive = folder / "patterns.npz"
    np.savez(archive, **arrays)
    return Plan(archive, None, {"checkpoint": f"model:{TEACHER_MODEL}"}, {"architecture": "convnet4"}, {"epochs": 10})


def main() -> int:
    arguments = _arguments()
    if not arguments.smoke:
        require_data()
    exit_on_sigterm()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with _folder(arguments.keep) as folder:
        with embedded(folder) as url, Distillery(url) as service:
            plan = _begin(service, folder, arguments)
            jobs = {name: finished(service, name, plan.spec(name)) for name in JOBS}
            files = {name: _download(service, job["id"], folder / "files" / name) for name, job in jobs.items()}
        print(f"\n{table({name: job['result'] for name, job in jobs.items()})}", flush=True)
        for name, its in files.items():
            print(f"\n{name}: the files as downloaded, by onnxruntime {'' if arguments.smoke else 'and Pillow '}alone")
            program = [
                sys.executable,
                "-I",
                str(REPOSITORY / "bench" / "measure_files.py"),
                str(its),
                str(plan.archive),
            ]
            if subprocess.run(program, check=False).returncode:
                return 1
    return 0


def _begin(service: Distillery, folder: Path, arguments: argparse.Namespace) -> Plan:
    """Register what an earlier run in this home has not, train a teacher if none is given, and return the plan."""
    known = {row["name"] for row in (*service.models(), *service.datasets())}
    archive = FLOWERS
    if arguments.smoke:
        plan = smoke(folder)
        archive = plan.archive
    if DATASET not in known:
        service.register_dataset(DATASET, archive)
    if arguments.smoke:
        teacher = {"dataset": DATASET, "student": "convnet16", "method": "supervised", "training": {"epochs": 10}}
        job = finished(service, "teacher", teacher)
        return Plan(archive, None, {"checkpoint": f"job:{job['id']}"}, plan.student, plan.training)
    if "resnet20-cifar100" not in known:
        weights = DATA / "teachers" / "cifar100_resnet20.pth"
        service.register_model("resnet20-cifar100", weights, architecture="resnet20", preprocessing=PREPROCESSING)
    if arguments.teacher is not None:
        if TEACHER_MODEL not in known:
            service.register_model(TEACHER_MODEL, arguments.teacher)
        return flowers(arguments.epochs, f"model:{TEACHER_MODEL}")
    if "resnet56-cifar100" not in known:
        service.register_model("resnet56-cifar100", TEACHER_FILE, architecture="resnet56", preprocessing=PREPROCESSING)
    spec = teacher_spec(Budget(teacher_epochs=3 * arguments.epochs, image_size=SIZE, precision="auto"))
    return flowers(arguments.epochs, f"job:{finished(service, 'teacher', spec)['id']}")


def _download(service: Distillery, job_id: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for artifact in service.artifacts(job_id):
        service.download(job_id, artifact["name"], to=folder)
    return folder


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: the models of the plain job, then each job's files."""
    plain = reports["plain"]
    first = next(row for row in plain["files"] if row["latency"])
    sizes = [one["batch"] for one in first["latency"]]
    lines = [
        f"{plain['test_samples']} test images; {first['threads']} thread(s) of {first['cpu']}. p50 of a batch in ms.",
        "",
        "| job | file | int8 | accuracy, % | agreement, % | bytes | "
        + " | ".join(f"p50, batch {size}" for size in sizes)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * len(sizes),
    ]
    for name in ("teacher", "alone"):
        if plain.get(name):
            cells = [plain[name]["architecture"], name, "–", _percent(plain[name]["accuracy"]), "–"]
            lines.append(_row([*cells, f"{plain[name]['bytes']:,}", *("–" for _ in sizes)]))
    for job, report in reports.items():
        cells = [job, "the student", "–", _percent(report["student"]["accuracy"]), "–"]
        lines.append(_row([*cells, f"{report['student']['bytes']:,}", *("–" for _ in sizes)]))
        lines += [_file(job, row, sizes) for row in report["files"]]
    return "\n".join(lines)


def _file(job: str, row: Mapping[str, Any], sizes: Sequence[int]) -> str:
    if row["refused"] is not None:
        return _row([job, row["name"], "refused:", row["refused"]["message"], *("" for _ in range(2 + len(sizes)))])
    quantization = {None: "–", "after_training": "after training", "aware": "trained for"}[row["quantization"]]
    return _row(
        [
            *(job, f"`{row['name']}`", quantization, _percent(row["accuracy"]), _percent(row["agreement"])),
            f"{row['bytes']:,}",
            *(f"{one['p50_ms']:.2f}" for one in row["latency"]),
        ]
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        open_folder(keep)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="distillery-shipping-") as name:
        open_folder(Path(name))
        yield Path(name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.shipping", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="student.safetensors of a job on flowers")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="the server's home, which a second run continues")
    parser.add_argument("--smoke", action="store_true", help="small patterns; the figures do not count")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
