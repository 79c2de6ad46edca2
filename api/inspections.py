"""What inspections found, kept by digest: the same bytes are opened once."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Request

from api.inspector import Inspector, Refused
from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts
from store import inspections
from store.blobs import BlobStore
from store.database import Database


@dataclass(frozen=True)
class Inspections:
    db: Database
    files: BlobStore
    inspector: Inspector

    async def has(self, digest: str) -> bool:
        return await to_thread.run_sync(self.files.exists, digest)

    async def model(self, digest: str, architecture: str | None) -> ModelFacts | Refused:
        key = architecture or ""
        kept = await self.db.read(inspections.get, digest, "model", key)
        if kept is not None:
            return Refused(**kept["refused"]) if "refused" in kept else ModelFacts.model_validate(kept)
        seen = await self.inspector.model(self.files.path(digest), architecture)
        await self._keep(digest, "model", key, seen)
        return seen

    async def dataset(self, digest: str, image_size: int | None) -> DatasetFacts | Refused:
        key = str(image_size or "")
        kept = await self.db.read(inspections.get, digest, "dataset", key)
        if kept is not None:
            return Refused(**kept["refused"]) if "refused" in kept else DatasetFacts.model_validate(kept)
        seen = await self.inspector.dataset(self.files.path(digest), image_size)
        await self._keep(digest, "dataset", key, seen)
        return seen

    async def architecture(self, name: str, data: DatasetFacts) -> ArchitectureFacts | Refused:
        digest = hashlib.sha256(name.encode()).hexdigest()
        key = f"{data.num_classes} classes, {data.channels} x {data.image_size[0]} x {data.image_size[1]}"
        kept = await self.db.read(inspections.get, digest, "architecture", key)
        if kept is not None:
            return Refused(**kept["refused"]) if "refused" in kept else ArchitectureFacts.model_validate(kept)
        seen = await self.inspector.architecture(name, data.num_classes, data.channels, data.image_size)
        await self._keep(digest, "architecture", key, seen)
        return seen

    async def _keep(
        self, digest: str, kind: str, key: str, seen: ModelFacts | DatasetFacts | ArchitectureFacts | Refused
    ) -> None:
        """Verdicts about the bytes are kept; one about us (a crash, a timeout) is asked again next time."""
        if isinstance(seen, Refused):
            if seen.final:
                await self.db.write(inspections.put, digest, kind, key, {"refused": asdict(seen)})
            return
        await self.db.write(inspections.put, digest, kind, key, seen.model_dump(mode="json"))


async def inspections_of(request: Request) -> Inspections:
    found: Inspections = request.app.state.inspections
    return found


Seen = Annotated[Inspections, Depends(inspections_of)]
