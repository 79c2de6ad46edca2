"""Rounding by hand, against onnxruntime, and a training whose last epochs round."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcore import checkpoint, models
from kdcore.classifier import Classifier, FrozenTeacher
from kdcore.data.images import Images, TrainingSet
from kdcore.graph_step import GraphStep
from kdcore.lesson import Needs, Scheme
from kdcore.measure.grading import Outcome
from kdcore.objectives import Objective, Setting, build
from kdcore.quantization import FakeQuantization, keep_in_eval, of_tensors, rounded_activation, rounded_weight
from kdcore.schemes.exits import Exits
from kdcore.schemes.mutual import Mutual
from kdcore.schemes.offline import Alone, Offline, TeacherAhead
from kdcore.spec import Training
from kdcore.spec.methods.response import Kd
from kdcore.training import Observer, StageTraining
from tests.kdcore.engine import copied, int8_session, same


def floats(*values: float) -> Tensor:
    return torch.tensor(values)


# Rounding.


def test_rounded_activation_by_hand():
    """-1 to 1.55 in 255 steps of 0.01, the 100th of which is 0. The gradient is 1 inside and 0 outside."""
    given = floats(0.004, 0.006, -0.237, 1.55, 3.0, -5.0).requires_grad_()
    rounded = rounded_activation(given, torch.tensor(-1.0), torch.tensor(1.55))
    assert rounded.tolist() == pytest.approx([0.0, 0.01, -0.24, 1.55, 1.55, -1.0], abs=1e-6)
    rounded.sum().backward()
    assert given.grad is not None and given.grad.tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("low", "high", "given", "expected"),
    [
        (1.0, 2.55, 0.004, 0.0),  # A range without 0 is widened to hold it: 255 steps of 0.01 from 0.
        (1.0, 2.55, 0.996, 1.0),
        (-2.55, -1.0, -0.996, -1.0),
        (-2.55, -1.0, 0.5, 0.0),
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_rounded_activation_has_zero_exactly(low, high, given, expected):
    rounded = rounded_activation(floats(given, 0.0), torch.tensor(low), torch.tensor(high))
    assert rounded.tolist() == pytest.approx([expected, 0.0], abs=1e-6) and rounded[1] == 0


def test_rounded_weight_by_hand():
    """One step a channel: 1, 0.02, and none for zeros. Nothing is cut off, so the gradient is 1 everywhere."""
    weight = torch.tensor([[127.0, 63.4], [-2.54, 0.031], [0.0, 0.0]], requires_grad=True)
    rounded = rounded_weight(weight)
    assert rounded.flatten().tolist() == pytest.approx([127, 63, -2.54, 0.04, 0, 0], abs=1e-6)
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 2))


def test_rounded_weight_is_the_same_before_and_after_a_batch_norm_is_folded_into_it():
    weight, gains = torch.randn(4, 3, 3, 3), floats(0.5, -2.0, 4.0, 0.25).view(-1, 1, 1, 1)
    torch.testing.assert_close(rounded_weight(gains * weight), gains * rounded_weight(weight), rtol=1e-6, atol=0)


# Which tensors are rounded.


class Block(nn.Module):
    """A residual block and a classifier, as the networks of the catalogue have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.first(images * 2)).relu()
        maps = (self.second(maps) + maps).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1))


def block() -> Block:
    torch.manual_seed(0)
    network = Block()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(32, 1, 8, 8))
    return network.eval()


def measured(network: nn.Module, *batches: Tensor) -> FakeQuantization:
    rounding = FakeQuantization()
    with torch.no_grad(), rounding.measuring():
        for images in batches:
            rounding.run(network, images, follows=False)
    return rounding


def read_by(rounding: FakeQuantization) -> list[list[list[Any]]]:
    return [one["read_by"] for one in rounding.ranges()]


def test_fake_quantization_rounds_each_tensor_once_wherever_it_is_read():
    """The block's input, read by a convolution and a sum, has one range; a product with a constant reads nothing."""
    assert read_by(measured(block(), torch.randn(2, 1, 8, 8))) == [
        [["conv", 0, 0]],
        [["conv", 1, 0], ["add", 0, 1]],
        [["add", 0, 0]],
        [["pool", 0, 0]],
        [["linear", 0, 0]],
    ]


