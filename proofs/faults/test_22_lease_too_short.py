"""Row 22: a lease that one late heartbeat would lose is refused at start, with a value that would work.

Each limit of the timings by itself: `tests/store/test_settings.py`.
"""

import os
import subprocess
import sys

import pytest

from tests.worker.job_database import REPOSITORY


@pytest.mark.parametrize("program", ["worker", "api"])
def test_lease_too_short_is_refused(program: str):
    timings = {"DISTILLERY_LEASE_S": "4", "DISTILLERY_HEARTBEAT_S": "1.5", "DISTILLERY_LOOK_S": "1"}
    refused = subprocess.run(
        [sys.executable, "-m", program],
        cwd=REPOSITORY,
        env={**os.environ, **timings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert refused.returncode == 1
    assert f"{program}: " in refused.stderr and "set lease_s to 6 or more" in refused.stderr
