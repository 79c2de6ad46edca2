"""The files that a job made, by name. They become visible together with `succeeded`, in one transaction."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select

from store import tables
from store.errors import NotFound
from store.records import as_record, columns


@dataclass(frozen=True)
class NewArtifact:
    """A file whose bytes are in the file store already."""

    name: str
    sha256: str
    bytes: int
    media_type: str


@dataclass(frozen=True)
class Artifact(NewArtifact):
    """One row of `artifacts`."""

    job_id: str


ARTIFACT_COLUMNS = columns(tables.artifacts, Artifact)


def publish(connection: Connection, job_id: str, artifacts: Sequence[NewArtifact]) -> None:
    """Write a finished job's artifacts. They replace those of an earlier end."""
    connection.execute(delete(tables.artifacts).where(tables.artifacts.c.job_id == job_id))
    if artifacts:
        rows = [{"job_id": job_id, **asdict(artifact)} for artifact in artifacts]
        connection.execute(insert(tables.artifacts), rows)


def list_artifacts(connection: Connection, job_id: str) -> Sequence[Artifact]:
    of_job = select(*ARTIFACT_COLUMNS).where(tables.artifacts.c.job_id == job_id).order_by(tables.artifacts.c.name)
    return [as_record(Artifact, row) for row in connection.execute(of_job)]


def get(connection: Connection, job_id: str, name: str) -> Artifact:
    named = select(*ARTIFACT_COLUMNS).where(tables.artifacts.c.job_id == job_id, tables.artifacts.c.name == name)
    row = connection.execute(named).one_or_none()
    if row is None:
        raise NotFound("artifact", name)
    return as_record(Artifact, row)
