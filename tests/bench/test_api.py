"""The bench of the API: its load, and a short run."""

import subprocess
import sys

import pytest

from bench.api import Load, request
from bench.processes import REPOSITORY


def test_request_is_complete() -> None:
    sent = request("http://h:1/v1/jobs?limit=2", "POST", {"a": 1}, If_None_Match='"x"')
    head, _, body = sent.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/jobs?limit=2 HTTP/1.1",
        b"Host: h:1",
        b"Content-Type: application/json",
        b'If-None-Match: "x"',
        b"Content-Length: 8",
    ]
    assert body == b'{"a": 1}'


@pytest.mark.parametrize(("share", "wait"), [(0.5, 2.0), (0.99, 4.0), (0.0, 1.0)])
def test_load_within_is_the_wait_of_a_share_of_the_answers(share: float, wait: float) -> None:
    assert Load(1.0, [4.0, 1.0, 2.0, 3.0]).within(share) == wait


@pytest.mark.slow
def test_bench_runs() -> None:
    command = [sys.executable, "-m", "bench.api", "--smoke"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    names = {line[:22].strip() for line in ran.stdout.splitlines()}
    assert names >= {"bare", "poll", "poll, 304", "list", "no match", "submit", "poll, 5 streams"}
