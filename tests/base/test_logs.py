"""Both forms of the log: a line a record, with ids, and without what could forge a line."""

import json
import logging
import sys

import pytest

from base.logs import REQUEST, JsonLines, Lines

JOB = "job_01k3m0v2xw8r0123456789ab"


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("distillery.api", logging.WARNING, __file__, 1, message, arguments, None)
    vars(made).update(more)
    return made


def test_json_lines_have_the_ids_of_request_and_job():
    scope = {"type": "http"}
    token = REQUEST.set(scope)
    try:
        scope["request_id"] = "req_1"  # the middleware inside of it draws the id
        line = json.loads(JsonLines().format(record("job %s: waits\nfor\u001b[2J", JOB)))
    finally:
        REQUEST.reset(token)
    assert line.pop("at").endswith("+00:00")
    assert line == {
        "level": "warning", "logger": "distillery.api", "message": f"job {JOB}: waits\nfor\u001b[2J",
        "request_id": "req_1", "job_id": JOB,
    }  # fmt: skip
    assert "request_id" not in json.loads(JsonLines().format(record("none is answered")))


def test_json_lines_have_the_fields_of_a_record_and_its_traceback():
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        made = record("GET /", fields={"status": 500, "job_id": "job_x"}, exc_info=sys.exc_info())
    line = json.loads(JsonLines().format(made))
    assert (line["status"], line["job_id"]) == (500, "job_x")
    assert "RuntimeError: broken" in line["traceback"]
    assert "\n" not in JsonLines().format(made)


@pytest.mark.parametrize("sent", ["a\n2026-01-01 ERROR forged", "a\x1b]0;title\x07", "a\x9b2J"])
def test_lines_show_control_characters_and_do_not_obey_them(sent: str):
    shown = Lines().format(record("named %s", sent))
    assert "\n" not in shown and "\x1b" not in shown and "\x9b" not in shown
    assert "named a\\" in shown
