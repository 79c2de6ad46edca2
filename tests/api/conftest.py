"""A server in this process with a real SQLite file, and jobs in any state."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import Connection

from api.app import create_app
from api.inspections import KINDS, OF_FILES, F, Inspector, Keep, OnProgress, Refused
from base.wire import Role
from kdcore.catalog import (
    ArchitectureFacts,
    DatasetFacts,
    ModelFacts,
    PublishedFacts,
    StartFacts,
    TapFacts,
    architecture,
)
from kdcore.catalog.facts import DATASET_READING, LogitsFacts, ProgramFacts
from kdcore.spec.cost import JobCost, ProbeRequest
from store import jobs, keys, lifecycle, projects
from store.artifacts import NewArtifact
from store.database import Database, migrate
from store.errors import NameTaken
from store.file_store import FileStore
from store.settings import Settings

SUPERVISED = {
    "name": "first light",
    "dataset": "digits",
    "student": "convnet8",
    "method": "supervised",
    "training": {"epochs": 3, "batch_size": 64},
}
DATASET = DatasetFacts(
    kind="arrays", num_classes=4, class_names=["a", "b", "c", "d"], channels=1, image_size=(8, 8), train=400, test=100,
    mean=[0.5], std=[0.25], reading=DATASET_READING,
)  # fmt: skip
MODEL = ModelFacts(
    architecture="convnet32", num_classes=10, channels=1, parameters=46_410, bytes=190_000, format="safetensors"
)
PUBLISHED = PublishedFacts(
    architecture="torchvision/resnet50", num_classes=100, channels=3, parameters=23_712_932, bytes=94_851_728,
    format="pytorch", mean=[0.5] * 3, std=[0.25] * 3, file="resnet50-11ad3fa6.pth",
)  # fmt: skip
START: dict[str, Any] = {
    "num_classes": 7, "parameters": 1_000, "taken": 900, "classifier_taken": 0,
    "fresh": ["fc.weight", "fc.bias"], "classifier": ["fc.weight", "fc.bias"],
}  # fmt: skip
PROGRAM = ProgramFacts(num_classes=10, channels=1, parameters=20_000, bytes=80_000, image_size=(8, 8))
LOGITS = LogitsFacts(num_classes=10, bytes=80_000, train=1437)
"""Of the digits."""
ONNX = PROGRAM.model_copy(update={"format": "onnx", "batch": 4})


class FakeInspector(Inspector):
    """Answers without a child process, and records the requests."""

    def __init__(self) -> None:
        super().__init__(Path("never used"))
        self.answers: dict[str, BaseModel | Refused] = {}
        """By the digest that a blob's file is named after, or a name; what a student takes over, by `start <digest>`.
        Others have the default facts of their kind."""
        self.shapes: dict[str, list[int]] = {}
        """Of taps, by path; others are maps of four channels."""
        self.requests: list[tuple[Any, ...]] = []
        """Kind, subject (the digest of a file), and the options that were given; without probes."""
        self.gate: asyncio.Event | None = None
        """Inspections of files wait for it after they have reported `counted`."""
        self.counted: list[tuple[int, int]] = []
        self.running = 0
        """The number of inspections that wait."""
        self.cost: JobCost | Refused = Refused("internal", "this test has no probe", final=False)
        self.probes: list[ProbeRequest] = []

    async def inspect(
        self,
        kind: type[F],
        *subject: str,
        on_progress: OnProgress | None = None,
        keep: Keep | None = None,
        asker: str = "",
        **options: Any,
    ) -> F:
        if kind is JobCost:
            return self._probe(kind, *subject)
        subject = (Path(subject[0]).name,) if kind in OF_FILES else subject
        self.requests.append(
            (KINDS[kind], *subject, {name: value for name, value in options.items() if value or value is False})
        )
        if self.gate is not None and kind in OF_FILES:
            await self._wait(self.gate, on_progress)
        about = f"start {subject[0]}" if issubclass(kind, StartFacts) else subject[0]
        answer = self.answers.get(about, self._default(kind, *subject))
        if isinstance(answer, Refused):
            raise answer
        assert isinstance(answer, kind)
        return answer

    async def _wait(self, gate: asyncio.Event, on_progress: OnProgress | None) -> None:
        self.running += 1
        try:
            for done, total in self.counted if on_progress else ():
                on_progress(done, total)
            await gate.wait()
        finally:
            self.running -= 1

    def _probe(self, kind: type[F], request: str) -> F:
        self.probes.append(ProbeRequest.model_validate_json(request))
        if isinstance(self.cost, Refused):
            raise self.cost
        assert isinstance(self.cost, kind)
        return self.cost

    def _default(self, kind: type[BaseModel], name: str, *paths: str) -> BaseModel | Refused:
        if kind is TapFacts:
            if missing := [path for path in paths if path.startswith("layer9")]:
                text = f"there is no {missing[0]!r} in {name}"
                return Refused("spec_invalid", text, "near it: layer1, layer2, layer3")
            return TapFacts(shapes={path: self.shapes.get(path, [4, 4, 4]) for path in paths})
        if kind is ArchitectureFacts:
            return architecture(name) if name == "timm/resnet18" else Refused("spec_invalid", f"timm has no {name}")
        if issubclass(kind, StartFacts):
            return kind(**START)
        return {
            ModelFacts: MODEL,
            ProgramFacts: PROGRAM,
            LogitsFacts: LOGITS,
            DatasetFacts: DATASET,
            PublishedFacts: PUBLISHED,
        }[kind]


@dataclass
class Service:
    """A server in this process, a client of it, and its database, files and inspector."""

    app: FastAPI
    http: httpx.AsyncClient
    db: Database
    files: FileStore
    inspector: FakeInspector
    settings: Settings
    wake_ups: list[bool] = field(default_factory=list)
    """One for each time that the workers were to be woken."""

    async def key(self, role: Role = "member", project: str = "default", name: str = "ann", **more: Any) -> str:
        """Make a key, and its project if there is none. From the first one on, every request needs a key."""

        def make(connection: Connection) -> str:
            with suppress(NameTaken):
                projects.create(connection, project)
            return keys.create(connection, project, name, role, **more)[1]

        made = await self.db.write(make)
        self.app.state.authentication.forget()
        return made

    @asynccontextmanager
    async def holder(self, key: str) -> AsyncIterator["Service"]:
        """The same service, for the holder of a key."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url=self.http.base_url, headers=headers) as http:
            yield replace(self, http=http)

    async def submit(self, **changes: Any) -> str:
        answer = await self.http.post("/v1/jobs", json={**SUPERVISED, **changes})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def claim(self, job_id: str) -> int:
        """Claim the oldest job, which must be this one. Returns the fence."""
        claim = await self.db.write(lifecycle.claim, "worker-1", 30, takeover=False)
        assert claim is not None
        assert claim.job.id == job_id
        return claim.fence

    async def succeed(self, job_id: str, files: dict[str, bytes] | None = None, **report: Any) -> dict[str, str]:
        """Claim and finish the job, with these files beside its own. Returns the digests of all, by name."""
        fence = await self.claim(job_id)
        digests = {}
        made = []
        own = {"student.safetensors": b"weights of " + job_id.encode(), "report.json": b"{}"}
        for name, content in {**own, **(files or {})}.items():
            blob = self.files.put_stream([content])
            digests[name] = blob.sha256
            media_type = "text/html" if name.endswith(".html") else "application/octet-stream"
            made.append(NewArtifact(name, blob.sha256, blob.bytes, media_type))
        job = await self.db.read(jobs.get, job_id)
        students = job.resolved_spec["student"]
        architecture = (students[0] if isinstance(students, list) else students)["architecture"]
        student = {
            "architecture": architecture,
            "parameters": 3_000,
            "bytes": 12_000,
            "accuracy": 0.9,
            "agreement": None,
        }
        dataset = DATASET.model_copy(update={"kind": "named", "num_classes": 10, "class_names": list("0123456789")})
        result = {
            "teacher": None,
            "student": student,
            "alone": None,
            "gain": None,
            "dataset": dataset.model_dump(mode="json"),
        }
        done = await self.db.write(lifecycle.finish_succeeded, job_id, fence, {**result, **report}, made)
        assert done
        return digests

    async def fail(self, job_id: str) -> None:
        fence = await self.claim(job_id)
        error = {"code": "loss_diverged", "message": "the loss became nan", "retryable": False, "hint": None}
        await self.db.write(lifecycle.finish_failed, job_id, fence, error, None)

    async def upload(self, content: bytes) -> str:
        """Upload bytes. Returns the blob's name, `sha256:<hex>`."""
        answer = await self.http.post("/v1/uploads", content=content)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["blob"])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with the newest tables, to copy from."""
    path = tmp_path_factory.mktemp("schema") / "distillery.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def settings(tmp_path: Path, migrated: Path) -> Settings:
    shutil.copy(migrated, tmp_path / "distillery.db")
    return Settings(home=tmp_path, min_free_bytes=0)


@pytest.fixture
async def service(settings: Settings) -> AsyncIterator[Service]:
    async with serving(settings) as running:
        yield running


@asynccontextmanager
async def serving(settings: Settings, **headers: str) -> AsyncIterator[Service]:
    wake_ups: list[bool] = []
    inspector = FakeInspector()
    app = create_app(settings, wake_workers=lambda: wake_ups.append(True), inspector=inspector)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers) as client,
    ):
        yield Service(app, client, app.state.database, app.state.files, inspector, settings, wake_ups)


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an answer, after checking that it is this problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["type"] and body["title"] and body["detail"]
    return body
