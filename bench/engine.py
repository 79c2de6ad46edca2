"""How fast a step of the engine is, beside the plain loop that people write, on this machine.

    .venv/bin/python -m bench.engine [--settings live hits ...] [--rounds 9] [--turn 8] [--json FILE]
    .venv/bin/python -m bench.engine --levers       each lever off, beside the default
    .venv/bin/python -m bench.engine --growth       how cost grows
    .venv/bin/python -m bench.engine --smoke        seconds: two rounds of small networks on random pixels

All contestants (`bench/contestants.py`) live at the same time and take turns: a process is stopped while it has no
turn. A turn is some steps that are not timed, then `--turn` that are; the order alternates from round to round, and the
first round is dropped. A ratio is the median of the ratios of the rounds, with the 10th and 90th percentile, over the
quiet rounds only: those in whose turns all other processes used less than 0.25 of a core. Set-up is never in a ratio.

Each job's first step is compared with the plain step, in float64, on the same bytes from the same weights. No ratio is
printed if that fails (exit code 4), or if fewer than five rounds were quiet (exit code 3).

Uses the real data beside the checkout (`../shared/data`); `--data random` needs none.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from base.cores import cores
from bench.cifar100 import DATA, PREPROCESSING, subset
from bench.contestants import PEAK_WORK, Arena, Contestant, Json
from bench.processes import REPOSITORY, exit_on_sigterm
from worker import devices

QUIET_CORES = 0.25
QUIET_ROUNDS = 5
ALL_HIT = 0.999
TOO_FEW_QUIET, CHECK_FAILED = 3, 4
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FLOWERS = DATA / "flowers128.zip"
MOBILE = ("torchvision/resnet18", "torchvision/mobilenet_v3_small")
MOBILE_SIDE = 96
JOB_EPOCHS, JOB_IMAGES = 30, 45_000

LOSS_LIMIT = {"fp32": 1e-6, "bf16": 5e-3}
"""The largest relative error of the first loss, against float64. In bf16 that of PyTorch's own operators is 4e-3 (root
mean square over 24 pairs of random networks), and by chance much less in one of them."""
COSINE_LIMIT = {"fp32": 0.9999, "bf16": 0.99}
PLAIN_ERRORS = 3
"""So many times the plain loop's own error in the same precision is allowed where that is more: the order of sums, and
with it a folded batch norm, decides what is rounded off."""

Rates = Mapping[str, float]


@dataclass(frozen=True)
class Turn:
    """What one process, or several at the same time, did in a turn."""

    rate: float
    """Samples (of a peak: products) a second."""
    others: float
    """Cores that other processes used."""
    cores: float
    peak_bytes: int
    hits: float | None = None
    """The share of hits among look-ups in a teacher's cache; None without any."""


Round = Mapping[str, Turn]


@dataclass(frozen=True)
class Slot:
    """A turn of each round: the processes that run in it, and whether another process keeps a core busy."""

    name: str
    runs: tuple[str, ...]
    neighbour: bool = False


@dataclass(frozen=True)
class Row:
    """A figure of the table. `value` gives it for the rates of one round; `must` and `beyond` are the issue's marks."""

    name: str
    uses: tuple[str, ...]
    value: Callable[[Rates], float]
    must: float | None = None
    beyond: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Field:
    """Contestants that are compared, with the slots of a round and the rows of the table."""

    name: str
    arena: Arena
    contestants: tuple[Contestant, ...]
    slots: tuple[Slot, ...]
    rows: tuple[Row, ...]
    begin_beside_neighbour: tuple[str, ...] = ()
    whole_job: bool = False
    """Add the rows of a whole job with its baseline."""
    by_epoch: bool = False
    """Show what an epoch of JOB_IMAGES takes: its seconds, and the memory of the teacher's cache."""


@dataclass
class Measured:
    """What a field's run has given."""

    field: Field
    ready: dict[str, Json] = field(default_factory=dict)
    """What each process said after its first step."""
    rounds: list[Round] = field(default_factory=list)
    """All but the dropped one."""
    checks: dict[str, Json] = field(default_factory=dict)


class Process:
    """A contestant. It is stopped (SIGSTOP, with its loaders) whenever it has nothing to do."""

    def __init__(self, contestant: Contestant, threads: int | None) -> None:
        folder = Path(contestant.folder)
        self.contestant = contestant
        self.log = folder / "log"
        folder.mkdir(parents=True)
        contestant.write(folder / "contestant.json")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.contestants", str(folder / "contestant.json")],
                cwd=REPOSITORY,
                env=environment(contestant, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.ready = self.answer()
        self.stop()

    def send(self, **command: Any) -> None:
        self.signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Json:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.contestant.name} ended:\n{tail}")
        answered: Json = json.loads(line)
        return answered

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


