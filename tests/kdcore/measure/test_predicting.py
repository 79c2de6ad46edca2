import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from base.errors import DatasetUnreadable, SpecFaults
from kdcore import data as data_sets
from kdcore import models
from kdcore.__main__ import main
from kdcore.catalog import DatasetFacts
from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble
from kdcore.measure import predicting
from kdcore.measure.evaluate import logits_on
from kdcore.measure.predicting import Shown, probabilities_of_teacher, run_prediction, top
from kdcore.run import run
from kdcore.spec import Dataset
from kdcore.spec.kinds import PredictionSpec
from tests.kdcore.engine import distilled, method_job, workspace, write_arrays, write_teacher
from tests.kdcore.tiny import constant


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def done(data, teacher, tmp_path_factory):
    """A finished job: its folder and its report."""
    where, _ = workspace(tmp_path_factory.mktemp("job"))
    return where, run(distilled(data, teacher), where)


def asked(done, picture, folder, **job):
    """The spec of a prediction as a worker writes it, of a picture's bytes or image."""
    where, report = done
    path = folder / "picture"
    path.write_bytes(picture if isinstance(picture, bytes) else encoded(picture))
    body = {
        "kind": "prediction",
        "image": f"file:{path}",
        "job": {**json.loads((where.out / "spec.json").read_text()), **job},
        "dataset": report["dataset"],
        "student": f"file:{where.out / 'student.safetensors'}",
    }
    if report["alone"]:
        body["alone"] = f"file:{where.out / 'alone.safetensors'}"
    return body


def answer(done, picture, folder, **job):
    where, _ = workspace(folder / "prediction")
    return run_prediction(PredictionSpec.parse(asked(done, picture, folder, **job), stored=True), where)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_image(data, number=0):
    with np.load(data) as arrays:
        return Image.fromarray(arrays["x_test"][number, :, :, 0])


test_image.__test__ = False


def test_run_prediction_says_what_the_job_itself_has_measured(done, data, teacher, tmp_path):
    """The same probabilities as those of the test set's logits, which the report's figures are made of."""
    where, report = done
    said = answer(done, test_image(data, 4), tmp_path)
    loaded = data_sets.load(Dataset(source=f"file:{data}"), data, tmp_path / "cache")
    spec = json.loads((where.out / "spec.json").read_text())
    networks = {
        "teacher": (spec["teacher"], teacher),
        "student": (spec["student"], where.out / "student.safetensors"),
        "alone": (spec["student"], where.out / "alone.safetensors"),
    }
    for name, (own, path) in networks.items():
        network = models.build(own["architecture"], 3, 1)
        network.load_state_dict(load_file(path))
        classifier = Classifier(network, own["preprocessing"]["mean"], own["preprocessing"]["std"])
        expected = logits_on(classifier, loaded.test)[4].softmax(0)
        assert said[name]["architecture"] == own["architecture"]
        assert [one["number"] for one in said[name]["top"]] == expected.argsort(descending=True).tolist()
        assert [one["probability"] for one in said[name]["top"]] == pytest.approx(
            expected.sort(descending=True).values.tolist(), abs=1e-5
        )
        assert [one["class"] for one in said[name]["top"]] == [
            report["dataset"]["class_names"][one["number"]] for one in said[name]["top"]
        ]
    assert said["agree"] == (said["teacher"]["top"][0]["class"] == said["student"]["top"][0]["class"])
    assert said["image"] == {"width": 8, "height": 8, "kinds": ["grey"], "shown": "as it is, 8 x 8 pixels, grey"}
    assert said["notes"] == []


def test_run_prediction_of_a_job_without_teacher_or_baseline(data, teacher, tmp_path):
    where, _ = workspace(tmp_path / "job")
    done = where, run(distilled(data, teacher, baseline="none", epochs=1), where)
    said = answer(done, test_image(data), tmp_path, teacher=None, method="supervised")
    assert said["teacher"] is said["alone"] is said["agree"] is None
    assert said["notes"] == ["the job has no teacher of its own"]
    said = answer(done, test_image(data), tmp_path, teacher={"logits": "blob:sha256:" + 64 * "a"})
    assert said["teacher"] is None and said["notes"][0].startswith("the teacher is a file of logits")
    gone = {"checkpoint": "blob:sha256:" + 64 * "a", "architecture": "convnet4"}
    said = answer(done, test_image(data), tmp_path, teacher=gone)
    assert said["teacher"] is None and said["student"] is not None
    assert said["notes"] == ["the teacher's file is not stored any more"]


