"""A file of logits in the place of a teacher: reading, looking up, and whole jobs."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from base.errors import SpecFaults, TeacherMismatch, WarningRefused
from kdcore import __main__ as engine
from kdcore import data
from kdcore.catalog.facts import LogitsFacts
from kdcore.checkpoint import Stopped
from kdcore.classifier import FrozenTeacher
from kdcore.data.archive import Limits
from kdcore.data.images import Data, Images
from kdcore.data.views import Views
from kdcore.lesson import NOTHING, Batch
from kdcore.run import run
from kdcore.spec import CropFlip, Dataset, NoAugmentation, parse_evaluation
from kdcore.spec.fitting import views_drawn
from kdcore.stored_logits import StoredLogits, inspect, open_logits
from kdcore.training import StageTraining
from tests.kdcore.engine import events, job, same, workspace, write_arrays
from tests.kdcore.tiny import named

FOUR = np.arange(12, dtype=np.float32).reshape(4, 3)
"""Logits of four training images and three classes."""


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{"logits": FOUR, **arrays})
    return path


def blobs(train: int = 4, test: int = 2, side: int = 8) -> Data:
    """Images of a data set whose labels are 0, 1, 2, 0, …"""
    generator = torch.Generator().manual_seed(0)
    splits = [
        Images(
            torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator),
            torch.arange(count) % 3,
        )
        for count in (train, test)
    ]
    return Data(splits[0], splits[1], ("a", "b", "c"), None)  # type: ignore[arg-type]


def looked_up(teacher: StoredLogits, rows: list[int], views: list[int]) -> Tensor:
    inputs = torch.zeros(len(rows), 1, 8, 8, dtype=torch.uint8)
    batch = Batch(inputs, torch.zeros(len(rows)), torch.tensor(rows), 1, torch.tensor(views))
    return teacher(batch).logits


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_inspect_logits_facts(tmp_path, save):
    save(tmp_path / "t.npz", logits=FOUR.astype("float16"), test_logits=FOUR[:2], labels=[0, 1, 2, 0])
    facts = inspect(tmp_path / "t.npz")
    assert (facts.train, facts.test, facts.num_classes, facts.views, facts.labels) == (4, 2, 3, None, True)
    assert (facts.architecture, facts.parameters, facts.field) == ("logits", 0, "logits")
    assert LogitsFacts.model_validate_json(facts.model_dump_json()) == facts


NAN = FOUR.copy()
NAN[2, 1] = np.nan
VIEWS = np.stack([FOUR, FOUR])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"logits": NAN}, r"logits\[2, 1\] is nan"),
        ({"test_logits": NAN.astype("float16")}, r"test_logits\[2, 1\] is nan"),
        ({"logits": FOUR.astype("float64")}, "logits is float64, and must be float16 or float32"),
        ({"logits": FOUR.astype("int32")}, "logits is int32"),
        ({"logits": np.array([{}], dtype=object)}, "never unpickled"),
        ({"logits": np.asfortranarray(NAN)}, r"logits\[2, 1\] is nan"),
        ({"logits": FOUR[:0]}, "logits is empty"),
        ({"logits": FOUR[0]}, r"shape \(3,\), and is training images x classes"),
        ({"logits": VIEWS}, r"shape \(2, 4, 3\), and is training images x classes"),
        ({"logits": VIEWS, "views": [0, 2]}, "view 1 is not among them"),
        ({"logits": VIEWS, "views": [1, 1]}, "view 0 is not among them"),
        ({"logits": VIEWS, "views": [0, 1, 2]}, "views has shape"),
        ({"logits": VIEWS, "views": [0.0, 1.0]}, "views is float64, and must be integers"),
        ({"test_logits": FOUR[:, :2]}, "test_logits has shape"),
        ({"labels": [0, 1]}, "labels has shape"),
        ({"names": ["a"]}, "an array 'names', which is not read"),
    ],
)
def test_inspect_logits_refuses(tmp_path, arrays, said):
    with pytest.raises(TeacherMismatch, match=said) as caught:
        inspect(saved(tmp_path / "t.npz", **arrays))
    assert caught.value.hint


def test_inspect_logits_refuses_files_that_are_broken(tmp_path):
    whole = saved(tmp_path / "t.npz")
    (tmp_path / "text.npz").write_text("1,2,3")
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    np.savez(tmp_path / "none.npz", y=FOUR)
    with zipfile.ZipFile(whole) as archive:
        blob = archive.read("logits.npy")
    huge = blob.replace(b"(4, 3), }" + b" " * 12, b"(4000000000000, 3), }")
    assert len(huge) == len(blob) and huge != blob
    for name, content in (("short", blob[:-4]), ("no", b"no array"), ("huge", huge)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.writestr("logits.npy", content)
    said = {
        "text": "cannot be read",
        "cut": "cannot be read",
        "none": "no array logits",
        "short": "cut short",
        "huge": "the most is",
    }
    for name, words in {**said, "no": "cannot be read"}.items():
        with pytest.raises(TeacherMismatch, match=words):
            inspect(tmp_path / f"{name}.npz")


def test_inspect_logits_the_command_answers_with_facts_or_the_reason(tmp_path, capsys):
    for path in (saved(tmp_path / "t.npz"), saved(tmp_path / "bad.npz", logits=NAN)):
        assert engine.main(["inspect", "logits", str(path), "--progress"]) == 0
    begun, facts, _, refused = map(json.loads, capsys.readouterr().out.splitlines())
    assert begun == {"progress": {"done": 0, "total": 0}}
    assert facts["facts"] == inspect(tmp_path / "t.npz").model_dump(mode="json")
    assert refused["error"]["code"] == "teacher_mismatch"


def test_stored_logits_are_looked_up_by_row_and_view(tmp_path):
    several = np.stack([FOUR, FOUR + 100]).astype("float16")
    teacher = StoredLogits(open_logits(saved(tmp_path / "t.npz", logits=several, views=[1, 0])), blobs())
    teacher.show(NOTHING)
    found = looked_up(teacher, [3, 0], [0, 1])
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == [[109.0, 110.0, 111.0], [0.0, 1.0, 2.0]], "view 0 is the second of the file"
    assert teacher.of_test_images() is None
    assert teacher.soft_targets([torch.tensor([[0.0, 0.0]])], 4.0).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("how", [CropFlip(padding=1), CropFlip(padding=2, flip=False), NoAugmentation()])
def test_stored_logits_are_those_of_a_network_on_the_same_views(tmp_path, how):
    """A file that was made view by view gives what the network gives for the drawn views."""
    loaded, network = blobs(train=12), FrozenTeacher(named("convnet4"))
    drawn = views_drawn(how)
    assert drawn is not None
    logits = torch.full((drawn, 12, 3), torch.nan)
    views = Views(how, None, 3)
    for epoch in range(drawn * 8):
        batch = views.batch(loaded.train, torch.arange(12), 0, epoch)
        assert batch.view_ids is not None
        logits[batch.view_ids, batch.index] = network(batch).logits
    logits = logits.nan_to_num(0.0)
    arrays = {"logits": logits.numpy(), "views": np.arange(drawn)} if drawn > 1 else {"logits": logits[0].numpy()}
    file = open_logits(saved(tmp_path / "t.npz", **arrays))
    teacher = StoredLogits(file, loaded)
    batch = views.batch(loaded.train, torch.tensor([5, 2, 7]), 0, 3)
    assert torch.allclose(teacher(batch).logits, network(batch).logits, atol=1e-5)
    plain = Views(NoAugmentation(), None, 3).batch(loaded.train, torch.arange(12), 0, 0)
    if bool(logits[file.facts.plain_view].abs().sum(1).gt(0).all()):
        assert torch.allclose(teacher.of_rows(torch.arange(12)), network(plain).logits, atol=1e-5)


def test_stored_logits_in_fortrans_order_are_the_same(tmp_path):
    columns = FOUR[:, [2, 0, 1]]
    assert columns.flags.f_contiguous, "numpy makes this order without being asked"
    teacher = StoredLogits(open_logits(saved(tmp_path / "t.npz", logits=columns)), blobs())
    assert looked_up(teacher, [3, 0], [0, 0]).tolist() == [[11.0, 9.0, 10.0], [2.0, 0.0, 1.0]]


@pytest.mark.parametrize("flip", [True, False])
def test_view_numbers_are_those_that_the_guide_says(flip):
    loaded = blobs(train=24)
    batch = Views(CropFlip(padding=2, flip=flip), None, 3).batch(loaded.train, torch.arange(24), 0, 0)
    assert batch.view_ids is not None
    for picture, number, seen in zip(loaded.train.pixels[:], batch.view_ids.tolist(), batch.inputs, strict=True):
        place, mirrored = divmod(number, 2) if flip else (number, 0)
        top, left = divmod(place, 5)
        cut = np.pad(picture[0].numpy(), 2)[top : top + 8, left : left + 8]
        assert np.array_equal(seen[0].numpy(), cut[:, ::-1] if mirrored else cut)


@pytest.mark.parametrize(("how", "plain"), [(CropFlip(padding=4), 80), (CropFlip(padding=1, flip=False), 4)])
def test_plain_view_is_the_middle_one(how, plain):
    facts = LogitsFacts(num_classes=3, bytes=1, train=4, views=views_drawn(how))
    assert facts.plain_view == plain


def test_stored_logits_of_other_labels_are_refused(tmp_path):
    labels = {"labels": [0, 1, 2, 0], "test_logits": FOUR[:2], "test_labels": [0, 1]}
    StoredLogits(open_logits(saved(tmp_path / "t.npz", **labels)), blobs())
    for wrong in ({"labels": [0, 2, 1, 0]}, {"test_labels": [1, 0]}):
        with pytest.raises(TeacherMismatch, match="in another order than the data set's"):
            StoredLogits(open_logits(saved(tmp_path / "t.npz", **{**labels, **wrong})), blobs())


def answers(count: int, seed: int = 0, wrong: float = 0.1) -> np.ndarray:
    """Logits that are mostly right for the labels of `write_arrays`."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(count) < wrong, rng.integers(0, 3, count), np.arange(count) % 3)
    return (2 * np.eye(3)[labels] + rng.normal(0, 0.3, (count, 3))).astype("float32")


