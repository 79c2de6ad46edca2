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
from kdcore.measure import evaluate, kept, teacher_check
from kdcore.models import build
from kdcore.programs import Program
from kdcore.protocol import REPORT_OF_ATTEMPTS
from kdcore.run import run
from kdcore.spec import Dataset
from store import cache as store_cache
from tests.kdcore.engine import events, job, workspace, write_arrays, write_teacher
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


def test_kept_counts_what_was_taken_and_says_what_is_not_kept(data, tmp_path, monkeypatch):
    def asked(room=None):
        one = kept.Kept(tmp_path, room or Room(), Dataset(source="file:x"), data.facts, CPU)
        return one, one.logits("linear", linear(0), data.test, lambda: torch.zeros(30, 3))

    first, _ = asked(Room(9))
    assert first.report() == {
        "taken": 0, "measured": 1, "notes": ["not kept for later jobs: the cache has no room for 360 bytes"],
    }  # fmt: skip
    assert asked()[0].report() == {"taken": 0, "measured": 1, "notes": []}
    assert asked()[0].report() == {"taken": 1, "measured": 0, "notes": []}
    (path,) = tmp_path.glob("*-logits/*")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(kept, "write_whole", full)
        notes = asked()[0].report()["notes"]
    assert notes == [
        "measured again: the stored numbers have another checksum",
        "not kept for later jobs: No space left on device",
    ]


def test_kept_asks_for_the_rows_that_are_there_and_for_the_threads_that_measure(data, tmp_path, monkeypatch):
    one = kept.Kept(tmp_path, Room(), Dataset(source="file:x"), data.facts, CPU)
    few = data.test.take(torch.arange(4))

    def ask(*part):
        return len(one.logits("linear", linear(0), few, lambda: torch.zeros(4, 3), list(part) or None))

    parts = [(), kept.part_of("test", 30, torch.arange(4)), kept.part_of("test", 30, torch.arange(1, 5)),
             kept.part_of("train", 30, torch.arange(4)), kept.part_of("test", 31, torch.arange(4))]  # fmt: skip
    assert [ask(*part) for part in parts + parts] == [4] * 10 and one.report()["measured"] == 5
    assert len(one.logits("linear", linear(0), few, lambda: torch.zeros(12, 3), ["thrice"], 12)) == 12
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ask()
    assert one.report()["measured"] == 7


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
        key(data, computing=replace(CPU, convolutions=True)),
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


@pytest.mark.parametrize("sample", [30, 12])
def test_run_a_second_job_with_a_teacher_runs_it_only_to_teach_and_reports_the_same_bits(sample, tmp_path, monkeypatch):
    """Test images, held-out ones, and those of the teacher check: all test images or a few, also as other
    normalizations show them, and those whose soft targets are looked at."""
    data, teacher = write_arrays(tmp_path / "data.npz"), write_teacher(tmp_path / "teacher.safetensors")
    spec, logits_on = job(data, teacher, method="kd", training={"epochs": 1}), evaluate.logits_on
    parameters = evaluate.parameters(build("convnet8", 3, 1))
    rows: list[int] = []

    def counted(model, images, on_images=None):
        if evaluate.parameters(model.network) == parameters:
            rows.append(len(images))
        return logits_on(model, images, on_images)

    monkeypatch.setattr(evaluate, "logits_on", counted)
    monkeypatch.setattr(teacher_check, "IMAGES", sample)
    reports, figures, runs, checks = [], [], [], []
    for name, cache in (("first", "cache"), ("second", "cache"), ("apart", "other")):
        where, stream = workspace(tmp_path / name, tmp_path / cache)
        report = run(spec, where)
        figures.append(report["kept_logits"])
        reports.append({**report, **dict.fromkeys(REPORT_OF_ATTEMPTS)})
        runs.append(list(rows))
        (check,) = events(stream, "teacher_check")
        checks.append(check)
        rows.clear()
    assert reports[0] == reports[1] == reports[2] and checks[0] == checks[1] == checks[2]
    assert runs[0] == runs[2] and len(runs[0]) > 4 and runs[1] == []
    # Where the check has measured all test images, the report takes these.
    asked = 5
    taken = sample == 30
    assert figures[0] == {"taken": taken, "measured": asked - taken, "notes": []}
    assert figures[1] == {"taken": asked, "measured": 0, "notes": []}


def test_run_the_held_out_logits_of_another_jobs_baseline_are_kept_those_of_a_new_student_are_not(tmp_path):
    data, teacher = write_arrays(tmp_path / "data.npz"), write_teacher(tmp_path / "teacher.safetensors")
    alone = run(job(data, baseline="none"), (where := workspace(tmp_path / "alone")[0]))
    assert alone["kept_logits"] == {"taken": 0, "measured": 0, "notes": []}
    baseline = where.out / "student.safetensors"
    spec = job(data, teacher, method="kd", baseline=f"file:{baseline}", training={"epochs": 1})
    first, second = (run(spec, workspace(tmp_path / name, tmp_path / "cache")[0]) for name in ("first", "second"))
    assert second["kept_logits"]["measured"] == 0
    assert second["kept_logits"]["taken"] == first["kept_logits"]["measured"] + first["kept_logits"]["taken"] == 7
    assert first["calibration"] == second["calibration"] and first["alone"] == second["alone"]
