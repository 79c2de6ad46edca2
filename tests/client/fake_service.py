"""A service in miniature behind httpx.MockTransport: enough of the contract to see what the client does with it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from client.sdk import Distillery

Handler = Callable[[httpx.Request], httpx.Response]


def job(**changes: Any) -> dict[str, Any]:
    return {
        "id": "job_1",
        "name": "first light",
        "status": "succeeded",
        "phase": None,
        "requested": None,
        "allowed_actions": ["delete"],
        "method": "kd",
        "labels": {},
        "progress": None,
        "queue_position": None,
        "waiting": None,
        "priority": 0,
        "not_before": None,
        "deadline_at": None,
        "attempts_without_progress": 1,
        "max_attempts": 3,
        "checkpoint_step": None,
        "spec": {},
        "resolved_spec": {},
        "result": None,
        "error": None,
        "kind": "distillation",
        "teacher_check": None,
        "warnings": [],
        "created_at": "2026-01-02T03:04:05.678Z",
        "started_at": None,
        "finished_at": None,
        **changes,
    }


def listed(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job as a list has it."""
    result = job["result"]
    figures = None if result is None else {"accuracy": result.get("student", result)["accuracy"]}
    if result is not None and "proof" in result:
        figures["gap_closed"] = (result["proof"]["gap_closed"] or {}).get("value")
    absent = ("spec", "resolved_spec", "result", "warnings", "teacher_check")
    return {**{name: value for name, value in job.items() if name not in absent}, "figures": figures}


def warning(code: str = "normalization_guessed", pointer: str = "/teacher/preprocessing") -> dict[str, Any]:
    return {"code": code, "pointer": pointer, "message": "the data's mean is used", "hint": "give the teacher's"}


def teacher_check(accuracy: float = 0.702, images: int = 1000) -> dict[str, Any]:
    return {"accuracy": accuracy, "interval": [0.67, 0.73], "images": images, "test_samples": 10_000}