class Neighbour:
    """A process that keeps one core busy while it is let run."""

    def __init__(self) -> None:
        core = max(os.sched_getaffinity(0))
        code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
        self.process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        self.process.send_signal(signal.SIGSTOP)

    @contextmanager
    def busy(self, busy: bool) -> Iterator[list[int]]:
        """Let it run during a `with` block, if `busy`. Gives the processes that are not others."""
        if busy:
            self.process.send_signal(signal.SIGCONT)
        try:
            yield [self.process.pid]
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def environment(contestant: Contestant, threads: int | None) -> dict[str, str]:
    """Return the environment of a contestant; of ours, that which a worker gives to its engine. Without a number of
    threads, each side chooses its own."""
    kept = {name: value for name, value in os.environ.items() if name not in THREADS}
    if contestant.kind == "ours":
        device = devices.discover(threads=threads, environment=kept)[0]
        return devices.engine_environment(device, Path(contestant.folder), kept, allocator=contestant.allocator)
    return {**kept, **({} if threads is None else dict.fromkeys(THREADS, str(threads)))}


def measure(field: Field, options: argparse.Namespace) -> Measured:
    """Start a field's processes one after the other, check their first steps, and let them take turns."""
    measured = Measured(field)
    with ExitStack() as stack:
        neighbour = None
        if any(slot.neighbour for slot in field.slots) or field.begin_beside_neighbour:
            neighbour = Neighbour()
            stack.callback(neighbour.end)
        processes: dict[str, Process] = {}
        beside = {name for slot in field.slots if slot.neighbour for name in slot.runs}
        for contestant in field.contestants:
            # The turns of the others are load, too: a job that adapts its threads would leave them a core.
            adapts = contestant.kind != "ours" or contestant.name in beside
            with _beside(neighbour, contestant.name in field.begin_beside_neighbour):
                process = Process(contestant, options.threads or (None if adapts else cores()))
            stack.callback(process.end)
            processes[contestant.name] = process
            measured.ready[contestant.name] = process.ready
            _say(f"{field.name}: {contestant.name} is ready after {process.ready['setup_s']:.1f} s")
        measured.checks = _checked(processes)
        for number in range(options.rounds + 1):
            slots = field.slots if number % 2 else field.slots[::-1]
            turns = {slot.name: _turn(slot, processes, neighbour, options) for slot in slots}
            if number:
                measured.rounds.append(turns)
            others = max(turn.others for turn in turns.values())
            _say(f"{field.name}: round {number} of {options.rounds}, others used up to {others:.2f} cores")
    return measured


@contextmanager
def _beside(neighbour: Neighbour | None, busy: bool) -> Iterator[list[int]]:
    if neighbour is None:
        yield []
        return
    with neighbour.busy(busy) as known:
        yield known


def _checked(processes: Mapping[str, Process]) -> dict[str, Json]:
    """Let a plain loop check the first step of each job of ours that has the fields to be checked."""
    judge = next((process for process in processes.values() if process.contestant.kind == "plain"), None)
    if judge is None:
        return {}
    checks = {}
    for name, process in processes.items():
        if process.contestant.kind == "ours":
            known = {"taught": process.contestant.taught, "precision": process.ready["precision"]}
            judge.send(check={"file": process.ready["check"], **known})
            checks[name] = judge.answer()
            judge.stop()
    return checks


def _turn(
    slot: Slot, processes: Mapping[str, Process], neighbour: Neighbour | None, options: argparse.Namespace
) -> Turn:
    running = [processes[name] for name in slot.runs]
    with _beside(neighbour, slot.neighbour) as known:
        for process in running:
            beside = [other.process.pid for other in running if other is not process]
            process.send(**_lengths(process.contestant, options), watched=[*known, *beside])
        answers = [process.answer() for process in running]
        for process in running:
            process.stop()
    rate = 0.0
    for process, answer in zip(running, answers, strict=True):
        samples = 1 if process.contestant.kind == "peak" else process.contestant.arena.batch
        rate += answer["steps"] * samples / answer["seconds"]
    return Turn(
        rate,
        max(answer["others"] for answer in answers),
        sum(answer["cores"] for answer in answers),
        max(answer["peak_bytes"] for answer in answers),
        _share_of_hits(answers),
    )


