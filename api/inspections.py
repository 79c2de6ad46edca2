"""What inspections found, kept by digest: the same bytes are opened once."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, TypeVar

from anyio import to_thread
from fastapi import Depends, Request
from pydantic import BaseModel

from api.inspector import Inspector, Refused
from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts, TapFacts
from kdcore.catalog.facts import ProgramFacts
from store import inspections
from store.blobs import BlobStore
from store.database import Database

F = TypeVar("F", bound=BaseModel)


@dataclass(frozen=True)
class Inspections:
    db: Database
    files: BlobStore
    inspector: Inspector

    async def has(self, digest: str) -> bool:
        return await to_thread.run_sync(self.files.exists, digest)

    async def model(self, digest: str, architecture: str | None) -> ModelFacts | Refused:
        ask = partial(self.inspector.model, self.files.path(digest), architecture)
        return await self._once(ModelFacts, digest, "model", architecture or "", ask)

    async def program(self, digest: str) -> ProgramFacts | Refused:
        ask = partial(self.inspector.program, self.files.path(digest))
        return await self._once(ProgramFacts, digest, "program", "", ask)

    async def dataset(self, digest: str, image_size: int | None) -> DatasetFacts | Refused:
        ask = partial(self.inspector.dataset, self.files.path(digest), image_size)
        return await self._once(DatasetFacts, digest, "dataset", str(image_size or ""), ask)

    async def architecture(self, name: str, data: DatasetFacts) -> ArchitectureFacts | Refused:
        ask = partial(self.inspector.architecture, name, data.num_classes, data.channels, data.image_size)
        return await self._once(ArchitectureFacts, _digest(name), "architecture", _shape(data), ask)

    async def taps(self, architecture: str, paths: Sequence[str], data: DatasetFacts) -> dict[str, list[int]] | Refused:
        """What a network gives at each path for one image of these data."""
        ask = partial(self.inspector.taps, architecture, data.num_classes, data.channels, data.image_size, paths)
        seen = await self._once(TapFacts, _digest(architecture, *paths), "taps", _shape(data), ask)
        return seen if isinstance(seen, Refused) else seen.shapes

    async def _once(
        self, facts: type[F], digest: str, kind: str, key: str, ask: Callable[[], Awaitable[F | Refused]]
    ) -> F | Refused:
        """Verdicts about the bytes are kept; one about us (a crash, a timeout) is asked again next time."""
        kept = await self.db.read(inspections.get, digest, kind, key)
        if kept is not None:
            return Refused(**kept["refused"]) if "refused" in kept else facts.model_validate(kept)
        seen = await ask()
        if not isinstance(seen, Refused):
            await self.db.write(inspections.put, digest, kind, key, seen.model_dump(mode="json"))
        elif seen.final:
            await self.db.write(inspections.put, digest, kind, key, {"refused": asdict(seen)})
        return seen


def _digest(*words: str) -> str:
    """A name stands for what it names: a network has no bytes before it is built."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _shape(data: DatasetFacts) -> str:
    return f"{data.num_classes} classes, {data.channels} x {data.image_size[0]} x {data.image_size[1]}"


async def inspections_of(request: Request) -> Inspections:
    found: Inspections = request.app.state.inspections
    return found


Seen = Annotated[Inspections, Depends(inspections_of)]
