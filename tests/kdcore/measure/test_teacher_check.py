"""Networks whose answers are known by hand: the pixels of an image are its class, one hot, under noise."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from base.errors import TeacherMismatch, WarningRefused
from kdcore import models
from kdcore.catalog import DatasetFacts
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.measure import evaluate
from kdcore.measure.chance import wilson
from kdcore.measure.teacher_check import affordable, assignment, class_order, findings, measure, normalization, sample
from kdcore.prepare import prepare
from kdcore.protocol import KnownBefore
from kdcore.run import run
from tests.kdcore.engine import distilled, events, job, supervised, workspace, write_arrays, write_teacher


def facts(names, channels=1, mean=(0.5,), std=(0.5,)):
    return DatasetFacts(
        kind="arrays", num_classes=len(names), class_names=list(names), channels=channels, image_size=(1, len(names)),
        train=10, test=10, mean=list(mean), std=list(std),
    )  # fmt: skip


def answers(labels, classes, accuracy, seed=0):
    """Answers that are right with this probability, else any class."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < accuracy, labels, rng.integers(0, classes, len(labels)))


def balanced(classes, each):
    return np.repeat(np.arange(classes), each)


NUMBERS = sorted(map(str, range(1, 13)))


# sample


def test_sample_takes_all_images_if_there_are_few():
    assert sample(torch.tensor([0, 1, 1]), 2, 3).tolist() == [0, 1, 2]


def test_sample_takes_the_same_number_of_each_class_as_far_as_possible():
    labels = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    rows = sample(labels, 3, 20)
    assert torch.bincount(labels[rows]).tolist() == [10, 8, 2]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_sample_is_the_same_each_time_and_draws_nothing():
    labels = torch.arange(1000) % 7
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(sample(labels, 7, 100), sample(labels, 7, 100))
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_is_bounded_by_images_and_networks():
    small, large = nn.Linear(10, 10), nn.Linear(8000, 12500, device="meta")
    one, other = Classifier(small, [0.5], [0.5]), Classifier(large, [0.5], [0.5])
    assert affordable((32, 32), [one]) == 1000
    assert affordable((128, 128), [one]) == 250
    assert affordable((32, 32), [one, other]) == 999  # 100 million parameters: four times a small network.
    assert affordable((64, 64), [other]) == 249
    assert affordable((512, 512), [one]) == 128


# class_order


