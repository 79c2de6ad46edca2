import pytest
import torch

from kdcore.objectives import Setting, build
from kdcore.objectives.activation_boundary import ActivationBoundaries
from kdcore.objectives.attention import AttentionTransfer, GradientAttention
from kdcore.objectives.fitnet import Hints
from kdcore.objectives.fsp import SolutionFlow
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
    assert build((), SETTING) == [None]


@pytest.mark.parametrize("method", [Dml(), One(), BornAgain()], ids=lambda method: method.name)
def test_schemes_on_logits_teach_by_the_divergence_or_the_cross_entropy(method):
    objective = build((method,), SETTING)[-1]
    assert isinstance(objective, KnowledgeDistillation) and objective.temperature == 4
    assert objective.form == ("cross_entropy" if method.name == "born_again" else "kl")


@pytest.mark.parametrize("method", [Kd(standardize=True), Dml(standardize=True)], ids=lambda method: method.name)
def test_any_method_on_logits_can_be_standardised(method):
    assert isinstance(build((method,), SETTING)[-1], Standardized)


def test_attention_by_gradient_is_an_objective_of_its_own():
    assert isinstance(build((Attention(mapping="gradient"),), SETTING)[-1], GradientAttention)
    assert isinstance(build((Attention(taps=(TAP,)),), SETTING)[-1], AttentionTransfer)


def test_joint_hints_are_one_stage_and_the_papers_two_end_as_kd():
    joint, two = build((HINTS,), SETTING), build((TWO_HINTS,), SETTING)
    assert [type(objective) for objective in joint] == [Hints]
    assert [type(objective) for objective in two] == [Hints, KnowledgeDistillation]


def test_what_only_comes_first_leaves_labels_alone_behind():
    stages = build((BOUNDARY,), SETTING)
    assert len(stages) == 2 and stages[-1] is None


def test_both_stages_of_factor_transfer_hold_one_paraphraser():
    stages = build((FactorTransfer(tap=TAP, pretraining_epochs=1),), SETTING)
    first, last = stages
    assert first.paraphraser is last.paraphraser


def test_a_method_that_stands_alone_is_weighed_by_beta_alone():
    assert isinstance(build((Kd(),), SETTING)[-1], KnowledgeDistillation)


def test_a_list_is_a_weighted_sum_in_its_order():
    stages = build((Kd(weight=0.9), Rkd(tap=TAP, weight=2)), SETTING)
    assert isinstance(stages[-1], WeightedSum)
    assert stages[-1].names == ["kd", "rkd"] and stages[-1].weights == [0.9, 2]


def test_a_list_of_which_one_remains_beside_the_labels_keeps_its_weight():
    stages = build((BOUNDARY.model_copy(update={"weight": 5}), Kd(weight=0.9)), SETTING)
    assert len(stages) == 2
    assert stages[-1].names == ["kd"] and stages[-1].weights == [0.9]


def test_first_stages_keep_the_order_of_the_list():
    flows = Fsp(taps=(TAP, TAP), pretraining_epochs=1)
    *first, _ = build((TWO_HINTS, Kd(weight=1), flows, BOUNDARY), SETTING)
    assert [type(objective) for objective in first] == [Hints, SolutionFlow, ActivationBoundaries]


def test_methods_of_one_name_are_told_apart():
    stages = build((Kd(weight=1), Kd(form="logits_l2", weight=2)), SETTING)
    assert stages[-1].names == ["kd", "kd-2"]
