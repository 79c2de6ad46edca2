import pytest

from base.errors import DatabaseUnavailable
from store import errors

SAID = {
    errors.NotFound("job", "job_1"): "there is no job 'job_1'",
    errors.ActionNotAllowed("failed", None, "pause", ["retry", "delete"]): (
        "a job that is failed cannot be asked to pause; allowed now: retry, delete"
    ),
    errors.ActionNotAllowed("running", "cancel", "pause", ["cancel"]): (
        "a job that is running, and was asked to cancel, cannot be asked to pause; allowed now: cancel"
    ),
    errors.NameTaken("model", "resnet56"): "there is a model named 'resnet56' already",
    errors.OffsetConflict("up_1", 0, 5): "upload up_1 goes on at byte 5, not at 0",
    errors.UploadBusy("up_1"): "another request is writing to upload up_1",
    errors.BlobMismatch("up_1", "5 bytes", "6 bytes"): "up_1: announced 5 bytes, found 6 bytes",
}


@pytest.mark.parametrize(("error", "said"), SAID.items(), ids=lambda given: type(given).__name__)
def test_a_refusal_says_what_was_asked_and_what_would_work(error: errors.StoreError, said: str):
    assert isinstance(error, errors.StoreError)
    assert str(error) == said


def test_no_database_is_no_refusal():
    assert not issubclass(DatabaseUnavailable, errors.StoreError)
