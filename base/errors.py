"""Errors of a job, each with a stable code.

    EngineError
     ├─ SpecInvalid         spec_invalid          the spec contradicts itself, or a name in it does not exist
     ├─ WarningRefused      warning_refused       `strict`, and a warning is known before the training
     ├─ TeacherMismatch     teacher_mismatch      a file of weights or a program cannot be read, or does not fit
     ├─ TeacherUnavailable  teacher_unavailable   the job whose student should teach did not succeed
     ├─ WeightsUnavailable  weights_unavailable   published weights cannot be downloaded
     ├─ DatasetUnreadable   dataset_unreadable    an archive, image, row or label is invalid
     ├─ InputLost           input_lost            the file store has lost the bytes that the spec names
     ├─ OutOfMemory         out_of_memory         retryable: the device may have been shared
     ├─ LossDiverged        loss_diverged         the loss is not finite
     ├─ DeadlineExceeded    deadline_exceeded     the job took longer than its time limit
     ├─ WorkerLost          worker_lost           retryable: the process or its host vanished
     ├─ EngineSilent        engine_silent         retryable: the process hung, and was stopped
     ├─ StorageFull         storage_full          retryable: continues when there is disk space
     ├─ TooManyFiles        too_many_files        retryable: continues when the host lets a process open files again
     └─ Internal            internal              retryable: our fault

The codes are a closed list that clients may rely on; `retryable` says whether the same spec can succeed later.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from base.text import clipped


class EngineError(Exception):
    """Base of all errors: a stable code, a message of one sentence, and a hint at what would work."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "retryable": self.retryable, "hint": self.hint}


class SpecInvalid(EngineError):
    code = "spec_invalid"


class WarningRefused(EngineError):
    """A spec is `strict`, and something about it is guessed or looks wrong (`base/warning.py`)."""

    code = "warning_refused"


class TeacherMismatch(EngineError):
    """Raised where a teacher's file is read (`kdcore/weights/`, `kdcore/programs/`) and where it is used
    (`kdcore/prepare.py`, `lesson.py`, `measure/evaluate.py` and `measure/teacher_check.py`); also for the checkpoint
    from which a student starts. At submit, `kdcore/spec/fitting.py` and, for classes, `kdcore/spec/classes.py` return
    faults of this code, and `api/references.py` those that an inspection found."""

    code = "teacher_mismatch"


class TeacherUnavailable(EngineError):
    code = "teacher_unavailable"


class WeightsUnavailable(EngineError):
    """Raised by `kdcore/weights/published.py`. It is not retried: a machine without internet would only fail later."""

    code = "weights_unavailable"


class DatasetUnreadable(EngineError):
    code = "dataset_unreadable"

    def __init__(self, message: str, hint: str | None = None, option: str | None = None) -> None:
        super().__init__(message, hint)
        self.option = option
        """The field of the registration, or of the spec's data set, that is at fault; None if the file is."""


class InputLost(EngineError):
    """Raised by `worker/attempt.py`. It is not retried: what is gone from disk, or damaged there, must be uploaded
    again. A file store that is not mounted has lost nothing: that is StorageFull."""

    code = "input_lost"


class OutOfMemory(EngineError):
    code = "out_of_memory"
    retryable = True


class LossDiverged(EngineError):
    code = "loss_diverged"


class DeadlineExceeded(EngineError):
    code = "deadline_exceeded"


class WorkerLost(EngineError):
    code = "worker_lost"
    retryable = True


class EngineSilent(EngineError):
    code = "engine_silent"
    retryable = True


class StorageFull(EngineError):
    code = "storage_full"
    retryable = True


class TooManyFiles(EngineError):
    """A process, or its host, has no free file descriptor. Raised by `base/files.py`; it costs a job no attempt."""

    code = "too_many_files"
    retryable = True


class Internal(EngineError):
    code = "internal"
    retryable = True


CODES = tuple(kind.code for kind in EngineError.__subclasses__())
"""All codes that a failed job can have."""
Code = Literal[CODES]  # type: ignore[valid-type]


MESSAGE_CHARACTERS = 1000
"""The most of a message or pointer that is sent: both may contain what a client has written."""


@dataclass(frozen=True)
class Fault:
    """One fault of a spec: its place (RFC 6901 pointer, "" is the whole body), a message, and what would work."""

    pointer: str
    message: str
    code: str
    allowed: Any = None
    got: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Return what an answer says: as long as a person reads, whatever the client sent, and of strict JSON."""
        own = {"pointer": _limited(self.pointer), "message": _limited(self.message), "code": self.code}
        more = {"allowed": self.allowed, "got": clipped(self.got)}
        return own | {name: value for name, value in more.items() if value is not None}


def _limited(text: str) -> str:
    return str(clipped(text, MESSAGE_CHARACTERS))


class SpecFaults(SpecInvalid):
    """All faults of one spec at once."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer or '/'}: {fault.message}" for fault in faults))
        self.faults = faults


class DatabaseUnavailable(ConnectionError):
    """The database cannot be reached, or did not answer in time. A commit whose answer was lost may have succeeded."""