@pytest.mark.parametrize(
    ("names", "trained", "title"),
    [
        (NUMBERS, sorted(NUMBERS, key=int), "natural order"),
        ([f"img{n}" for n in NUMBERS], [f"img{n}" for n in sorted(NUMBERS, key=int)], "natural order"),
        (["Bird", "Cat", "ant", "dog"], ["ant", "Bird", "Cat", "dog"], "natural order"),
        (["ant", "Bird", "Cat", "dog"], ["Bird", "Cat", "ant", "dog"], "order by characters"),
        (["a", "b", "c", "d", "e"], ["e", "d", "c", "b", "a"], "reversed order"),
        (["a", "b"], ["b", "a"], "reversed order"),
        (["a", "b", "c", "d", "e"], ["e", "a", "b", "c", "d"], "shifted up by one"),
        (["a", "b", "c", "d", "e"], ["b", "c", "d", "e", "a"], "shifted down by one"),
        (["a", "b", "c", "d", "e"], ["c", "e", "a", "b", "d"], "following order"),
        (["a", "b", "c", "d", "e"], ["a", "b", "d", "c", "e"], "following order"),
    ],
)
@pytest.mark.parametrize("accuracy", [1.0, 0.7])
def test_class_order_names_the_order_of_the_training(names, trained, title, accuracy):
    labels = balanced(len(names), 40)
    own = np.array([trained.index(name) for name in names])
    found = class_order(labels, own[answers(labels, len(names), accuracy)], names)
    assert found is not None and title in found.title
    assert [names[at] for at in np.argsort(found.order)] == trained


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("classes", "accuracy"), [(2, 0.0), (2, 0.3), (10, 0.0), (10, 0.1), (10, 0.4), (100, 0.02)])
def test_class_order_of_a_weak_teacher_is_not_blamed(classes, accuracy, seed):
    labels = balanced(classes, max(4, 400 // classes))
    names = [f"class {n}" for n in range(1, classes + 1)]
    assert class_order(labels, answers(labels, classes, accuracy, seed), names) is None


@pytest.mark.parametrize("kind", ["constant", "three of ten", "confused pair"])
def test_class_order_of_a_biased_teacher_is_not_blamed(kind):
    """A teacher that sees wrong pixels answers with few classes; that is no order."""
    labels = np.concatenate([balanced(10, 20), np.full(300, 7)])  # One class is larger.
    biased = {
        "constant": np.full(len(labels), 3),
        "three of ten": np.choose(labels % 3, [4, 1, 8]),
        "confused pair": np.where(labels == 2, 5, labels),
    }[kind]
    assert class_order(labels, biased, [str(n) for n in range(1, 11)]) is None


def test_class_order_of_a_good_teacher_is_not_looked_for():
    labels = balanced(4, 25)
    assert class_order(labels, labels, ["1", "10", "11", "2"]) is None


# assignment


@pytest.mark.parametrize("seed", range(10))
def test_assignment_is_the_cheapest_of_all(seed):
    costs = np.random.default_rng(seed).integers(0, 20, (5, 5)).astype(float)
    found = assignment(costs)
    cheapest = min(sum(costs[row, column] for row, column in enumerate(p)) for p in itertools.permutations(range(5)))
    assert sorted(found) == list(range(5))
    assert costs[np.arange(5), found].sum() == cheapest


# normalization: a network that answers rightly only for pixels as it was trained on


class Nearest(nn.Module):
    """Answers with the class whose normalized image is nearest."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("classes", images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(images.flatten(1), self.classes.flatten(1))


def coloured(classes=8, each=30):
    """One image 3 x 4 x 4 for each class, and a split of such images under a little noise.

    Classes differ in red and blue: by their sum, on which the scale of a normalization depends, and by their order.
    """
    generator = torch.Generator().manual_seed(0)
    reds = torch.tensor([100, 124, 108, 140, 116, 156, 132, 164])
    blues = torch.tensor([96, 88, 120, 104, 128, 112, 152, 136])
    colours = torch.stack([reds, torch.full((8,), 128), blues], 1).view(8, 3, 1, 1).expand(8, 3, 4, 4)[:classes]
    labels = torch.arange(classes).repeat_interleave(each)
    noise = torch.randint(-2, 3, (len(labels), 3, 4, 4), generator=generator)
    return colours.to(torch.uint8), Images((colours[labels] + noise).to(torch.uint8), labels)


def trained_on(pixels, mean, std, bgr=False):
    """The network of a teacher that was trained with this normalization."""
    prototypes = Classifier(nn.Flatten(), mean, std)(pixels.flip(1) if bgr else pixels).logits
    return Nearest(prototypes)


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
DATA = facts([str(n) for n in range(8)], 3, (0.5, 0.5, 0.5), (0.08, 0.08, 0.08))


def found(network, images, mean, std, data=DATA, order=None):
    member = Classifier(network, mean, std, order=order).eval()
    logits = evaluate.logits_on(member, images)
    shares = torch.full((len(images),), 1 / len(images), dtype=torch.float64)
    return findings(member, images, logits, data, shares, "/teacher")


@pytest.mark.parametrize(
    ("mean", "std", "title"),
    [
        (*IMAGENET, "ImageNet's mean and std"),
        ([0.5] * 3, [0.5] * 3, "mean 0.5 and std 0.5"),
        ([0.0] * 3, [1.0] * 3, "pixels in 0..1"),
        ([0.0] * 3, [1 / 255] * 3, "pixels in 0..255"),
    ],
)
def test_normalization_of_the_training_is_named_with_its_values(mean, std, title):
    pixels, images = coloured()
    warning = found(trained_on(pixels, mean, std), images, DATA.mean, DATA.std)[0]
    assert (warning.code, warning.pointer) == ("normalization_wrong", "/teacher/preprocessing")
    assert title in warning.message and warning.hint is not None
    values = json.loads(warning.hint.split('"preprocessing": ')[1])
    assert values == {"mean": [round(one, 6) for one in mean], "std": [round(one, 6) for one in std]}


def test_normalization_channel_order_is_found():
    pixels, images = coloured()
    warning = found(trained_on(pixels, *IMAGENET, bgr=True), images, *IMAGENET)[0]
    assert warning.code == "channel_order_wrong" and "BGR" in warning.message
    assert "[2, 1, 0]" in (warning.hint or "")


def test_normalization_that_fits_is_not_doubted():
    pixels, images = coloured()
    assert found(trained_on(pixels, *IMAGENET), images, *IMAGENET) == []


def test_normalization_leaves_the_teacher_in_eval_mode():
    _, images = coloured()
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 8)).eval()
    member = Classifier(network, *IMAGENET).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    normalization(member, images, np.zeros(len(images), dtype=np.int64), DATA)
    assert not any(module.training for module in member.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_findings_a_teacher_without_any_knowledge_is_near_chance_and_nothing_else():
    _, images = coloured()
    constant = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    nn.init.zeros_(constant[1].weight)
    warnings = found(constant, images, *IMAGENET)
    assert [warning.code for warning in warnings] == ["teacher_near_chance"]


def test_findings_an_order_is_told_in_the_outputs_of_the_network_even_if_it_was_stated_wrongly():
    """The network's outputs are the classes in reverse; stated was that they are shifted."""
    pixels, images = coloured()
    reverse = trained_on(pixels.flip(0), *IMAGENET)
    stated = [*range(1, 8), 0]
    warning = found(reverse, images, *IMAGENET, order=stated)[0]
    assert warning.code == "class_order_wrong" and warning.pointer == "/teacher/class_names"
    assert (warning.hint or "").endswith("7, 6, 5, 4, 3, 2, 1, 0")


def test_findings_right_outputs_with_wrong_names_are_told_by_what_they_are():
    pixels, images = coloured()
    warning = found(trained_on(pixels, *IMAGENET), images, *IMAGENET, order=list(range(7, -1, -1)))[0]
    assert warning.code == "class_order_wrong"
    assert "(output 0 is 0, output 1 is 1, " in warning.message
    assert (warning.hint or "").endswith("0, 1, 2, 3, 4, 5, 6, 7")


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_findings_a_right_teacher_is_not_doubted_because_there_are_few_images(names):
    """The 95 % interval of 2 of 2 begins at 34 %: it is no reason to call 100 % hardly better than guessing."""
    data, labels = facts(names), torch.arange(len(names))
    images = Images(torch.nn.functional.one_hot(labels).mul(255).to(torch.uint8).view(-1, 1, 1, len(names)), labels)
    member = Classifier(nn.Flatten(), [0.5], [0.5]).eval()
    logits = evaluate.logits_on(member, images)
    shares = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    assert findings(member, images, logits, data, shares, "/teacher") == []


def test_normalization_that_only_lifts_to_chance_is_not_named():
    """Always wrong with its own normalization, it answers the same to all images with any other: that is no cure."""

    class Confused(nn.Module):
        def forward(self, images):
            levels = images.mean((1, 2, 3))
            following = (levels / 20).round().long().add(1).remainder(8)
            return nn.functional.one_hot(torch.where(levels > 10, following, 0), 8).float()

    labels = torch.arange(8).repeat_interleave(30)
    images = Images((20 + 20 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels)
    member = Classifier(Confused(), [0.0], [1 / 255]).eval()
    answers_n = evaluate.logits_on(member, images).argmax(1).numpy()
    assert (answers_n != labels.numpy()).all()
    assert normalization(member, images, answers_n, facts([str(n) for n in range(8)])) is None


# check, in whole jobs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz", train=240, test=90)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a good teacher."""
    where, _ = workspace(tmp_path_factory.mktemp("teacher"))
    recipe = {"epochs": 12, "augmentation": "none", "optimizer": {"name": "adamw", "lr": 0.01}}
    report = run(job(data, student="convnet8", training={"batch_size": 16, **recipe}), where)
    assert report["student"]["accuracy"] > 0.9
    return where.out


def changed(trained, path, change):
    """The teacher's file with other weights, and its notes."""
    from safetensors import safe_open

    with safe_open(trained / "student.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["distillery"])
    state = load_file(trained / "student.safetensors")
    change(state, notes)
    save_file(state, path, {"distillery": json.dumps(notes)})
    return path


def test_check_gives_the_teachers_accuracy_before_the_training(data, trained, tmp_path):
    where, stream = workspace(tmp_path)
    report = run(distilled(data, trained / "student.safetensors", baseline="none"), where)
    (line,) = events(stream, "teacher_check")
    assert line["accuracy"] == pytest.approx(report["teacher"]["accuracy"])
    assert line["interval"] == pytest.approx(list(wilson(line["accuracy"], 90)))
    assert (line["images"], line["test_samples"], line["key"], line["warnings"]) == (90, 90, None, [])
    order = [json.loads(text) for text in stream.getvalue().splitlines()]
    names = [one.get("phase", one["event"]) for one in order]
    assert names.index("checking_teacher") < names.index("teacher_check") < names.index("training")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_refuses_answers_that_are_not_finite_and_names_the_member(value, data, trained, tmp_path):
    def poison(state, notes):
        for name in state:
            if name.endswith("running_var"):
                state[name] = -state[name] - 1 if math.isnan(value) else state[name] * 0 + 1e-38
            if value == float("inf") and name.endswith("fc.weight"):
                state[name] = state[name] * 0 + 3e38

    broken = changed(trained, tmp_path / "broken.safetensors", poison)
    good = trained / "student.safetensors"
    where, stream = workspace(tmp_path / "job")
    with pytest.raises(TeacherMismatch, match=r"the teacher answers \w+( numbers)? on \d+ of 90 images") as error:
        run(distilled(data, broken, baseline="none"), where)
    assert "lr" not in str(error.value.hint) and not events(stream, "metric")
    where, _ = workspace(tmp_path / "ensemble")
    with pytest.raises(TeacherMismatch, match="the teacher /teacher/1 answers"):
        run(job(data, [{"checkpoint": f"file:{good}"}, {"checkpoint": f"file:{broken}"}], method="kd"), where)


def test_loss_that_diverges_by_the_teachers_fault_is_a_teacher_mismatch(tmp_path):
    """Finite on every test image, but a white one, which only the training set has, overflows its first layer."""
    arrays = dict(np.load(write_arrays(tmp_path / "dark.npz")))
    arrays["x_train"][::3] = 255
    np.savez(tmp_path / "data.npz", **arrays)
    file = write_teacher(tmp_path / "teacher.safetensors")
    state = load_file(file)
    state["layer1.0.weight"][:] = 3.9e37  # nine of them: 3.5e38, above float32's largest number
    state["layer1.1.running_var"][:] = 1e38
    notes = {"architecture": "convnet8", "mean": [0.0], "std": [1.0]}
    save_file(state, file, {"distillery": json.dumps(notes)})
    where, stream = workspace(tmp_path / "job")
    with pytest.raises(TeacherMismatch, match=r"the teacher answers NaN on 40 of 120 images"):
        # Folded, this layer would not overflow: its weights are divided by the deviation of 1e19.
        run(distilled(tmp_path / "data.npz", file, baseline="none", kernels="eager"), where)
    assert len(events(stream, "teacher_check")) == 1


def test_check_a_strict_job_is_refused_for_what_the_check_finds(data, tmp_path):
    where, stream = workspace(tmp_path)
    untrained = changed_notes(write_teacher(tmp_path / "untrained.safetensors"))
    with pytest.raises(WarningRefused, match="teacher_near_chance"):
        # So many epochs that nothing but the teacher is doubted; none of them is trained.
        run(job(data, untrained, method="kd", strict=True, training={"epochs": 1000}), where)
    assert not events(stream, "metric")


def changed_notes(path):
    """The same file, which also states its normalization: nothing is guessed."""

    save_file(
        load_file(path), path,
        {"distillery": json.dumps({"architecture": "convnet8", "mean": [0.5], "std": [0.2]})},
    )  # fmt: skip
    return path


def test_check_result_that_the_service_knows_is_not_measured_again(data, trained, tmp_path, monkeypatch):
    from kdcore.measure import teacher_check

    warning = {"code": "teacher_near_chance", "pointer": "/teacher", "message": "known before", "hint": None}
    figures = {"accuracy": 0.5, "interval": [0.4, 0.6], "images": 90, "test_samples": 90, "warnings": [warning]}
    figures["dropped"] = None
    monkeypatch.setattr(teacher_check, "teacher_check_key", lambda resolved: "k1")
    spec = distilled(data, trained / "student.safetensors", baseline="none")
    where, stream = workspace(tmp_path / "known")
    where.known = KnownBefore(teacher_check={**figures, "key": "k1"})
    report = run(spec, where)
    assert events(stream, "teacher_check") == [{"event": "teacher_check", "key": "k1", **figures}]
    assert warning in report["warnings"]
    where, stream = workspace(tmp_path / "other")
    where.known = KnownBefore(teacher_check={**figures, "key": "k2"})
    run(spec, where)
    assert events(stream, "teacher_check")[0]["accuracy"] > 0.9


def test_check_is_left_out_without_a_teacher(data, tmp_path):
    where, stream = workspace(tmp_path)
    run(supervised(data, epochs=1), where)
    assert not events(stream, "teacher_check")
    assert "checking_teacher" not in [line["phase"] for line in events(stream, "phase")]


def test_check_class_names_of_a_teacher_put_its_outputs_into_the_datas_order(data, trained, tmp_path):
    """The same teacher with its outputs in reverse: found without names, put right with them, the same report."""

    def reverse(state, notes):
        for name in ("fc.weight", "fc.bias"):
            state[name] = state[name].flip(0)
        del notes["class_names"]

    other = changed(trained, tmp_path / "reverse.safetensors", reverse)
    where, stream = workspace(tmp_path / "silent")
    run(distilled(data, other, baseline="none"), where)
    (warning,) = [line for line in events(stream, "warning") if line["code"] == "class_order_wrong"]
    assert "reversed order" in warning["message"] and warning["hint"].endswith("2, 1, 0")

    stated = [{"checkpoint": f"file:{other}", "class_names": ["2", "1", "0"]}]
    where, stream = workspace(tmp_path / "stated")
    report = run(job(data, stated, method="kd"), where)
    codes = [line["code"] for line in events(stream, "warning")]
    assert "class_order_changed" in codes and "class_order_wrong" not in codes
    where, _ = workspace(tmp_path / "plain")
    plain = run(job(data, [{"checkpoint": f"file:{trained / 'student.safetensors'}"}], method="kd"), where)
    assert report["teacher"]["accuracy"] == plain["teacher"]["accuracy"]
    assert report["student"]["accuracy"] == plain["student"]["accuracy"]


def test_check_a_map_of_classes_teaches_what_the_classes_alone_teach(data, trained, tmp_path):
    """The teacher gets two outputs that answer nothing: with a map, student and check are those without them."""

    def enlarge(state, notes):
        state["fc.weight"] = torch.cat([torch.zeros(2, state["fc.weight"].shape[1]), state["fc.weight"].flip(0)])
        state["fc.bias"] = torch.cat([torch.full((2,), -30.0), state["fc.bias"].flip(0)])
        notes |= {"class_names": ["x", "y", "two", "one", "zero"], "num_classes": 5}

    other = changed(trained, tmp_path / "five.safetensors", enlarge)
    stated = {"checkpoint": f"file:{other}", "class_map": {"0": "zero", "1": ["One"], "2": 2}}
    where, stream = workspace(tmp_path / "mapped")
    report = run(job(data, stated, method="kd"), where)
    where, plain_stream = workspace(tmp_path / "plain")
    plain = run(job(data, {"checkpoint": f"file:{trained / 'student.safetensors'}"}, method="kd"), where)
    assert report["teacher"]["accuracy"] == plain["teacher"]["accuracy"]
    assert report["student"]["loss"] == pytest.approx(plain["student"]["loss"], rel=1e-4)
    (found,), (without,) = events(stream, "teacher_check"), events(plain_stream, "teacher_check")
    assert (found["accuracy"], found["dropped"]) == (without["accuracy"], 0.0) and without["dropped"] is None


def test_check_measures_the_probability_that_a_map_drops_and_warns(data, trained, tmp_path):
    """A fourth output that is as likely as class 0 takes half of its probability."""

    def copy_of_a_class(state, notes):
        for name in ("fc.weight", "fc.bias"):
            state[name] = torch.cat([state[name], state[name][:1]])
        del notes["class_names"]
        notes["num_classes"] = 4

    other = changed(trained, tmp_path / "four.safetensors", copy_of_a_class)
    teacher = {"checkpoint": f"file:{other}", "class_map": {"0": [0], "1": [1], "2": [2]}}
    where, _ = workspace(tmp_path / "dropped")
    prepared = prepare(job(data, teacher, method="kd"), where)
    measured = measure(prepared)
    member = prepared.teacher.members[0]
    own = evaluate.logits_on(member.with_all_outputs(), prepared.data.test).double().softmax(1)
    assert measured["dropped"] == pytest.approx(float(own[:, 3].mean()), abs=1e-6)
    assert ("probability_dropped" in [one["code"] for one in measured["warnings"]]) == (measured["dropped"] > 0.25)
    merged = prepare(job(data, {**teacher, "class_map": {"0": [0, 3], "1": 1, "2": 2}}, method="kd"), where)
    assert measure(merged)["dropped"] == pytest.approx(0, abs=1e-6)


def test_check_a_map_whose_classes_are_exchanged_is_told_with_the_numbers_that_fit(data, trained, tmp_path):
    teacher = {"checkpoint": f"file:{trained / 'student.safetensors'}", "class_map": {"0": 2, "1": 1, "2": 0}}
    where, _ = workspace(tmp_path)
    found = {one["code"]: one for one in measure(prepare(job(data, teacher, method="kd"), where))["warnings"]}
    warning = found["class_order_wrong"]
    assert warning["pointer"] == "/teacher/class_map"
    assert warning["hint"].endswith('{"0": 0, "1": 1, "2": 2}')


def test_teacher_of_other_classes_teaches_by_its_activations_and_is_not_graded(data, trained, tmp_path):
    def enlarge(state, notes):
        for name in ("fc.weight", "fc.bias"):
            state[name] = torch.cat([state[name], state[name]])
        notes |= {"class_names": list("uvwxyz"), "num_classes": 6}

    other = changed(trained, tmp_path / "six.safetensors", enlarge)
    where, stream = workspace(tmp_path / "rkd")
    report = run(job(data, {"checkpoint": f"file:{other}"}, method="rkd"), where)
    assert "teacher_classes_differ" in [line["code"] for line in events(stream, "warning")]
    assert not events(stream, "teacher_check")
    assert report["teacher"]["accuracy"] is None and report["student"]["agreement"] is None
    assert report["teacher"]["parameters"] > 0 and "cannot be measured" in report["verdict"]
    with pytest.raises(TeacherMismatch, match="class_map says which of its outputs answer each class"):
        prepare(job(data, {"checkpoint": f"file:{other}"}, method="kd"), workspace(tmp_path / "kd")[0])


def test_check_models_of_this_project_know_their_image_size(trained):
    from kdcore.weights import inspect

    assert inspect(trained / "student.safetensors", None).image_size == (8, 8)
    assert models.build("convnet8", 3, 1) is not None
