"""The Python client: one method for each route. Answers are the service's JSON as typed dictionaries (`base/wire.py`).

    with Distillery() as distillery:
        job = distillery.submit({"dataset": "digits", "student": "convnet4", "method": "supervised"})
        job = distillery.wait(job["id"])
        distillery.download(job["id"], to="student.safetensors")

The defaults of the address and the key are DISTILLERY_URL and DISTILLERY_API_KEY.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack
from uuid import uuid4

import httpx

from base.defaults import DEFAULT_URL
from base.jobs import TERMINAL
from base.references import STUDENT_FILE
from base.wire import (
    ArtifactView,
    AttemptView,
    AuditView,
    BenchmarkView,
    CollectionView,
    Dataset,
    DeliveryView,
    EventView,
    JobFilters,
    JobSummary,
    JobView,
    KeyView,
    LimitsView,
    MeasuredModel,
    Model,
    NewKeyView,
    PredictionView,
    ProjectView,
    Role,
    SecretWebhookView,
    StorageView,
    Suggestions,
    UploadView,
    ValidationView,
    WebhookView,
    WorkerView,
)
from client import transfer
from client.connection import Connection
from client.errors import ApiError, DistilleryError, InvalidInput, NotEnded
from client.event_stream import EventStream
from client.transfer import CHUNK_BYTES, OnProgress

INSPECTION_POLL_S = 0.5
PREDICTION_POLL_S = 0.5
OUTAGE_S = 120.0
"""The longest outage of the server that waiting tolerates."""


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
        """`retries` and `pause_s` (doubled each time) apply to failed transmissions, never to refused requests."""
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

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> JobView:
        """Queue a job. An ApiError lists every fault of the spec.

        The default idempotency key is random. It prevents a second job when the request is sent again after a
        failed transmission.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        job: JobView = self.connection.json("POST", "/v1/jobs", json=dict(spec), headers=headers, idempotent=True)
        return job

    def validate(self, spec: Mapping[str, Any], *, probe: bool = True) -> ValidationView:
        """Check a spec without submitting it. Returns every fault, or the resolved spec and an estimate.

        If the cost of such a job was never measured, the server runs a few of its steps, which takes some seconds;
        not with `probe=False`.
        """
        path = "/v1/jobs/validate" + ("" if probe else "?probe=false")
        validation: ValidationView = self.connection.json("POST", path, json=dict(spec), idempotent=True)
        return validation

    def job(self, job_id: str) -> JobView:
        job: JobView = self.connection.json("GET", f"/v1/jobs/{job_id}")
        return job

    def jobs(self, *, limit: int = 100, **filters: Unpack[JobFilters]) -> Iterator[JobSummary]:
        """Yield the jobs that match all filters, newest first, or as `sort` says, without specs and results.

        `limit` is the size of the pages, which are fetched as needed. `full_jobs` yields whole jobs.
        """
        return self._jobs(limit, filters)

    def full_jobs(self, *, limit: int = 100, **filters: Unpack[JobFilters]) -> Iterator[JobView]:
        """Yield whole jobs, as `job` returns one; see `jobs`."""
        return self._jobs(limit, filters, view="full")

    def label_job(self, job_id: str, labels: Mapping[str, str]) -> JobView:
        """Replace the labels of a job."""
        job: JobView = self.connection.json("PATCH", f"/v1/jobs/{job_id}", json={"labels": dict(labels)})
        return job

    def _jobs(self, limit: int, filters: Mapping[str, Any], **more: str) -> Iterator[Any]:
        if unknown := filters.keys() - JobFilters.__annotations__.keys():
            raise TypeError(f"jobs() has no filter {', '.join(sorted(unknown))}")
        return self._pages("/v1/jobs", limit=limit, **more, **filters)

    def cancel(self, job_id: str) -> JobView:
        """Cancel a job. A running job becomes `cancelled` when its process has ended: `wait` for that."""
        return self._act(job_id, "cancel", idempotent=True)

    def pause(self, job_id: str) -> JobView:
        return self._act(job_id, "pause", idempotent=True)

    def resume(self, job_id: str) -> JobView:
        return self._act(job_id, "resume")

    def retry(self, job_id: str, *, from_scratch: bool = False) -> JobView:
        """Queue a failed or cancelled job again. It continues from its last checkpoint, or starts from scratch."""
        return self._act(job_id, "retry", body={"from": "scratch" if from_scratch else "checkpoint"})

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with its files."""
        self.connection.request("DELETE", f"/v1/jobs/{job_id}")

    def attempts(self, job_id: str) -> list[AttemptView]:
        """Return all attempts of a job, oldest first."""
        return list(self._pages(f"/v1/jobs/{job_id}/attempts"))

    def events(self, job_id: str, *, after: int = 0) -> list[EventView]:
        """Return the events so far, from number `after` + 1."""
        events: list[EventView] = []
        more = True
        while more:
            last = events[-1]["seq"] if events else after
            page = self.connection.json("GET", f"/v1/jobs/{job_id}/events", params={"after": last})
            events += page["data"]
            more = page["next"] is not None
        return events

    def watch(self, job_id: str, *, after: int = 0, max_outage_s: float = OUTAGE_S) -> Iterator[EventView]:
        """Iterate over the events until the job has ended: each once, in order, also if the server restarts."""
        return iter(EventStream(self.connection, job_id, after, max_outage_s))

    def wait(
        self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 0.5, max_outage_s: float = OUTAGE_S
    ) -> JobView:
        """Return the job when it has ended, in any status. Raises NotEnded after `timeout_s`; the job continues.

        An outage of the server is tolerated for `max_outage_s`.
        """
        began = answered_at = time.monotonic()
        status = "out of reach"
        while True:
            try:
                job = self.job(job_id)
            except DistilleryError as error:
                if not error.transient or time.monotonic() - answered_at > max_outage_s:
                    raise
            else:
                answered_at, status = time.monotonic(), job["status"]
                if status in TERMINAL:
                    return job
            if timeout_s is not None and time.monotonic() - began >= timeout_s:
                raise NotEnded(job_id, status, timeout_s)
            time.sleep(poll_s)

    def metrics(
        self, job_id: str, keys: list[str] | None = None, *, after_step: int | None = None, max_points: int = 500
    ) -> dict[str, dict[str, list[tuple[int, float | None]]]]:
        """Return curves by trial (`student`, `alone`, `assistant-1`, …) and key (`validation/accuracy`, …), each as a
        list of (step, value)."""
        params = {"keys": ",".join(keys) if keys else None, "after_step": after_step, "max_points": max_points}
        answer = self.connection.json("GET", f"/v1/jobs/{job_id}/metrics", params=_without_none(params))
        return {
            trial: {key: [(step, value) for step, value in points] for key, points in curves.items()}
            for trial, curves in answer["series"].items()
        }

    def logs(self, job_id: str, *, tail: int = 1000, attempt: int | None = None) -> str:
        """Return the last lines that an attempt printed. Default: the newest attempt."""
        params = _without_none({"tail": tail, "attempt": attempt})
        return self.connection.request("GET", f"/v1/jobs/{job_id}/logs", params=params).text

    def artifacts(self, job_id: str) -> list[ArtifactView]:
        """Return the files of a succeeded job: name, size, SHA-256."""
        artifacts: list[ArtifactView] = self.connection.json("GET", f"/v1/jobs/{job_id}/artifacts")["data"]
        return artifacts

    def download(
        self,
        job_id: str,
        name: str = STUDENT_FILE,
        *,
        to: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Path:
        """Fetch a file of the job to `to`, a path or a folder. The file appears only when complete and checked.

        A broken download leaves a hidden partial file beside it; the next call continues from there.
        """
        artifact = self._artifact(job_id, name)
        target = Path(to) if to is not None else Path(name)
        if target.is_dir():
            target /= name
        return transfer.download(self.connection, artifact, target, on_progress=on_progress)

    def predict(self, job_id: str, image: str | Path | bytes, *, timeout_s: float = 120) -> PredictionView:
        """Show an image (a path, or the bytes of its file) to the teacher and the student of a job that has succeeded.

        Waits for the answer for as long as `timeout_s`; then the state is still `waiting` or `running`. An ApiError
        with the code `image_unreadable` says that the file is no image.
        """
        content = image if isinstance(image, bytes) else _bytes_of(Path(image))
        until = time.monotonic() + timeout_s
        found: PredictionView = self.connection.json(
            "POST", f"/v1/jobs/{job_id}/predict", content=content, idempotent=True
        )
        while found["state"] in ("waiting", "running") and time.monotonic() < until:
            time.sleep(PREDICTION_POLL_S)
            found = self.connection.json("GET", f"/v1/predictions/{found['id']}")
        return found

    # Files, models, data sets

    def upload(
        self,
        path: str | Path,
        *,
        resume: str | None = None,
        on_progress: OnProgress | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> str:
        """Send a file in parts and return its blob, `sha256:<hex>`. `resume` is the id of an upload to continue."""
        return transfer.upload(
            self.connection, Path(path), resume=resume, on_progress=on_progress, chunk_bytes=chunk_bytes
        )

    def register_model(
        self,
        name: str,
        file: str | Path,
        architecture: str | None = None,
        *,
        preprocessing: Mapping[str, list[float]] | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
        part: str | None = None,
        averaged: bool | None = None,
        labels: Mapping[str, str] | None = None,
        strict: bool = False,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Model:
        """Register a checkpoint as a teacher. `file` is a path, which is uploaded, or a blob. The server inspects
        it first; what it had to guess is in the model's `warnings`, and with `strict` an ApiError instead.

        Without `wait` it returns after a few seconds at most, then perhaps with the state `inspecting`: see
        `wait_for_model`. KeyboardInterrupt cancels the registration.

        `preprocessing` is `{"mean": [...], "std": [...]}`, one number for each channel, of pixels in 0..1.
        `class_names` are the names of the outputs, in their order; `image_size` is that of the training. Of a file with
        several networks, `part` names the one to take (`student`), and `averaged` says if the averaged weights are.
        """
        body = {
            "name": name,
            "blob": self._blob(file, on_progress),
            "architecture": architecture,
            "preprocessing": None if preprocessing is None else dict(preprocessing),
            "class_names": None if class_names is None else list(class_names),
            "image_size": image_size,
            "part": part,
            "averaged": averaged,
            "labels": None if labels is None else dict(labels),
            "strict": strict or None,
        }
        model: Model = self._register("/v1/models", _without_none(body))
        return self.wait_for_model(model) if wait else model

    def register_dataset(
        self,
        name: str,
        file: str | Path,
        *,
        image_size: int | None = None,
        options: Mapping[str, Any] | None = None,
        strict: bool = False,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        on_inspection: OnProgress | None = None,
    ) -> Dataset:
        """Register a data set: `.npz` arrays, an archive of class folders, or such a folder, which is packed first (its
        progress is reported before that of the upload). The server reads every row first; what it had to decide itself
        is in the data set's `warnings`, and with `strict` an ApiError instead.

        `options` are the other fields that say how the images are read, such as `{"resize": "pad", "channels": 3}`.
        Jobs that name the data set read it like that.

        `on_inspection` gets the number of images that the server has read, and of all. Without `wait` it returns after
        a few seconds at most, then perhaps with the state `inspecting`: see `wait_for_dataset`. KeyboardInterrupt
        cancels the registration.
        """
        blob = self._packed_blob(file, on_progress)
        body = {**(options or {}), "name": name, "blob": blob, "image_size": image_size, "strict": strict or None}
        dataset: Dataset = self._register("/v1/datasets", _without_none(body))
        return self.wait_for_dataset(dataset, on_progress=on_inspection) if wait else dataset

    def wait_for_model(self, model: Model) -> Model:
        """Return a registered model when it has been inspected. Raises the ApiError of a refusal. KeyboardInterrupt
        cancels the registration."""
        waited: Model = self._inspected("/v1/models", model, None)
        return waited

    def wait_for_dataset(self, dataset: Dataset, *, on_progress: OnProgress | None = None) -> Dataset:
        """Return a registered data set when it has been inspected; see `wait_for_model`. `on_progress` gets the number
        of images that the server has read, and of all."""
        waited: Dataset = self._inspected("/v1/datasets", dataset, on_progress)
        return waited

    def models(self, *, labels: Sequence[str] = (), full: bool = False) -> Iterator[Model]:
        """Yield the registered models, newest first, with the main facts, or all with `full`. `labels` are `name:value`
        or names, which must all match."""
        return self._registered("/v1/models", labels, full)

    def label_model(self, name_or_id: str, labels: Mapping[str, str]) -> Model:
        """Replace the labels of a model."""
        model: Model = self.connection.json("PATCH", f"/v1/models/{name_or_id}", json={"labels": dict(labels)})
        return model

    def model(self, name_or_id: str) -> MeasuredModel:
        model: MeasuredModel = self.connection.json("GET", f"/v1/models/{name_or_id}")
        return model

    def delete_model(self, name_or_id: str) -> None:
        self.connection.request("DELETE", f"/v1/models/{name_or_id}")

    def evaluate_model(
        self,
        name_or_id: str,
        dataset: str,
        *,
        image_size: int | None = None,
        preprocessing: Mapping[str, list[float]] | None = None,
        class_map: Mapping[str, str | int | Sequence[str | int]] | None = None,
        strict: bool = False,
        idempotency_key: str | None = None,
    ) -> JobView:
        """Queue a job that measures a registered model on all test images of a data set. `wait` for it: its `result`
        is an `Evaluation`. `class_map` names the model's outputs for each class of the data, where they differ. The
        idempotency key is that of `submit`."""
        body = {
            "dataset": dataset,
            "image_size": image_size,
            "preprocessing": None if preprocessing is None else dict(preprocessing),
            "class_map": None if class_map is None else dict(class_map),
            "strict": strict or None,
        }
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        path = f"/v1/models/{name_or_id}/evaluations"
        job: JobView = self.connection.json("POST", path, json=_without_none(body), headers=headers, idempotent=True)
        return job

    def evaluations(self, name_or_id: str) -> Iterator[JobSummary]:
        """Yield the evaluations of a registered model, newest first, without their results."""
        return self._pages(f"/v1/models/{name_or_id}/evaluations", limit=100)

    def export(
        self,
        job_id: str,
        formats: Sequence[str] = ("safetensors",),
        *,
        checkpoint: str = "best",
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
        strict: bool = False,
        idempotency_key: str | None = None,
    ) -> JobView:
        """Queue a job that writes and measures files of a job's student. `wait` for it: its `result` is an `Export`;
        `download` fetches the files from it. `checkpoint` is best or last; `options` are the `export_options` of a
        spec; with `strict` the job fails if a file is refused. The idempotency key is that of `submit`."""
        body = {
            "export": list(formats),
            "checkpoint": checkpoint,
            "export_options": None if options is None else dict(options),
            "name": name,
            "strict": strict or None,
        }
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        path = f"/v1/jobs/{job_id}/exports"
        job: JobView = self.connection.json("POST", path, json=_without_none(body), headers=headers, idempotent=True)
        return job

    def exports(self, job_id: str) -> Iterator[JobView]:
        """Yield the exports of a job, newest first, with their results."""
        return self._pages(f"/v1/jobs/{job_id}/exports", limit=100)

    def benchmark(
        self,
        architecture: str | None = None,
        *,
        model: str | None = None,
        job: str | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        threads: int | None = None,
        formats: Sequence[str] | None = None,
        anew: bool = False,
        idempotency_key: str | None = None,
    ) -> BenchmarkView:
        """Measure one network: a listed architecture, a registered model, or a job's student. What is kept already is
        returned at once; else `job` of the answer measures it: `wait` for that, then get `benchmark_of` its `key`."""
        body = {
            "architecture": architecture,
            "model": model,
            "job": job,
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "batch_size": batch_size,
            "device": device,
            "threads": threads,
            "export": None if formats is None else list(formats),
            "anew": anew or None,
        }
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        made: BenchmarkView = self.connection.json(
            "POST", "/v1/benchmarks", json=_without_none(body), headers=headers, idempotent=True
        )
        return made

    def benchmark_of(self, key: str) -> BenchmarkView:
        """Return a benchmark by its key."""
        found: BenchmarkView = self.connection.json("GET", f"/v1/benchmarks/{key}")
        return found

    def benchmarks(self) -> Iterator[BenchmarkView]:
        """Yield the benchmarks that are kept, newest first."""
        return self._pages("/v1/benchmarks", limit=100)

    def suggestions(self, **budget: str | float | None) -> Suggestions:
        """Return students that fit into a budget, from measured figures alone: `budget_ms`, `budget_bytes` or both, and
        `image_size`, `channels`, `classes`, `batch`, `runtime`, `device`, `threads`, `dataset`."""
        found: Suggestions = self.connection.json("GET", "/v1/suggestions", params=_without_none(budget))
        return found

    def datasets(self, *, labels: Sequence[str] = (), full: bool = False) -> Iterator[Dataset]:
        """Yield the registered data sets, newest first, then the built-in ones; see `models`."""
        return self._registered("/v1/datasets", labels, full)

    def label_dataset(self, name_or_id: str, labels: Mapping[str, str]) -> Dataset:
        """Replace the labels of a data set."""
        dataset: Dataset = self.connection.json("PATCH", f"/v1/datasets/{name_or_id}", json={"labels": dict(labels)})
        return dataset

    def _registered(self, path: str, labels: Sequence[str], full: bool) -> Iterator[Any]:
        return self._pages(path, limit=100, labels=list(labels) or None, view="full" if full else None)

    def dataset(self, name_or_id: str) -> Dataset:
        dataset: Dataset = self.connection.json("GET", f"/v1/datasets/{name_or_id}")
        return dataset

    def delete_dataset(self, name_or_id: str) -> None:
        self.connection.request("DELETE", f"/v1/datasets/{name_or_id}")

    # Webhooks

    def webhooks(self) -> Iterator[WebhookView]:
        """Yield the webhooks of the project, newest first."""
        return self._pages("/v1/webhooks", limit=100)

    def webhook(self, webhook_id: str) -> WebhookView:
        webhook: WebhookView = self.connection.json("GET", f"/v1/webhooks/{webhook_id}")
        return webhook

    def add_webhook(self, url: str, events: Sequence[str] | None = None) -> SecretWebhookView:
        """Notify an address of the project's jobs: by default of their ends and alerts.

        The answer has the `secret`, once. A receiver verifies each message with it and the library `standardwebhooks`.
        """
        body = _without_none({"url": url, "events": None if events is None else list(events)})
        webhook: SecretWebhookView = self.connection.json("POST", "/v1/webhooks", json=body)
        return webhook

    def change_webhook(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> WebhookView:
        """Change what is given. `enabled=True` also sends again to one that the service has disabled."""
        body = _without_none({"url": url, "events": None if events is None else list(events), "enabled": enabled})
        path = f"/v1/webhooks/{webhook_id}"
        webhook: WebhookView = self.connection.json("PATCH", path, json=body, idempotent=True)
        return webhook

    def delete_webhook(self, webhook_id: str) -> None:
        self.connection.request("DELETE", f"/v1/webhooks/{webhook_id}")

    def test_webhook(self, webhook_id: str) -> DeliveryView:
        """Queue a test message. `deliveries` says a moment later what came of it."""
        delivery: DeliveryView = self.connection.json("POST", f"/v1/webhooks/{webhook_id}/test")
        return delivery

    def rotate_webhook(self, webhook_id: str) -> SecretWebhookView:
        """Give a webhook another secret, which the answer has, once. For a day messages are signed with both."""
        webhook: SecretWebhookView = self.connection.json("POST", f"/v1/webhooks/{webhook_id}/rotate")
        return webhook

    def deliveries(self, webhook_id: str, *, status: str | None = None) -> Iterator[DeliveryView]:
        """Yield the messages to a webhook, newest first: all, or those that are `pending`, `delivered` or `failed`."""
        return self._pages(f"/v1/webhooks/{webhook_id}/deliveries", limit=100, status=status)

    def replay_delivery(self, webhook_id: str, delivery_id: str) -> DeliveryView:
        """Send a message again, under the same id."""
        path = f"/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay"
        delivery: DeliveryView = self.connection.json("POST", path, idempotent=True)
        return delivery

    # The catalogue and the server

    def methods(self) -> list[dict[str, Any]]:
        """Return all methods: the paper, target and needs of each, and its options as a JSON schema."""
        return list(self._pages("/v1/methods"))

    def method(self, name: str) -> dict[str, Any]:
        method: dict[str, Any] = self.connection.json("GET", f"/v1/methods/{name}")
        return method

    def architectures(
        self, *, family: str | None = None, source: str | None = None, classes: int = 10, channels: int = 3
    ) -> list[dict[str, Any]]:
        """Return all networks, each with its parameter count for these classes and channels."""
        return list(self._pages("/v1/architectures", family=family, source=source, classes=classes, channels=channels))

    def workers(self) -> list[WorkerView]:
        """Return all workers with their devices. `alive` workers take jobs."""
        return list(self._pages("/v1/workers"))

    def uploads(self, *, status: str | None = None) -> Iterator[UploadView]:
        """Return all uploads, newest first. `status`: `open` or `complete`."""
        return self._pages("/v1/uploads", status=status)

    def delete_upload(self, upload_id: str) -> None:
        """Delete an upload, and its bytes if nothing else names them."""
        self.connection.request("DELETE", f"/v1/uploads/{upload_id}")

    def storage(self) -> StorageView:
        """Return disk usage, free disk space, and for the operator also the runs of the collector."""
        storage: StorageView = self.connection.json("GET", "/v1/storage")
        return storage

    def collect(self) -> CollectionView:
        """Delete now what nothing needs any more. It may take minutes. Only the operator may do that."""
        collection: CollectionView = self.connection.json("POST", "/v1/storage/collections", timeout=None)
        return collection

    # Keys and projects

    def create_key(
        self, name: str, *, role: Role = "member", project: str | None = None, expires_in_s: int | None = None
    ) -> NewKeyView:
        """Make an API key. Its `key` is in this answer only. Only the operator names a project."""
        body = {"name": name, "role": role, "project": project, "expires_in_s": expires_in_s}
        key: NewKeyView = self.connection.json("POST", "/v1/keys", json=_without_none(body))
        return key

    def keys(self, *, project: str | None = None) -> Iterator[KeyView]:
        """Yield the keys of the project, newest first; for the operator those of all, or of one."""
        return self._pages("/v1/keys", limit=100, project=project)

    def rotate_key(self, key_id: str) -> NewKeyView:
        """Give a key another secret. The old one ends."""
        key: NewKeyView = self.connection.json("POST", f"/v1/keys/{key_id}/rotate")
        return key

    def revoke_key(self, key_id: str) -> None:
        """End a key for good, everywhere within five seconds."""
        self.connection.request("DELETE", f"/v1/keys/{key_id}")

    def create_project(self, name: str) -> ProjectView:
        how: dict[str, Any] = {"headers": _random_key(), "idempotent": True}
        project: ProjectView = self.connection.json("POST", "/v1/projects", json={"name": name}, **how)
        return project

    def projects(self) -> Iterator[ProjectView]:
        return self._pages("/v1/projects", limit=100)

    def limits(self, project: str | None = None) -> LimitsView:
        """Return the limits of a project, and what is used. Only the operator names one."""
        limits: LimitsView = self.connection.json("GET", "/v1/limits", params=_without_none({"project": project}))
        return limits

    def set_limits(self, project: str, limits: Mapping[str, int | None]) -> LimitsView:
        """Set limits of a project; None: the default holds again. Only the operator may do that."""
        changed: LimitsView = self.connection.json(
            "PATCH", f"/v1/projects/{project}", json={"limits": dict(limits)}, idempotent=True
        )
        return changed

    def audit(
        self,
        *,
        action: str | None = None,
        resource: str | None = None,
        key: str | None = None,
        outcome: str | None = None,
        project: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> Iterator[AuditView]:
        """Yield who did what to which resource, newest first: in the project, for the operator in all of them.

        Times are ISO 8601 with an offset.
        """
        filters = {"action": action, "resource": resource, "key": key, "outcome": outcome, "project": project}
        return self._pages("/v1/audit", limit=100, **filters, since=since, until=until)

    def delete_project(self, name: str) -> None:
        """Delete a project that has no jobs, models, data sets and uploads, and end its keys."""
        self.connection.request("DELETE", f"/v1/projects/{name}")

    def ready(self) -> bool:
        """Return True if the server can take jobs now. Raises Unreachable if there is no answer."""
        try:
            self.connection.request("GET", "/readyz")
        except ApiError as error:
            if error.code != "unavailable":
                raise
            return False
        return True

    def _act(self, job_id: str, verb: str, idempotent: bool = False, body: Mapping[str, str] | None = None) -> JobView:
        job: JobView = self.connection.json("POST", f"/v1/jobs/{job_id}/{verb}", idempotent=idempotent, json=body)
        return job

    def _pages(self, path: str, **params: Any) -> Iterator[Any]:
        after: str | None = None
        while True:
            page = self.connection.json("GET", path, params=_without_none({**params, "after": after}))
            yield from page["data"]
            after = page["next"]
            if after is None:
                return

    def _artifact(self, job_id: str, name: str) -> ArtifactView:
        artifacts = {artifact["name"]: artifact for artifact in self.artifacts(job_id)}
        if name not in artifacts:
            status = self.job(job_id)["status"]
            files = (
                f"its files are {', '.join(artifacts)}"
                if artifacts
                else f"it is {status}, only succeeded jobs have files"
            )
            raise InvalidInput(f"job {job_id} has no {name}: {files}")
        return artifacts[name]

    def _register(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            return self.connection.json("POST", path, json=body, headers=_random_key(), idempotent=True)
        except KeyboardInterrupt:
            self._cancel_unanswered(path, body)
            raise

    def _cancel_unanswered(self, path: str, body: Mapping[str, Any]) -> None:
        """Delete the row of a registration whose answer has not arrived, if there is one; never another one."""
        try:
            entry = self.connection.json("GET", f"{path}/{body['name']}")
            if entry.get("state") == "inspecting" and entry["blob"] == body["blob"]:
                self.connection.request("DELETE", f"{path}/{entry['id']}")
        except ApiError as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise

    def _inspected(self, path: str, entry: Any, on_progress: OnProgress | None) -> Any:
        answered_at = time.monotonic()
        try:
            while entry.get("state") == "inspecting":
                if on_progress and entry["progress"]:
                    on_progress(entry["progress"]["done"], entry["progress"]["total"])
                time.sleep(INSPECTION_POLL_S)
                try:
                    entry = self.connection.json("GET", f"{path}/{entry['id']}")
                    answered_at = time.monotonic()
                except DistilleryError as error:
                    if not error.transient or time.monotonic() - answered_at > OUTAGE_S:
                        raise
        except KeyboardInterrupt:
            self.connection.request("DELETE", f"{path}/{entry['id']}")
            raise
        if entry.get("state") == "refused":
            raise _refusal(entry["error"])
        return entry

    def _packed_blob(self, file: str | Path, on_progress: OnProgress | None) -> str:
        if isinstance(file, str) and file.removeprefix("blob:").startswith("sha256:"):
            return self._blob(file, on_progress)
        with transfer.packed(Path(file), on_progress) as path:
            return self.upload(path, on_progress=on_progress)

    def _blob(self, file: str | Path, on_progress: OnProgress | None) -> str:
        if isinstance(file, str) and file.removeprefix("blob:").startswith("sha256:"):
            return file.removeprefix("blob:")
        return self.upload(file, on_progress=on_progress)


def _random_key() -> dict[str, str]:
    """Return a header with which a request may be sent again: it makes nothing twice."""
    return {"Idempotency-Key": uuid4().hex}


def _refusal(error: Mapping[str, Any]) -> ApiError:
    """Return the error that the POST of a registration would have been, if the inspection had ended earlier."""
    problem = {**error, "title": "The file cannot be used", "detail": error["message"]}
    del problem["message"]
    return ApiError(problem, httpx.codes.UNPROCESSABLE_ENTITY)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not None; the server has its own defaults for the others."""
    return {name: value for name, value in values.items() if value is not None}


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
