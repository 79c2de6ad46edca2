"""A failpoint acts once, at the passing that was asked for, and is nothing where nobody asked."""

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


def test_nothing_is_armed_by_itself():
    assert failpoints._armed == {}
    failpoint("anywhere")


def test_it_acts_at_the_passing_that_was_asked_for_and_only_then():
    arm("here=away:2, there=full")
    failpoint("here")
    with pytest.raises(DatabaseUnavailable):
        failpoint("here")
    failpoint("here")
    with pytest.raises(OSError) as raised:
        failpoint("there")
    assert raised.value.errno == errno.ENOSPC


def test_the_environment_arms_a_process():
    program = "from base.failpoints import failpoint; failpoint('here'); print('alive', flush=True); failpoint('here')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"DISTILLERY_FAILPOINTS": "here=kill:2", "PYTHONPATH": "."},
        capture_output=True,
        check=False,
    )
    assert (ended.stdout, ended.returncode) == (b"alive\n", -signal.SIGKILL)


def test_a_hung_thread_leaves_the_others_alone_and_goes_on_when_the_process_is_woken():
    program = """
        import threading
        from base.failpoints import failpoint

        def hang():
            print("before", flush=True)
            failpoint("here")
            print("after", flush=True)

        threading.Thread(target=hang).start()
        input()
        print("the others live", flush=True)
    """
    environment = {"DISTILLERY_FAILPOINTS": "here=hang", "PYTHONPATH": "."}
    command = [sys.executable, "-c", dedent(program)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout.readline() == b"before\n"
        process.stdin.write(b"\n")
        assert process.stdout.readline() == b"the others live\n"
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == b"after\n"
        assert process.wait(20) == 0


@pytest.mark.parametrize("text", ["here", "here=explode", "here=kill:soon"])
def test_what_cannot_be_meant_is_refused(text: str):
    with pytest.raises(ValueError, match="NAME=ACTION"):
        arm(text)
