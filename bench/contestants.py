"""The processes that `bench.engine` lets take turns: a job of the engine, a plain loop, and the machine's matrix peak.

    python -m bench.contestants FILE.json       a Contestant as JSON; started by bench/engine.py only

`ours` is `kdcore.run.run` itself, a whole job with its defaults: the bench only stands behind the callback that a job
has after each step. `plain` is the loop that people write: PIL transforms for each sample, a DataLoader, fp32 in NCHW,
eager, `.item()` at each step. It has networks and a loss of its own; only its weights are those of the files.

A process prints one JSON line when it is ready, after its first step. Then it reads commands, one JSON line each, from
standard input, and answers each by one line: a turn (`warm` steps that are not timed, then `steps` that are), or
`check`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from bench.processes import descendants

Json = dict[str, Any]

TICKS = os.sysconf("SC_CLK_TCK")
PEAK_SIDE = 2048


@dataclass(frozen=True)
class Arena:
    """What all contestants of a comparison have in common."""

    teacher: str
    student: str
    data: str
    """An .npz file of uint8 arrays, or an archive of pictures."""
    teacher_file: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    """Of pictures: the side of the images that the networks see."""
    unpacked: str | None = None
    """Of an archive: a folder with its training pictures, in one folder for each class. The plain loop reads these."""
    batch: int = 64
    temperature: float = 4.0
    alpha: float = 0.1
    beta: float = 0.9
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Contestant:
    """One process of a comparison."""

    name: str
    kind: str
    """ours, plain or peak."""
    arena: Arena
    folder: str
    """Its own folder, for the job's files."""
    taught: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `training`, if ours."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the job that differ, if ours."""
    computing: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `kdcore.device.Computing` that differ from what the job would choose, if ours."""
    allocator: Literal["auto", "off"] = "auto"
    """The worker's setting, if ours."""
    fill_steps: int = 0
    """Steps of an earlier job on the same cache, so that these are hits; if ours."""
    workers: int = 0
    """Processes that load data, if plain."""
    turn_steps: int = 0
    """Steps of a turn, which is then a whole epoch with the evaluation at its end; 0: as many as of all others."""

    @classmethod
    def read(cls, path: Path) -> Contestant:
        content = json.loads(path.read_text())
        return cls(**{**content, "arena": Arena(**content["arena"])})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def main() -> None:
    began = time.monotonic()
    me = Contestant.read(Path(sys.argv[1]))
    # Whatever else is printed must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    {"ours": _ours, "plain": _plain, "peak": _peak}[me.kind](me, Turns(sys.stdin.readline, answers, began))


class Turns:
    """The turns of one process. `after_step` returns at once within a turn, and waits for the driver after it."""

    def __init__(self, read: Callable[[], str], answers: Any, began: float) -> None:
        self._read, self._answers, self._began = read, answers, began
        self._warm = self._left = self._timed = 0
        self._seconds = self._last = 0.0
        self._before = self._looked_up = (0, 0)
        self._watched: list[int] = []
        self.check: Callable[[Json], Json] | None = None
        self.looked_up: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Hits and misses of a teacher's cache so far."""

    def ready(self, **facts: Any) -> None:
        """Say that the first step is done, and wait for the first turn."""
        self._answer(setup_s=time.monotonic() - self._began, **facts)
        self._wait()

    def after_step(self, counted: bool = True) -> None:
        """Count a step; one that is not counted, such as that with an evaluation, is left out of steps and seconds."""
        now = time.monotonic()
        if self._warm:
            self._warm -= 1
            if not self._warm:
                self._begin()
            return
        if counted:
            self._seconds += now - self._last
            self._timed += 1
            self._left -= 1
        if self._left > 0:
            self._last = time.monotonic()
            return
        busy, own = (after - before for after, before in zip(self._used(), self._before, strict=True))
        wall = now - self._started
        hits, misses = (after - before for after, before in zip(self.looked_up(), self._looked_up, strict=True))
        self._answer(
            hits=hits,
            misses=misses,
            seconds=self._seconds,
            steps=self._timed,
            others=max(0.0, (busy - own) / TICKS / wall) if wall else 0.0,
            cores=own / TICKS / wall if wall else 0.0,
            peak_bytes=_peak_bytes(),
        )
        self._wait()

    def _begin(self) -> None:
        self._timed, self._seconds = 0, 0.0
        self._before, self._looked_up = self._used(), self.looked_up()
        self._started = self._last = time.monotonic()

    def _used(self) -> tuple[int, int]:
        """Return the ticks that the whole machine has worked, and those of this process, its children and the watched
        ones: what is left is the work of others."""
        family = [os.getpid(), *descendants(os.getpid()), *self._watched]
        return machine_ticks(), sum(map(ticks_of, family))

    def _wait(self) -> None:
        while line := self._read():
            command = json.loads(line)
            if "check" in command:
                assert self.check is not None, "only the plain loop checks"
                self._answer(**self.check(command["check"]))
                continue
            self._warm, self._left = command["warm"], command["steps"]
            self._watched = command.get("watched", [])
            if not self._warm:
                self._begin()
            return
        _end()

    def _answer(self, **fields: Any) -> None:
        self._answers.write(json.dumps(fields) + "\n")
        self._answers.flush()