def test_run_a_job_with_stored_logits_resumes_to_the_same_bits(tmp_path, monkeypatch):
    blobs_file = write_arrays(tmp_path / "blobs.npz")
    views = np.stack([answers(120, view) for view in range(18)])
    file = tmp_path / "t.npz"
    np.savez(file, logits=views, views=np.arange(18), test_logits=answers(30), test_labels=np.arange(30) % 3)
    spec = job(blobs_file, [{"logits": f"file:{file}"}], method="dkd", baseline="train")
    where, stream = workspace(tmp_path / "whole")
    report = run(spec, where)
    right = float((answers(30).argmax(1) == np.arange(30) % 3).mean())
    (check,) = events(stream, "teacher_check")
    assert (check["accuracy"], check["images"], check["key"]) == (pytest.approx(right), 30, None)
    row = report["teacher"]
    assert (row["architecture"], row["parameters"], row["bytes"]) == ("logits", 0, file.stat().st_size)
    assert row["accuracy"] == pytest.approx(right) and row["training_accuracy"] > 0.8
    assert report["student"]["agreement"] is not None
    stopped, lines = workspace(tmp_path / "stopped")
    step = StageTraining._step

    def last(self: StageTraining, *arguments: Any) -> None:
        step(self, *arguments)
        stopped.stop_requested = True

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StageTraining, "_step", last)
        run(spec, stopped)
    resumed, _ = workspace(tmp_path / "resumed")
    run(spec, resumed, stopped.out / events(lines, "checkpoint")[-1]["path"])
    one, other = (load_file(place.out / "student.safetensors") for place in (where, resumed))
    assert same(one, other)


