"""A stand-in for `python -m kdcore run`: same flags, same lines, no torch. Its spec says what it does.

    {"fake": {"steps": 20, "step_s": 0.02, "checkpoint_every": 5, "at": {"7": "segfault"}, "once": "FILE"}}

That of a prediction has it in `job`.

Its "weights" are a chain of hashes of all steps, so they differ if a resumed run loses or repeats one.
`at` names a misbehaviour and the step where it happens; with `once`, only while that file does not exist.
"""

import argparse
import builtins
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from kdcore import protocol

STOPPED = 75


def weights_after(steps: int) -> str:
    """The weights of an undisturbed run."""
    weights = "initial"
    for step in range(1, steps + 1):
        weights = trained(weights, step)
    return weights


def trained(weights: str, step: int) -> str:
    return hashlib.sha256(f"{weights} {step}".encode()).hexdigest()


def parent(process: int) -> int:
    _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return int(rest.split()[1])


class Engine:
    def __init__(self, arguments: argparse.Namespace) -> None:
        spec = json.loads(arguments.spec.read_text())
        self.options: dict[str, Any] = (spec.get("job") or spec).get("fake", {})
        self.out: Path = arguments.out
        self.lines = os.fdopen(arguments.events_fd, "w", buffering=1) if arguments.events_fd else sys.stdout
        self.stop_requested = False
        self.resume: Path | None = arguments.resume
        self.known: Path | None = arguments.known

    def write_line(self, event: str, **fields: Any) -> None:
        self.lines.write(json.dumps({"event": event, **fields}) + "\n")
        self.lines.flush()

    def print(self, text: str) -> None:
        """Print to the log. As in the real engine, a full disk costs only the line."""
        with suppress(OSError):
            builtins.print(text, flush=True)

    def stop(self, _: int, __: FrameType | None) -> None:
        self.stop_requested = True

    def run(self) -> int:
        self.print("the fake engine starts")
        signal.signal(signal.SIGTERM, self.stop)
        self.write_line("phase", phase="validating")
        if "weights_taken" in self.options:
            self.write_line("weights_taken", **self.options["weights_taken"])
        if "teacher_check" in self.options:
            self.write_line("teacher_check", **self.options["teacher_check"])
        self.write_line("phase", phase="training")
        step, weights = 0, "initial"
        if self.resume:
            state = json.loads(self.resume.read_text())
            step, weights = state["step"], state["weights"]
            self.print(f"continues after step {step}")
        steps = self.options.get("steps", 10)
        while step < steps:
            step, weights = step + 1, trained(weights, step + 1)
            time.sleep(self.options.get("step_s", 0.01))
            epoch = self.options.get("epochs", {}).get(str(step), 0)
            self.write_line("metric", trial="student", step=step, epoch=epoch, values={"train/loss": 1 / step})
            self.write_line("progress", trial="student", epoch=1, epochs=1, step=step, total_steps=steps, percent=100 * step / steps, seconds_remaining=None)  # fmt: skip  # noqa: E501
            if self.stop_requested or step % self.options.get("checkpoint_every", 5) == 0:
                self.checkpoint(step, weights)
            if self.stop_requested:
                return STOPPED
            self.misbehave(step)
        self.write_line("phase", phase="exporting")
        self.announce("artifact", self.out / "student.safetensors", weights, name="student.safetensors", media_type="application/octet-stream")  # fmt: skip  # noqa: E501
        self.announce("artifact", self.out / "report.json", "{}", name="report.json", media_type="application/json")
        known = protocol.KnownBefore.read(self.known).teacher_check if self.known else None
        report = {"student": {"accuracy": 0.5}, "weights": weights, "known": known, **self.options.get("report", {})}
        self.write_line("done", report=report)
        return 0

    def checkpoint(self, step: int, weights: str) -> None:
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        self.announce(
            "checkpoint", folder / f"{step:09d}.pt", json.dumps({"step": step, "weights": weights}), step=step
        )

    def announce(self, event: str, path: Path, text: str, **fields: Any) -> None:
        path.write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.write_line(event, path=str(path.relative_to(self.out)), bytes=len(text), sha256=digest, **fields)

    def misbehave(self, step: int) -> None:
        how = self.options.get("at", {}).get(str(step))
        if how is None:
            return
        once = self.options.get("once")
        if once is not None:
            if Path(once).exists():
                return
            Path(once).touch()
        getattr(self, how)()

    def segfault(self) -> None:
        ctypes.string_at(0)

    def vanish(self) -> None:
        os._exit(0)

    def exit_three(self) -> None:
        os._exit(3)

    def kill_itself(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def deaf(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    def work(self) -> None:
        """Print the signs of work that no progress counts."""
        self.write_line("working", done=1, total=2)
        self.write_line("waiting")

    def hold_the_interpreter(self) -> None:
        """A C call that never releases the interpreter lock: no signal handler runs any more."""
        ctypes.PyDLL(None).sleep(600)

    def loiter(self) -> None:
        """Wait for the request to stop."""
        while not self.stop_requested:
            time.sleep(0.01)

    def kill_guard(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    def kill_worker(self) -> None:
        os.kill(parent(os.getppid()), signal.SIGKILL)
        time.sleep(600)

    def out_of_memory(self) -> None:
        raise MemoryError

    def hoard(self) -> None:
        """Allocate and write memory until the process is killed."""
        taken = []
        while True:
            taken.append(b"x" * (16 << 20))

    def swell(self) -> None:
        """Take 300 MB of memory and wait."""
        self.taken = b"x" * 300_000_000
        time.sleep(600)

    def no_image(self) -> None:
        self.write_line("error", code="dataset_unreadable", message="no image", retryable=False, hint=None)
        sys.exit(1)

    def diverge(self) -> None:
        self.write_line(
            "error", code="loss_diverged", message="the loss is not a number", retryable=False, hint="lower lr"
        )
        sys.exit(1)

    def storage_full(self) -> None:
        self.write_line("error", code="storage_full", message="the disk is full", retryable=True, hint=None)
        sys.exit(1)

    def too_many_files(self) -> None:
        self.write_line("error", code="too_many_files", message="no file can be opened", retryable=True, hint=None)
        sys.exit(1)

    def wait(self) -> None:
        """Wait for the file `gate`, or for the request to stop."""
        gate = Path(self.options["gate"])
        while not (self.stop_requested or gate.exists()):
            time.sleep(0.01)

    def garbage(self) -> None:
        self.lines.write('not json\n[1, 2]\n{"no": "event"}\n')
        self.lines.flush()

    def grandchild(self) -> None:
        """Start a child that ignores SIGTERM and keeps every descriptor open."""
        sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", sleeper], close_fds=False)
        (self.out / "grandchild").write_text(str(child.pid))

    def escape(self) -> None:
        """Announce a file outside of its folder."""
        self.write_line("artifact", name="passwd", path="../../../../../../../../etc/passwd", media_type="text/plain", bytes=1, sha256="0" * 64)  # fmt: skip  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("spec", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wait", type=int)
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--cache-max-bytes", type=int)
    parser.add_argument("--teacher-cache-max-bytes", type=int)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--events-fd", type=int)
    arguments = parser.parse_args()
    if arguments.wait is not None:
        arguments = parser.parse_args(["run", *protocol.receive_order(arguments.wait, lambda: None)])
    return Engine(arguments).run()


if __name__ == "__main__":
    sys.exit(main())