def _end() -> NoReturn:
    """End at once: the driver has closed its side, and nothing here is worth a clean end."""
    os._exit(0)


def machine_ticks() -> int:
    """Return the ticks that all processes of the machine have worked, and those that its host took away."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return user + nice + system + irq + softirq + steal


def ticks_of(pid: int) -> int:
    """Return the ticks of one process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# Ours.


def spec_of(me: Contestant) -> Json:
    """Return the body of the job, with its defaults but for what is compared."""
    arena = me.arena
    normalisation = {"mean": arena.mean, "std": arena.std}
    size = {} if arena.image_size is None else {"image_size": arena.image_size}
    taught = {
        "method": "kd",
        "temperature": arena.temperature,
        "alpha": arena.alpha,
        "beta": arena.beta,
        "teacher": {
            "architecture": arena.teacher,
            "checkpoint": f"file:{arena.teacher_file}",
            "preprocessing": normalisation,
        },
    }
    optimizer = {"name": "sgd", "lr": arena.lr, "momentum": arena.momentum, "weight_decay": arena.weight_decay}
    training = {"batch_size": arena.batch, "seed": 0, "optimizer": optimizer, **me.training}
    return {
        "dataset": {"source": f"file:{arena.data}", **size},
        "student": {"architecture": arena.student, "preprocessing": normalisation},
        **(taught if me.taught else {"method": "supervised"}),
        **me.spec,
        "training": training,
    }


def _ours(me: Contestant, turns: Turns) -> None:
    from kdcore.checkpoint import Stopped

    if me.fill_steps:
        with suppress(Stopped):
            run_job(me, "fill", lambda training, workspace: _stop_at(me.fill_steps, training, workspace))
    last_epoch = 0

    first_step = ExitStack()
    first_step.enter_context(without_dropout())

    def after_step(training: Any, _: Any) -> None:
        nonlocal last_epoch
        ends_epoch, last_epoch = training.position.epoch > last_epoch, training.position.epoch
        if training.global_step == 1:
            first_step.close()
            turns.looked_up = lambda: looked_up(training)
            turns.ready(
                check=write_first_step(training, Path(me.folder)),
                precision="bf16" if training.scheme.models["student"].bf16 else "fp32",
                view_bytes=view_bytes(training),
                **_facts(),
            )
        else:
            turns.after_step(me.turn_steps > 0 or not ends_epoch)

    run_job(me, "job", after_step)


def looked_up(training: Any) -> tuple[int, int]:
    """Return the hits and misses of the teacher's cache so far; zeros without one."""
    cached = _cached(training)
    return (0, 0) if cached is None else (cached.figures.hits, cached.figures.misses)


def view_bytes(training: Any) -> int | None:
    """Return what one view takes in the teacher's cache, with its key; None if none is kept."""
    cached = _cached(training)
    return None if cached is None or cached.why_unused else 8 + cached._layout.size


def _cached(training: Any) -> Any:
    """Return the cache behind a stage's teacher; None without one."""
    teacher = getattr(training.scheme, "teacher", None)
    while teacher is not None and not hasattr(teacher, "figures"):
        teacher = getattr(teacher, "teacher", None)
    return teacher


def _stop_at(step: int, training: Any, workspace: Any) -> None:
    workspace.stop_requested = training.global_step >= step


def run_job(me: Contestant, name: str, after_step: Callable[[Any, Any], None]) -> None:
    """Run the contestant's job as the engine does, and call `after_step` after each of its steps, with the stage's
    training and the workspace."""
    from kdcore import device, kernels, prepare, run
    from kdcore.checkpoint import Watch
    from kdcore.protocol import Lines
    from kdcore.spec import parse

    class Gate(Watch):
        def after_step(self, training: Any) -> None:
            super().after_step(training)
            after_step(training, self.workspace)

    folder = Path(me.folder)
    out, lines = folder / name, folder / f"{name}.lines"
    out.mkdir(parents=True)
    choose = device.begin

    def chosen(*arguments: Any, **options: Any) -> Any:
        computing = replace(choose(*arguments, **options), **me.computing)
        if computing.kernels:
            kernels.enable(folder / "cache", computing.convolutions)
        else:
            kernels.disable()
        return computing

    with lines.open("w") as stream, _replaced(run, "Watch", Gate), _replaced(device, "begin", chosen):
        run.run(parse(spec_of(me)), prepare.Workspace(out, {}, folder / "cache", Lines(stream)))


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's attribute another value during a `with` block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def without_dropout() -> AbstractContextManager[None]:
    """Let dropout pass its input on during a `with` block: two networks with other masks cannot be compared."""
    from torch.nn import functional

    return _replaced(functional, "dropout", lambda input, *_, **__: input)


