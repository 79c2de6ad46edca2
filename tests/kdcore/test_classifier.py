import math

import pytest
import torch
from torch import Tensor, nn

from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble, answered
from kdcore.data.images import Images
from kdcore.lesson import Needs
from kdcore.measure.evaluate import logits_on
from kdcore.models.layers import can_fold
from tests.kdcore.tiny import batch, constant, linear, named


def test_classifier_pixels_are_normalised_channel_by_channel():
    """Pixel 255 is 1: (1 - 0.5) / 0.25 = 2; pixel 0: (0 - 0.2) / 0.1 = -2."""
    classifier = Classifier(nn.Flatten(), [0.5, 0.2], [0.25, 0.1])
    pixels = torch.tensor([255, 0], dtype=torch.uint8).view(1, 2, 1, 1)
    assert classifier(pixels).logits.tolist()[0] == pytest.approx([2, -2])


def test_classifier_mixed_float_pixels_mean_the_same_as_bytes():
    classifier = Classifier(nn.Flatten(), [0.5], [0.5])
    pixels = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8)
    assert torch.equal(classifier(pixels).logits, classifier(pixels.float()).logits)


def test_classifier_the_network_computes_in_bf16_and_hands_over_fp32():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    classifier = Classifier(network, [0.5], [0.5], taps=["1"], bf16=True)
    seen = []
    network[1].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    view = classifier(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert seen == [torch.bfloat16]
    assert view.logits.dtype == view.taps["1"].dtype == torch.float32


def test_classifier_normalisation_is_no_part_of_the_exported_state():
    assert set(Classifier(nn.Linear(1, 1), [0.5], [0.5]).state_dict()) == {"network.weight", "network.bias"}


def two_pixels() -> tuple[Classifier, Tensor]:
    """Two pixels, three classes, and four images."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (4, 1, 1, 2), dtype=torch.uint8)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(2, 3)), [0.4], [0.5]), pixels


def test_classifier_the_input_gradient_is_that_of_the_summed_loss_at_the_normalised_images():
    """Of a linear classifier: (p - onehot) · W, an image at a time; a mean would have divided it by four."""
    classifier, pixels = two_pixels()
    labels = torch.tensor([0, 1, 2, 0])
    view = classifier(pixels, labels)
    p = view.logits.softmax(1) - nn.functional.one_hot(labels, 3)
    by_hand = (p @ classifier.network[1].weight).view(4, 1, 1, 2)
    assert torch.allclose(view.input_gradient, by_hand, atol=1e-6)


def test_classifier_the_input_gradient_can_be_learned_from_where_gradients_are_on():
    classifier, pixels = two_pixels()
    labels = torch.tensor([0, 1, 2, 0])
    classifier(pixels, labels).input_gradient.square().sum().backward()
    assert classifier.network[1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        fixed = classifier(pixels, labels)
    assert not fixed.input_gradient.requires_grad and fixed.input_gradient.abs().sum() > 0


def test_classifier_an_unknown_label_is_taken_to_be_the_views_own_answer():
    classifier, pixels = two_pixels()
    own = classifier(pixels).logits.argmax(1)
    unknown = torch.where(torch.tensor([True, False, False, True]), -1, own)
    assert torch.equal(classifier(pixels, unknown).input_gradient, classifier(pixels, own).input_gradient)


def test_known_labels_are_never_answered():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert answered(torch.tensor([0, -1, -1]), logits).tolist() == [0, 1, 0]
    mixed = torch.full((3, 2), 0.5)
    assert answered(mixed, logits) is mixed


def test_classifier_watching_other_places_forgets_the_ones_before():
    classifier, pixels = two_pixels()
    classifier.watch(["1", "1@in", "1"])
    assert set(classifier(pixels).taps) == {"1", "1@in"}
    classifier.watch(["0"])
    assert set(classifier(pixels).taps) == {"0"}
    classifier.watch([])
    assert classifier(pixels).taps == {}


def test_classifier_another_network_like_it_sees_the_same_normalised_images():
    classifier, pixels = two_pixels()
    other = classifier.like(nn.Flatten())
    assert torch.equal(other(pixels).logits, ((pixels / 255 - 0.4) / 0.5).flatten(1))
    assert other.bf16 == classifier.bf16


def test_classifier_images_that_are_normalised_already_are_only_looked_at():
    classifier, pixels = two_pixels()
    images = (pixels / 255 - 0.4) / 0.5
    assert torch.equal(classifier.view(images).logits, classifier(pixels).logits)


BATCH = batch([0, 1, 2, 0])


needs_fold = pytest.mark.skipif(not can_fold(True), reason="oneDNN's fused convolutions do not work here in bfloat16")


@needs_fold
def test_frozen_teacher_that_is_folded_answers_in_its_precision_wherever_it_is_measured():
    """In training, by `logits_on` (which takes other models in float32), and under a normalisation that is tried."""
    for bf16 in (False, True):
        classifier = named("resnet8")
        classifier.bf16 = bf16
        expected = FrozenTeacher(named("resnet8"))(BATCH).logits
        teacher = FrozenTeacher(classifier, folded=True)
        logits = teacher(BATCH).logits
        assert logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=0.1 if bf16 else 1e-5)
        measured = logits_on(classifier, Images(BATCH.inputs, BATCH.labels))
        tried = Classifier(classifier.network, [0.5], [0.25]).eval()
        assert torch.equal(measured, logits) and torch.equal(tried(BATCH.inputs).logits, logits)
        assert torch.equal(classifier.with_all_outputs()(BATCH.inputs).logits, logits)


@needs_fold
def test_frozen_teacher_that_is_folded_gives_the_input_gradient_of_the_eager_form():
    folded, eager = FrozenTeacher(named("resnet8"), folded=True), FrozenTeacher(named("resnet8"))
    for teacher in (folded, eager):
        teacher.show(Needs(input_gradient=True))
    assert torch.equal(folded(BATCH).input_gradient, eager(BATCH).input_gradient)


@needs_fold
def test_frozen_teacher_is_folded_after_its_weights_are_loaded():
    """As in a born-again generation: each convolution is folded when it first runs."""
    classifier, other = named("resnet8", 0), named("resnet8", 1)
    classifier.network.load_state_dict(other.network.state_dict())
    teacher = FrozenTeacher(classifier, folded=True)
    assert torch.allclose(teacher(BATCH).logits, FrozenTeacher(other)(BATCH).logits, atol=1e-5)
    assert list(classifier.network.state_dict()) == list(other.network.state_dict())


def frozen() -> FrozenTeacher:
    return FrozenTeacher(Classifier(nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2), nn.Flatten()), [0.5], [0.5]))


def test_frozen_teacher_train_mode_does_not_reach_it():
    teacher = frozen()
    nn.ModuleList([teacher]).train()
    statistics = teacher.classifier.network[1].running_mean.clone()
    teacher(BATCH)
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher.classifier.network[1].running_mean, statistics)


def test_frozen_teacher_has_no_parameter_to_train_and_gives_no_gradient():
    teacher = frozen()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(BATCH).logits.requires_grad


def test_frozen_teacher_shows_the_taps_the_layers_and_the_gradient_that_it_is_asked_for():
    teacher = frozen()
    bare = teacher(BATCH)
    assert bare.taps == {} and bare.layers == {} and bare.input_gradient is None
    teacher.show(Needs(student_taps=("5",), teacher_taps=("0",), teacher_layers=("1",), input_gradient=True))
    view = teacher(batch([0, 1, 1, 0]))
    assert set(view.taps) == {"0"} and view.layers == {"1": teacher.classifier.network[1]}
    assert view.input_gradient.shape == (4, 1, 4, 4) and view.input_gradient.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in (view.logits, view.taps["0"], view.input_gradient))
    teacher.show(Needs())
    assert teacher(BATCH).taps == {} and teacher(BATCH).input_gradient is None


def ensemble(*teachers: Classifier, weights=(1, 1), temperature: float = 1.0) -> TeacherEnsemble:
    return TeacherEnsemble([FrozenTeacher(teacher) for teacher in teachers], weights, temperature)


def test_teacher_ensemble_probabilities_are_averaged_not_logits():
    """(0.9 + 0.5) / 2 = 0.7. The mean of logits would be (log 9 + 0) / 2 = log 3: 0.75."""
    view = ensemble(constant(0.9, 0.1), constant(0.5, 0.5))(BATCH)
    assert view.logits.softmax(1)[0].tolist() == pytest.approx([0.7, 0.3], rel=1e-6)


def test_teacher_ensemble_weights_are_shares_whatever_they_sum_to():
    """(3 · 0.9 + 1 · 0.5) / 4 = 0.8"""
    for weights in ((3, 1), (0.3, 0.1)):
        view = ensemble(constant(0.9, 0.1), constant(0.5, 0.5), weights=weights)(BATCH)
        assert view.logits.softmax(1)[0].tolist() == pytest.approx([0.8, 0.2], rel=1e-6)


def test_teacher_ensemble_softened_by_its_temperature_its_answer_is_the_mean_of_softened_answers():
    """T = 2 takes square roots of odds: 9 : 1 becomes 3 : 1, so (0.75 + 0.5) / 2 = 0.625."""
    view = ensemble(constant(0.9, 0.1), constant(0.5, 0.5), temperature=2.0)(BATCH)
    assert (view.logits / 2).softmax(1)[0].tolist() == pytest.approx([0.625, 0.375], rel=1e-6)
    assert view.logits[0, 0].item() == pytest.approx(2 * math.log(0.625), rel=1e-6)


def test_teacher_ensemble_images_are_averaged_one_by_one():
    first, second = linear(0), linear(1)
    view = ensemble(first, second, weights=(1, 2), temperature=4.0)(BATCH)
    softened = [(one(BATCH.inputs).logits / 4).softmax(1) for one in (first, second)]
    assert torch.allclose((view.logits / 4).softmax(1), softened[0] / 3 + softened[1] * 2 / 3, atol=1e-6)


def test_teacher_ensemble_two_identical_teachers_teach_as_one():
    one, both = FrozenTeacher(linear(0)), ensemble(linear(0), linear(0), temperature=4.0)
    assert torch.allclose((both(BATCH).logits / 4).softmax(1), (one(BATCH).logits / 4).softmax(1), atol=1e-6)


def test_teacher_ensemble_a_teacher_that_is_surely_wrong_leaves_no_infinity():
    view = ensemble(constant(1e-30, 1), constant(1, 1e-30))(BATCH)
    assert view.logits.isfinite().all() and view.logits.softmax(1)[0].tolist() == pytest.approx([0.5, 0.5])


def test_teacher_ensemble_several_teachers_are_frozen_too():
    both = ensemble(linear(0), linear(1))
    nn.ModuleList([both]).train()
    assert not any(parameter.requires_grad for parameter in both.parameters())
    assert not any(member.training for member in both.members) and not both(BATCH).logits.requires_grad


def test_classifier_outputs_are_put_into_the_datas_order():
    """Class 0 of the data is the network's output 2, class 1 its output 0, class 2 its output 1."""
    classifier, pixels = two_pixels()
    ordered = Classifier(classifier.network, [0.4], [0.5], order=[2, 0, 1])
    assert torch.equal(ordered(pixels).logits, classifier(pixels).logits[:, [2, 0, 1]])
    assert "order" not in ordered.state_dict()


def test_classifier_outputs_of_one_class_are_added_as_probabilities_and_others_left_out():
    """Of four outputs, 3 and 1 answer class 0, 2 answers class 1; output 0 is left out of the softmax."""
    network = constant(0.1, 0.2, 0.3, 0.4).network
    mapped = Classifier(network, [0.5], [0.5], outputs=[[3, 1], [2]])
    assert mapped(BATCH.inputs).logits.softmax(1)[0].tolist() == pytest.approx([0.6 / 0.9, 0.3 / 0.9], rel=1e-6)
    raw = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = [math.log(math.exp(4) + math.exp(2)), 3.0]
    assert mapped.of_classes(raw)[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert mapped.of_classes(raw)[0, 1] == 3.0, "the logit of one output alone keeps its bits"
    single = Classifier(network, [0.5], [0.5], outputs=[[3], [0]])
    assert torch.equal(single.of_classes(raw), torch.tensor([[4.0, 1.0]]))
    assert torch.equal(mapped.with_all_outputs().of_classes(raw), raw) and "merged" not in mapped.state_dict()


def test_classifier_gradient_through_added_outputs_is_their_share():
    mapped = Classifier(constant(0.1, 0.2, 0.3, 0.4).network, [0.5], [0.5], outputs=[[3, 1], [2]])
    raw = torch.tensor([[0.0, 1.0, 2.0, 1.0]], requires_grad=True)
    mapped.of_classes(raw)[0, 0].backward()
    assert raw.grad[0].tolist() == pytest.approx([0, 0.5, 0, 0.5])


def test_frozen_teacher_with_a_map_gives_no_gradient():
    teacher = FrozenTeacher(Classifier(constant(0.2, 0.3, 0.5).network, [0.5], [0.5], outputs=[[2, 0], [1]]))
    view = teacher(BATCH)
    assert view.logits.shape[1] == 2 and not view.logits.requires_grad


def test_classifier_input_gradient_is_that_of_the_label_in_the_datas_order():
    classifier, pixels = two_pixels()
    ordered = Classifier(classifier.network, [0.4], [0.5], order=[2, 0, 1])
    labels = torch.tensor([0, 1, 2, 0])
    in_own_order = torch.tensor([2, 0, 1, 2])
    gradient = ordered(pixels, labels).input_gradient
    assert torch.allclose(gradient, classifier(pixels, in_own_order).input_gradient, atol=1e-7)


def test_teacher_ensemble_averages_members_of_different_orders_class_by_class():
    one = constant(0.7, 0.2, 0.1)
    other = Classifier(constant(0.1, 0.7, 0.2).network, [0.5], [0.5], order=[1, 2, 0])
    view = ensemble(one, other)(BATCH)
    assert view.logits.softmax(1)[0].tolist() == pytest.approx([0.7, 0.2, 0.1], rel=1e-5)
