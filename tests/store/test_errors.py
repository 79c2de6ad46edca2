import pytest

from base.errors import DatabaseUnavailable
from store import errors

MESSAGES = {
    errors.NotFound("job", "job_1"): "there is no job 'job_1'",
    errors.ActionNotAllowed("failed", None, "pause", ["retry", "delete"]): (
        "pause is not allowed for a job that is failed; allowed: retry, delete"
    ),
    errors.ActionNotAllowed("running", "cancel", "pause", ["cancel"]): (
        "pause is not allowed for a job that is running (cancel requested); allowed: cancel"
    ),
    errors.LeaseLost("job_1", 2): "attempt 2 does not own job job_1 any more; its writes are refused",
    errors.IdempotencyConflict("k", "job", "job_1"): "the key 'k' was used with another body, for job job_1",
    errors.NameTaken("model", "resnet56"): "there is already a model named 'resnet56'; remove it first, "
    "or choose another name",
    errors.OffsetConflict("up_1", 0, 5): "upload up_1 continues at byte 5, not at 0",
    errors.UploadBusy("up_1"): "another request is writing to upload up_1",
    errors.BlobMismatch("up_1", "5 bytes", "6 bytes"): "up_1: expected 5 bytes, got 6 bytes",
}


@pytest.mark.parametrize(("error", "message"), MESSAGES.items(), ids=lambda value: type(value).__name__)
def test_store_error_has_a_message_for_the_client(error: errors.StoreError, message: str):
    assert isinstance(error, errors.StoreError)
    assert str(error) == message


def test_store_errors_have_a_code_each_as_the_docstring_lists_them():
    codes = {error.__name__: error.code for error in errors.StoreError.__subclasses__()}
    lines = [line.split() for line in errors.__doc__.splitlines() if "─" in line]
    assert codes == {name: code for _, name, code, *_ in lines}
    assert len(set(codes.values())) == len(codes)


def test_details_are_what_an_answer_adds_to_the_message():
    assert errors.NotFound("job", "job_1").details == {}
    assert errors.OffsetConflict("up_1", 0, 5).details == {"offset": 5}
    assert errors.ActionNotAllowed("running", None, "delete", ["cancel"]).details == {
        "job_status": "running",
        "allowed_actions": ["cancel"],
    }


def test_database_unavailable_is_no_store_error():
    assert not issubclass(DatabaseUnavailable, errors.StoreError)
