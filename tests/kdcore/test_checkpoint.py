import subprocess

import pytest
import torch

from base.errors import Internal, StorageFull
from base.files import write_whole
from kdcore import checkpoint, export
from tests.store.disks import with_disks

CPU = torch.device("cpu")


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"weights": {"w": torch.arange(3.0)}, "position": {"epoch": 2}, "nothing": None, "random": None}
    written = checkpoint.save(tmp_path, 7, state)
    assert written.path.name == "000000007.pt"
    loaded = checkpoint.load(written.path, CPU)
    assert torch.equal(loaded["weights"]["w"], torch.arange(3.0)) and loaded["position"] == {"epoch": 2}


def test_the_last_two_are_kept(tmp_path):
    for step in (3, 12, 5, 100):
        checkpoint.save(tmp_path, step, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000012.pt", "000000100.pt"]


def test_a_torn_checkpoint_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": torch.zeros(1000)}).path
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(Internal, match=r"000000001\.pt"):
        checkpoint.load(path, CPU)


@with_disks
def test_a_full_disk_is_named_and_keeps_the_last_good_one(tmp_path):
    """A real one, of one megabyte, for a state of two; and a student, which is written another way."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "distillery", str(small)], check=True)
    try:
        checkpoint.save(small, 1, {"w": torch.zeros(1000)})
        with pytest.raises(StorageFull, match=r"no disk space to write 000000002\.pt: No space left on device"):
            checkpoint.save(small, 2, {"w": torch.zeros(500_000)})
        with pytest.raises(StorageFull, match=r"no disk space to write student: No space left on device"):
            write_whole(small / "student", lambda path: export._save({"w": torch.zeros(500_000)}, {}, path))
        assert [path.name for path in small.iterdir()] == ["000000001.pt"]
        assert torch.equal(checkpoint.load(small / "000000001.pt", CPU)["w"], torch.zeros(1000))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_random_numbers_go_on_where_they_stopped():
    state = checkpoint.random_state()
    once = torch.rand(4)
    checkpoint.restore_random_state(state)
    assert torch.equal(torch.rand(4), once)
