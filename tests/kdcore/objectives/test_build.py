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


def test_build_of_no_methods_is_labels_alone():
    assert build((), SETTING) == [None]


@pytest.mark.parametrize("method", [Dml(), One(), BornAgain()], ids=lambda method: method.name)
def test_build_gives_schemes_on_logits_the_divergence_or_the_cross_entropy(method):
    objective = build((method,), SETTING)[-1]
    assert isinstance(objective, KnowledgeDistillation) and objective.temperature == 4
    assert objective.form == ("cross_entropy" if method.name == "born_again" else "kl")


@pytest.mark.parametrize("method", [Kd(standardize=True), Dml(standardize=True)], ids=lambda method: method.name)
def test_build_standardizes_any_method_on_logits(method):
    assert isinstance(build((method,), SETTING)[-1], Standardized)


def test_build_gives_attention_by_gradient_an_objective_of_its_own():
    assert isinstance(build((Attention(mapping="gradient"),), SETTING)[-1], GradientAttention)
    assert isinstance(build((Attention(taps=(TAP,)),), SETTING)[-1], AttentionTransfer)


def test_build_makes_joint_hints_one_stage_and_the_papers_two_end_as_kd():
    joint, two = build((HINTS,), SETTING), build((TWO_HINTS,), SETTING)
    assert [type(objective) for objective in joint] == [Hints]
    assert [type(objective) for objective in two] == [Hints, KnowledgeDistillation]


def test_build_leaves_the_labels_alone_after_a_method_that_only_comes_first():
    stages = build((BOUNDARY,), SETTING)
    assert len(stages) == 2 and stages[-1] is None


def test_build_gives_both_stages_of_factor_transfer_one_paraphraser():
    stages = build((FactorTransfer(tap=TAP, pretraining_epochs=1),), SETTING)
    first, last = stages
    assert first.paraphraser is last.paraphraser


def test_build_gives_a_single_method_no_weight_of_its_own():
    assert isinstance(build((Kd(),), SETTING)[-1], KnowledgeDistillation)


def test_build_makes_a_list_a_weighted_sum_in_its_order():
    stages = build((Kd(weight=0.9), Rkd(tap=TAP, weight=2)), SETTING)
    assert isinstance(stages[-1], WeightedSum)
    assert stages[-1].names == ["kd", "rkd"] and stages[-1].weights == [0.9, 2]


def test_build_keeps_the_weight_of_the_one_method_that_remains_beside_the_labels():
    stages = build((BOUNDARY.model_copy(update={"weight": 5}), Kd(weight=0.9)), SETTING)
    assert len(stages) == 2
    assert stages[-1].names == ["kd"] and stages[-1].weights == [0.9]


def test_build_keeps_the_order_of_first_stages():
    flows = Fsp(taps=(TAP, TAP), pretraining_epochs=1)
    *first, _ = build((TWO_HINTS, Kd(weight=1), flows, BOUNDARY), SETTING)
    assert [type(objective) for objective in first] == [Hints, SolutionFlow, ActivationBoundaries]


def test_build_numbers_methods_of_one_name():
    stages = build((Kd(weight=1), Kd(form="logits_l2", weight=2)), SETTING)
    assert stages[-1].names == ["kd", "kd-2"]
