"""Errors of the store, with messages for the client whose request failed.

    StoreError
     ├─ NotFound              not_found              no such row in this project
     ├─ ActionNotAllowed      action_not_allowed     the job's status does not allow the action; StillUsed
     ├─ NotExportable         not_exportable         the job has no weights of its student, or not these
     ├─ TeacherUnavailable    teacher_unavailable    the job whose student should teach has ended without one
     ├─ LeaseLost             lease_lost             another attempt owns the job: stop at once
     ├─ IdempotencyConflict   idempotency_conflict   the key was used for another body
     ├─ NameTaken             name_taken             names are unique within a project
     ├─ ProjectNotEmpty       project_not_empty      it has rows, which must be deleted first
     ├─ KeyEnded              key_ended              the key was revoked or has expired
     ├─ LimitReached          limit_reached          a limit of the project; waiting helps
     ├─ QuotaExceeded         quota_exceeded         a limit of the project; something must be deleted first
     ├─ BlobMismatch          checksum_mismatch      the bytes do not have the expected size or digest
     ├─ WebhookDisabled       webhook_disabled       nothing is sent to it
     ├─ OffsetConflict        offset_conflict        the upload continues at another offset
     └─ UploadBusy            upload_busy            another request is writing to the same upload

`code` names the error for programs; `details` is what an answer adds to the message. A database that cannot be reached
is `base.errors.DatabaseUnavailable`, and a full disk is `base.errors.StorageFull`: these two can be retried.
"""

from typing import Any, ClassVar


class StoreError(Exception):
    """Base of the errors that are caused by stored data: the same request would fail again."""

    code: ClassVar[str]

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class NotFound(StoreError):
    code = "not_found"

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"there is no {kind} {id!r}")
        self.kind, self.id = kind, id


class ActionNotAllowed(StoreError):
    code = "action_not_allowed"

    def __init__(self, status: str, requested: str | None, action: str, allowed_actions: list[str]) -> None:
        state = status if requested is None else f"{status} ({requested} requested)"
        super().__init__(
            f"{action} is not allowed for a job that is {state}; allowed: {', '.join(allowed_actions) or 'nothing'}",
            job_status=status,
            allowed_actions=allowed_actions,
        )
        self.status, self.action, self.allowed_actions = status, action, allowed_actions


class StillUsed(ActionNotAllowed):
    """A job that is to be deleted has jobs of its own that have not ended, such as exports."""

    def __init__(self, status: str, users: list[str]) -> None:
        StoreError.__init__(
            self,
            f"delete is not allowed while jobs that use this one's student have not ended: {', '.join(users)}; cancel "
            "them, or wait",
            job_status=status,
            allowed_actions=[],
        )
        self.status, self.action, self.allowed_actions = status, "delete", []


class NotExportable(StoreError):
    code = "not_exportable"

    def __init__(self, message: str, allowed: list[str]) -> None:
        super().__init__(message, allowed_checkpoints=allowed)
        self.allowed = allowed


class TeacherUnavailable(StoreError):
    code = "teacher_unavailable"

    def __init__(self, job_id: str, status: str | None) -> None:
        """`status` is that of the teacher's job, None if it does not exist any more."""
        state = "was deleted: submit a new job" if status is None else f"is {status}: retry it first"
        super().__init__(f"job {job_id}, whose student this job needs, {state}", teacher_job=job_id)
        self.job_id, self.status = job_id, status


class LeaseLost(StoreError):
    code = "lease_lost"

    def __init__(self, job_id: str, fence: int) -> None:
        super().__init__(f"attempt {fence} does not own job {job_id} any more; its writes are refused")
        self.job_id, self.fence = job_id, fence


class IdempotencyConflict(StoreError):
    code = "idempotency_conflict"

    def __init__(self, key: str, kind: str, id: str) -> None:
        super().__init__(f"the key {key!r} was used with another body, for {kind} {id}")
        self.key, self.kind, self.id = key, kind, id


class NameTaken(StoreError):
    code = "name_taken"

    def __init__(self, kind: str, name: str, *, deleted: bool = False) -> None:
        if deleted:
            super().__init__(f"the {kind} {name!r} was deleted, and its name is not given again; choose another name")
        else:
            super().__init__(f"there is already a {kind} named {name!r}; remove it first, or choose another name")
        self.kind, self.name = kind, name


class ProjectNotEmpty(StoreError):
    code = "project_not_empty"

    def __init__(self, name: str, holds: list[str]) -> None:
        has = f"has {' and '.join(holds)}: delete these first" if holds else "is the service's own and stays"
        super().__init__(f"project {name!r} {has}", holds=holds)
        self.name, self.holds = name, holds


class LimitReached(StoreError):
    code = "limit_reached"

    def __init__(self, limit: str, value: int, used: int, retry_after_s: int) -> None:
        super().__init__(
            f"the project's limit {limit} is {value}, and it has {used}; try again in {retry_after_s} s",
            limit=limit,
            value=value,
            used=used,
        )
        self.limit, self.value, self.used, self.retry_after_s = limit, value, used, retry_after_s


class QuotaExceeded(StoreError):
    code = "quota_exceeded"

    def __init__(self, limit: str, value: int, used: int, more: int) -> None:
        super().__init__(
            f"the project's limit {limit} is {value}, it has {used}, and this needs {more} more; delete something "
            "first",
            limit=limit,
            value=value,
            used=used,
        )
        self.limit, self.value, self.used, self.more = limit, value, used, more


class KeyEnded(StoreError):
    code = "key_ended"

    def __init__(self, id: str) -> None:
        super().__init__(f"key {id} was revoked or has expired; make a new one")
        self.id = id


class BlobMismatch(StoreError):
    code = "checksum_mismatch"

    def __init__(self, name: str, expected: object, actual: object) -> None:
        super().__init__(f"{name}: expected {expected}, got {actual}")
        self.name, self.expected, self.actual = name, expected, actual


class WebhookDisabled(StoreError):
    code = "webhook_disabled"

    def __init__(self, id: str) -> None:
        super().__init__(f"webhook {id} is disabled, so that nothing is sent to it; set enabled to true first")
        self.id = id


class OffsetConflict(StoreError):
    code = "offset_conflict"

    def __init__(self, id: str, sent: int, offset: int) -> None:
        super().__init__(f"upload {id} continues at byte {offset}, not at {sent}", offset=offset)
        self.id, self.sent, self.offset = id, sent, offset


class UploadBusy(StoreError):
    code = "upload_busy"

    def __init__(self, id: str) -> None:
        super().__init__(f"another request is writing to upload {id}")
        self.id = id
