import pytest
import torch

from kdcore import objectives
from kdcore.objectives import Setting, build
from kdcore.objectives.attention import AttentionTransfer, GradientAttention
from kdcore.objectives.fitnet import Hints
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.objectives.standardized import Standardized
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec.methods.features import ActivationBoundary, Attention, FactorTransfer, FitNet, Fsp
from kdcore.spec.methods.relations import Rkd
from kdcore.spec.methods.response import Kd
from kdcore.spec.methods.schemes import BornAgain, Dml, One
from kdcore.spec.vocabulary import Pair

SETTING = Setting(4.0, num_classes=3, epochs=10, labels=torch.zeros(6).long(), rows=torch.arange(6))
TAP = Pair(student="a", teacher="b")
HINTS = FitNet(tap=TAP)
TWO_HINTS = FitNet(tap=TAP, stages="two", pretraining_epochs=3)
BOUNDARY = ActivationBoundary(taps=(TAP,), pretraining_epochs=2)


def test_of_no_methods_nothing_is_taught():
    assert build((), SETTING) == objectives.Curriculum((), None)


@pytest.mark.parametrize("method", [Dml(), One(), BornAgain()], ids=lambda method: method.name)
def test_schemes_on_logits_teach_by_the_divergence_or_the_cross_entropy(method):
    objective = build((method,), SETTING).mainly
    assert isinstance(objective, KnowledgeDistillation) and objective.temperature == 4
    assert objective.form == ("cross_entropy" if method.name == "born_again" else "kl")


@pytest.mark.parametrize("method", [Kd(standardize=True), Dml(standardize=True)], ids=lambda method: method.name)
def test_any_method_on_logits_can_be_standardised(method):
    assert isinstance(build((method,), SETTING).mainly, Standardized)


def test_attention_by_gradient_is_an_objective_of_its_own():
    assert isinstance(build((Attention(mapping="gradient"),), SETTING).mainly, GradientAttention)
    assert isinstance(build((Attention(taps=(TAP,)),), SETTING).mainly, AttentionTransfer)


def test_joint_hints_are_one_stage_and_the_papers_two_end_as_kd():
    joint, two = build((HINTS,), SETTING), build((TWO_HINTS,), SETTING)
    assert joint.first == () and isinstance(joint.mainly, Hints)
    ((method, first),) = two.first
    assert method is TWO_HINTS and isinstance(first, Hints)
    assert isinstance(two.mainly, KnowledgeDistillation)


def test_what_only_comes_first_leaves_labels_alone_behind():
    curriculum = build((BOUNDARY,), SETTING)
    assert len(curriculum.first) == 1 and curriculum.mainly is None


def test_both_stages_of_factor_transfer_hold_one_paraphraser():
    curriculum = build((FactorTransfer(tap=TAP, pretraining_epochs=1),), SETTING)
    ((_, first),) = curriculum.first
    assert first.paraphraser is curriculum.mainly.paraphraser


def test_a_method_that_stands_alone_is_weighed_by_beta_alone():
    assert isinstance(build((Kd(),), SETTING).mainly, KnowledgeDistillation)


def test_a_list_is_a_weighted_sum_in_its_order():
    curriculum = build((Kd(weight=0.9), Rkd(tap=TAP, weight=2)), SETTING)
    assert isinstance(curriculum.mainly, WeightedSum)
    assert curriculum.mainly.names == ["kd", "rkd"] and curriculum.mainly.weights == [0.9, 2]


def test_a_list_of_which_one_remains_beside_the_labels_keeps_its_weight():
    curriculum = build((BOUNDARY.model_copy(update={"weight": 5}), Kd(weight=0.9)), SETTING)
    assert [method.weight for method, _ in curriculum.first] == [5]
    assert curriculum.mainly.names == ["kd"] and curriculum.mainly.weights == [0.9]


def test_first_stages_keep_the_order_of_the_list():
    flows = Fsp(taps=(TAP, TAP), pretraining_epochs=1)
    first = build((TWO_HINTS, Kd(weight=1), flows, BOUNDARY), SETTING).first
    assert [method.name for method, _ in first] == ["fitnet", "fsp", "activation_boundary"]


def test_methods_of_one_name_are_told_apart():
    curriculum = build((Kd(weight=1), Kd(form="logits_l2", weight=2)), SETTING)
    assert curriculum.mainly.names == ["kd", "kd-2"]
