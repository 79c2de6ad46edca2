"""The injector: inject the planned faults in order, and start killed processes again."""

import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from base.clock import boottime
from base.wakeup import celery_settings, send_wakeup
from bench.chaos.plan import Fault
from bench.chaos.system import ENGINE_MODULE, MIN_FREE_BYTES, System
from bench.processes import (
    Program,
    Target,
    UnexpectedExit,
    ancestors,
    command_line,
    descendants,
    send_signal,
    stop_all,
)

T = TypeVar("T")

POLL_S = 0.05
TARGET_WAIT_S = 20.0
"""After this time without a suitable target, a kill takes any target, and any other fault is skipped."""
TRAINING_PROGRAMS = ("worker", "server")
GUARD = "guard.py"
WAKE_UPS = 300


@dataclass(frozen=True)
class Injection:
    """A fault that was injected."""

    kind: str
    target: str
    at: float
    """In seconds of `boottime()`."""
    kills: bool
    engines: tuple[int, ...] = ()
    """The engines that a kill ended, or whose worker it ended."""


@dataclass
class Injector:
    system: System
    watch: Callable[[], object] = lambda: None
    """Called at each poll; raises if the run makes no progress any more."""
    injections: list[Injection] = field(default_factory=list)
    skipped: list[Fault] = field(default_factory=list)
    exits: list[UnexpectedExit] = field(default_factory=list)
    broker_unreachable: int = 0
    """Number of faults at the broker that found none."""
    _lasting: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    """The faults that last: when each ends, and how to end it."""
    _training: set[int] = field(default_factory=set)
    _bytes_read: int = 0

    def inject_all(self, faults: Iterable[Fault], may_continue: Callable[[int], bool]) -> None:
        """Inject the faults in order. `may_continue` gets the number of kills and can delay the next fault."""
        for fault in faults:
            self.wait(_after(fault.after_s))
            self.wait(lambda: may_continue(self.kills))
            injection = self._inject(fault)
            if injection is None:
                self.skipped.append(fault)
            else:
                self.injections.append(injection)

    @property
    def kills(self) -> int:
        return sum(injection.kills for injection in self.injections)

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait for a condition; meanwhile start killed processes again, and end faults that are over."""
        while not condition():
            self._poll()
            time.sleep(POLL_S)

    def end_lasting_faults(self) -> None:
        for _, end in self._lasting:
            end()
        self._lasting = []

    def stop_programs(self) -> None:
        """Stop all programs. The servers continue, so that the database can be read."""
        stop_all(target for target in self.system.targets.values() if isinstance(target, Program))

    def _poll(self) -> None:
        self.watch()
        for target in self.system.targets.values():
            if unexpected := target.restart_if_due():
                self.exits.append(unexpected)
        over = [fault for fault in self._lasting if fault[0] <= time.monotonic()]
        self._lasting = [fault for fault in self._lasting if fault not in over]
        for _, end in over:
            end()

    def _inject(self, fault: Fault) -> Injection | None:
        """Inject a fault as soon as it has a target. Returns None if it was skipped; a kill is never skipped."""
        injections: list[Injection] = []
        waited_enough = _after(TARGET_WAIT_S)

        def try_once() -> bool:
            injection = self._try(fault, only_training=fault.needs_training and not waited_enough())
            injections.extend([injection] if injection else [])
            return bool(injections) or (waited_enough() and not fault.kills)

        self.wait(try_once)
        return injections[0] if injections else None

    def _try(self, fault: Fault, only_training: bool) -> Injection | None:
        at = boottime()
        match fault.kind:
            case "worker" | "server" | "api" | "valkey" | "postgres":
                return self._kill(self._choose_target(fault, only_training), fault, at)
            case "engine" | "guard":
                return self._kill_child(fault, at)
            case "freeze a worker" | "freeze the server" | "freeze valkey":
                return self._freeze(self._choose_target(fault, only_training), fault, at)
            case "drop all wake-ups":
                self._use_broker(lambda celery: celery.control.purge())
            case "send 300 wake-ups":
                self._use_broker(_send_wake_ups)
            case "fill the disk" | "leave little disk space":
                if not self.system.disk.mounted:
                    return None
                self.system.disk.fill(free_bytes=0 if fault.kind == "fill the disk" else MIN_FREE_BYTES // 2)
                self._end_later(fault, self.system.disk.free)
        return Injection(fault.kind, "", at, kills=False)

    def _choose_target(self, fault: Fault, only_training: bool) -> Target | None:
        """A target of the fault's kind. `only_training`: for programs that train, one that trains now."""
        targets = self.system.targets_named(fault.kind.rsplit(" ", 1)[-1])
        if only_training and targets[0].name.startswith(TRAINING_PROGRAMS):
            targets = [target for target in targets if self._training_engines(target)]
        return _choose(targets, fault) if targets else None

    def _kill(self, target: Target | None, fault: Fault, at: float) -> Injection | None:
        engines = _engines(target)
        if target is None or not target.kill(fault.duration_s):
            return None
        return Injection(fault.kind, target.name, at, True, tuple(engines))

    def _kill_child(self, fault: Fault, at: float) -> Injection | None:
        """Kill an engine that trains, or the guard above it."""
        engines = [pid for target in self.system.targets.values() for pid in self._training_engines(target)]
        if not engines:
            return None
        engine = _choose(engines, fault)
        pid = engine if fault.kind == "engine" else _guard_of(engine)
        if pid is None or not send_signal(pid, signal.SIGKILL):
            return None
        return Injection(fault.kind, str(pid), at, True, (engine,))

    def _freeze(self, target: Target | None, fault: Fault, at: float) -> Injection | None:
        engines = _engines(target)
        if target is None or not target.freeze():
            return None
        self._end_later(fault, target.unfreeze)
        return Injection(fault.kind, target.name, at, False, tuple(engines))

    def _end_later(self, fault: Fault, end: Callable[[], object]) -> None:
        self._lasting.append((time.monotonic() + fault.duration_s, end))

    def _use_broker(self, act: Callable[[Celery], object]) -> None:
        """Act on a thread of its own: a broker that is frozen or down must not delay the next faults."""
        url = self.system.broker
        assert url is not None, "only a cluster has a broker"

        def try_once() -> None:
            self.broker_unreachable += not _with_broker(url, act)

        threading.Thread(target=try_once, daemon=True).start()

    def _training_engines(self, target: Target) -> list[int]:
        """The engines of a program that have begun a step."""
        training = self._processes_with_steps()
        return [pid for pid in _engines(target) if pid in training]

    def _processes_with_steps(self) -> set[int]:
        """Processes that have begun a step, from the new lines of the step records."""
        if self.system.records.exists():
            with self.system.records.open("rb") as file:
                file.seek(self._bytes_read)
                lines = file.read().splitlines(keepends=True)
            complete = [line for line in lines if line.endswith(b"\n")]
            self._bytes_read += sum(map(len, complete))
            self._training |= {int(line.split()[3]) for line in complete}
        return self._training


def _after(seconds: float) -> Callable[[], bool]:
    """A condition that becomes true after `seconds`."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _send_wake_ups(celery: Celery) -> None:
    for _ in range(WAKE_UPS):
        send_wakeup(celery)


def _with_broker(url: str, act: Callable[[Celery], object]) -> bool:
    """Return False if the broker cannot be reached: it may just have been killed."""
    celery = Celery("chaos", broker=url, set_as_current=False)
    celery.conf.update(celery_settings(url))
    try:
        act(celery)
    except (OperationalError, RedisError, OSError):
        return False
    finally:
        celery.close()
    return True


def _engines(target: Target | None) -> list[int]:
    """The engines below a program, training or warm. The guard is left out: its command line ends with the engine's."""
    if not isinstance(target, Program):
        return []
    lines = {pid: command_line(pid) for pid in descendants(target.pid)}
    return sorted(pid for pid, line in lines.items() if ENGINE_MODULE in line and GUARD not in line)


def _guard_of(engine: int) -> int | None:
    return next((pid for pid in ancestors(engine) if GUARD in command_line(pid)), None)


def _choose(candidates: list[T], fault: Fault) -> T:
    return candidates[int(fault.choice * len(candidates))]
