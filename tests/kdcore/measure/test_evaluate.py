import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from base.errors import TeacherMismatch, WarningRefused
from kdcore import data, models
from kdcore.classifier import Classifier
from kdcore.data import streaming
from kdcore.data.images import Images
from kdcore.measure import evaluate
from kdcore.measure.evaluate import (
    agreement,
    batch_size,
    evaluate_checkpoint,
    logits_on,
    paired_p,
    per_class,
    run_evaluation,
    score,
    wilson,
    write_images,
)
from kdcore.prepare import Workspace
from kdcore.protocol import EXIT_STOPPED, Lines
from kdcore.spec import Dataset, EvaluationSpec, Preprocessing, Teacher
from tests.kdcore.engine import events, workspace, write_arrays, write_teacher


def test_score_worked_out_by_hand():
    """Six classes; the right one comes first, second, and last."""
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 3)
    result = score(logits, torch.tensor([0, 1, 5]))
    assert (result.accuracy, result.accuracy_top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    log_sum = math.log(sum(math.exp(z) for z in range(6)))
    assert result.loss == pytest.approx(((log_sum - 5) + (log_sum - 4) + (log_sum - 0)) / 3)


@pytest.mark.parametrize("classes", [2, 6, 10, 100])
def test_score_of_equal_logits_is_that_of_argmax(classes):
    """A network that ends in a ReLU, as SqueezeNet, often has several zeros and nothing above them."""
    labels = torch.arange(10 * classes) % classes
    logits = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(0)).clamp(max=0.5)
    result = score(logits, labels)
    assert result.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert result.accuracy <= result.accuracy_top5
    rows = per_class(logits, labels, [str(at) for at in range(classes)])
    assert result.accuracy == pytest.approx(sum(row["accuracy"] for row in rows) / classes)


def test_two_classes_have_no_top_five_but_a_score():
    assert score(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).accuracy_top5 == 1


def test_agreement_counts_equal_first_choices():
    one, other = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([[9.0, 0], [0, 9], [0, 9]])
    assert agreement(one, other) == pytest.approx(2 / 3)


def test_logits_on_every_image_is_seen_once_in_order_and_the_mode_is_left_alone():
    images = Images(torch.arange(600).remainder(256).to(torch.uint8).view(600, 1, 1, 1), torch.zeros(600).long())
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), [0.0], [1.0], bf16=True).train()
    logits = logits_on(classifier, images)
    assert torch.equal(logits[:, 0], images.pixels.flatten().float() / 255)
    assert classifier.training and classifier.bf16 and not logits.requires_grad


def test_logits_on_counts_the_images_of_each_batch():
    images, counts = Images(torch.zeros(600, 1, 1, 1, dtype=torch.uint8), torch.zeros(600).long()), []
    logits_on(Classifier(nn.Flatten(), [0.0], [1.0]), images, counts.append)
    assert counts == [256, 256, 88]


@pytest.mark.parametrize(
    ("height", "width", "images"),
    [(8, 8, 256), (64, 64, 256), (64, 128, 128), (128, 128, 64), (224, 224, 20), (2000, 2000, 1)],
)
def test_batch_size_falls_with_the_pixels_of_an_image(height, width, images):
    assert batch_size(height, width) == images


def test_logits_on_do_not_depend_on_the_batch_size(monkeypatch):
    torch.manual_seed(0)
    model = Classifier(models.build("convnet8", 3, 1), [0.5], [0.25])
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(40).long())
    whole = logits_on(model, images)
    monkeypatch.setattr(evaluate, "BATCH_PIXELS", 3 * 64)
    assert torch.allclose(logits_on(model, images), whole, atol=1e-5)


def answers(*right: bool) -> torch.Tensor:
    """Logits of two classes; the right one is the first."""
    return torch.tensor([[float(one), float(not one)] for one in right])


def test_paired_p_worked_out_by_hand():
    """Of 12 images both are right on one and both wrong on two: 1 against 8 decide. 2 · (1 + 9) / 2⁹."""
    one = answers(True, False, False, *[True] * 1, *[False] * 8)
    other = answers(True, False, False, *[False] * 1, *[True] * 8)
    labels = torch.zeros(12).long()
    assert paired_p(one, other, labels) == pytest.approx(20 / 512)
    assert paired_p(other, one, labels) == pytest.approx(20 / 512)