def write_first_step(training: Any, folder: Path) -> str:
    """Write what the first step saw and computed, for the check, and return the file: the bytes of its images, labels,
    the weights before it, its loss and its gradients."""
    import torch

    from kdcore.data.views import Batches

    batch = next(iter(Batches(training.training_set, training.recipe, training.views, epoch=0)))
    network = training.scheme.models["student"].network
    path = folder / "first_step.pt"
    torch.save(
        {
            "pixels": batch.inputs,
            "labels": batch.labels,
            "weights": dict(training.grading.best["student"].weights),
            "loss": float(training.sums["loss"]),
            "gradients": {name: value.grad for name, value in network.named_parameters() if value.grad is not None},
        },
        path,
    )
    return str(path)


def _facts() -> Json:
    import torch

    return {"threads": torch.get_num_threads()}


# The plain loop.


def _plain(me: Contestant, turns: Turns) -> None:
    import torch
    from torch.nn import functional as F

    arena = me.arena
    student = plain_network(arena.student, arena.classes)
    teacher = plain_network(arena.teacher, arena.classes)
    teacher.load_state_dict(torch.load(arena.teacher_file, weights_only=True))
    teacher.eval()
    turns.check = lambda command: check_first_step(arena, Path(command.pop("file")), **command)
    loader = plain_loader(arena, me.workers)
    sgd = torch.optim.SGD(student.parameters(), arena.lr, arena.momentum, weight_decay=arena.weight_decay)
    student.train()
    running_loss, right, seen, step = 0.0, 0, 0, 0
    while True:
        for images, labels in loader:
            logits = student(images)
            loss = F.cross_entropy(logits, labels)
            if me.taught:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                loss = arena.alpha * loss + arena.beta * plain_kd(logits, teacher_logits, arena.temperature)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            running_loss += loss.item()
            right += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
            step += 1
            if step == 1:
                work = work_of_sample(student, teacher, images[:2])
                turns.ready(work=work, **_facts())
            else:
                turns.after_step()


def plain_kd(student_logits: Any, teacher_logits: Any, temperature: float) -> Any:
    from torch.nn import functional as F

    student, teacher = F.log_softmax(student_logits / temperature, 1), F.softmax(teacher_logits / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean") * temperature**2


def plain_loader(arena: Arena, workers: int) -> Any:
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from kdcore import vision

    library = vision.torchvision()
    import torchvision.transforms as T

    after = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(arena.mean, arena.std)]
    data: Any
    if arena.unpacked is not None:
        size, ratio = arena.image_size, (3 / 4, 4 / 3)
        crop = T.RandomResizedCrop(size, scale=(0.35, 1.0), ratio=ratio)
        data = library.datasets.ImageFolder(arena.unpacked, T.Compose([crop, *after]))
    else:
        import numpy as np

        arrays = np.load(arena.data)
        images, labels = arrays["x_train"], arrays["y_train"]
        transform = T.Compose([T.RandomCrop(images.shape[1], padding=4), *after])

        class Pictures(Dataset[Any]):
            def __len__(self) -> int:
                return len(images)

            def __getitem__(self, row: int) -> Any:
                return transform(Image.fromarray(images[row])), int(labels[row])

        data = Pictures()
    return DataLoader(data, arena.batch, shuffle=True, drop_last=True, num_workers=workers)


def plain_network(name: str, classes: int) -> Any:
    """Return a network by its name: torchvision's own, or a CIFAR ResNet as in the distillation papers' code."""
    import torch
    from torch import nn

    if name.startswith("torchvision/"):
        from kdcore import vision

        return vision.torchvision().models.get_model(
            name.removeprefix("torchvision/"), weights=None, num_classes=classes
        )

    class Block(nn.Module):
        def __init__(self, before: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = None
            if stride != 1 or before != width:
                self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

        def forward(self, x: Any) -> Any:
            shortcut = x if self.downsample is None else self.downsample(x)
            x = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(x)) + shortcut)

    class CifarResNet(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            blocks, before = (depth - 2) // 6, 16
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            self.relu = nn.ReLU(inplace=True)
            for number, width in enumerate((16, 32, 64), 1):
                strides = [1 if number == 1 else 2, *[1] * (blocks - 1)]
                group = [Block(before if at == 0 else width, width, stride) for at, stride in enumerate(strides)]
                self.add_module(f"layer{number}", nn.Sequential(*group))
                before = width
            self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, classes)

        def forward(self, x: Any) -> Any:
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.fc(torch.flatten(self.avgpool(x), 1))

    return CifarResNet(int(name.removeprefix("resnet")))


