"""The Python client: one method a route. Answers are the service's own JSON, as typed dictionaries.

    with Distillery() as distillery:
        job = distillery.submit({"dataset": "digits", "student": "convnet4", "method": "supervised"})
        job = distillery.wait(job["id"])
        distillery.download(job["id"], to="student.safetensors")

The address and the key come from DISTILLERY_URL and DISTILLERY_API_KEY where they are not given.
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx

from base.jobs import TERMINAL
from client import transfer
from client.answers import STUDENT_FILE, Artifact, Attempt, Dataset, Event, Job, Model, Storage, Validation
from client.connection import Connection
from client.errors import ApiError, DistilleryError, NotEnded, Unusable
from client.feed import Feed
from client.transfer import CHUNK_BYTES, Tell

DEFAULT_URL = "http://127.0.0.1:8000"
INSPECTION_S = 1800.0
"""Registering waits for the inspection of the whole file."""


class Distillery:
    """A Distillery server."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30,
        retries: int = 2,
        pause_s: float = 0.25,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`retries` and `pause_s` (doubled each time) are for what failed on the way, never for what was refused."""
        self.connection = Connection(
            base_url or os.environ.get("DISTILLERY_URL") or DEFAULT_URL,
            api_key or os.environ.get("DISTILLERY_API_KEY"),
            timeout_s=timeout_s,
            retries=retries,
            pause_s=pause_s,
            transport=transport,
        )

    @property
    def base_url(self) -> str:
        return self.connection.base_url

    def close(self) -> None:
        self.connection.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Jobs

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Queue a job. An ApiError names every fault of the spec.

        Without a key of yours a random one is sent, so that a request that broke on the way makes one job, not two.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        job: Job = self.connection.json("POST", "/v1/jobs", json=dict(spec), headers=headers, repeatable=True)
        return job

    def validate(self, spec: Mapping[str, Any]) -> Validation:
        """What `submit` would say, without submitting: every fault, the resolved spec, an estimate."""
        told: Validation = self.connection.json("POST", "/v1/jobs/validate", json=dict(spec), repeatable=True)
        return told

    def job(self, job_id: str) -> Job:
        found: Job = self.connection.json("GET", f"/v1/jobs/{job_id}")
        return found

    def jobs(self, *, status: str | None = None, method: str | None = None, limit: int = 100) -> Iterator[Job]:
        """Every job, newest first. `limit` is the size of the pages that are fetched as you go."""
        return self._pages("/v1/jobs", status=status, method=method, limit=limit)

    def cancel(self, job_id: str) -> Job:
        """A running job becomes `cancelled` when its process has really ended; `wait` for that."""
        return self._move(job_id, "cancel", repeatable=True)

    def pause(self, job_id: str) -> Job:
        return self._move(job_id, "pause", repeatable=True)

    def resume(self, job_id: str) -> Job:
        return self._move(job_id, "resume")

    def retry(self, job_id: str, *, from_scratch: bool = False) -> Job:
        """Queue a failed or cancelled job again: from its last checkpoint, or as if it had never run."""
        return self._move(job_id, "retry", body={"from": "scratch" if from_scratch else "checkpoint"})

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, and all that it left behind."""
        self.connection.ask("DELETE", f"/v1/jobs/{job_id}")

    def attempts(self, job_id: str) -> list[Attempt]:
        """Every claim of the job, oldest first: who tried, from which step to which, and how it ended."""
        return list(self._pages(f"/v1/jobs/{job_id}/attempts"))

    def events(self, job_id: str, *, after: int = 0) -> list[Event]:
        """The events so far, behind number `after`."""
        found: list[Event] = []
        more = True
        while more:
            seen = found[-1]["seq"] if found else after
            page = self.connection.json("GET", f"/v1/jobs/{job_id}/events", params={"after": seen})
            found += page["data"]
            more = page["next"] is not None
        return found

    def watch(self, job_id: str, *, after: int = 0, patience_s: float = 120) -> Iterator[Event]:
        """Events as they happen, until the job has ended: each once, in order, over breaks and restarts."""
        return iter(Feed(self.connection, job_id, after, patience_s))

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 0.5, patience_s: float = 120) -> Job:
        """The job once it has ended, however it ended. NotEnded after `timeout_s`: the job goes on.

        A server that is away is waited for, no longer than `patience_s` at a time.
        """
        began = heard = time.monotonic()
        status = "out of reach"
        while True:
            try:
                job = self.job(job_id)
            except DistilleryError as error:
                if not error.passes or time.monotonic() - heard > patience_s:
                    raise
            else:
                heard, status = time.monotonic(), job["status"]
                if status in TERMINAL:
                    return job
            if timeout_s is not None and time.monotonic() - began >= timeout_s:
                raise NotEnded(job_id, status, timeout_s)
            time.sleep(poll_s)

    def metrics(
        self, job_id: str, keys: list[str] | None = None, *, after_step: int | None = None, max_points: int = 500
    ) -> dict[str, dict[str, list[tuple[int, float | None]]]]:
        """Curves by trial (`student`, `alone`, `assistant-1`, ...) and key, such as `validation/accuracy`, as
        (step, value) points."""
        wanted = {"keys": ",".join(keys) if keys else None, "after_step": after_step, "max_points": max_points}
        answer = self.connection.json("GET", f"/v1/jobs/{job_id}/metrics", params=_given(wanted))
        return {
            trial: {key: [(step, value) for step, value in points] for key, points in curves.items()}
            for trial, curves in answer["series"].items()
        }

    def logs(self, job_id: str, *, tail: int = 1000, attempt: int | None = None) -> str:
        """The end of what the job's process printed."""
        return self.connection.ask(
            "GET", f"/v1/jobs/{job_id}/logs", params=_given({"tail": tail, "attempt": attempt})
        ).text

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The files of a succeeded job: name, size, SHA-256."""
        found: list[Artifact] = self.connection.json("GET", f"/v1/jobs/{job_id}/artifacts")["data"]
        return found

    def download(
        self, job_id: str, name: str = STUDENT_FILE, *, to: str | Path | None = None, tell: Tell | None = None
    ) -> Path:
        """Fetch a file of the job; `to` is a path or a folder. It appears there whole and checked, or not at all.

        What broke off is kept beside it under a hidden name, and the next call goes on from there.
        """
        artifact = self._artifact(job_id, name)
        target = Path(to) if to is not None else Path(name)
        return transfer.download(self.connection, artifact, target / name if target.is_dir() else target, tell=tell)

    # Files, models, data sets

    def upload(
        self,
        path: str | Path,
        *,
        resume: str | None = None,
        tell: Tell | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> str:
        """Send a file in parts; returns its blob, `sha256:<hex>`. `resume` takes the id of an upload that broke."""
        return transfer.upload(self.connection, Path(path), resume=resume, tell=tell, chunk_bytes=chunk_bytes)

    def register_model(
        self,
        name: str,
        file: str | Path,
        architecture: str | None = None,
        *,
        preprocessing: Mapping[str, list[float]] | None = None,
        tell: Tell | None = None,
    ) -> Model:
        """Make a checkpoint a teacher. `file` is a path, which is uploaded, or a blob. It is inspected first."""
        body = {
            "name": name,
            "blob": self._blob(file, tell),
            "architecture": architecture,
            "preprocessing": None if preprocessing is None else dict(preprocessing),
        }
        model: Model = self.connection.json("POST", "/v1/models", json=_given(body), timeout=INSPECTION_S)
        return model

    def register_dataset(
        self, name: str, file: str | Path, *, image_size: int | None = None, tell: Tell | None = None
    ) -> Dataset:
        """Make `.npz` arrays or an archive of class folders a data set. Every row is read first."""
        body = {"name": name, "blob": self._blob(file, tell), "image_size": image_size}
        dataset: Dataset = self.connection.json("POST", "/v1/datasets", json=_given(body), timeout=INSPECTION_S)
        return dataset

    def models(self) -> Iterator[Model]:
        return self._pages("/v1/models", limit=100)

    def model(self, name_or_id: str) -> Model:
        found: Model = self.connection.json("GET", f"/v1/models/{name_or_id}")
        return found

    def delete_model(self, name_or_id: str) -> None:
        self.connection.ask("DELETE", f"/v1/models/{name_or_id}")

    def datasets(self) -> Iterator[Dataset]:
        return self._pages("/v1/datasets", limit=100)

    def dataset(self, name_or_id: str) -> Dataset:
        found: Dataset = self.connection.json("GET", f"/v1/datasets/{name_or_id}")
        return found

    def delete_dataset(self, name_or_id: str) -> None:
        self.connection.ask("DELETE", f"/v1/datasets/{name_or_id}")

    # What there is

    def methods(self) -> list[dict[str, Any]]:
        """Every method: its paper, what it matches, what it needs, its options as a JSON schema."""
        return list(self._pages("/v1/methods"))

    def method(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.connection.json("GET", f"/v1/methods/{name}")
        return found

    def architectures(
        self, *, family: str | None = None, source: str | None = None, classes: int = 10, channels: int = 3
    ) -> list[dict[str, Any]]:
        """Every network that may teach or learn, with its parameter count for so many classes and channels."""
        return list(self._pages("/v1/architectures", family=family, source=source, classes=classes, channels=channels))

    def workers(self) -> list[dict[str, Any]]:
        """Who works, on what, and whether it proves that it does: `alive`."""
        return list(self._pages("/v1/workers"))

    def storage(self) -> Storage:
        """How much is kept, how much room there is, and what the collector removed lately."""
        found: Storage = self.connection.json("GET", "/v1/storage")
        return found

    def ready(self) -> bool:
        """Whether the server can take jobs now. Unreachable where there is none."""
        try:
            self.connection.ask("GET", "/readyz")
        except ApiError as refused:
            if refused.code != "unavailable":
                raise
            return False
        return True

    def _move(self, job_id: str, verb: str, repeatable: bool = False, body: Mapping[str, str] | None = None) -> Job:
        job: Job = self.connection.json("POST", f"/v1/jobs/{job_id}/{verb}", repeatable=repeatable, json=body)
        return job

    def _pages(self, path: str, **wanted: Any) -> Iterator[Any]:
        after: str | None = None
        while True:
            page = self.connection.json("GET", path, params=_given({**wanted, "after": after}))
            yield from page["data"]
            after = page["next"]
            if after is None:
                return

    def _artifact(self, job_id: str, name: str) -> Artifact:
        found = {artifact["name"]: artifact for artifact in self.artifacts(job_id)}
        if name not in found:
            status = self.job(job_id)["status"]
            made = f"it made {', '.join(found)}" if found else f"it is {status}, and files appear when a job succeeds"
            raise Unusable(f"job {job_id} has no {name}: {made}")
        return found[name]

    def _blob(self, file: str | Path, tell: Tell | None) -> str:
        if isinstance(file, str) and file.removeprefix("blob:").startswith("sha256:"):
            return file.removeprefix("blob:")
        return self.upload(file, tell=tell)


def _given(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not given: the server has its own defaults."""
    return {name: value for name, value in wanted.items() if value is not None}