def test_fake_quantization_a_norm_reads_what_it_is_not_folded_into():
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.after = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
            self.before, self.layer = nn.BatchNorm2d(1), nn.LayerNorm(4)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(self.after(self.conv(self.before(images))))

    assert read_by(measured(Norms().eval(), torch.randn(2, 1, 4, 4))) == [
        [["batch_norm", 0, 0]],
        [["conv", 0, 0]],
        [["norm", 0, 0]],
    ]


def test_fake_quantization_measures_the_mean_extremes_of_batches_and_rounds_nothing_meanwhile():
    network, one = block(), torch.linspace(-1, 3, 64).view(1, 1, 8, 8)
    rounding = FakeQuantization()
    with torch.no_grad(), rounding.measuring():
        assert torch.equal(rounding.run(network, one, follows=False), network(one))
        rounding.run(network, 2 * one, follows=False)
    assert (rounding.ranges()[0]["low"], rounding.ranges()[0]["high"]) == (-3, 9)


def test_fake_quantization_ranges_follow_the_images_of_the_training_only():
    network, images = block(), torch.linspace(-1, 3, 64).view(1, 1, 8, 8)
    rounding = measured(network, images)
    before = rounding.ranges()
    rounding.run(network, 11 * images, follows=False)
    assert rounding.ranges() == before
    rounding.run(network, 11 * images, follows=True)
    first = rounding.ranges()[0]
    assert (first["low"], first["high"]) == pytest.approx((-2.2, 6.6))


def test_fake_quantization_of_its_ranges_is_the_same():
    network, images = block(), torch.randn(4, 1, 8, 8)
    rounding = measured(network, images)
    again = FakeQuantization(rounding.ranges())
    assert again.ranges() == rounding.ranges()
    outputs = [one.run(network, images, follows=False) for one in (rounding, again)]
    assert torch.equal(*outputs) and not torch.equal(outputs[0], network(images))