def work_of_sample(student: Any, teacher: Any, images: Any) -> Json:
    """Return the operations of one sample, two for a multiplication with its addition: those of a forward pass of
    the teacher, and of a forward and backward pass of the student."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    student = copy.deepcopy(student).eval()
    with FlopCounterMode(display=False) as learned:
        student(images).sum().backward()
    with torch.no_grad(), FlopCounterMode(display=False) as taught:
        teacher(images)
    return {
        "student": learned.get_total_flops() / len(images),
        "teacher": taught.get_total_flops() / len(images),
    }


# The check.


def check_first_step(arena: Arena, path: Path, taught: bool, precision: str) -> Json:
    """Return how far a first step of ours is from the plain one in float64 on the same bytes from the same weights, and
    how far the plain one in our precision is: the relative error of the loss and the cosine of all gradients.

    The plain loss may be right by chance, where the errors of its images cancel each other. So its error is at least
    what independent errors of this size leave of it: their root mean square, divided by the root of their number.
    """
    import torch

    step = torch.load(path, weights_only=True)
    exact_N, exact = _plain_step(arena, step, taught, torch.float64)
    plain_N, plain = _plain_step(arena, step, taught, torch.float32, autocast=precision == "bf16")
    exact_loss, errors_N, ours = float(exact_N.mean()), plain_N.double() - exact_N, step["gradients"]
    left = max(abs(float(errors_N.mean())), float(errors_N.square().mean().sqrt()) / len(errors_N) ** 0.5)
    found = {
        "loss_error": abs(step["loss"] - exact_loss) / abs(exact_loss),
        "plain_loss_error": left / abs(exact_loss),
        "plain_cosine": _cosine(plain, exact),
    }
    if other := sorted(exact.keys() ^ ours.keys()):
        return {**found, "cosine": 0.0, "note": f"other gradients: {other[:3]}"}
    return {**found, "cosine": _cosine(ours, exact)}


def _plain_step(arena: Arena, step: Json, taught: bool, dtype: Any, autocast: bool = False) -> tuple[Any, Json]:
    """Return the loss of each image, and the gradients of their mean."""
    import torch
    from torch.nn import functional as F

    student = plain_network(arena.student, arena.classes)
    student.load_state_dict(step["weights"])
    student = student.to(dtype).train()
    mean, std = (torch.tensor(values, dtype=dtype).view(1, -1, 1, 1) for values in (arena.mean, arena.std))
    images = (step["pixels"].to(dtype) / 255 - mean) / std
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), without_dropout():
        logits = student(images)
        if taught:
            teacher = plain_network(arena.teacher, arena.classes)
            teacher.load_state_dict(torch.load(arena.teacher_file, weights_only=True))
            with torch.no_grad():
                teacher_logits = teacher.to(dtype).eval()(images)
    logits = logits.to(dtype)
    losses_N = F.cross_entropy(logits, step["labels"], reduction="none")
    if taught:
        given = [one.to(dtype).split(1) for one in (logits, teacher_logits)]
        of_teacher_N = torch.stack([plain_kd(*pair, arena.temperature) for pair in zip(*given, strict=True)])
        losses_N = arena.alpha * losses_N + arena.beta * of_teacher_N
    losses_N.mean().backward()
    return losses_N.detach(), {name: value.grad for name, value in student.named_parameters()}


def _cosine(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    import torch

    left, right = (torch.cat([each[name].double().flatten() for name in sorted(one)]) for each in (one, other))
    return float(left @ right / (left.norm() * right.norm()))


# The machine's matrix peak.


def _peak(me: Contestant, turns: Turns) -> None:
    """Multiply two square matrices at each step, by the operation that is fast here: a linear layer in bf16, a 1 x 1
    convolution in fp32, which oneDNN computes, where a product of matrices goes through MKL."""
    import torch
    from torch.nn import functional as F

    if me.training["precision"] == "bf16":
        left, right = torch.randn(2, PEAK_SIDE, PEAK_SIDE).bfloat16()
        multiply = lambda: F.linear(left, right)  # noqa: E731
    else:
        maps = torch.randn(1, PEAK_SIDE, 32, PEAK_SIDE // 32).contiguous(memory_format=torch.channels_last)
        kernels = torch.randn(PEAK_SIDE, PEAK_SIDE, 1, 1)
        multiply = lambda: F.conv2d(maps, kernels)  # noqa: E731
    with torch.inference_mode():
        multiply()
        turns.ready(**_facts())
        while True:
            multiply()
            turns.after_step()


PEAK_WORK = 2 * PEAK_SIDE**3
"""Operations of one step of a peak."""


if __name__ == "__main__":
    main()
