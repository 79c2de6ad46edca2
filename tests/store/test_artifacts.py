import pytest

from store import artifacts
from store.artifacts import Artifact, NewArtifact
from store.database import Database
from store.errors import NotFound
from tests.store.helpers import SHA256, running

REPORT = NewArtifact("report.json", SHA256, 9, "application/json")
STUDENT = NewArtifact("student.safetensors", SHA256, 99, "application/octet-stream")


def test_list_artifacts_and_get_by_name(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        artifacts.publish(connection, job_id, [STUDENT, REPORT])
        assert [artifact.name for artifact in artifacts.list_artifacts(connection, job_id)] == [
            REPORT.name,
            STUDENT.name,
        ]
        assert artifacts.get(connection, job_id, "report.json") == Artifact(
            "report.json", SHA256, 9, "application/json", job_id
        )
        with pytest.raises(NotFound, match=r"there is no artifact 'spec\.json'"):
            artifacts.get(connection, job_id, "spec.json")


def test_publish_replaces_what_an_earlier_end_published(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        artifacts.publish(connection, job_id, [STUDENT, REPORT])
        artifacts.publish(connection, job_id, [REPORT])
        assert [artifact.name for artifact in artifacts.list_artifacts(connection, job_id)] == ["report.json"]
        artifacts.publish(connection, job_id, [])
        assert list(artifacts.list_artifacts(connection, job_id)) == []
