"""Seconds and peak memory of looking at a data set, as a registration does, here and in other trees, interleaved.

    python -m bench.registration [--pngs 60000] [--jpegs 13000] [--tar-gb 5] [--rounds 3] [--cores N]
                                 [--tree before=PATH]... [--to FOLDER]

Makes (or finds, in --to) a zip of small PNGs of 32 x 32 pixels, a zip of JPEGs of 224 x 224 pixels, and a tar of large
JPEGs of about --tar-gb GB, all of noise that was smoothed; 0 leaves one out. Then `python -m kdcore inspect dataset`
runs on each in every tree in turn, round after round, so that a busy machine troubles all of them alike. `wall` and
`cpu` are seconds and the lowest of the rounds, `peak` is the largest resident size in MB; the same `facts` mean that
the trees agree on classes, counts, mean and std.
"""

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parents[1]
CLASSES = 10
DISTINCT = 64


def picture(number: int, side: int, kind: str, grain: int = 8) -> bytes:
    noise = Image.frombytes("RGB", (grain, grain), random.Random(number).randbytes(3 * grain * grain))  # noqa: S311
    out = io.BytesIO()
    noise.resize((side, side), Image.Resampling.BILINEAR).save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return out.getvalue()


def names(count: int, suffix: str) -> Iterator[str]:
    for number in range(count):
        split = "test" if number % 7 == 0 else "train"
        yield f"{split}/class{number // 7 % CLASSES}/{number:07}.{suffix}"


def zipped(path: Path, count: int, suffix: str, make: Callable[[int], bytes]) -> None:
    pictures = [make(number) for number in range(DISTINCT)]
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names(count, suffix)):
            archive.writestr(name, pictures[number % DISTINCT])


def tarred(path: Path, gigabytes: float) -> None:
    pictures = [picture(number, 1024, "JPEG", 512) for number in range(DISTINCT)]
    count = int(gigabytes * 1e9 * DISTINCT / sum(map(len, pictures)))
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names(count, "jpg")):
            member = tarfile.TarInfo(name)
            member.size = len(pictures[number % DISTINCT])
            archive.addfile(member, io.BytesIO(pictures[number % DISTINCT]))


def inspected(tree: Path, path: Path, size: int | None, cores: int | None) -> tuple[float, float, float, str]:
    """Return wall seconds, CPU seconds, peak MB and a digest of the facts of one inspection."""
    command = [sys.executable, "-m", "kdcore", "inspect", "dataset", str(path)]
    command += [] if size is None else ["--image-size", str(size)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command if cores is None else ["taskset", "-c", f"0-{cores - 1}", *command],
            cwd=tree, env=environment, stdout=output,
        )  # fmt: skip
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        answer = json.loads(output.read() or b"{}")
    if child.returncode or not answer.get("ok"):
        raise SystemExit(f"{tree}: {answer}")
    facts = answer["facts"]
    kept = {name: facts[name] for name in ("class_names", "channels", "image_size", "train", "test", "mean", "std")}
    return (
        wall,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss / 1024,
        hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8],
    )


def main() -> int:
    arguments = _arguments()
    arguments.to.mkdir(parents=True, exist_ok=True)
    trees = {"here": HERE, **dict(arguments.tree)}
    for path, make, size in _archives(arguments):
        if not path.exists():
            make(path)
        print(f"\n{path.name}, {path.stat().st_size / 1e6:,.0f} MB", flush=True)
        best: dict[str, tuple[float, float, float, str]] = {}
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                figures = inspected(tree, path, size, arguments.cores)
                known = best.get(name, figures)
                best[name] = (*map(min, known[:2], figures[:2]), max(known[2], figures[2]), figures[3])
        for name, (wall, cpu, peak, facts) in best.items():
            print(
                f"  {name:<8} wall {wall:7.1f} s   cpu {cpu:7.1f} s   peak {peak:6.0f} MB   facts {facts}", flush=True
            )
    return 0


def _archives(arguments: argparse.Namespace) -> Iterator[tuple[Path, Callable[[Path], None], int | None]]:
    pngs, jpegs, gigabytes = arguments.pngs, arguments.jpegs, arguments.tar_gb
    if pngs:
        yield arguments.to / f"pngs-{pngs}.zip", lambda p: zipped(p, pngs, "png", lambda n: picture(n, 32, "PNG")), None
    if jpegs:
        yield (
            arguments.to / f"jpegs-{jpegs}.zip",
            lambda p: zipped(p, jpegs, "jpg", lambda n: picture(n, 224, "JPEG")),
            None,
        )
    if gigabytes:
        yield arguments.to / f"large-{gigabytes:g}.tar", lambda p: tarred(p, gigabytes), 64


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pngs", type=int, default=60_000)
    parser.add_argument("--jpegs", type=int, default=13_000)
    parser.add_argument("--tar-gb", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int)
    parser.add_argument("--to", type=Path, default=Path("bench-registration"))
    parser.add_argument("--tree", action="append", default=[], type=_tree, metavar="NAME=PATH")
    return parser.parse_args()


def _tree(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not (Path(path) / "kdcore").is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=PATH of a tree with kdcore/ in it")
    return name, Path(path).resolve()


if __name__ == "__main__":
    raise SystemExit(main())