def test_run_a_job_without_test_logits_reports_the_training_images(tmp_path):
    blobs_file = write_arrays(tmp_path / "blobs.npz")
    np.savez(tmp_path / "t.npz", logits=answers(120, wrong=0.0), labels=np.arange(120) % 3)
    plain = {"epochs": 1, "augmentation": {"name": "none"}}
    spec = job(blobs_file, [{"logits": f"file:{tmp_path / 't.npz'}"}], method="kd", training=plain)
    where, stream = workspace(tmp_path / "whole")
    report = run(spec, where)
    assert events(stream, "teacher_check") == []
    assert [line["code"] for line in events(stream, "warning")][:1] == ["teacher_not_tested"]
    row = report["teacher"]
    assert (row["accuracy"], row["loss"], row["training_accuracy"]) == (None, None, 1.0)
    assert "its teacher was measured on training images only (100.0 %)" in report["verdict"]
    assert report["student"]["agreement"] is None
    strict = spec.model_copy(update={"strict": True})
    with pytest.raises(WarningRefused, match="teacher_not_tested"):
        run(strict, workspace(tmp_path / "strict")[0])


@pytest.mark.parametrize(
    ("columns", "rows", "code"),
    [([1, 2, 0], np.arange(120), "class_order_wrong"), ([0, 1, 2], np.arange(120) // 40 * 40, "teacher_near_chance")],
)
def test_check_finds_stored_logits_in_another_order(tmp_path, columns, rows, code):
    blobs_file = write_arrays(tmp_path / "blobs.npz")
    np.savez(tmp_path / "t.npz", logits=answers(120)[rows][:, columns])
    plain = {"epochs": 1, "augmentation": {"name": "none"}}
    spec = job(blobs_file, [{"logits": f"file:{tmp_path / 't.npz'}"}], method="kd", training=plain)
    where, stream = workspace(tmp_path / "job")
    run(spec, where)
    found = {line["code"]: line for line in events(stream, "warning")}
    assert code in found and found[code]["pointer"] == "/teacher/logits"


def test_run_refuses_stored_logits_of_other_images(tmp_path):
    blobs_file, file = write_arrays(tmp_path / "blobs.npz"), saved(tmp_path / "t.npz")
    with pytest.raises(TeacherMismatch, match="4 rows of logits, the data set has 120 training images"):
        run(job(blobs_file, [{"logits": f"file:{file}"}], method="kd"), workspace(tmp_path / "job")[0])


def test_an_evaluation_of_logits_is_refused():
    with pytest.raises(SpecFaults, match="a file of logits has none"):
        parse_evaluation({"model": {"logits": "file:t.npz"}, "dataset": {"source": "digits"}})


def test_images_of_the_training_split_are_in_the_order_of_rows(tmp_path, capsys):
    cache = str(tmp_path / "cache")
    written = tmp_path / "train.safetensors"
    assert engine.main(["images", str(written), "--dataset", "digits", "--cache", cache, "--split", "train"]) == 0
    answer = json.loads(capsys.readouterr().out)
    train = data.load(Dataset(source="digits"), None, Path(cache)).train
    assert (answer["train_samples"], answer["class_names"]) == (len(train), [str(digit) for digit in range(10)])
    assert torch.equal(load_file(written)["labels"], train.labels)


def test_open_logits_that_were_packed_as_only_zeros_are(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.stored_logits.LIMITS", Limits(ratio_from_bytes=10_000))
    np.savez_compressed(tmp_path / "a.npz", logits=np.zeros((10_000, 10), np.float32))
    with pytest.raises(TeacherMismatch, match="unpacks to more than 100 times its size"):
        open_logits(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", logits=np.zeros((10_000, 10), np.float32))
    assert open_logits(tmp_path / "a.npz").facts.train == 10_000


def test_open_logits_of_too_many_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.stored_logits._MOST_ARRAYS", 1)
    with pytest.raises(TeacherMismatch, match="more than 1 arrays"):
        open_logits(saved(tmp_path / "a.npz", labels=np.arange(4)))