def test_run_prediction_of_a_student_with_several_members(data, teacher, tmp_path):
    where, _ = workspace(tmp_path / "job")
    method = {"name": "born_again", "generations": 2, "answer": "ensemble"}
    report = run(method_job("born_again", data, teacher, method=method, training={"epochs": 1}), where)
    said = answer((where, report), test_image(data), tmp_path)
    states = predicting._states(where.out / "student.safetensors")
    assert len(states) > 1 and states[0].keys() == states[1].keys()
    assert sum(one["probability"] for one in said["student"]["top"]) == pytest.approx(1)


def test_run_prediction_of_a_teacher_with_other_classes(done, data, tmp_path):
    other = write_teacher(tmp_path / "other.safetensors", classes=5)
    own = json.loads((done[0].out / "spec.json").read_text())["teacher"]
    said = answer(done, test_image(data), tmp_path, teacher={**own, "checkpoint": f"file:{other}"})
    assert {one["class"] for one in said["teacher"]["top"]} == {f"output {number}" for number in range(5)}
    assert said["notes"] == ["the teacher has other classes than the data set"]


@pytest.mark.parametrize(
    ("picture", "kinds"),
    [
        (Image.new("RGB", (40, 20), "red"), ["colour"]),
        (Image.new("CMYK", (9, 30)), ["cmyk", "colour"]),
        (Image.new("RGBA", (12, 12), (0, 0, 0, 0)), ["alpha", "colour"]),
        (Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), ["grey", "sixteen_bit"]),
        (Image.new("P", (33, 7)), ["colour", "palette"]),
    ],
)
def test_run_prediction_of_every_kind_of_picture(done, picture, kinds, tmp_path):
    form = "TIFF" if picture.mode == "CMYK" else "PNG"
    said = answer(done, encoded(picture, form), tmp_path)
    assert said["image"]["kinds"] == kinds
    assert sum(one["probability"] for one in said["student"]["top"]) == pytest.approx(1)


def test_run_prediction_of_an_animated_picture_sees_its_first_frame(done, data, tmp_path):
    first, second = test_image(data), Image.new("L", (8, 8), 255)
    moving = encoded(first, "GIF", save_all=True, append_images=[second])
    said, alone = answer(done, moving, tmp_path), answer(done, encoded(first, "GIF"), tmp_path)
    assert "animated" in said["image"]["kinds"] and said["student"] == alone["student"]


FACTS = {"kind": "folders", "num_classes": 2, "class_names": ["a", "b"], "train": 9, "test": 9}


def facts(channels=3, size=(8, 8)):
    return DatasetFacts(**FACTS, channels=channels, image_size=size, mean=[0.5] * channels, std=[0.5] * channels)


def read(**options):
    return Dataset(source="blob:sha256:" + 64 * "0", **options)


def left_black():
    """Twice as wide as high: a black left half, a white right half."""
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))
    return encoded(image)


def test_shown_is_what_a_training_would_see(tmp_path):
    """The pixels of a picture in a data set, by the data set's own reading, with each option."""
    import zipfile

    path = tmp_path / "set.zip"
    rng = np.random.default_rng(0)
    blobs = [encoded(Image.fromarray(rng.integers(0, 256, (19, 31, 3), dtype=np.uint8))) for _ in range(12)]
    with zipfile.ZipFile(path, "w") as archive:
        for number, blob in enumerate(blobs):
            archive.writestr(f"{'train' if number < 8 else 'test'}/{'ab'[number % 2]}/{number}.png", blob)
    for options in (
        {"image_size": 12},
        {"image_size": 12, "resize": "squash"},
        {"image_size": 12, "resize": "pad", "channels": 1},
        {"image_size": 12, "resize_to": 14, "interpolation": "bicubic"},
    ):
        dataset = Dataset(source=f"file:{path}", **options)
        loaded = data_sets.load(dataset, path, tmp_path / "cache")
        sized = data_sets.with_sizes({"train": loaded.train, "test": loaded.test}, [20], None, False, dataset, path,
                                     tmp_path / "cache")["test"]  # fmt: skip
        shown = [Shown(blob, dataset, loaded.facts) for blob in blobs[8:]]
        for side, store in ((None, sized.pixels), (20, sized.sized[20])):
            pixels = store[:]
            assert all(any(torch.equal(one.at(side)[0], row) for row in pixels) for one in shown)


