"""A failpoint acts once, at the passing that was asked for, and is nothing where nobody asked."""

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from store import failpoints
from store.errors import DatabaseUnavailable
from store.failpoints import arm, failpoint


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
    program = "from store.failpoints import failpoint; failpoint('here'); print('alive', flush=True); failpoint('here')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"DISTILLERY_FAILPOINTS": "here=kill:2", "PYTHONPATH": "."},
        capture_output=True,
        check=False,
    )
    assert (ended.stdout, ended.returncode) == (b"alive\n", -signal.SIGKILL)


@pytest.mark.parametrize("text", ["here", "here=explode", "here=kill:soon"])
def test_what_cannot_be_meant_is_refused(text: str):
    with pytest.raises(ValueError, match="NAME=ACTION"):
        arm(text)
