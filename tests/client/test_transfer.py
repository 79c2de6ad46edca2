import hashlib
import io
import os
import zipfile
from pathlib import Path

import pytest

from client.errors import Damaged, InvalidInput, Unreachable
from client.transfer import digest_of, packed
from tests.client.fake_service import FakeFiles, problem

CONTENT = bytes(range(256)) * 40


def part_of(target: Path) -> list[Path]:
    return list(target.parent.glob(".*.part"))


def test_download_is_complete_and_checked(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    target = (
        FakeFiles(CONTENT)
        .service()
        .client()
        .download("job_1", to=tmp_path / "new" / "s.st", on_progress=lambda done, total: calls.append((done, total)))
    )
    assert target.read_bytes() == CONTENT
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert part_of(target) == []


def test_download_into_a_folder(tmp_path: Path):
    assert FakeFiles(CONTENT).service().client().download("job_1", to=tmp_path) == tmp_path / "student.safetensors"


def test_download_continues_by_range_after_a_break(tmp_path: Path):
    files = FakeFiles(CONTENT, breaks=[1000, 0, 500])
    fake = files.service()
    assert fake.client().download("job_1", to=tmp_path / "s").read_bytes() == CONTENT
    requests = fake.requests_to("GET /v1/jobs/job_1/artifacts/student.safetensors")
    assert [one.headers.get("range") for one in requests] == [None, "bytes=1000-", "bytes=1000-", "bytes=1500-"]
    assert requests[1].headers["if-range"] == f'"{files.artifact["sha256"]}"'


def test_download_continues_in_the_next_call(tmp_path: Path):
    files = FakeFiles(CONTENT, breaks=[100, 0, 0, 0, 0, 0, 0, 0])
    with pytest.raises(Unreachable):
        files.service().client().download("job_1", to=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    files.breaks = []
    fake = files.service()
    assert fake.client().download("job_1", to=tmp_path / "s").read_bytes() == CONTENT
    assert fake.requests[-1].headers["range"] == "bytes=100-"


def test_download_from_a_server_without_ranges(tmp_path: Path):
    files = FakeFiles(CONTENT, breaks=[1000], ranges=False)
    assert files.service().client().download("job_1", to=tmp_path / "s").read_bytes() == CONTENT


def test_download_of_damaged_bytes_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "s"
    target.write_bytes(b"the old one")
    files = FakeFiles(CONTENT)
    promised = files.artifact
    fake = files.service()
    fake.routes["GET /v1/jobs/job_1/artifacts"] = {"data": [promised], "next": None}
    files.content = CONTENT[:-1] + b"!"
    with pytest.raises(Damaged, match=promised["sha256"]):
        fake.client().download("job_1", to=target)
    assert target.read_bytes() == b"the old one"
    assert part_of(target) == []


def test_download_of_an_existing_file_fetches_nothing(tmp_path: Path):
    fake = FakeFiles(CONTENT).service()
    fake.client().download("job_1", to=tmp_path / "s")
    fake.client().download("job_1", to=tmp_path / "s")
    assert len(fake.requests_to("GET /v1/jobs/job_1/artifacts/student.safetensors")) == 1


def test_download_of_an_empty_file(tmp_path: Path):
    assert FakeFiles(b"").service().client().download("job_1", to=tmp_path / "s").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_download_into_a_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="cannot write"):
        FakeFiles(CONTENT).service().client().download("job_1", to=tmp_path / "s")


def sample(tmp_path: Path, content: bytes = CONTENT) -> Path:
    path = tmp_path / "teacher.pth"
    path.write_bytes(content)
    return path


def test_upload_in_parts_returns_the_blob(tmp_path: Path):
    files = FakeFiles()
    fake = files.service()
    blob = fake.client().upload(sample(tmp_path), chunk_bytes=4096)
    assert blob == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert files.taken == CONTENT
    assert len(fake.requests_to("PATCH /v1/uploads/up_1")) == 3
    created = fake.requests_to("POST /v1/uploads")[0]
    assert created.url.params["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert created.url.params["filename"] == "teacher.pth"


def test_upload_continues_after_a_broken_part(tmp_path: Path):
    files = FakeFiles(breaks=[10, 0, 300])
    files.service().client().upload(sample(tmp_path), chunk_bytes=4096)
    assert files.taken == CONTENT


def test_upload_continues_after_an_outage(tmp_path: Path):
    files = FakeFiles()
    fake = files.service()
    fake.routes["PATCH /v1/uploads/up_1"] = [problem(503, "unavailable"), files.append]
    fake.client().upload(sample(tmp_path), chunk_bytes=4096)
    assert files.taken == CONTENT


def test_upload_resumes_an_earlier_one(tmp_path: Path):
    files = FakeFiles(taken=CONTENT[:5000], size=len(CONTENT))
    fake = files.service()
    fake.client().upload(sample(tmp_path), resume="up_1")
    assert files.taken == CONTENT
    assert fake.requests_to("POST /v1/uploads") == []


def test_upload_does_not_resume_that_of_another_file(tmp_path: Path):
    with pytest.raises(InvalidInput, match="is of a file of 7 bytes"):
        FakeFiles(size=7).service().client().upload(sample(tmp_path), resume="up_1")


def test_upload_raises_unreachable_after_many_breaks(tmp_path: Path):
    with pytest.raises(Unreachable):
        FakeFiles(breaks=[0] * 100).service().client().upload(sample(tmp_path))


def test_upload_with_another_digest_is_damaged(tmp_path: Path):
    files = FakeFiles(taken=b"x" * 5000, size=len(CONTENT))
    with pytest.raises(Damaged):
        files.service().client().upload(sample(tmp_path), resume="up_1")


@pytest.mark.parametrize("what", ["missing", "folder", "empty"])
def test_upload_refuses_folders_and_empty_files(tmp_path: Path, what: str):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    if what == "empty":
        path.touch()
    with pytest.raises(InvalidInput, match=what):
        FakeFiles().service().client().upload(path)


def tree(folder: Path, files: dict[str, bytes], order: int = 1) -> Path:
    for name, content in list(files.items())[::order]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


FILES = {
    "train/b/2.png": b"22",
    "train/a/1.png": b"1",
    "test/a/3.png": b"333",
    "notes.txt": b"x",
    "train/ä/4.png": b"4",
}


def digest_of_packed(folder: Path) -> str:
    with packed(folder) as archive:
        return digest_of(archive)


def test_packed_a_folder_is_a_zip_of_its_files_by_name(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    clutter = {".DS_Store": b"d", "train/a/Thumbs.db": b"t", "__MACOSX/train/a/1.png": b"m", ".git/config": b"g"}
    folder = tree(tmp_path / "flowers", {**FILES, **clutter})
    with packed(folder, lambda done, total: calls.append((done, total))) as archive:
        assert archive.name == "flowers.zip"
        with zipfile.ZipFile(archive) as content:
            assert content.namelist() == sorted(FILES)
            assert {name: content.read(name) for name in content.namelist()} == FILES
            assert {member.compress_type for member in content.infolist()} == {zipfile.ZIP_STORED}
    assert not archive.exists()
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and calls[-1] == (8, 8)


def test_packed_the_same_files_have_the_same_digest(tmp_path: Path):
    one = tree(tmp_path / "one", FILES)
    other = tree(tmp_path / "else" / "two", FILES, order=-1)
    for path in other.rglob("*.png"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    (other / ".DS_Store").write_bytes(b"d")
    assert digest_of_packed(one) == digest_of_packed(other)
    (other / "train/a/1.png").write_bytes(b"2")
    assert digest_of_packed(one) != digest_of_packed(other)


def test_packed_gives_a_file_as_it_is(tmp_path: Path):
    with packed(sample(tmp_path)) as same:
        assert same == tmp_path / "teacher.pth"
    assert same.exists()


def test_packed_follows_links_but_not_in_circles(tmp_path: Path):
    folder = tree(tmp_path / "data", {"train/a/1.png": b"1"})
    (folder / "test").symlink_to(folder / "train")
    with packed(folder) as archive, zipfile.ZipFile(archive) as content:
        assert content.namelist() == ["test/a/1.png", "train/a/1.png"]
    (folder / "train" / "up").symlink_to(folder)
    with pytest.raises(InvalidInput, match="link to a folder that it is in"), packed(folder):
        pass


def test_packed_keeps_empty_folders_so_that_the_server_can_name_them(tmp_path: Path):
    folder = tree(tmp_path / "data", {"train/a/1.png": b"1"})
    (folder / "train" / "empty").mkdir()
    with packed(folder) as archive, zipfile.ZipFile(archive) as content:
        assert content.namelist() == ["train/a/1.png", "train/empty/"]


@pytest.mark.parametrize("what", ["nothing", "pipe", "broken link", "name"])
def test_packed_refuses_what_cannot_be_packed(tmp_path: Path, what: str):
    folder = tmp_path / "data"
    folder.mkdir()
    if what != "nothing":
        (folder / "1.png").write_bytes(b"1")
    if what == "pipe":
        os.mkfifo(folder / "pipe")
    if what == "broken link":
        (folder / "link").symlink_to(tmp_path / "none")
    if what == "name":
        Path(os.fsdecode(bytes(folder) + b"/\xe4.png")).write_bytes(b"1")
    said = {"nothing": "holds no files", "pipe": "pipe is no file", "broken link": "cannot read", "name": "not UTF-8"}
    with pytest.raises(InvalidInput, match=said[what]), packed(folder):
        pass


def test_register_dataset_sends_a_folder_packed(tmp_path: Path):
    folder = tree(tmp_path / "flowers", FILES)
    files = FakeFiles()
    fake = files.service()
    fake.routes["POST /v1/datasets"] = {"name": "flowers"}
    fake.client().register_dataset("flowers", folder)
    assert zipfile.ZipFile(io.BytesIO(files.taken)).namelist() == sorted(FILES)
    assert fake.requests_to("POST /v1/uploads")[0].url.params["filename"] == "flowers.zip"
