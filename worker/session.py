"""One guard and what it guards, in a session of their own: started, ticked, ended, and always reaped.

The engine in it waits for its order (`kdcore.protocol`). A session is used as a context manager: leaving the block
leaves no process of it behind.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from tempfile import TemporaryFile
from typing import Self

from base.clock import boottime
from worker import guard

ANSWERS_IN_S = 5.0
"""How long an engine that was ready may take to hear its order."""


class Session:
    """`deadline` and every `tick` are times of `boottime()` past which the guard kills all of it."""

    def __init__(self, command: Sequence[str], *, deadline: float, environment: Mapping[str, str]) -> None:
        self.started_at = boottime()
        self.deadline = deadline
        self.killed = False
        self.channel, theirs = socket.socketpair()
        # What is printed before there is an order, and with it a log.
        self._early = TemporaryFile()  # noqa: SIM115 - closed with the session
        ticks, self._ticks = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, repr(deadline), "--", *command, "--wait", str(theirs.fileno())],
                stdin=ticks,
                stdout=self._early,
                stderr=self._early,
                pass_fds=(theirs.fileno(),),
                env=dict(environment),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(ticks)
        # A frozen guard must not freeze the heartbeat with it, nor a frozen engine whoever gives it an order.
        os.set_blocking(self._ticks, False)
        self.channel.settimeout(ANSWERS_IN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        self.reap()
        self._close()

    @property
    def pid(self) -> int:
        """The guard's process id, which is also its session and its process group."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether the engine has imported all, and waits for its order."""
        return readable(self.channel.fileno(), timeout_s=0) and not self.has_ended()

    def tick(self, deadline: float) -> None:
        """Let it go on until `deadline`. A full pipe means that the guard has plenty to read already."""
        try:
            os.write(self._ticks, f"{deadline!r}\n".encode())
        except (BlockingIOError, BrokenPipeError):
            return
        self.deadline = deadline

    def ask_to_stop(self) -> None:
        """SIGTERM to the engine, by way of the guard: it writes a checkpoint and leaves."""
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        self.killed = True
        self.kill_rest()

    def kill_rest(self) -> None:
        """SIGKILL to what an engine that has ended may have left behind."""
        if self._process.returncode is None:
            _kill_group(self.pid)

    def has_ended(self) -> bool:
        """Without reaping: until then the process group's number cannot go to anybody else."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def reap(self) -> int:
        """Wait for the end; the guard's exit code, which tells the engine's."""
        if self._process.returncode is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            _kill_group(self.pid)
        return self._process.wait()

    def printed(self, since: int = 0) -> bytes:
        """What was printed before the order, and whatever the guard has to say; from byte `since` on."""
        descriptor = self._early.fileno()
        return os.pread(descriptor, max(0, os.fstat(descriptor).st_size - since), since)

    def _close(self) -> None:
        self._early.close()
        self.channel.close()
        os.close(self._ticks)


def readable(descriptor: int, timeout_s: float) -> bool:
    """Whether there is something to read, or an end to be seen. `select` knows no descriptor above 1023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