def _share_of_hits(answers: Sequence[Json]) -> float | None:
    hits, all_of_them = (sum(answer[name] for answer in answers) for name in ("hits", "misses"))
    all_of_them += hits
    return hits / all_of_them if all_of_them else None


def _lengths(contestant: Contestant, options: argparse.Namespace) -> Json:
    """Return the steps of a turn. A loader's queue of batches is used up before the timed steps."""
    if contestant.turn_steps:
        return {"warm": 0, "steps": contestant.turn_steps}
    steps = max(2, round(options.turn * options.batch / contestant.arena.batch))
    return {"warm": max(2, 2 * contestant.workers + 1), "steps": steps}


# Figures.


def check_faults(check: Json, precision: str) -> list[str]:
    """Return what is wrong with a first step; nothing if its loss and gradients are the plain loop's."""
    limit = max(LOSS_LIMIT[precision], PLAIN_ERRORS * check["plain_loss_error"])
    least = min(COSINE_LIMIT[precision], 1 - PLAIN_ERRORS * (1 - check["plain_cosine"]))
    faults = []
    if not check["loss_error"] <= limit:
        faults.append(f"the first loss is off by {check['loss_error']:.1e} of it, more than {limit:.1e}")
    if not check["cosine"] >= least:
        faults.append(f"the gradients' cosine is {check['cosine']:.6f}, less than {least:.6g}")
    return faults + ([check["note"]] if "note" in check else [])


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def quiet(rounds: Iterable[Round], slots: Iterable[str]) -> list[Round]:
    """Return the rounds in which no turn of these slots was disturbed."""
    slots = list(slots)
    return [one for one in rounds if all(one[slot].others < QUIET_CORES for slot in slots)]


def better(rounds: Sequence[Round], names: Sequence[str]) -> str:
    """Return the name of the fastest slot, by the median."""
    kept = quiet(rounds, names) or rounds
    return max(names, key=lambda name: median(one[name].rate for one in kept))


@dataclass(frozen=True)
class Figure:
    """A row of the table, measured; `ratio` has the median and the 10th and 90th percentile, or is refused."""

    row: Row
    quiet: int
    rounds: int
    ratio: tuple[float, float, float] | None
    faults: tuple[str, ...]

    @property
    def text(self) -> str:
        if self.ratio is None:
            return "refused: " + "; ".join(self.faults)
        middle, low, high = self.ratio
        return f"{middle:.2f} [{low:.2f}..{high:.2f}]"

    @property
    def mark(self) -> str:
        """Whether the row reached what it must."""
        if self.ratio is None or self.row.must is None or self.row.beyond is None:
            return "–"
        reached = [self.ratio[0] <= mark if self.row.at_most else self.ratio[0] >= mark for mark in self._marks]
        return "beyond" if all(reached) else "reached" if any(reached) else "missed"

    @property
    def _marks(self) -> tuple[float, float]:
        assert self.row.must is not None and self.row.beyond is not None
        return self.row.must, self.row.beyond


def figure(row: Row, measured: Measured, required: int = QUIET_ROUNDS) -> Figure:
    """Return the figure of a row, or why it is refused."""
    kept = quiet(measured.rounds, row.uses)
    ours = [name for slot in measured.field.slots if slot.name in row.uses for name in slot.runs]
    faults = [
        f"{name}: {fault}"
        for name in dict.fromkeys(ours)
        if name in measured.checks
        for fault in check_faults(measured.checks[name], measured.ready[name]["precision"])
    ]
    filled = {one.name for one in measured.field.contestants if one.fill_steps}
    missed = [one[name].hits for one in kept for name in row.uses if name in filled and (one[name].hits or 0) < ALL_HIT]
    if missed:
        faults.append(f"not every look-up was a hit, but {min(share or 0.0 for share in missed):.0%}")
    if not faults and len(kept) < required:
        faults = [f"{len(kept)} of {len(measured.rounds)} rounds were quiet, at least {required} are needed"]
    if faults:
        return Figure(row, len(kept), len(measured.rounds), None, tuple(faults))
    values = [row.value({name: turn.rate for name, turn in one.items()}) for one in kept]
    ratio = (median(values), percentile(values, 0.1), percentile(values, 0.9))
    return Figure(row, len(kept), len(measured.rounds), ratio, ())