def test_paired_p_of_the_same_answers_is_one():
    assert paired_p(answers(True, False), answers(True, False), torch.zeros(2).long()) == 1


def test_paired_p_of_equal_counts_is_one_and_of_many_images_a_number():
    assert paired_p(answers(True, False), answers(False, True), torch.zeros(2).long()) == 1
    many = torch.zeros(100_000).long()
    one = torch.eye(2).repeat(50_000, 1)
    assert paired_p(one, one.flip(1), many) == 1
    assert paired_p(answers(*[True] * 2000), answers(*[False] * 2000), many[:2000]) == 0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published_intervals(correct, total, low, high):
    assert wilson(correct, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_is_symmetric_and_within_the_bounds():
    low, high = wilson(3, 10)
    assert wilson(7, 10) == (pytest.approx(1 - high), pytest.approx(1 - low))
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_fraction(correct, total):
    with pytest.raises(ValueError, match="no fraction"):
        wilson(correct, total)


def test_per_class_counts_by_the_true_class():
    logits = torch.eye(3)[[0, 0, 1, 1, 1]]
    rows = per_class(logits, torch.tensor([0, 1, 1, 1, 0]), ["a", "b", "c"])
    assert rows == [
        {"name": "a", "accuracy": 0.5, "test_samples": 2},
        {"name": "b", "accuracy": pytest.approx(2 / 3), "test_samples": 3},
        {"name": "c", "accuracy": None, "test_samples": 0},
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data set of more test images than fit in one batch, and an untrained network."""
    folder = tmp_path_factory.mktemp("files")
    return write_arrays(folder / "blobs.npz", test=1500), write_teacher(folder / "teacher.safetensors")


def spec_of(files, **fields) -> EvaluationSpec:
    data, model = files
    return EvaluationSpec(model=Teacher(checkpoint=f"file:{model}"), dataset=Dataset(source=f"file:{data}"), **fields)


def test_run_evaluation_measures_all_test_images(files, tmp_path):
    place, stream = workspace(tmp_path)
    report = run_evaluation(spec_of(files), place)
    loaded = data.load(Dataset(source=f"file:{files[0]}"), files[0], tmp_path / "cache")
    network = models.build("convnet8", 3, 1)
    network.load_state_dict(load_file(files[1]))
    logits = logits_on(Classifier(network, loaded.facts.mean, loaded.facts.std), loaded.test)
    expected = score(logits, loaded.test.labels)
    assert (report["accuracy"], report["loss"]) == (expected.accuracy, pytest.approx(expected.loss))
    assert report["interval"] == list(wilson(round(1500 * expected.accuracy), 1500))
    assert report["computing"].items() >= {"device": "cpu", "bf16": False, "threads": torch.get_num_threads()}.items()
    assert (report["architecture"], report["test_samples"]) == ("convnet8", 1500)
    assert report["accuracy"] == pytest.approx(sum(one["accuracy"] for one in report["per_class"]) / 3)
    assert [warning["code"] for warning in report["warnings"]] == ["normalization_guessed"]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [line["phase"] for line in events(stream, "phase")] == ["preparing", "evaluating", "exporting"]
    assert events(stream, "progress")[-1]["percent"] == 100
    assert [line["name"] for line in events(stream, "artifact")] == ["report.json"]


def test_evaluate_checkpoint_by_hand_is_the_same_measurement(files, tmp_path):
    place, _ = workspace(tmp_path)
    report = run_evaluation(spec_of(files), place)
    by_hand = evaluate_checkpoint(files[1], None, Dataset(source=f"file:{files[0]}"), place)
    assert (report["kept_logits"]["measured"], by_hand["kept_logits"]["taken"]) == (1, 1)
    assert {**by_hand, **{name: report[name] for name in ("seconds", "timings", "kept_logits")}} == report


def test_run_evaluation_of_a_streamed_set_is_the_same_measurement(files, tmp_path, monkeypatch):
    report = run_evaluation(spec_of(files), workspace(tmp_path / "stored")[0])
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 0)
    place, _ = workspace(tmp_path / "streamed")
    place.cache_max_bytes = 0
    streamed = run_evaluation(spec_of(files), place)
    assert streamed["warnings"][0]["code"] == "decoded_again"
    (note,) = streamed["kept_logits"]["notes"]
    assert note == "not kept for later jobs: the cache has no room for 18,000 bytes"
    of_attempts = ("warnings", "seconds", "timings", "kept_logits")
    assert {**streamed, **{name: report[name] for name in of_attempts}} == report


def measured(files, tmp_path, mean, std, order=None):
    """The network of the file on its test images, by hand."""
    loaded = data.load(Dataset(source=f"file:{files[0]}"), files[0], tmp_path)
    network = models.build("convnet8", 3, 1)
    network.load_state_dict(load_file(files[1]))
    return score(logits_on(Classifier(network, mean, std, order=order), loaded.test), loaded.test.labels)


def test_run_evaluation_uses_the_normalisation_of_its_spec(files, tmp_path):
    other = Teacher(checkpoint=f"file:{files[1]}", preprocessing=Preprocessing(mean=(0.1,), std=(3.0,)))
    place, _ = workspace(tmp_path)
    report = run_evaluation(spec_of(files).model_copy(update={"model": other}), place)
    expected = measured(files, tmp_path, [0.1], [3.0])
    assert (report["accuracy"], report["loss"]) == (expected.accuracy, pytest.approx(expected.loss))
    assert report["warnings"] == []


def test_run_evaluation_puts_outputs_into_the_datas_order(files, tmp_path):
    stated = Preprocessing(mean=(0.5,), std=(0.25,))
    model = Teacher(checkpoint=f"file:{files[1]}", preprocessing=stated, class_names=("2", "0", "1"))
    place, _ = workspace(tmp_path)
    report = run_evaluation(spec_of(files).model_copy(update={"model": model}), place)
    expected = measured(files, tmp_path, [0.5], [0.25], order=[1, 2, 0])
    assert (report["accuracy"], report["loss"]) == (expected.accuracy, pytest.approx(expected.loss))
    assert [(one["code"], one["pointer"]) for one in report["warnings"]] == [
        ("class_order_changed", "/model/class_names")
    ]


def test_run_evaluation_adds_the_outputs_of_a_class(files, tmp_path):
    six = write_teacher(tmp_path / "six.safetensors", classes=6)
    stated = Preprocessing(mean=(0.5,), std=(0.25,))
    model = Teacher(checkpoint=f"file:{six}", preprocessing=stated, class_map={"0": (5, 1), "1": 0, "2": (2,)})
    place, _ = workspace(tmp_path)
    report = run_evaluation(spec_of(files).model_copy(update={"model": model}), place)
    network = models.build("convnet8", 6, 1)
    network.load_state_dict(load_file(six))
    test = data.load(Dataset(source=f"file:{files[0]}"), files[0], tmp_path).test
    raw = logits_on(Classifier(network, [0.5], [0.25]), test).double()
    by_hand = torch.stack([(raw[:, 5].exp() + raw[:, 1].exp()).log(), raw[:, 0], raw[:, 2]], 1)
    assert report["accuracy"] == pytest.approx(float((by_hand.argmax(1) == test.labels).double().mean()))
    assert report["warnings"] == []


def test_run_evaluation_strict_refuses_a_guess_and_a_misfit_is_named(files, tmp_path):
    place, _ = workspace(tmp_path)
    with pytest.raises(WarningRefused, match="normalization_guessed"):
        run_evaluation(spec_of(files, strict=True), place)
    digits = spec_of(files).model_copy(update={"dataset": Dataset(source="digits")})
    with pytest.raises(TeacherMismatch, match="the teacher has 3 classes, the data set has 10"):
        run_evaluation(digits, place)


def test_run_evaluation_obeys_a_stop_after_a_batch(files, tmp_path):
    place, stream = workspace(tmp_path)
    place.stop_requested = True
    with pytest.raises(SystemExit) as stopped:
        run_evaluation(spec_of(files), place)
    assert stopped.value.code == EXIT_STOPPED and events(stream, "artifact") == []


def test_write_images_writes_the_images_that_a_report_is_measured_on(tmp_path):
    workspace = Workspace(tmp_path, {}, tmp_path / "cache", Lines(sys.stderr))
    assert write_images(tmp_path / "test.safetensors", Dataset(source="digits"), workspace) == {
        "test_samples": 360,
        "class_names": [str(digit) for digit in range(10)],
    }
    written = load_file(tmp_path / "test.safetensors")
    split = data.load(Dataset(source="digits"), None, tmp_path / "cache").test
    assert written["images"].shape == (360, 1, 8, 8)
    assert torch.equal(written["images"], split.pixels) and torch.equal(written["labels"], split.labels)
