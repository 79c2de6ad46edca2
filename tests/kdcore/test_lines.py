import io
import json

import pytest

from kdcore.lines import Lines


def test_one_object_a_line():
    stream = io.StringIO()
    lines = Lines(stream)
    lines.phase("training")
    lines.metric("student", 5, 1, {"train/loss": 0.5})
    lines.warning("slow", "is slow")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["phase", "metric", "warning"]


def test_progress_is_due_once_a_second():
    lines = Lines(io.StringIO())
    assert lines.progress_is_due()
    lines.progress(step=1)
    assert not lines.progress_is_due()


def test_numbers_that_json_lacks_are_refused_rather_than_written():
    with pytest.raises(ValueError, match="JSON"):
        Lines(io.StringIO()).metric("student", 1, 1, {"train/loss": float("nan")})
