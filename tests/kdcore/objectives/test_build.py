import pytest
import torch

from kdcore import objectives
from kdcore.catalog import METHODS
from kdcore.objectives import TAUGHT, Setting, build
from kdcore.objectives.attention import AttentionTransfer, GradientAttention
from kdcore.objectives.fitnet import Hints
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.objectives.standardized import Standardized
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec.methods import (
    ActivationBoundary,
    Attention,
    BornAgain,
    Dml,
    FactorTransfer,
    FitNet,
    Fsp,
    Kd,
    One,
    Pair,
    Rkd,
)

SETTING = Setting(4.0, num_classes=3, epochs=10, labels=torch.zeros(6).long(), rows=torch.arange(6))
TAP = Pair(student="a", teacher="b")
HINTS = FitNet(tap=TAP)
TWO_HINTS = FitNet(tap=TAP, stages="two", pretraining_epochs=3)
BOUNDARY = ActivationBoundary(taps=(TAP,), pretraining_epochs=2)


def test_taught_has_every_method_except_supervised():
    assert set(TAUGHT) == set(METHODS) - {"supervised"}


def test_build_of_no_methods_is_empty():
    assert build((), SETTING) == objectives.Curriculum((), None)


@pytest.mark.parametrize("method", [Dml(), One(), BornAgain()], ids=lambda method: method.name)
def test_build_gives_schemes_on_logits_the_divergence_or_the_cross_entropy(method):
    objective = build((method,), SETTING).mainly
    assert isinstance(objective, KnowledgeDistillation) and objective.temperature == 4
    assert objective.form == ("cross_entropy" if method.name == "born_again" else "kl")


@pytest.mark.parametrize("method", [Kd(standardize=True), Dml(standardize=True)], ids=lambda method: method.name)
def test_build_standardizes_any_method_on_logits(method):
    assert isinstance(build((method,), SETTING).mainly, Standardized)


def test_build_gives_attention_by_gradient_an_objective_of_its_own():
    assert isinstance(build((Attention(mapping="gradient"),), SETTING).mainly, GradientAttention)
    assert isinstance(build((Attention(taps=(TAP,)),), SETTING).mainly, AttentionTransfer)


def test_build_makes_joint_hints_one_stage_and_the_papers_two_end_as_kd():
    joint, two = build((HINTS,), SETTING), build((TWO_HINTS,), SETTING)
    assert joint.first == () and isinstance(joint.mainly, Hints)
    ((method, staged),) = two.first
    assert method is TWO_HINTS and staged.epochs == 3 and staged.trains_student and isinstance(staged.first, Hints)
    assert isinstance(two.mainly, KnowledgeDistillation)


def test_build_leaves_the_labels_alone_after_a_method_that_only_comes_first():
    curriculum = build((BOUNDARY,), SETTING)
    assert len(curriculum.first) == 1 and curriculum.mainly is None


def test_build_trains_no_student_in_a_stage_that_prepares_the_objective():
    ((_, staged),) = build((FactorTransfer(tap=TAP, pretraining_epochs=1),), SETTING).first
    assert not staged.trains_student and staged.then is not None


def test_build_gives_a_single_method_no_weight_of_its_own():
    assert isinstance(build((Kd(),), SETTING).mainly, KnowledgeDistillation)


def test_build_makes_a_list_a_weighted_sum_in_its_order():
    curriculum = build((Kd(weight=0.9), Rkd(tap=TAP, weight=2)), SETTING)
    assert isinstance(curriculum.mainly, WeightedSum)
    assert curriculum.mainly.names == ["kd", "rkd"] and curriculum.mainly.weights == [0.9, 2]


def test_build_keeps_the_weight_of_the_one_method_that_remains_beside_the_labels():
    curriculum = build((BOUNDARY.model_copy(update={"weight": 5}), Kd(weight=0.9)), SETTING)
    assert [method.weight for method, _ in curriculum.first] == [5]
    assert curriculum.mainly.names == ["kd"] and curriculum.mainly.weights == [0.9]


def test_build_keeps_the_order_of_first_stages():
    flows = Fsp(taps=(TAP, TAP), pretraining_epochs=1)
    first = build((TWO_HINTS, Kd(weight=1), flows, BOUNDARY), SETTING).first
    assert [method.name for method, _ in first] == ["fitnet", "fsp", "activation_boundary"]


def test_build_numbers_methods_of_one_name():
    curriculum = build((Kd(weight=1), Kd(form="logits_l2", weight=2)), SETTING)
    assert curriculum.mainly.names == ["kd", "kd-2"]
