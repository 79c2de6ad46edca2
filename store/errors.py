"""Why the store refused, in the words of whoever asked.

    StoreError
     ├─ NotFound              no such row in this project
     ├─ ActionNotAllowed             the job's status does not allow the move
     ├─ LeaseLost             another attempt owns the job: stop at once
     ├─ IdempotencyConflict   the key came before, with another body
     ├─ NameTaken             names are unique within a project
     ├─ BlobMismatch          the bytes are not the ones that were announced
     ├─ OffsetConflict        an upload goes on elsewhere than the client thinks
     └─ UploadBusy            another request writes to the same upload now
    DatabaseUnavailable       a ConnectionError: nothing is wrong with what was asked; try again

A full disk is the engine's own `StorageFull`, so that a failed job and a refused upload say the same.
"""


class StoreError(Exception):
    """Base of all refusals: a fact forbids what was asked, and asking again changes nothing."""


class NotFound(StoreError):
    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"there is no {kind} {id!r}")
        self.kind, self.id = kind, id


class ActionNotAllowed(StoreError):
    def __init__(self, status: str, requested: str | None, verb: str, allowed_actions: list[str]) -> None:
        stands = status if requested is None else f"{status}, and was asked to {requested},"
        super().__init__(
            f"a job that is {stands} cannot be asked to {verb}; allowed now: {', '.join(allowed_actions) or 'nothing'}"
        )
        self.status, self.verb, self.allowed_actions = status, verb, allowed_actions


class LeaseLost(StoreError):
    def __init__(self, job_id: str, fence: int) -> None:
        super().__init__(f"attempt {fence} no longer owns job {job_id}; what it still writes is refused")
        self.job_id, self.fence = job_id, fence


class IdempotencyConflict(StoreError):
    def __init__(self, key: str, job_id: str) -> None:
        super().__init__(f"the key {key!r} was used for another body, which became job {job_id}")
        self.key, self.job_id = key, job_id


class NameTaken(StoreError):
    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is a {kind} named {name!r} already")
        self.kind, self.name = kind, name


class BlobMismatch(StoreError):
    def __init__(self, what: str, announced: object, found: object) -> None:
        super().__init__(f"{what}: announced {announced}, found {found}")
        self.what, self.announced, self.found = what, announced, found


class OffsetConflict(StoreError):
    def __init__(self, id: str, sent: int, offset: int) -> None:
        super().__init__(f"upload {id} goes on at byte {offset}, not at {sent}")
        self.id, self.sent, self.offset = id, sent, offset


class UploadBusy(StoreError):
    def __init__(self, id: str) -> None:
        super().__init__(f"another request is writing to upload {id}")
        self.id = id