def exit_code(done: Iterable[tuple[Measured, Sequence[Figure]]]) -> int:
    """Return 4 if a first step is not the plain one, else 3 if a ratio was refused, else 0."""
    refused = False
    for measured, figures in done:
        for name, check in measured.checks.items():
            if check_faults(check, measured.ready[name]["precision"]):
                return CHECK_FAILED
        refused |= any(one.ratio is None for one in figures)
    return TOO_FEW_QUIET if refused else 0


# What is printed.


def tables(measured: Measured, figures: Sequence[Figure]) -> str:
    """Return Markdown tables of the contestants and of the ratios."""
    return f"{_contestants(measured)}\n\n{_ratios(figures)}"


def _contestants(measured: Measured) -> str:
    peaks = {
        slot: max((one[slot].rate for one in measured.rounds), default=0.0) * PEAK_WORK for slot in _peaks(measured)
    }
    by_name = {contestant.name: contestant for contestant in measured.field.contestants}
    batches = " and ".join(map(str, sorted({one.arena.batch for one in by_name.values()})))
    by_epoch = f"| s an epoch of {JOB_IMAGES:,} images | MB of the cache an epoch " * measured.field.by_epoch
    lines = [
        f"{measured.field.name}, batch {batches}. Matrix peak: "
        + (", ".join(f"{slot.removeprefix('peak ')} {rate / 1e9:.0f} GFLOP/s" for slot, rate in peaks.items()) or "–"),
        "",
        f"| contestant | samples/s, median [10th..90th percentile] {by_epoch}| of the peak | hits | cores | set-up, s "
        "| memory, MB | threads | first step against float64: loss, gradients' cosine |",
        "|---|---|---|---|---|---|---|---|---|" + "---|" * by_epoch.count("|"),
    ]
    for slot in measured.field.slots:
        if slot.name in peaks:
            continue
        kept = quiet(measured.rounds, [slot.name]) or measured.rounds
        turns = [one[slot.name] for one in kept]
        rates = [turn.rate for turn in turns]
        ready = measured.ready[slot.runs[0]]
        steps = by_name[slot.runs[0]].turn_steps
        batch = by_name[slot.runs[0]].arena.batch
        epoch = f", {steps * batch / median(rates):.1f} s an epoch" if steps else ""
        check = measured.checks.get(slot.runs[0])
        checked = "–" if check is None else f"{check['loss_error']:.1e}, {check['cosine']:.6f}"
        lines.append(
            f"| {slot.name} | {median(rates):.0f} [{percentile(rates, 0.1):.0f}..{percentile(rates, 0.9):.0f}]{epoch} "
            f"{_of_an_epoch(slot, median(rates), ready) if by_epoch else ''}"
            f"| {_share(measured, slot, median(rates), peaks)} | {_hits(turns, ready)} "
            f"| {median(turn.cores for turn in turns):.2f} | {ready['setup_s']:.1f} "
            f"| {max(turn.peak_bytes for turn in turns) / 1e6:.0f} | {ready['threads']} "
            f"| {checked} |"
        )
    return "\n".join(lines)


def _of_an_epoch(slot: Slot, rate: float, ready: Json) -> str:
    """Return the cells of one job's epoch: those that run at the same time share the rate."""
    cached = f"{JOB_IMAGES * ready['view_bytes'] / 1e6:.1f}" if ready.get("view_bytes") else "–"
    return f"| {len(slot.runs) * JOB_IMAGES / rate:.1f} | {cached} "


def _hits(turns: Sequence[Turn], ready: Json) -> str:
    shares = [turn.hits for turn in turns if turn.hits is not None]
    size = f", {ready['view_bytes']:.0f} bytes a view" if ready.get("view_bytes") else ""
    return f"{median(shares):.0%}{size}" if shares else "–"


def _peaks(measured: Measured) -> list[str]:
    return [contestant.name for contestant in measured.field.contestants if contestant.kind == "peak"]


def _share(measured: Measured, slot: Slot, rate: float, peaks: Rates) -> str:
    """Return the share of the matrix peak in its own precision: the work of the teacher counts where it is run."""
    work = next((ready["work"] for ready in measured.ready.values() if "work" in ready), None)
    contestant = next(one for one in measured.field.contestants if one.name == slot.runs[0])
    peak = peaks.get(f"peak {measured.ready[contestant.name].get('precision', 'fp32')}")
    if work is None or not peak or contestant.spec:
        return "–"
    runs_teacher = contestant.taught and not contestant.fill_steps  # Few look-ups of others are hits.
    return f"{rate * (work['student'] + work['teacher'] * runs_teacher) / peak:.0%}"