def test_fake_quantization_sums_in_place_stay_in_place():
    """And what a tensor was before it was overwritten is another activation."""

    class InPlace(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            maps = images.clone()
            maps.add_(images)
            maps *= images
            return maps

    network, images = InPlace(), torch.tensor([[0.0, 1.0]], requires_grad=True)
    rounding = measured(network, images)
    assert read_by(rounding) == [[["add", 0, 0]], [["add", 0, 1], ["mul", 0, 1]], [["mul", 0, 0]]]
    output = rounding.run(network, images, follows=False)
    assert output[0].tolist() == pytest.approx([0, 2], rel=0.01)
    output[0, 1].backward()
    assert images.grad[0].tolist() == pytest.approx([0, 4], rel=0.01)


def test_fake_quantization_leaves_the_network_its_own_once_it_has_run():
    network, images = block(), torch.randn(2, 1, 8, 8)
    before, state = network(images), copied(network.state_dict())
    measured(network, images).run(network, images, follows=True)
    assert torch.equal(network(images), before) and same(network.state_dict(), state)


NETWORKS = ("resnet8", "vgg8", "mobilenetv2_x0_5", "convnet4", "torchvision/mobilenet_v3_small")


@pytest.mark.parametrize("name", NETWORKS)
def test_fake_quantization_of_a_network_reaches_all_its_weights_and_changes_little(name):
    torch.manual_seed(0)
    network, images = models.build(name, 5, 3), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        network(images)
        network.eval()
        rounding = measured(network, images)
        exact, rounded = network(images), rounding.run(network, images, follows=False)
    layers = [one for one in network.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    assert sum(reader[0] in ("conv", "linear") for one in read_by(rounding) for reader in one) == len(layers)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.1
    network.train()
    keep_in_eval(network)
    rounding.run(network, images, follows=True).square().sum().backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in network.parameters())


def graph_of(network: Block) -> Any:
    """The block as an exporter writes it: its batch norm folded."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    norm, scale = network.norm, (network.norm.running_var + network.norm.eps).rsqrt() * network.norm.weight
    constants = {
        "first": network.first.weight * scale.view(-1, 1, 1, 1),
        "first bias": norm.bias - norm.running_mean * scale,
        "second": network.second.weight,
        "second bias": network.second.bias,
        "two": torch.tensor(2.0),
        "fc": network.fc.weight,
        "fc bias": network.fc.bias,
    }
    nodes = [
        helper.make_node("Mul", ["images", "two"], ["given"]),
        helper.make_node("Conv", ["given", "first", "first bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second", "second bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "fc", "fc bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def test_of_tensors_finds_each_range_by_its_place_in_the_graph():
    network = block()
    ranges = measured(network, torch.randn(2, 1, 8, 8)).ranges()
    low_high = [(one["low"], one["high"]) for one in ranges]
    found = of_tensors(graph_of(network), ranges)
    names = {"given": 0, "b": 1, "c": 2, "e": 3, "g": 4, "f": 4}
    assert found == {name: low_high[place] for name, place in names.items()}


def test_of_tensors_leaves_out_kinds_that_the_exporter_has_added_to():
    """A gate x · sigmoid(x) is one function of torch, so neither of its operators counts as a product."""
    network, model = block(), graph_of(block())
    from onnx import helper

    gate = [helper.make_node("Sigmoid", ["d"], ["s"]), helper.make_node("Mul", ["d", "s"], ["t"])]
    ranges = measured(network, torch.randn(2, 1, 8, 8)).ranges()
    model.graph.node.extend([*gate, helper.make_node("Add", ["d", "t"], ["u"])])
    assert set(of_tensors(model, ranges)) == {"given", "b", "e", "f", "g"}


def test_fake_quantization_computes_what_onnxruntime_does_with_its_ranges(tmp_path):
    """The difference is that of single steps where a sum is rounded the other way, far below that of int8 itself."""
    quantizing = pytest.importorskip("onnxruntime.quantization")
    onnx = pytest.importorskip("onnx")
    network, images = block(), torch.randn(64, 1, 8, 8)
    rounding = measured(network, images)
    model = graph_of(network)
    onnx.save(model, tmp_path / "float.onnx")
    ranges = of_tensors(model, rounding.ranges())
    overrides = {name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, (low, high) in ranges.items()}

    class Reader(quantizing.CalibrationDataReader):  # type: ignore[name-defined, misc]
        batches = iter([{"images": 100 * images.numpy()}])  # So wrong that they would be seen.

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantizing.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        per_channel=True,
        activation_type=quantizing.QuantType.QUInt8,
        weight_type=quantizing.QuantType.QInt8,
        op_types_to_quantize=["Conv", "Relu", "Add", "GlobalAveragePool", "Gemm"],
        extra_options={"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    with torch.no_grad():
        exact, rounded = network(images), rounding.run(network, images, follows=False)
    (logits,) = int8_session(tmp_path / "int8.onnx").run(None, {"images": images.numpy()})
    of_int8, apart = float((rounded - exact).norm()), float((torch.from_numpy(logits) - rounded).norm())
    assert apart < of_int8 / 4, (apart, of_int8)


# A classifier that rounds.


def classifier(seed: int, dropout: float = 0.0) -> Classifier:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)]
    return Classifier(nn.Sequential(*layers, nn.Linear(64, 2)), [0.5], [0.25], bf16=True)


def test_classifier_that_rounds_computes_in_float32_and_follows_in_train_mode_only():
    model, pixels = classifier(0).eval(), torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    model.rounding = rounding = FakeQuantization()
    with rounding.measuring():
        exact = model(pixels).logits
    model.rounding = None
    plain, model.bf16 = model, False
    assert torch.equal(exact, plain(pixels).logits)
    model.rounding, model.bf16 = rounding, True
    before = rounding.ranges()
    model(255 - pixels)
    assert rounding.ranges() == before
    model.train()(255 - pixels)
    assert rounding.ranges() != before


def test_classifier_begin_rounding_measures_ranges_in_eval_mode_from_which_another_one_continues():
    batches = [torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8) for _ in range(2)]
    model, by_hand, continued = (classifier(0, dropout=0.5) for _ in range(3))
    before, seen = copied(model.network.state_dict()), []
    model.train().begin_rounding(batches, seen.append)
    by_hand.eval().rounding = rounding = FakeQuantization()
    with torch.no_grad(), rounding.measuring():
        for pixels in batches:
            by_hand(pixels)
    assert model.rounding.ranges() == rounding.ranges() and seen == [8, 8]
    assert not model.network.training and same(model.network.state_dict(), before)
    continued.train().continue_rounding(rounding.ranges())
    assert torch.equal(continued.eval()(batches[0]).logits, by_hand(batches[0]).logits)


def test_keep_in_eval_is_for_good():
    model = classifier(0, dropout=0.5)
    keep_in_eval(model.network)
    model.train()
    before, pixels = copied(model.network.state_dict()), torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(model(pixels).logits, model(pixels).logits) and same(model.network.state_dict(), before)
    assert model.training and not any(one.training for one in model.network.modules())


# Training.


def images(count: int = 40) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 2)


def kd() -> Objective:
    return build((Kd(),), Setting(4.0, num_classes=2, epochs=1, labels=images().labels, rows=torch.arange(40)))[-1]


def training(scheme: Scheme, aware: int, recipe: dict | None = None, **observe: Any) -> StageTraining:
    spec = Training(**{"epochs": 4, "batch_size": 12, "augmentation": "none", **(recipe or {})})
    observer = Observer(**{"metric": lambda *_: None, "after_step": lambda _: None, **observe})
    objective = None if isinstance(scheme, Alone) else kd()
    return StageTraining(
        scheme, objective, 0.5, 0.5, 0.0, spec.epochs, spec, TrainingSet.of(images(), spec), 2, observer,
        aware_epochs=aware,
    )  # fmt: skip


def taught(aware: int, recipe: dict | None = None, student: Classifier | None = None, **observe: Any) -> StageTraining:
    scheme = Offline(student or classifier(0, dropout=0.25), FrozenTeacher(classifier(1)))
    return training(scheme, aware, recipe, **observe)


def state_after(epochs: int, aware: int, **recipe: Any) -> dict[str, Any]:
    states = {}

    def keep(one: StageTraining) -> None:
        if one.position.step == 0:
            states[one.position.epoch] = copied(one.state())

    taught(aware, recipe, after_step=keep).run()
    return states[epochs]


def test_stage_training_is_bit_for_bit_the_float_one_until_its_last_epochs():
    plain, aware = state_after(2, 0), state_after(2, 2)
    assert "quantization" not in aware and same(plain["learners"], aware["learners"])
    assert not same(state_after(3, 0)["learners"], state_after(3, 2)["learners"])


def test_stage_training_chooses_the_best_among_the_epochs_for_int8_and_keeps_the_best_before():
    points: list[float] = []
    done = taught(2, {"epochs": 6}, metric=lambda *point: points.append(point[2]["validation/accuracy"])).run()
    float_best = taught(0, {"epochs": 4, "schedule": {"name": "multistep", "milestones": []}})
    outcome = done["student"]
    assert outcome.best_epoch in (5, 6) and outcome.best_accuracy == max(points[4:])
    assert [one["read_by"] for one in outcome.ranges] == [[["conv", 0, 0]], [["linear", 0, 0]]]
    assert outcome.before.keys() == outcome.best.keys() and not same(outcome.before, outcome.best)
    same_epochs = taught(0, {"epochs": 6}, metric=lambda *_: None)
    same_epochs.epochs = 4
    same_epochs.recipe = same_epochs.recipe.model_copy(update={"schedule": float_best.recipe.schedule})
    assert same(same_epochs.run()["student"].best, outcome.before)


def test_stage_training_without_epochs_for_int8_has_no_ranges():
    outcome = taught(0).run()["student"]
    assert outcome == Outcome(outcome.best, outcome.last, outcome.best_epoch, outcome.best_accuracy, 4)


def test_stage_training_for_int8_keeps_the_statistics_that_were_measured_before():
    start = state_after(2, 2)
    one = taught(2)
    one.restore(start)
    graded = one.grading.graded("student")[0]
    outcome = one.run()["student"]
    statistics = [name for name in graded if "running" in name]
    assert all(torch.equal(outcome.last[name], graded[name]) for name in statistics)
    assert all(torch.equal(outcome.best[name], graded[name]) for name in statistics)
    assert not torch.equal(outcome.best["0.weight"], graded["0.weight"])


class Stop(Exception):
    pass


@pytest.mark.parametrize("recipe", [{}, {"ema": 0.5}, {"batch_norm": "running"}], ids=str)
@pytest.mark.parametrize("steps", [6, 7, 9])
def test_stage_training_for_int8_resumes_bit_for_bit(steps, recipe, tmp_path):
    """After the last float epoch, within the first epoch for int8, and after it."""
    states = []

    def stop(one: StageTraining) -> None:
        states.append(copied(one.state()))
        if one.global_step == steps:
            raise Stop

    whole = taught(2, recipe).run()["student"]
    with pytest.raises(Stop):
        taught(2, recipe, after_step=stop).run()
    resumed = taught(2, recipe)
    written = checkpoint.save(tmp_path, steps, checkpoint.Progress(training=states[-1]))
    resumed.restore(checkpoint.load(written.path, torch.device("cpu")).training)
    again = resumed.run()["student"]
    assert same(again.best, whole.best) and same(again.last, whole.last) and same(again.before, whole.before)
    assert again.ranges == whole.ranges and again.best_epoch == whole.best_epoch


def test_stage_training_for_int8_goes_on_from_the_average_and_begins_a_new_one():
    """A rate of nearly 0 leaves the weights where they are then."""
    recipe = {"ema": 0.5, "schedule": {"name": "multistep", "milestones": [2], "gamma": 1e-9}}
    start, one = state_after(2, 2, **recipe), taught(2, recipe)
    outcome = one.run()["student"]
    torch.testing.assert_close(outcome.last["0.weight"], start["averages"]["student"]["0.weight"])
    assert not torch.equal(start["averages"]["student"]["0.weight"], start["learners"]["0.network.0.weight"])


def test_stage_training_for_int8_rounds_no_teacher_and_every_peer():
    teacher = FrozenTeacher(classifier(1))
    taught_by = training(Offline(classifier(0), teacher), 1)
    taught_by.run()
    assert teacher.classifier.rounding is None
    peers = [classifier(0), classifier(1)]
    outcomes = training(Mutual(peers), 1).run()
    assert all(peer.rounding is not None for peer in peers)
    assert outcomes["student"].ranges != outcomes["student-2"].ranges


def test_stage_training_for_int8_rounds_no_teacher_that_runs_ahead_in_its_thread():
    in_turn = taught(2, student=classifier(0)).run()["student"]
    with closing(TeacherAhead(FrozenTeacher(classifier(1)), 1)) as ahead:
        beside = training(Offline(classifier(0), ahead), 2)
        assert same(beside.run()["student"].best, in_turn.best)


def test_stage_training_for_int8_of_exits_rounds_the_student_alone():
    torch.manual_seed(0)
    student = Classifier(models.build("resnet8", 2, 1), [0.5], [0.25])
    scheme = Exits(student, ["layer1"], "fc@in", 2, (4, 4))
    outcomes = training(scheme, 1, {"epochs": 2}).run()
    assert outcomes["student"].ranges and not outcomes["exit-1"].ranges
    assert scheme.exits[0].bottleneck[1].training, "its batch norms go on"
    assert not student.network.bn1.training


def test_stage_training_for_int8_begins_at_once_where_all_epochs_are():
    student = classifier(0)
    start = copied(student.network.state_dict())
    outcome = taught(4, student=student).run()["student"]
    names = [name for name in start if "running" not in name and "tracked" not in name]
    assert all(torch.equal(outcome.before[name], start[name]) for name in names)
    assert outcome.ranges


def test_stage_training_for_int8_leaves_a_captured_step():
    one = taught(2)
    one.graph_step = GraphStep(lambda: pytest.fail("nothing is captured"))
    one.position.epoch = 2
    one.run()
    assert one.graph_step is None


def test_stage_training_for_int8_with_gradients_at_the_images():
    """A method that compares them differentiates twice."""
    scheme = Offline(classifier(0), FrozenTeacher(classifier(1)), Needs(input_gradient=True))
    assert training(scheme, 1).run()["student"].ranges
