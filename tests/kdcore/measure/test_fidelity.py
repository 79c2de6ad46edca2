import json
import math

import pytest
import torch

from kdcore.measure import fidelity

LABELS = torch.tensor([0, 0, 1, 1])


def answers(*classes: int, count: int = 3) -> torch.Tensor:
    """Logits whose largest is that of the class."""
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_kl_n_is_that_of_two_coins():
    teacher, model = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert fidelity.kl_n(teacher, model).item() == pytest.approx(by_hand)
    assert fidelity.kl_n(teacher, teacher).item() == 0


def test_kl_n_is_finite_where_a_program_gives_a_class_no_probability():
    teacher, model = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert fidelity.kl_n(teacher, model).item() == pytest.approx(69, rel=1e-3)


def test_fidelity_counts_agreement_on_all_images_on_the_teachers_errors_and_by_class():
    found = fidelity.fidelity(answers(0, 1, 1, 0), answers(0, 1, 1, 2), LABELS, 3)
    assert found["agreement"] == 0.75 and found["where_teacher_errs"] == 0.5
    assert found["per_class"] == [1.0, 0.5, None]


def test_fidelity_of_a_teacher_without_errors_and_of_the_teacher_itself():
    found = fidelity.fidelity(answers(0, 0, 1, 1), answers(0, 0, 1, 1), LABELS, 3)
    assert found["where_teacher_errs"] is None and found["kl"] == 0 and found["agreement"] == 1


def test_confusion_counts_errors_by_class_the_most_frequent_first():
    predicted = torch.tensor([2, 2, 1, 0])
    found = fidelity.confusion(predicted, LABELS, 3)
    assert found["matrix"] == [[0, 0, 2], [1, 1, 0], [0, 0, 0]]
    assert [tuple(one.values()) for one in found["largest"]] == [(0, 2, 2), (1, 0, 1)]


def test_worst_classes_have_examples_of_their_surest_errors():
    predicted = torch.tensor([2, 1, 1, 0])
    probability = torch.tensor([0.5, 0.9, 0.9, 0.6])
    found = fidelity.worst_classes(predicted, probability, torch.tensor([0, 1, 1, 1]), LABELS, ["a", "b", "c"])
    assert [(one["name"], one["accuracy"]) for one in found] == [("a", 0.0), ("b", 0.5)]
    assert [(one["image"], one["predicted"], one["teacher"]) for one in found[0]["examples"]] == [(1, 1, 1), (0, 2, 0)]
    assert [one["image"] for one in found[1]["examples"]] == [3]


def test_similar_classes_are_those_to_which_the_teacher_gives_each_others_probability():
    """Class 0 gets (0.6, 0.3, 0.1), class 1 gets (0.1, 0.9, 0): (0.3 + 0.1) / 2. Class 2 has no images."""
    teacher = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.9, 1e-9], [0.1, 0.9, 1e-9]]).log()
    found = fidelity.similar_classes(teacher, LABELS, 1.0, 3)
    assert [(one["first"], one["second"]) for one in found] == [(0, 1)]
    assert found[0]["probability"] == pytest.approx(0.2)
    hotter = fidelity.similar_classes(teacher, LABELS, 100.0, 3)
    assert hotter[0]["probability"] == pytest.approx(1 / 3, abs=0.01)


def test_figures_of_a_thousand_classes_are_bounded():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 1000
    model, teacher = (torch.randn(2000, 1000, generator=generator) for _ in range(2))
    predicted, names = model.argmax(1), [f"class {number}" for number in range(1000)]
    found = [
        fidelity.fidelity(model, teacher, labels, 1000),
        fidelity.confusion(predicted, labels, 1000),
        fidelity.worst_classes(predicted, model.amax(1), teacher.argmax(1), labels, names),
        fidelity.similar_classes(teacher, labels, 4.0, 1000),
    ]
    assert found[1]["matrix"] is None and len(found[1]["largest"]) == fidelity.LARGEST
    assert len(found[2]) == fidelity.WORST and len(found[3]) == fidelity.SIMILAR
    assert len(json.dumps(found, indent=2)) < 50_000