def waiting(
    position: int | None, reason: str, message: str = "", until: str | None = None, jobs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Fields of a queued job."""
    reasons = {"reason": reason, "message": message, "until": until, "jobs": list(jobs)}
    return {"status": "queued", "queue_position": position, "waiting": reasons}


def prediction(**changes: Any) -> dict[str, Any]:
    model = {"architecture": "convnet4", "top": [{"class": "cat", "number": 3, "probability": 0.931}]}
    image = {"width": 300, "height": 200, "kinds": ["colour"], "shown": "the square in its middle"}
    answer = {"teacher": model, "student": model, "alone": None, "agree": True, "image": image, "notes": []}
    fields = {"id": "pred_1", "job": "job_1", "state": "answered", "message": None, "answer": answer, "error": None}
    return {**fields, **changes}


def attempt(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "attempt": number,
        "attempts_without_progress": number,
        "worker": "host-7-abc",
        "device": "cuda:0",
        "started_at": f"2026-01-02T03:04:{number:02d}.000Z",
        "ended_at": None,
        "how": None,
        "first_step": None,
        "last_step": None,
        **changes,
    }


def measured(accuracy: float, **changes: Any) -> dict[str, Any]:
    return {
        "architecture": "convnet4",
        "parameters": 1030,
        "bytes": 4304,
        "accuracy": accuracy,
        "accuracy_top5": 1.0,
        "loss": 0.1,
        "agreement": accuracy,
        **changes,
    }


def report(student: float = 0.95, alone: float | None = 0.9) -> dict[str, Any]:
    return {
        "teacher": measured(0.99, architecture="convnet32", parameters=56_554, agreement=None),
        "student": measured(student),
        "alone": None if alone is None else measured(alone),
        "gain": None if alone is None else student - alone,
        "test_samples": 400,
        "seconds": 2.0,
        "warnings": [],
    }


def evaluation_job(accuracy: float = 0.75, **changes: Any) -> dict[str, Any]:
    """A succeeded job that has measured a model."""
    figures = {**measured(accuracy), "interval": [0.7012, 0.7944], "test_samples": 1400, "seconds": 2.0, "warnings": []}
    del figures["agreement"]
    rows = (("cat", 0.9), ("dog", 0.5), ("eel", None), ("fox", 0.7), ("gnu", 0.8))
    classes = [{"name": name, "accuracy": fraction, "test_samples": 350} for name, fraction in rows]
    fields = {
        "kind": "evaluation",
        "method": "evaluation",
        "resolved_spec": {"model": {"architecture": "convnet4"}},
        "result": {**figures, "per_class": classes},
    }
    return job(**{**fields, **changes})


def file_row(format: str, **changes: Any) -> dict[str, Any]:
    """The row of a student's file, as in a report."""
    return {
        "name": f"student.{format}",
        "format": format,
        "runtime": "onnxruntime 1.28.0",
        "bytes": 19_114,
        "accuracy": 0.639,
        "agreement": 0.989,
        "latency": [{"batch": 1, "p50_ms": 0.014, "p95_ms": 0.02}, {"batch": 32, "p50_ms": 1.5, "p95_ms": 2}],
        "threads": 1,
        "cpu": "fast",
        "peak_memory_bytes": 53_477_376,
        "refused": None,
        **changes,
    }


def export_job(**changes: Any) -> dict[str, Any]:
    """A succeeded job that has written two files, of which one is refused."""
    refused = {"code": "export_mismatch", "message": "it lost too much"}
    student = {**measured(0.639), "interval": [0.588, 0.687], "test_samples": 360}
    fields = {
        "kind": "export",
        "method": "export",
        "result": {
            "job": "job_0",
            "checkpoint": {"which": "last", "step": 1200, "epoch": 7},
            "measured": student,
            "files": [file_row("onnx"), file_row("onnx_int8", refused=refused)],
            "dataset": {},
            "seconds": 2.0,
            "warnings": [],
        },
    }
    return job(**{**fields, **changes})


def benchmark(**changes: Any) -> dict[str, Any]:
    """A benchmark that is kept."""
    figures = {
        "architecture": "convnet8",
        "parameters": 3778,
        "bytes": 15_456,
        "macs": 2_500_000,
        "num_classes": 10,
        "channels": 1,
        "image_size": [8, 8],
        "batch_size": 32,
        "device": {"kind": "cpu", "name": "fast"},
        "threads": 1,
        "files": [file_row("safetensors", name=None, accuracy=None, agreement=None, peak_memory_bytes=None)],
        "seconds": 2.0,
        "warnings": [],
    }
    fields = {"key": "0" * 64, "status": "succeeded", "job": "job_1", "figures": figures, "error": None}
    return {**fields, "measured_at": "2026-01-02T03:04:05.000Z", **changes}


def evaluation() -> dict[str, Any]:
    classes = [("a", 0.5, 4), ("b", 0.1, 4), ("c", None, 0)]
    return {
        "architecture": "resnet56",
        "parameters": 861_620,
        "bytes": 3_500_000,
        "accuracy": 0.7263,
        "interval": [0.717, 0.735],
        "accuracy_top5": 0.9194,
        "loss": 1.5,
        "test_samples": 10_000,
        "per_class": [dict(zip(("name", "accuracy", "test_samples"), one, strict=True)) for one in classes],
        "seconds": 2.0,
        "warnings": [],
    }


def event(seq: int, type: str = "phase", **data: Any) -> dict[str, Any]:
    return {"seq": seq, "at": f"2026-01-02T03:04:{seq:02d}.000Z", "type": type, "data": data}


def problem(status: int, code: str, detail: str = "", **extra: Any) -> httpx.Response:
    body = {"type": f"urn:{code}", "title": code.replace("_", " "), "status": status, "detail": detail, "code": code}
    return httpx.Response(status, json={**body, "request_id": "req_1", "errors": [], **extra})


def page(data: list[Any], following: str | None = None) -> httpx.Response:
    return httpx.Response(200, json={"data": data, "next": following})


class Broken(httpx.SyncByteStream):
    """A body that breaks off after some pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        raise httpx.ReadError("the line broke")


@dataclass
class FakeService:
    """Answers by `VERB /path`; a route is one answer for ever or a list of answers, one a request."""

    routes: dict[str, Any] = field(default_factory=dict)
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        route = self.routes.get(f"{request.method} {request.url.path}")
        if isinstance(route, list):
            route = route.pop(0) if len(route) > 1 else route[0]
        if route is None:
            return problem(404, "not_found", f"{request.method} {request.url.path} is not there")
        if isinstance(route, Exception):
            raise route
        if callable(route):
            return route(request)
        return route if isinstance(route, httpx.Response) else httpx.Response(200, json=route)

    def client(self, **settings: Any) -> Distillery:
        return Distillery("http://fake", transport=httpx.MockTransport(self), pause_s=0, **settings)

    def requests_to(self, verb_and_path: str) -> list[httpx.Request]:
        return [one for one in self.requests if f"{one.method} {one.url.path}" == verb_and_path]

    def bodies(self, verb_and_path: str) -> list[Any]:
        return [json.loads(one.content) for one in self.requests_to(verb_and_path)]


@dataclass
class FakeFiles:
    """One artifact, served in ranges, and uploads that take parts; `breaks` cut a transfer after so many bytes."""

    content: bytes = b""
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    taken: bytes = b""
    size: int = 0

    @property
    def artifact(self) -> dict[str, Any]:
        return {
            "name": "student.safetensors",
            "bytes": len(self.content),
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "media_type": "application/octet-stream",
            "href": "/v1/jobs/job_1/artifacts/student.safetensors",
        }

    def download(self, request: httpx.Request) -> httpx.Response:
        begin = int(request.headers.get("range", "bytes=0-")[6:-1]) if self.ranges else 0
        status = 206 if begin else 200
        headers = {"Content-Range": f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}"} if begin else {}
        rest = self.content[begin:]
        if self.breaks:
            return httpx.Response(status, headers=headers, stream=Broken(rest[: self.breaks.pop(0)]))
        return httpx.Response(status, headers=headers, content=rest)

    def create(self, request: httpx.Request) -> httpx.Response:
        self.size = int(request.headers["upload-length"])
        return httpx.Response(201, json=self.upload())

    def append(self, request: httpx.Request) -> httpx.Response:
        offset = int(request.headers["upload-offset"])
        if offset != len(self.taken):
            return problem(409, "offset_conflict", offset=len(self.taken))
        if self.breaks:
            self.taken += request.content[: self.breaks.pop(0)]
            raise httpx.WriteError("the line broke")
        self.taken += request.content
        return httpx.Response(200, json=self.upload())

    def upload(self) -> dict[str, Any]:
        complete = len(self.taken) == self.size
        return {
            "id": "up_1",
            "filename": "f",
            "offset": len(self.taken),
            "bytes": self.size,
            "status": "complete" if complete else "open",
            "blob": f"sha256:{hashlib.sha256(self.taken).hexdigest()}" if complete else None,
        }

    def service(self) -> FakeService:
        return FakeService(
            {
                "GET /v1/jobs/job_1/artifacts": lambda _: page([self.artifact]),
                "GET /v1/jobs/job_1/artifacts/student.safetensors": self.download,
                "POST /v1/uploads": self.create,
                "PATCH /v1/uploads/up_1": self.append,
                "GET /v1/uploads/up_1": lambda _: httpx.Response(200, json=self.upload()),
            }
        )
