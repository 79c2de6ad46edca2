"""The faults themselves, one after the other, and the hand that starts again what died."""

import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from bench.chaos.plan import Fault
from bench.chaos.system import FLOOR_BYTES, MODULE, Service, stop_all
from bench.processes import Exit, Member, Program, above, below, boottime, command_line, send

T = TypeVar("T")

TICK_S = 0.05
VICTIM_S = 20.0
"""So long a fault waits for somebody to meet it; then it meets nobody, and is counted as such."""
TRAINS = ("worker", "server")
GUARD = "guard.py"
QUEUE, TASK = "look", "distillery.look"
RINGS = 300


@dataclass(frozen=True)
class Strike:
    """A fault that met somebody. `engines`: the engines that a kill ended, or left without a master."""

    kind: str
    victim: str
    at: float
    """Seconds of `boottime()`."""
    kills: bool
    engines: tuple[int, ...] = ()


@dataclass
class Storm:
    service: Service
    watch: Callable[[], object] = lambda: None
    """Asked again and again; may raise where waiting has no end."""
    strikes: list[Strike] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    unheard: int = 0
    """Rings that were to be dropped or doubled, and met no broker."""
    _lasting: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    _processes: set[int] = field(default_factory=set)
    _read: int = 0

    def rage(self, faults: Iterable[Fault], in_time: Callable[[int], bool]) -> None:
        """All of them, in order. `in_time` is told how many kills there were, and may ask for patience."""
        for fault in faults:
            self.wait(_passed(fault.after_s))
            self.wait(lambda: in_time(self.kills))
            strike = self._met(fault)
            if strike is None:
                self.missed.append(fault)
            else:
                self.strikes.append(strike)

    @property
    def kills(self) -> int:
        return sum(strike.kills for strike in self.strikes)

    def wait(self, until: Callable[[], object]) -> None:
        """Meanwhile what died comes back, and what was to last so long ends."""
        while not until():
            self._tick()
            time.sleep(TICK_S)

    def calm(self) -> None:
        """End all that lasts, now."""
        for _, end in self._lasting:
            end()
        self._lasting = []

    def stop(self) -> None:
        """The end of all programs; the servers stay for whoever wants to look."""
        stop_all(member for member in self.service.members.values() if isinstance(member, Program))

    def _tick(self) -> None:
        self.watch()
        for member in self.service.members.values():
            if ended := member.look_after():
                self.exits.append(ended)
        over = [one for one in self._lasting if one[0] <= time.monotonic()]
        self._lasting = [one for one in self._lasting if one not in over]
        for _, end in over:
            end()

    def _met(self, fault: Fault) -> Strike | None:
        """The fault, as soon as its victim is there. A kill takes whom it gets in the end, however long that takes."""
        met: list[Strike] = []
        given_up = _passed(VICTIM_S)

        def try_it() -> bool:
            strike = self._strike(fault, choosy=fault.at_work and not given_up())
            met.extend([strike] if strike else [])
            return bool(met) or (given_up() and not fault.kills)

        self.wait(try_it)
        return met[0] if met else None

    def _strike(self, fault: Fault, choosy: bool) -> Strike | None:
        at = boottime()
        match fault.kind:
            case "worker" | "server" | "api" | "valkey" | "postgres":
                return self._kill_member(self._chosen_member(fault, choosy), fault, at)
            case "engine" | "guard":
                return self._kill_child(fault, at)
            case "freeze a worker" | "freeze the server" | "freeze valkey":
                return self._freeze(self._chosen_member(fault, choosy), fault, at)
            case "drop all rings":
                self._broker(lambda celery: celery.control.purge())
            case "ring 300 times":
                self._broker(_ring)
            case "fill the disk" | "leave no room to start":
                if not self.service.disk.mounted:
                    return None
                self.service.disk.leave(0 if fault.kind == "fill the disk" else FLOOR_BYTES // 2)
                self._later(fault, self.service.disk.free)
        return Strike(fault.kind, "", at, kills=False)

    def _chosen_member(self, fault: Fault, choosy: bool) -> Member | None:
        """Anybody of the kind; or, if we are choosy, of those who train, where the kind does."""
        members = self.service.named(fault.kind.rsplit(" ", 1)[-1])
        if choosy and members[0].name.startswith(TRAINS):
            members = [member for member in members if self._at_work(member)]
        return _chosen(members, fault) if members else None

    def _kill_member(self, victim: Member | None, fault: Fault, at: float) -> Strike | None:
        engines = _engines(victim)
        if victim is None or not victim.kill(fault.for_s):
            return None
        return Strike(fault.kind, victim.name, at, True, tuple(engines))

    def _kill_child(self, fault: Fault, at: float) -> Strike | None:
        """An engine at work, or the guard above one."""
        engines = [pid for member in self.service.members.values() for pid in self._at_work(member)]
        if not engines:
            return None
        engine = _chosen(engines, fault)
        victim = engine if fault.kind == "engine" else self._guard_of(engine)
        if victim is None or not send(victim, signal.SIGKILL):
            return None
        return Strike(fault.kind, str(victim), at, True, (engine,))

    def _freeze(self, victim: Member | None, fault: Fault, at: float) -> Strike | None:
        engines = _engines(victim)
        if victim is None or not victim.freeze():
            return None
        self._later(fault, victim.wake)
        return Strike(fault.kind, victim.name, at, False, tuple(engines))

    def _at_work(self, member: Member) -> list[int]:
        """Its engines that have begun a step."""
        recorded = self._recorded()
        return [pid for pid in _engines(member) if pid in recorded]

    def _guard_of(self, engine: int) -> int | None:
        return next((pid for pid in above(engine) if GUARD in command_line(pid)), None)

    def _later(self, fault: Fault, end: Callable[[], object]) -> None:
        self._lasting.append((time.monotonic() + fault.for_s, end))

    def _broker(self, act: Callable[[Celery], object]) -> None:
        """On a thread of its own: a broker that is frozen or away must not hold up the storm."""
        url = self.service.broker
        assert url is not None, "only a cluster's storm strikes at the broker"

        def try_it() -> None:
            self.unheard += not _with_broker(url, act)

        threading.Thread(target=try_it, daemon=True).start()

    def _recorded(self) -> set[int]:
        """Processes that have begun a step."""
        if self.service.records.exists():
            with self.service.records.open("rb") as file:
                file.seek(self._read)
                lines = file.read().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            self._read += sum(map(len, whole))
            self._processes |= {int(line.split()[3]) for line in whole}
        return self._processes


def _passed(seconds: float) -> Callable[[], bool]:
    """Whether so long has passed since this was called."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _ring(celery: Celery) -> None:
    """Stale and doubled rings, for nothing."""
    for _ in range(RINGS):
        celery.send_task(TASK, queue=QUEUE, expires=60, ignore_result=True, retry=False)


def _with_broker(url: str, act: Callable[[Celery], object]) -> bool:
    """False where the broker was away: it may just have been killed."""
    celery = Celery("chaos", broker=url, set_as_current=False)
    celery.conf.update(
        task_default_queue=QUEUE, broker_transport_options={"socket_timeout": 2, "socket_connect_timeout": 2}
    )
    try:
        act(celery)
    except (OperationalError, RedisError, OSError):
        return False
    finally:
        celery.close()
    return True


def _engines(member: Member | None) -> list[int]:
    """Engines below a program of ours, at work or waiting. A guard's command line ends with its engine's."""
    if not isinstance(member, Program):
        return []
    lines = {pid: command_line(pid) for pid in below(member.pid)}
    return sorted(pid for pid, words in lines.items() if MODULE in words and GUARD not in words)


def _chosen(among: list[T], fault: Fault) -> T:
    return among[int(fault.which * len(among))]
