import subprocess

import pytest
import torch

from base.errors import Internal, StorageFull
from base.files import write_whole
from base.warning import WarningItem
from kdcore import checkpoint
from kdcore.checkpoint import Progress
from kdcore.device import Computing
from kdcore.exports import safetensors
from kdcore.measure.grading import Outcome
from tests.disks import with_disks
from tests.kdcore.engine import as_by_the_version_before

CPU = torch.device("cpu")


def progress(size: int = 3) -> Progress:
    """One ended trial, one ended stage of the next, and a stage in training."""
    outcome = Outcome({"w": torch.arange(3.0)}, {"w": torch.ones(size)}, best_epoch=2, best_accuracy=0.5, epochs=3)
    learned = {"learners": {"w": torch.zeros(2)}, "objective": {}}
    return Progress({"assistant-1": {"student": outcome}}, {"student/fsp": learned}, {"position": {"epoch": 2}})


def test_save_and_load_return_the_same_progress(tmp_path):
    written = checkpoint.save(tmp_path, 7, progress())
    assert written.path.name == "000000007.pt"
    loaded = checkpoint.load(written.path, CPU)
    outcome = loaded.finished["assistant-1"]["student"]
    assert torch.equal(outcome.best["w"], torch.arange(3.0)) and (outcome.best_epoch, outcome.epochs) == (2, 3)
    assert torch.equal(loaded.prepared["student/fsp"]["learners"]["w"], torch.zeros(2))
    assert loaded.training == {"position": {"epoch": 2}}


def test_a_checkpoint_keeps_how_the_job_computes(tmp_path):
    computing = Computing("cpu", True, 2, kernels=True, why="its share of the cores")
    written = checkpoint.save(tmp_path, 7, Progress(computing=computing))
    assert checkpoint.load(written.path, torch.device("cpu")).computing == computing


def test_a_checkpoint_keeps_the_names_of_its_parts(tmp_path):
    """An older version's checkpoints resume, and this one's will: the names are part of the format."""
    state = torch.load(checkpoint.save(tmp_path, 7, progress()).path, weights_only=True)
    assert list(state) == [
        "format", "finished", "prepared", "training", "batch_norm", "reading", "has_sizes", "computing", "warnings",
        "cost", "starts", "curves", "used",
    ]  # fmt: skip
    assert list(state["finished"]["assistant-1"]["student"]) == [
        "best",
        "last",
        "best_epoch",
        "best_accuracy",
        "epochs",
        "running",
        "ranges",
        "before",
    ]


def test_save_and_load_keep_the_kind_of_statistics_and_the_warnings(tmp_path):
    warning = WarningItem("teacher_saturated", "/teacher", "its soft targets are its labels", "another teacher")
    saved = Progress(batch_norm="running", warnings=[warning])
    loaded = checkpoint.load(checkpoint.save(tmp_path, 7, saved).path, CPU)
    assert (loaded.batch_norm, loaded.warnings, loaded.format) == ("running", [warning], checkpoint.FORMAT)


def test_load_a_checkpoint_without_a_format_used_running_averages(tmp_path):
    path = checkpoint.save(tmp_path, 7, progress()).path
    as_by_the_version_before(path)
    loaded = checkpoint.load(path, CPU)
    assert (loaded.batch_norm, loaded.reading, loaded.warnings, loaded.format) == ("running", 1, [], 1)
    assert loaded.finished["assistant-1"]["student"].running == {}


def test_load_refuses_the_format_of_a_newer_version(tmp_path):
    torch.save({"format": checkpoint.FORMAT + 1, "finished": {}, "prepared": {}, "training": None}, tmp_path / "1.pt")
    with pytest.raises(Internal, match="is of a newer version"):
        checkpoint.load(tmp_path / "1.pt", CPU)


def test_save_keeps_the_last_two(tmp_path):
    for step in (3, 12, 5, 100):
        checkpoint.save(tmp_path, step, Progress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000012.pt", "000000100.pt"]


def test_load_names_a_torn_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, 1, progress(1000)).path
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(Internal, match=r"000000001\.pt"):
        checkpoint.load(path, CPU)


@pytest.mark.parametrize("state", [{}, {"finished": {"student": {"student": {"weights": 1}}}}, ["no state"]])
def test_load_names_a_checkpoint_of_another_version(tmp_path, state):
    torch.save(state, tmp_path / "1.pt")
    with pytest.raises(Internal, match=r"the checkpoint 1\.pt cannot be read"):
        checkpoint.load(tmp_path / "1.pt", CPU)


@with_disks
def test_a_full_disk_is_named_and_keeps_the_last_good_one(tmp_path):
    """A real one, of one megabyte, for a state of two; and a student, which is written another way."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "distillery", str(small)], check=True)
    try:
        checkpoint.save(small, 1, progress(1000))
        with pytest.raises(StorageFull, match=r"no disk space to write 000000002\.pt: No space left on device"):
            checkpoint.save(small, 2, progress(500_000))
        with pytest.raises(StorageFull, match=r"no disk space to write student: No space left on device"):
            write_whole(small / "student", lambda path: safetensors._save({"w": torch.zeros(500_000)}, {}, path))
        assert [path.name for path in small.iterdir()] == ["000000001.pt"]
        kept = checkpoint.load(small / "000000001.pt", CPU)
        assert torch.equal(kept.finished["assistant-1"]["student"].last["w"], torch.ones(1000))
    finally:
        subprocess.run(["umount", str(small)], check=True)