def _ratios(figures: Sequence[Figure]) -> str:
    lines = ["| ratio | median [10th..90th percentile] | quiet rounds | must | beyond | |", "|---|---|---|---|---|---|"]
    for one in figures:
        sign = "≤ " if one.row.at_most else ""
        must, beyond = (f"{sign}{mark:g}" if mark is not None else "–" for mark in (one.row.must, one.row.beyond))
        lines.append(f"| {one.row.name} | {one.text} | {one.quiet} of {one.rounds} | {must} | {beyond} | {one.mark} |")
    return "\n".join(lines)


def as_json(measured: Measured, figures: Sequence[Figure]) -> Json:
    return {
        "field": measured.field.name,
        "ready": measured.ready,
        "checks": measured.checks,
        "rounds": [{name: vars(turn) for name, turn in one.items()} for one in measured.rounds],
        "ratios": {
            one.row.name: {"ratio": one.ratio, "quiet": one.quiet, "faults": one.faults, "mark": one.mark}
            for one in figures
        },
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The data.


def arena(options: argparse.Namespace, folder: Path) -> Arena:
    """Return the pair and its data: CIFAR-100 with its real teacher, flowers or random pixels with a random one."""
    teacher, student = options.pair
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = None
    if options.data == "cifar100":
        teacher_file = DATA / "teachers" / f"cifar100_{teacher}.pth"
        if not teacher_file.exists():
            raise SystemExit(f"there is no {teacher_file.name} beside this checkout: give --data random")
        data, classes, size = subset(folder, options.samples), 100, None
        mean, std = tuple(PREPROCESSING["mean"]), tuple(PREPROCESSING["std"])
    elif options.data == "flowers":
        data, classes, size, teacher_file = FLOWERS, 5, MOBILE_SIDE, folder / "teacher.pth"
        unpacked = str(unpacked_flowers(folder))
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        random_teacher(teacher, classes, size, teacher_file)
    else:
        classes, size, teacher_file = options.classes, None, folder / "teacher.pth"
        data = random_pixels(folder / "random.npz", options.samples, classes)
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        random_teacher(teacher, classes, 32, teacher_file)
    return Arena(teacher, student, str(data), str(teacher_file), classes, mean, std, size, unpacked, options.batch)


def random_pixels(path: Path, samples: int, classes: int) -> Path:
    """Write an .npz of random images, as many test images as classes."""
    draw = np.random.default_rng(0)

    def images(count: int) -> Any:
        return draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

    labels = np.arange(samples) % classes
    tested = max(classes, 20)
    np.savez(path, x_train=images(samples), y_train=labels, x_test=images(tested), y_test=np.arange(tested) % classes)
    return path


def unpacked_flowers(folder: Path) -> Path:
    """Unpack the pictures and return the folder of those for training, which has a folder for each class."""
    if not FLOWERS.exists():
        raise SystemExit(f"{FLOWERS.name} is not beside this checkout (../shared/data)")
    with zipfile.ZipFile(FLOWERS) as archive:
        archive.extractall(folder / "flowers")
    return next(path for path in (folder / "flowers").rglob("train") if path.is_dir())


def random_teacher(name: str, classes: int, side: int, path: Path) -> None:
    """Write a network of random weights whose batch norms fit its activations, and whose answers are decided: a loss
    near zero would be rounded as a whole."""
    import torch
    from torch import nn

    from bench.contestants import plain_network

    torch.manual_seed(0)
    network = plain_network(name, classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(16, 3, side, side))
    weights = network.state_dict()
    weights[list(weights)[-2]] *= 10  # Of the classifier, the last layer.
    torch.save(weights, path)


# What is compared.


def contestant(name: str, kind: str, of: Arena, folder: Path, **fields: Any) -> Contestant:
    return Contestant(name, kind, of, str(folder / name.replace(" ", "-")), **fields)


def plains(of: Arena, folder: Path, options: argparse.Namespace, taught: bool) -> list[Contestant]:
    """Return the plain loop with each number of loader processes: the fastest one is the reference."""
    name = PLAIN if taught else PLAIN_ALONE
    return [
        contestant(f"{name}, {number} workers", "plain", of, folder, taught=taught, workers=number)
        for number in options.workers
    ]


def peaks(of: Arena, folder: Path, options: argparse.Namespace) -> list[Contestant]:
    if options.smoke:
        return []
    return [contestant(f"peak {one}", "peak", of, folder, training={"precision": one}) for one in ("fp32", "bf16")]


def _slots(contestants: Iterable[Contestant]) -> tuple[Slot, ...]:
    return tuple(Slot(one.name, (one.name,)) for one in contestants)


PLAIN, PLAIN_ALONE = "plain", "plain alone"
SETTINGS = ("live", "hits", "alone", "job", "fp32", "bf16", "neighbour", "mobile")


def table_field(of: Arena, folder: Path, options: argparse.Namespace) -> Field:
    """Return what the issue's table needs: of these settings, all but `mobile`, which has an arena of its own."""
    wanted = {"live", *options.settings}
    if "job" in wanted:
        wanted |= {"alone", "hits"}
    filled = (options.rounds + 1) * (options.turn + 3)
    default = {"training": {"precision": options.precision}}
    ours: dict[str, Json] = {
        "live": default,
        "hits": {**default, "fill_steps": filled},
        "alone": {**default, "taught": False},
        "fp32": {"training": {"precision": "fp32"}},
        "bf16": {"training": {"precision": "bf16"}},
    }
    contestants = plains(of, folder, options, taught=True)
    if "alone" in wanted:
        contestants += plains(of, folder, options, taught=False)
    contestants += [contestant(name, "ours", of, folder, **ours[name]) for name in ours if name in wanted]
    slots = list(_slots(contestants))
    began_beside: tuple[str, ...] = ()
    if "neighbour" in wanted:
        began_beside = (NEIGHBOUR_BEFORE,)
        for name in (NEIGHBOUR_BEFORE, NEIGHBOUR_LATER):
            contestants.append(contestant(name, "ours", of, folder, **ours["live"]))
            slots.append(Slot(name, (name,), neighbour=True))
    machine = peaks(of, folder, options)
    rows = [row for row in table_rows() if set(row.uses) <= {slot.name for slot in slots} | {PLAIN, PLAIN_ALONE}]
    everything, all_slots = (*contestants, *machine), (*slots, *_slots(machine))
    return Field(f"{of.teacher} to {of.student}", of, everything, all_slots, tuple(rows), began_beside, "job" in wanted)


NEIGHBOUR_BEFORE, NEIGHBOUR_LATER = "live, a neighbour from the start", "live, a neighbour that came later"


def table_rows() -> list[Row]:
    """Return the rows of issue 14's table that compare on one arena."""
    busy = [
        Row(
            f"time beside a busy process on one core, {when}, against quiet",
            (name, "live"),
            lambda rates, name=name: rates["live"] / rates[name],
            2.2,
            2.0,
            at_most=True,
        )
        for when, name in (("from the start", NEIGHBOUR_BEFORE), ("that came later", NEIGHBOUR_LATER))
    ]
    return [
        Row("KD, the teacher is run every step, against plain", ("live", PLAIN), _against_plain("live"), 2.8, 3.5),
        Row("KD, every look-up hits the cache, against plain", ("hits", PLAIN), _against_plain("hits"), 4.6, 6.5),
        Row(
            "time of KD with all hits against no teacher",
            ("hits", "alone"),
            lambda rates: rates["alone"] / rates["hits"],
            1.08,
            1.03,
            at_most=True,
        ),
        Row("student alone against plain without a teacher", ("alone", PLAIN_ALONE), _alone_against_plain),
        Row("fp32, the teacher is run every step, against plain", ("fp32", PLAIN), _against_plain("fp32"), 1.7, 2.2),
        Row("bf16, the teacher is run every step, against plain", ("bf16", PLAIN), _against_plain("bf16")),
        *busy,
    ]


def _against_plain(name: str) -> Callable[[Rates], float]:
    return lambda rates: rates[name] / rates[PLAIN]


def _alone_against_plain(rates: Rates) -> float:
    return rates["alone"] / rates[PLAIN_ALONE]


def job_rows(measured: Measured) -> list[Row]:
    """Return the rows of a whole job with its baseline, computed: the set-up as it was measured, and then the steps of
    30 epochs of 45,000 images, with the teacher and without, at the rates of each round. Evaluations are in no side."""
    ready = measured.ready
    setups = [(name, one["setup_s"]) for name, one in ready.items()]
    batch = measured.field.arena.batch
    images = JOB_EPOCHS * (JOB_IMAGES // batch) * batch

    def value(name: str) -> Callable[[Rates], float]:
        def seconds(rates: Rates) -> float:
            ours = ready["live"]["setup_s"] + images / rates[name] + images / rates["alone"]
            setup = sum(
                min(times for name, times in setups if name.startswith(f"{one}, ")) for one in (PLAIN, PLAIN_ALONE)
            )
            return (setup + images / rates[PLAIN] + images / rates[PLAIN_ALONE]) / ours

        return seconds

    names = ("live", "hits")
    marks = {"live": (3.0, 3.5), "hits": (4.0, 6.0)}
    return [
        Row(
            f"a job with baseline, {name}, against plain with and then without teacher (computed)",
            (name, "alone", PLAIN, PLAIN_ALONE),
            value(name),
            *marks[name],
        )
        for name in names
    ]


def mobile_field(of: Arena, folder: Path, options: argparse.Namespace) -> Field:
    live = contestant("live", "ours", of, folder, training={"precision": options.precision})
    contestants = [*plains(of, folder, options, taught=True), live]
    row = Row(f"{of.teacher} to {of.student}, the teacher is run every step, against plain", ("live", PLAIN),
              _against_plain("live"), 2.2, 3.0)  # fmt: skip
    machine = peaks(of, folder, options)
    name = f"{of.teacher} to {of.student} at {of.image_size} pixels"
    return Field(name, of, (*contestants, *machine), _slots((*contestants, *machine)), (row,))


LEVERS: dict[str, Json] = {
    "precision fp32": {"training": {"precision": "fp32"}},
    "kernels eager": {"training": {"kernels": "eager"}},
    "unfused norms": {"computing": {"kernels": False, "convolutions": False}},
    "oneDNN's convolutions": {"computing": {"convolutions": False}},
    "the allocator as it is": {"allocator": "off"},
    "unfolded teacher": {"computing": {"folded": False}},
    "overlap on": {"training": {"overlap": True}},
    "cache off": {"training": {"teacher_cache": "off"}},
    "one thread": {"training": {"threads": 1}},
}
"""The default with one thing changed."""


def levers_field(of: Arena, folder: Path, names: Sequence[str], precision: str) -> Field:
    """Return the default beside itself with one lever changed each, all in the same rounds."""
    plain = contestant("plain, 0 workers", "plain", of, folder)  # It checks the first steps.
    contestants = []
    for name, change in {"live": {}, **{name: LEVERS[name] for name in names}}.items():
        training = {"precision": precision, **change.get("training", {})}
        contestants.append(contestant(name, "ours", of, folder, **{**change, "training": training}))
    rows = [
        Row(f"default against {name}", ("live", name), lambda rates, name=name: rates["live"] / rates[name])
        for name in names
    ]
    return Field("levers", of, (plain, *contestants), _slots(contestants), tuple(rows))


GROWTH = ("batch", "classes", "students", "samples", "workers")


def growth_fields(options: argparse.Namespace, folder: Path) -> Iterator[Field]:
    """Yield what shows how cost grows, a field for each quantity: random pixels, as speed depends on no content."""

    def of(name: str, **changed: Any) -> Arena:
        changes = {"data": "random", "samples": 4_000, "classes": 100, **changed}
        return arena(argparse.Namespace(**{**vars(options), **changes}), folder / name)

    def ours(name: str, at: Arena, **fields: Any) -> Contestant:
        training = {"precision": options.precision, **fields.pop("training", {})}
        return contestant(name, "ours", at, folder / "runs", training=training, **fields)

    def ratio(first: str, name: str) -> Row:
        return Row(f"{name} against {first}", (first, name), lambda rates: rates[name] / rates[first])

    def compared(name: str, with_: str, *contestants: Contestant) -> Field:
        rows = tuple(ratio(with_, one.name) for one in contestants if one.name != with_)
        return Field(name, contestants[0].arena, contestants, _slots(contestants), rows, by_epoch=True)

    base, wanted = of("base"), options.growth or GROWTH
    if "batch" in wanted:
        sizes = (16, 32, 64, 128, 256)
        batches = [ours(f"batch {batch}", replace(base, batch=batch)) for batch in sizes]
        yield compared("batch", "batch 64", *batches)
    if "classes" in wanted:
        filled = (options.rounds + 1) * (options.turn + 3)
        numbers = (10, 100, 1000)
        kinds = [ours(f"{k} classes", of(f"classes-{k}", classes=k), fill_steps=filled) for k in numbers]
        yield compared("classes", "100 classes", *kinds)
    if "students" in wanted:
        student = {"architecture": base.student, "preprocessing": {"mean": base.mean, "std": base.std}}
        several = [
            ours(f"{number} students", base, taught=False, spec={"method": "dml", "student": [student] * number})
            for number in (2, 3)
        ]
        yield compared("students", "1 student", ours("1 student", base, taught=False), *several)
    if "samples" in wanted:
        counts = [samples * base.batch // 64 for samples in (1_000, 2_000, 4_000)]
        whole = [
            ours(f"{n} samples", of(f"samples-{n}", samples=n), turn_steps=int(0.9 * n) // base.batch) for n in counts
        ]
        yield compared("epochs of so many samples, with their end", whole[1].name, *whole)
    if "workers" in wanted:
        workers = tuple(ours(f"worker {number}", base, training={"threads": 1}) for number in range(1, cores() + 1))
        names = [worker.name for worker in workers]
        together = tuple(Slot(f"{n} workers at once", tuple(names[:n])) for n in range(1, cores() + 1))
        rows = tuple(ratio(together[0].name, slot.name) for slot in together[1:])
        yield Field("workers of one thread each", base, workers, together, rows, by_epoch=True)


def resolved(measured: Measured) -> Measured:
    """Add the faster of each two plain loops, by all quiet rounds, under the name that rows use."""
    slots = [slot.name for slot in measured.field.slots]
    for name in (PLAIN, PLAIN_ALONE):
        both = [slot for slot in slots if slot.startswith(f"{name}, ")]
        if both and measured.rounds:
            best = better(measured.rounds, both)
            measured.rounds = [{**one, name: one[best]} for one in measured.rounds]
    return measured


def main() -> int:
    options = _arguments()
    exit_on_sigterm()
    done: list[tuple[Measured, list[Figure]]] = []
    with tempfile.TemporaryDirectory(prefix="distillery-engine-") as name:
        for one in _fields(options, Path(name)):
            measured = resolved(measure(one, options))
            rows = [*one.rows, *(job_rows(measured) if one.whole_job else [])]
            figures = [figure(row, measured) for row in rows]
            done.append((measured, figures))
            print(f"{tables(measured, figures)}\n", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps([as_json(*pair) for pair in done], indent=1))
    code = exit_code(done)
    # A smoke has too few rounds for a ratio, and wants none.
    return 0 if options.smoke and code == TOO_FEW_QUIET else code


def _fields(options: argparse.Namespace, folder: Path) -> Iterator[Field]:
    if options.growth is not None:
        yield from growth_fields(options, folder)
        return
    if options.levers is not None:
        yield levers_field(arena(options, folder / "data"), folder, options.levers or list(LEVERS), options.precision)
        return
    if set(options.settings) != {"mobile"}:
        yield table_field(arena(options, folder / "data"), folder / "table", options)
    if "mobile" in options.settings:
        mobile = argparse.Namespace(**{**vars(options), "pair": MOBILE, "data": "flowers"})
        yield mobile_field(arena(mobile, folder / "flowers"), folder / "mobile", options)


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description="The engine beside a plain loop.")
    parser.add_argument("--pair", type=_pair, default=("resnet56", "resnet20"), metavar="TEACHER:STUDENT")
    parser.add_argument("--data", choices=["cifar100", "flowers", "random"], default="cifar100")
    parser.add_argument("--samples", type=int, default=10_000, help="training images")
    parser.add_argument("--classes", type=int, default=10, help="of random pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of ours")
    parser.add_argument("--threads", type=int, help="of both sides; default: what each takes by itself")
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[0, 1], help="loader processes of plain, the best counts"
    )
    parser.add_argument("--rounds", type=int, default=9, help="beside the dropped one")
    parser.add_argument("--turn", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="rows of the table")
    parser.add_argument("--levers", nargs="*", choices=list(LEVERS), metavar="LEVER", help=", ".join(LEVERS))
    parser.add_argument("--growth", nargs="*", choices=GROWTH, metavar="QUANTITY", help=", ".join(GROWTH))
    parser.add_argument("--json", type=Path, help="file for all figures of all rounds")
    parser.add_argument("--smoke", action="store_true", help="that everything runs, in seconds; no ratio")
    options = parser.parse_args(argv)
    if options.smoke:
        small = {"pair": ("resnet20", "resnet8"), "data": "random", "samples": 200, "batch": 16, "rounds": 2, "turn": 2}
        options = argparse.Namespace(**{**vars(options), **small, "threads": 1, "workers": [0], "settings": ["live"]})
    return options


def _pair(text: str) -> tuple[str, str]:
    teacher, found, student = text.partition(":")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not TEACHER:STUDENT, as in resnet56:resnet20")
    return teacher, student


if __name__ == "__main__":
    sys.exit(main())
