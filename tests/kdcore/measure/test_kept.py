import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from base.data_cache import lock_of
from kdcore.classifier import Classifier
from kdcore.data import Room, load
from kdcore.device import Computing
from kdcore.measure import evaluate, kept
from kdcore.programs import Program
from kdcore.run import run
from kdcore.spec import Dataset
from store import cache as store_cache
from tests.kdcore.engine import job, workspace, write_arrays, write_teacher
from tests.kdcore.tiny import linear

LOGITS = torch.tensor([[1.5, -0.0], [float("inf"), 3e-45], [2.0, 7.0]])


def never():
    raise AssertionError("it is measured only once")


def same_bits(one, other) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_logits_are_measured_once_and_kept_to_the_last_bit(tmp_path):
    cache = tmp_path / "cache"
    assert kept.logits(cache, Room(), "a", 3, lambda: LOGITS) is LOGITS
    assert same_bits(kept.logits(cache, Room(), "a", 3, never), LOGITS)
    with pytest.raises(AssertionError, match="once"):
        kept.logits(cache, Room(), "b", 3, never)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "other", "lock"])
def test_logits_that_are_damaged_are_measured_and_written_again(damage, tmp_path):
    kept.logits(tmp_path, Room(), "a", 3, lambda: LOGITS)
    (path,) = tmp_path.glob("a-logits/*")
    whole = path.read_bytes()
    if damage == "lock":
        path.unlink()  # As a process leaves it that was killed before the file was renamed.
    else:
        damaged = {"bit": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-4], "empty": b"", "other": b"x" * 99}
        path.write_bytes(damaged[damage])
    assert same_bits(kept.logits(tmp_path, Room(), "a", 3, lambda: LOGITS), LOGITS)
    assert path.read_bytes() == whole
    assert same_bits(kept.logits(tmp_path, Room(), "a", 3, never), LOGITS)


def test_logits_of_another_number_of_images_are_not_taken(tmp_path):
    kept.logits(tmp_path, Room(), "a", 3, lambda: LOGITS)
    assert len(kept.logits(tmp_path, Room(), "a", 2, lambda: LOGITS[:2])) == 2


def test_logits_without_room_or_with_a_full_disk_are_measured_all_the_same(tmp_path, monkeypatch):
    assert kept.logits(tmp_path, Room(LOGITS.numel() * 4 - 1), "a", 3, lambda: LOGITS) is LOGITS
    assert not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "write_whole", full)
    assert kept.logits(tmp_path, Room(), "a", 3, lambda: LOGITS) is LOGITS


def test_logits_are_trimmed_as_decoded_data_is_the_longest_unused_first(tmp_path):
    for key in ("old", "used"):
        kept.logits(tmp_path, Room(), key, 3, lambda: LOGITS)
        os.utime(tmp_path / f"{key}-logits", (1, 1))
    kept.logits(tmp_path, Room(), "used", 3, never)
    assert [one.folder.name for one in store_cache.trim(tmp_path, 0)] == ["old-logits"]
    assert lock_of(tmp_path / "old-logits").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz")
    return load(Dataset(source=f"file:{path}"), path, path.parent / "cache")


CPU = Computing("cpu", bf16=False, threads=1)


def key(data, model=None, **changed):
    given = {"architecture": "linear", "dataset": Dataset(source="file:x"), "computing": CPU, "facts": data.facts}
    given |= changed
    model = model or linear(0)
    return kept.key(model, given["architecture"], data.test, given["dataset"], given["facts"], given["computing"])


def test_key_of_what_gives_the_same_logits_is_the_same(data):
    assert key(data) == key(data, linear(0))
    assert key(data) == key(data, computing=replace(CPU, bf16=True, overlap=True, kernels=True))
    # A file is known by its bytes, wherever it lies.
    assert key(data) == key(data, dataset=Dataset(source="file:y"))


def test_key_differs_with_everything_that_decides(data, monkeypatch):
    network = linear(0).network
    ordered = Classifier(network, [0.5], [0.25], order=[1, 0, 2])
    mapped = Classifier(network, [0.5], [0.25], outputs=[[0], [1, 2], [2]])
    others = [
        *(key(data, one) for one in (linear(1), ordered, mapped, Classifier(network, [0.5], [0.26]))),
        key(data, Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3).half()), [0.5], [0.25])),
        key(data, architecture="another"),
        key(data, computing=replace(CPU, threads=2)),
        key(data, computing=replace(CPU, folded=True)),
        key(data, computing=replace(CPU, folded=True, convolutions=True)),
        key(data, dataset=Dataset(source="file:x", channels=3)),
        key(data, facts=data.facts.model_copy(update={"digest": "sha256:other"})),
        key(replace(data, test=data.test.take(torch.arange(5)))),
    ]
    monkeypatch.setattr(torch, "__version__", "3.0")
    everything = [*others, key(data)]
    monkeypatch.undo()
    assert len({*everything, key(data)}) == len(everything) + 1


def test_key_knows_a_program_by_its_file(data):
    class Silent(Program):
        def __init__(self, digest):
            super().__init__(SimpleNamespace(digest=digest))

    one, again, other = (Classifier(Silent(digest), [0.5], [0.25]) for digest in ("a", "a", "b"))
    assert key(data, one) == key(data, again) != key(data, other)


def test_run_a_second_job_with_a_teacher_takes_its_logits_and_reports_the_same_bits(tmp_path, monkeypatch):
    data, teacher = write_arrays(tmp_path / "data.npz"), write_teacher(tmp_path / "teacher.safetensors")
    spec, measured, logits_on = job(data, teacher, method="kd", training={"epochs": 1}), [], evaluate.logits_on

    def counted(model, images, on_images=None):
        measured.append((sum(one.numel() for one in model.network.parameters()), len(images)))
        return logits_on(model, images, on_images)

    monkeypatch.setattr(evaluate, "logits_on", counted)
    reports, runs = [], []
    for name, cache in (("first", "cache"), ("second", "cache"), ("apart", "other")):
        where, _ = workspace(tmp_path / name, tmp_path / cache)
        reports.append({**run(spec, where), "seconds": 0, "cost": 0, "timings": 0, "teacher_cache": 0})
        runs.append(list(measured))
        measured.clear()
    assert reports[0] == reports[1] == reports[2]
    assert runs[0] == runs[2] and len(runs[1]) == len(runs[0]) - 1
