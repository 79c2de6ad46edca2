import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from textwrap import dedent

import pytest

from base import failpoints
from base.errors import DatabaseUnavailable
from base.failpoints import arm, failpoint


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def test_failpoint_does_nothing_by_default():
    assert failpoints._armed == {}
    failpoint("anywhere")


def test_failpoint_acts_at_the_given_pass_only():
    arm("here=away:2, there=full")
    failpoint("here")
    with pytest.raises(DatabaseUnavailable):
        failpoint("here")
    failpoint("here")
    with pytest.raises(OSError) as raised:
        failpoint("there")
    assert raised.value.errno == errno.ENOSPC


def test_arm_from_the_environment():
    program = "from base.failpoints import failpoint; failpoint('here'); print('alive', flush=True); failpoint('here')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"DISTILLERY_FAILPOINTS": "here=kill:2", "PYTHONPATH": "."},
        capture_output=True,
        check=False,
    )
    assert (ended.stdout, ended.returncode) == (b"alive\n", -signal.SIGKILL)


def test_failpoint_hang_stops_one_thread_until_sigcont():
    program = """
        import threading
        from base.failpoints import failpoint

        def hang():
            print("before", flush=True)
            failpoint("here")
            print("after", flush=True)

        threading.Thread(target=hang).start()
        input()
        print("the other thread runs", flush=True)
    """
    environment = {"DISTILLERY_FAILPOINTS": "here=hang", "PYTHONPATH": "."}
    command = [sys.executable, "-c", dedent(program)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout.readline() == b"before\n"
        process.stdin.write(b"\n")
        assert process.stdout.readline() == b"the other thread runs\n"
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == b"after\n"
        assert process.wait(20) == 0


@pytest.mark.parametrize("text", ["here", "here=explode", "here=kill:soon"])
def test_arm_refuses_an_invalid_text(text: str):
    with pytest.raises(ValueError, match="NAME=ACTION"):
        arm(text)