def test_shown_turns_a_picture_only_if_the_data_set_does():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    blob = encoded(image, exif=exif)
    as_stored, upright = (
        Shown(blob, read(image_size=8, orientation=how), facts()).at(None)[0, 0] for how in ("ignore", "apply")
    )
    assert torch.equal(upright, as_stored.flip(0, 1)) and as_stored[0, 0] == 0


def test_shown_of_images_of_a_data_set_that_are_no_squares():
    """The middle in the same shape; a picture of that size stays as it is."""
    shown = Shown(left_black(), read(), facts(size=(16, 8))).at(None)
    assert shown.shape == (1, 3, 16, 8)
    assert (shown[0, :, :, :3] < 60).all() and (shown[0, :, :, 5:] > 190).all()
    same = Shown(left_black(), read(), facts(size=(16, 32))).at(None)
    assert (same[..., :16] == 0).all() and (same[..., 16:] == 255).all()


def test_shown_of_a_grey_data_set_and_at_a_size_of_the_teachers_own():
    shown = Shown(left_black(), read(image_size=8), facts(channels=1))
    assert shown.at(None).shape == (1, 1, 8, 8) and shown.at(12).shape == (1, 1, 12, 12)
    # Without image_size the pixels of the data are all that there are, so that larger ones are made of them.
    stored = Shown(left_black(), read(), facts())
    assert torch.equal(stored.at(16), predicting.resizing.resized(stored.at(None), (16, 16)))


def test_probabilities_of_a_teacher_with_several_networks_are_their_weighted_mean():
    members = [FrozenTeacher(constant(0.5, 0.3, 0.2)), FrozenTeacher(constant(0.1, 0.1, 0.8))]
    ensemble = TeacherEnsemble(members, [3, 1], temperature=4.0)
    shown = Shown(left_black(), read(image_size=8), facts(channels=1))
    probabilities = probabilities_of_teacher(ensemble, shown)
    assert probabilities.tolist() == pytest.approx([0.4, 0.25, 0.35])
    assert top(probabilities, ["a", "b", "c"], 2) == [
        {"class": "a", "number": 0, "probability": pytest.approx(0.4)},
        {"class": "c", "number": 2, "probability": pytest.approx(0.35)},
    ]


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"", "not an image of a known kind"),
        (b"GIF89a" + bytes(20), "the image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known kind"),
        (encoded(Image.new("L", (60_000, 1))), "too long and thin"),
        (encoded(Image.new("RGB", (30, 30)))[:60], "the image"),
    ],
)
def test_run_prediction_refuses_what_is_no_image(done, blob, words, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "MAX_PIXELS", 1_000_000)
    with pytest.raises(DatasetUnreadable, match=words):
        answer(done, blob, tmp_path)


def test_run_prediction_refuses_more_pixels_than_any_picture_has(done, tmp_path):
    """A few bytes of a header announce them; nothing is decoded."""
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(DatasetUnreadable, match="pixels"):
        answer(done, bomb, tmp_path)


def test_main_runs_a_prediction_by_its_kind(done, data, tmp_path, capfd):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(asked(done, test_image(data), tmp_path)))
    assert main(["run", str(spec), "--out", str(tmp_path / "out")]) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["event"] == "done" and last["report"]["student"]["top"]


def test_prediction_spec_names_each_fault():
    with pytest.raises(SpecFaults) as caught:
        PredictionSpec.parse({"kind": "prediction", "image": "nowhere"})
    assert {"/image", "/job", "/dataset", "/student"} <= {fault.pointer for fault in caught.value.faults}
    assert PredictionSpec.model_fields.keys() >= {"kind", "image", "job", "dataset", "student", "alone"}
