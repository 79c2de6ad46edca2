import pytest

from store import artifacts
from store.artifacts import Artifact, NewArtifact
from store.database import Database
from store.errors import NotFound
from tests.store.scene import SHA256, running

REPORT = NewArtifact("report.json", SHA256, 9, "application/json")
STUDENT = NewArtifact("student.safetensors", SHA256, 99, "application/octet-stream")


def test_artifacts_by_name(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        artifacts.publish(connection, job_id, [STUDENT, REPORT])
        assert [artifact.name for artifact in artifacts.list(connection, job_id)] == [REPORT.name, STUDENT.name]
        assert artifacts.get(connection, job_id, "report.json") == Artifact(
            "report.json", SHA256, 9, "application/json", job_id
        )
        with pytest.raises(NotFound, match=r"there is no artifact 'spec\.json'"):
            artifacts.get(connection, job_id, "spec.json")


def test_a_later_end_takes_the_place_of_an_earlier_one(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        artifacts.publish(connection, job_id, [STUDENT, REPORT])
        artifacts.publish(connection, job_id, [REPORT])
        assert [artifact.name for artifact in artifacts.list(connection, job_id)] == ["report.json"]
        artifacts.publish(connection, job_id, [])
        assert list(artifacts.list(connection, job_id)) == []
