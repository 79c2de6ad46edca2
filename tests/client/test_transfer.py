import hashlib
import os
from pathlib import Path

import pytest

from client.errors import Damaged
from client.errors import Unreachable
from client.errors import InvalidInput
from tests.client.fake import Files, problem

CONTENT = bytes(range(256)) * 40


def part_of(target: Path) -> list[Path]:
    return list(target.parent.glob(".*.part"))


def test_a_download_is_whole_checked_and_alone(tmp_path: Path):
    told: list[tuple[int, int]] = []
    target = (
        Files(CONTENT)
        .fake()
        .client()
        .download("job_1", to=tmp_path / "new" / "s.st", tell=lambda done, total: told.append((done, total)))
    )
    assert target.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert part_of(target) == []


def test_into_a_folder_it_keeps_its_name(tmp_path: Path):
    assert Files(CONTENT).fake().client().download("job_1", to=tmp_path) == tmp_path / "student.safetensors"


def test_a_break_goes_on_by_range(tmp_path: Path):
    files = Files(CONTENT, breaks=[1000, 0, 500])
    fake = files.fake()
    assert fake.client().download("job_1", to=tmp_path / "s").read_bytes() == CONTENT
    asked = fake.asked("GET /v1/jobs/job_1/artifacts/student.safetensors")
    assert [one.headers.get("range") for one in asked] == [None, "bytes=1000-", "bytes=1000-", "bytes=1500-"]
    assert asked[1].headers["if-range"] == f'"{files.artifact["sha256"]}"'


def test_the_next_call_goes_on_where_the_last_broke(tmp_path: Path):
    files = Files(CONTENT, breaks=[100, 0, 0, 0, 0, 0, 0, 0])
    with pytest.raises(Unreachable):
        files.fake().client().download("job_1", to=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    files.breaks = []
    fake = files.fake()
    assert fake.client().download("job_1", to=tmp_path / "s").read_bytes() == CONTENT
    assert fake.requests[-1].headers["range"] == "bytes=100-"


def test_a_server_without_ranges_starts_over(tmp_path: Path):
    files = Files(CONTENT, breaks=[1000], ranges=False)
    assert files.fake().client().download("job_1", to=tmp_path / "s").read_bytes() == CONTENT


def test_damaged_bytes_replace_nothing(tmp_path: Path):
    target = tmp_path / "s"
    target.write_bytes(b"the old one")
    files = Files(CONTENT)
    promised = files.artifact
    fake = files.fake()
    fake.routes["GET /v1/jobs/job_1/artifacts"] = {"data": [promised], "next": None}
    files.content = CONTENT[:-1] + b"!"
    with pytest.raises(Damaged, match=promised["sha256"]):
        fake.client().download("job_1", to=target)
    assert target.read_bytes() == b"the old one"
    assert part_of(target) == []


def test_what_is_there_already_is_not_fetched_again(tmp_path: Path):
    fake = Files(CONTENT).fake()
    fake.client().download("job_1", to=tmp_path / "s")
    fake.client().download("job_1", to=tmp_path / "s")
    assert len(fake.asked("GET /v1/jobs/job_1/artifacts/student.safetensors")) == 1


def test_an_empty_file(tmp_path: Path):
    assert Files(b"").fake().client().download("job_1", to=tmp_path / "s").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="cannot write"):
        Files(CONTENT).fake().client().download("job_1", to=tmp_path / "s")


def sample(tmp_path: Path, content: bytes = CONTENT) -> Path:
    path = tmp_path / "teacher.pth"
    path.write_bytes(content)
    return path


def test_an_upload_goes_in_parts_and_comes_back_as_a_blob(tmp_path: Path):
    files = Files()
    fake = files.fake()
    blob = fake.client().upload(sample(tmp_path), chunk_bytes=4096)
    assert blob == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert files.taken == CONTENT
    assert len(fake.asked("PATCH /v1/uploads/up_1")) == 3
    created = fake.asked("POST /v1/uploads")[0]
    assert created.url.params["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert created.url.params["filename"] == "teacher.pth"


def test_a_broken_part_goes_on_where_the_server_stands(tmp_path: Path):
    files = Files(breaks=[10, 0, 300])
    files.fake().client().upload(sample(tmp_path), chunk_bytes=4096)
    assert files.taken == CONTENT


def test_a_part_that_meets_an_outage_goes_on_where_the_server_stands(tmp_path: Path):
    files = Files()
    fake = files.fake()
    fake.routes["PATCH /v1/uploads/up_1"] = [problem(503, "unavailable"), files.append]
    fake.client().upload(sample(tmp_path), chunk_bytes=4096)
    assert files.taken == CONTENT


def test_an_upload_of_before_goes_on(tmp_path: Path):
    files = Files(taken=CONTENT[:5000], size=len(CONTENT))
    fake = files.fake()
    fake.client().upload(sample(tmp_path), resume="up_1")
    assert files.taken == CONTENT
    assert fake.asked("POST /v1/uploads") == []


def test_an_upload_of_another_file_does_not_go_on(tmp_path: Path):
    with pytest.raises(InvalidInput, match="is of a file of 7 bytes"):
        Files(size=7).fake().client().upload(sample(tmp_path), resume="up_1")


def test_a_line_that_only_breaks_is_given_up(tmp_path: Path):
    with pytest.raises(Unreachable):
        Files(breaks=[0] * 100).fake().client().upload(sample(tmp_path))


def test_a_blob_that_is_not_the_file(tmp_path: Path):
    files = Files(taken=b"x" * 5000, size=len(CONTENT))
    with pytest.raises(Damaged):
        files.fake().client().upload(sample(tmp_path), resume="up_1")


@pytest.mark.parametrize("what", ["missing", "folder", "empty"])
def test_files_that_cannot_be_sent(tmp_path: Path, what: str):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    if what == "empty":
        path.touch()
    with pytest.raises(InvalidInput, match=what):
        Files().fake().client().upload(path)
