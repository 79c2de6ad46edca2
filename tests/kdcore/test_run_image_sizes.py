"""Jobs with images of several sizes, for a teacher and for boxes: kdcore/prepare.py, data/loading.py, run.py."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from base.errors import SpecFaults, TeacherMismatch
from kdcore import data as kdcore_data
from kdcore import prepare
from kdcore.checkpoint import Stopped
from kdcore.data import streaming
from kdcore.data.images import Resized
from kdcore.measure.evaluate import run_evaluation
from kdcore.run import run
from kdcore.spec import Dataset, EvaluationSpec, Teacher, parse
from kdcore.training import StageTraining
from tests.kdcore.engine import (
    as_by_the_version_before,
    distilled,
    events,
    job,
    same,
    supervised,
    workspace,
    write_arrays,
    write_pool,
    write_teacher,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 16 x 16, which jobs read at 8."""
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz", side=16)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """It learned from the pictures as they are, and says so."""
    where, _ = workspace(tmp_path_factory.mktemp("teacher"))
    run(supervised(data, epochs=2), where)
    return where.out / "student.safetensors"


def at_8(data, teacher, image_size=None, **fields):
    return job(
        data,
        [{"checkpoint": f"file:{teacher}", "image_size": image_size}] if image_size else teacher,
        **{"method": "kd", "dataset": {"source": f"file:{data}", "image_size": 8}, **fields},
    )


def finish(spec, folder, resume=None):
    where, _ = workspace(folder)
    return run(spec, where, resume), load_file(where.out / "student.safetensors"), where.out


def test_run_the_teacher_is_checked_and_graded_on_its_own_size(data, teacher, tmp_path):
    report, _, out = finish(at_8(data, teacher, baseline="train"), tmp_path)
    spec = EvaluationSpec(model=Teacher(checkpoint=f"file:{teacher}"), dataset=Dataset(source=f"file:{data}"))
    where, _ = workspace(tmp_path / "evaluation")
    assert report["teacher"]["accuracy"] == run_evaluation(spec, where)["accuracy"]
    assert report["dataset"]["image_size"] == (8, 8) or report["dataset"]["image_size"] == [8, 8]
    assert json.loads((out / "spec.json").read_text())["teacher"]["image_size"] == 16
    with safe_open(out / "student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["distillery"])["image_size"] == [8, 8]
    assert "image_size_differs" not in {one["code"] for one in report["warnings"]}


def test_run_the_student_alone_is_the_same_to_the_bit_beside_a_teacher_of_any_size(data, teacher, tmp_path):
    alone = []
    for size in (8, 16):
        _, _, out = finish(at_8(data, teacher, size, baseline="train"), tmp_path / str(size))
        alone.append(load_file(out / "alone.safetensors"))
    assert same(*alone)


def test_run_a_teacher_of_the_datas_own_size_changes_no_bit(data, teacher, tmp_path):
    silent = write_teacher(tmp_path / "silent.safetensors")
    states = [finish(at_8(data, silent, size), tmp_path / str(size))[1] for size in (None, 8)]
    assert same(*states)
    assert not same(states[0], finish(at_8(data, silent, 16), tmp_path / "other")[1])


def stopped(spec, folder, steps, monkeypatch):
    where, stream = workspace(folder)
    step = StageTraining._step

    def counted(self, batch):
        step(self, batch)
        where.stop_requested = self.global_step + 1 >= steps

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "_step", counted)
        with pytest.raises(Stopped):
            run(spec, where)
    return where.out / events(stream, "checkpoint")[-1]["path"]


@pytest.mark.parametrize("augmentation", ["crop_flip", "random_resized_crop"])
def test_run_a_stopped_job_resumes_to_the_same_bits(augmentation, data, teacher, tmp_path, monkeypatch):
    spec = at_8(data, teacher, training={"augmentation": {"name": augmentation}, "mix": {"name": "cutmix"}})
    _, whole, _ = finish(spec, tmp_path / "whole")
    _, again, _ = finish(spec, tmp_path / "again")
    _, resumed, _ = finish(spec, tmp_path / "resumed", stopped(spec, tmp_path / "stopped", 4, monkeypatch))
    assert same(whole, again) and same(whole, resumed)


def test_run_a_job_of_an_earlier_version_goes_on_with_the_datas_size(data, teacher, tmp_path, monkeypatch):
    """Its teacher learned from 16 x 16, and got 8 x 8: in that version there was no other size."""
    running = {"batch_norm": "running", "kernels": "eager"}
    earlier = at_8(data, teacher, 8, training=running)
    _, whole, _ = finish(earlier, tmp_path / "whole")
    checkpoint = stopped(earlier, tmp_path / "stopped", 1, monkeypatch)
    as_by_the_version_before(checkpoint)
    _, resumed, out = finish(at_8(data, teacher), tmp_path / "resumed", checkpoint)
    assert same(whole, resumed)
    assert json.loads((out / "spec.json").read_text())["teacher"]["image_size"] is None


def test_run_teachers_of_two_sizes_answer_as_one(data, teacher, tmp_path):
    both = [{"checkpoint": f"file:{teacher}", "image_size": size} for size in (16, 8)]
    report, _, _ = finish(at_8(data, both), tmp_path)
    alone = [finish(at_8(data, teacher, size), tmp_path / str(size))[0] for size in (16, 8)]
    rows = [report["models"][name]["accuracy"] for name in ("teacher-1", "teacher-2")]
    assert rows == [one["teacher"]["accuracy"] for one in alone]


@pytest.mark.parametrize(
    "fields",
    [
        {"method": {"name": "born_again", "generations": 2}},
        {"assistants": ["convnet8"]},
        {"method": ["kd", "attention"]},
        {"method": "fitnet"},
        {"method": "rkd", "training": {"augmentation": {"name": "none"}, "mix": {"name": "mixup"}}},
    ],
    ids=str,
)
def test_run_chains_stages_and_taps_with_a_teacher_of_another_size(fields, data, teacher, tmp_path):
    report, _, _ = finish(at_8(data, teacher, **fields), tmp_path)
    assert 0 <= report["student"]["accuracy"] <= 1


def test_run_unlabelled_images_are_shown_in_both_sizes(data, teacher, tmp_path):
    pool = write_pool(tmp_path / "pool.npz", side=16)
    where, _ = workspace(tmp_path)
    spec = at_8(data, teacher, unlabelled={"source": f"file:{pool}", "labels": "none"})
    prepared = prepare.prepare(spec, where)
    trained = prepared.training_set(prepared.trials[0]).images
    assert trained.pixels.shape == (180, 1, 8, 8) and trained.sized[16].shape == (180, 1, 16, 16)
    assert torch.equal(trained.sized[16][120:], torch.from_numpy(np.load(pool)["x_train"]).permute(0, 3, 1, 2))
    native = at_8(data, teacher, 32, dataset=f"file:{data}", unlabelled={"source": f"file:{pool}", "labels": "none"})
    prepared = prepare.prepare(native, where)
    large = prepared.training_set(prepared.trials[0]).images.sized[32]
    assert isinstance(large, Resized) and large.shape == (180, 1, 32, 32)
    assert large.index_select(0, torch.tensor([3, 150])).shape == (2, 1, 32, 32)


def test_prepare_only_the_jobs_own_teacher_costs_pixels_of_its_size(data, teacher, tmp_path):
    where, _ = workspace(tmp_path)
    prepared = prepare.prepare(at_8(data, teacher, baseline="train"), where)
    sizes = {trial.name: list(prepared.training_set(trial).images.sized) for trial in prepared.trials}
    assert sizes == {"student": [16], "alone": []}
    assert prepared.training_set(prepared.trials[0]).held_out.sized == {}


def test_prepare_a_teacher_sees_the_pictures_and_not_the_students_pixels_enlarged(data, teacher, tmp_path):
    where, _ = workspace(tmp_path)
    prepared = prepare.prepare(at_8(data, teacher), where)
    pictures = torch.from_numpy(np.load(data)["x_test"]).permute(0, 3, 1, 2)
    assert torch.equal(prepared.data.test.sized[16], pictures)
    assert torch.equal(prepared.data.test.at(16).pixels, pictures)
    small = np.asarray(Image.fromarray(pictures[0, 0].numpy()).resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(prepared.data.test.pixels[:1][0, 0], small)


def test_prepare_pictures_that_are_smaller_are_enlarged_when_they_are_read(data, teacher, tmp_path):
    """The pictures have 16 x 16: nothing more can be stored of them, and the cache has one entry."""
    where, _ = workspace(tmp_path)
    prepared = prepare.prepare(at_8(data, teacher, 40, dataset=f"file:{data}"), where)
    large = prepared.data.test.sized[40]
    assert isinstance(large, Resized) and len(list(where.cache.glob("*/facts.json"))) == 1
    picture = prepared.data.test.pixels[:1][0, 0].numpy()
    theirs = np.asarray(Image.fromarray(picture).resize((40, 40), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(large[:1][0, 0].numpy().astype(int) - theirs).max() <= 2


def test_with_sizes_a_crop_shows_the_same_part_at_every_size(tmp_path):
    """20 of 40 pixels, of pictures that are resized to 40: at 30 these are 30 of 60."""
    dataset = Dataset(source="digits", image_size=20, resize_to=40)
    loaded = kdcore_data.load(dataset, None, tmp_path)
    sized = kdcore_data.with_sizes(
        {"test": loaded.test}, [30], None, kdcore_data.enlarges(dataset), dataset, None, tmp_path
    )
    expected = kdcore_data.load(Dataset(source="digits", image_size=30, resize_to=60), None, tmp_path).test.pixels
    assert torch.equal(sized["test"].sized[30], expected)


def test_evaluations_have_the_datas_size_only(data, teacher, tmp_path):
    spec = EvaluationSpec(
        model=Teacher(checkpoint=f"file:{teacher}", image_size=16), dataset=Dataset(source=f"file:{data}")
    )
    where, _ = workspace(tmp_path)
    with pytest.raises(TeacherMismatch, match="an evaluation shows the images at the data set's size"):
        run_evaluation(spec, where)


def test_parse_an_image_size_below_4_is_refused(data, teacher):
    body = distilled(data, teacher).as_json()
    body["teacher"]["image_size"] = 3
    with pytest.raises(SpecFaults, match="image_size"):
        parse(body)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of PNG files of 24 x 24."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.zip"
    rng = np.random.default_rng(5)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", 30), ("test", 10)):
            for label in range(2):
                for number in range(count):
                    pixels = rng.integers(100 * label, 156 + 100 * label, (24, 24)).astype(np.uint8)
                    blob = io.BytesIO()
                    Image.fromarray(pixels).save(blob, "PNG")
                    archive.writestr(f"{split}/{label}/{number}.png", blob.getvalue())
    return path


def boxes(pictures, store_size=None, **fields):
    how = {"name": "random_resized_crop", **({"store_size": store_size} if store_size else {})}
    dataset = {"source": f"file:{pictures}", "image_size": 8}
    training = {"augmentation": how, "batch_size": 16, **fields.pop("training", {})}
    return job(pictures, **{"dataset": dataset, "training": training, **fields})


def test_prepare_boxes_are_cut_from_larger_pictures_and_evaluations_stay_as_they_are(pictures, tmp_path):
    """8 / sqrt(0.35) is 13.5."""
    where, _ = workspace(tmp_path)
    wide, plain = (prepare.prepare(boxes(pictures, size), where) for size in (None, 8))
    assert wide.spec.training.augmentation.store_size == 14 and wide.data.facts.own_side == 24
    trained = wide.training_set(wide.trials[0])
    assert trained.images.wide.shape == (60, 1, 14, 14) and trained.held_out.wide is None
    assert plain.training_set(plain.trials[0]).images.wide is None
    assert torch.equal(wide.data.test.pixels, plain.data.test.pixels)
    assert torch.equal(trained.held_out.pixels, plain.training_set(plain.trials[0]).held_out.pixels)


def test_prepare_a_larger_store_serves_the_teacher_too(pictures, tmp_path):
    where, _ = workspace(tmp_path)
    file = write_teacher(tmp_path / "teacher.safetensors", classes=2)
    teacher = [{"checkpoint": f"file:{file}", "image_size": 12}]
    prepared = prepare.prepare(boxes(pictures, teacher=teacher, method="kd", baseline="train"), where)
    sets = {trial.name: prepared.training_set(trial).images for trial in prepared.trials}
    assert sets["student"].wide.shape[2] == sets["alone"].wide.shape[2] == 21
    assert sets["student"].sized.keys() == {12} and not sets["alone"].sized
    assert prepared.data.test.sized[12].shape == (20, 1, 12, 12)


def test_run_a_stopped_student_from_weights_with_larger_pictures_resumes_to_the_same_bits(
    pictures, tmp_path, monkeypatch
):
    """Its teacher has a size of its own, too; the file of its weights is gone when it resumes."""
    weights = write_teacher(tmp_path / "weights.safetensors", "convnet4", classes=5)
    file = write_teacher(tmp_path / "teacher.safetensors", classes=2)
    student = {"architecture": "convnet4", "checkpoint": f"file:{weights}", "freeze": ["layer1"], "head_lr": 2}
    teacher = [{"checkpoint": f"file:{file}", "image_size": 12}]
    spec = boxes(pictures, teacher=teacher, method="kd", student=student)
    report, whole, out = finish(spec, tmp_path / "whole")
    assert json.loads((out / "spec.json").read_text())["training"]["augmentation"]["store_size"] == 21
    assert report["starts"]["/student"]["classifier"] == "fresh"
    frozen = [name for name in whole if name.startswith("layer1.")]
    assert frozen and same({name: whole[name] for name in frozen}, {name: load_file(weights)[name] for name in frozen})
    checkpoint = stopped(spec, tmp_path / "stopped", 4, monkeypatch)
    weights.unlink()
    assert same(whole, finish(spec, tmp_path / "resumed", checkpoint)[1])


def test_run_a_stopped_job_with_larger_pictures_resumes_to_the_same_bits(pictures, tmp_path, monkeypatch):
    spec = boxes(pictures, training={"epochs": 3})
    _, whole, _ = finish(spec, tmp_path / "whole")
    _, resumed, _ = finish(spec, tmp_path / "resumed", stopped(spec, tmp_path / "stopped", 4, monkeypatch))
    assert same(whole, resumed)
    assert not same(whole, finish(boxes(pictures, 8, training={"epochs": 3}), tmp_path / "small")[1])


def test_run_a_job_of_an_earlier_version_goes_on_with_boxes_from_its_images(pictures, tmp_path, monkeypatch):
    running = {"batch_norm": "running", "epochs": 3, "kernels": "eager"}
    _, whole, _ = finish(boxes(pictures, 8, training=running), tmp_path / "whole")
    checkpoint = stopped(boxes(pictures, 8, training=running), tmp_path / "stopped", 1, monkeypatch)
    as_by_the_version_before(checkpoint)
    _, resumed, out = finish(boxes(pictures, training={"epochs": 3}), tmp_path / "resumed", checkpoint)
    assert same(whole, resumed)
    assert json.loads((out / "spec.json").read_text())["training"]["augmentation"]["store_size"] is None


@pytest.mark.parametrize("how", ["boxes", "crops"])
def test_run_pictures_of_several_sizes_that_are_decoded_as_needed_give_the_same_bits(
    how, pictures, tmp_path, monkeypatch
):
    file = write_teacher(tmp_path / "teacher.safetensors", classes=2)
    fields = {"teacher": [{"checkpoint": f"file:{file}", "image_size": 12}], "method": "kd"}
    fields |= {"training": {"augmentation": {"name": "crop_flip"}}} if how == "crops" else {}
    _, stored, _ = finish(boxes(pictures, **fields), tmp_path / "stored")
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 0)
    where, _ = workspace(tmp_path / "streamed")
    where.cache_max_bytes = 0
    report = run(boxes(pictures, **fields), where)
    assert same(stored, load_file(where.out / "student.safetensors"))
    assert [one["code"] for one in report["warnings"]].count("decoded_again") == 1
