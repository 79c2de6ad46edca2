"""The objectives: one module for each paper. An objective gets a Lesson; it runs no model and uses no scheme.

`OBJECTIVES` lists them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kdcore.objectives import activation_boundary, attention, factor_transfer, fitnet, fsp
from kdcore.objectives.byot import SelfDistillation
from kdcore.objectives.cc import CorrelationCongruence
from kdcore.objectives.crd import ContrastiveRepresentation
from kdcore.objectives.dist import CorrelationKd
from kdcore.objectives.dkd import DecoupledKd
from kdcore.objectives.feature import FeatureMatching
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.objectives.nkd import NormalizedKd
from kdcore.objectives.nst import NeuronSelectivityTransfer
from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.ofd import Overhaul
from kdcore.objectives.pkt import ProbabilisticTransfer
from kdcore.objectives.reviewkd import KnowledgeReview
from kdcore.objectives.rkd import RelationalKd
from kdcore.objectives.sp import SimilarityPreserving
from kdcore.objectives.standardized import Standardized
from kdcore.objectives.ttm import TransformedTeacher
from kdcore.objectives.vid import VariationalInformation
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec import Method, numbered

__all__ = ["OBJECTIVES", "Objective", "Setting", "TwoStages", "build"]

OBJECTIVES: dict[str, Callable[[Any, Setting], Objective | TwoStages]] = {
    "kd": KnowledgeDistillation,
    "dkd": DecoupledKd,
    "nkd": NormalizedKd,
    "dist": CorrelationKd,
    "ttm": TransformedTeacher,
    "fitnet": fitnet.from_options,
    "attention": attention.from_options,
    "nst": NeuronSelectivityTransfer,
    "factor_transfer": factor_transfer.from_options,
    "activation_boundary": activation_boundary.from_options,
    "fsp": fsp.from_options,
    "feature": FeatureMatching,
    "vid": VariationalInformation,
    "ofd": Overhaul,
    "reviewkd": KnowledgeReview,
    "rkd": RelationalKd,
    "sp": SimilarityPreserving,
    "pkt": ProbabilisticTransfer,
    "cc": CorrelationCongruence,
    "crd": ContrastiveRepresentation,
    "byot": SelfDistillation,
}
"""By the name of its options: the function that makes a method's objective, or its two stages."""


def build(methods: Sequence[Method], setting: Setting) -> list[Objective | None]:
    """Return the objective of each stage of a trial: the first stages, then the last (None: labels alone)."""
    first: list[Objective | None] = []
    terms: list[tuple[str, float, Objective]] = []
    for method in methods:
        objective: Objective | None
        options = method.loss_options
        match OBJECTIVES[options.name](options, setting):
            case TwoStages(first=early, then=objective):
                first.append(early)
            case objective:
                pass
        if objective is not None:
            objective = Standardized(objective) if method.standardizes else objective
            terms.append((method.name, weight(method), objective))
    names = numbered([name for name, _, _ in terms])
    return [*first, _sum([(name, *term[1:]) for name, term in zip(names, terms, strict=True)])]


def weight(method: Method) -> float:
    """Return a method's weight among others; a single method has weight 1."""
    return 1.0 if method.weight is None else method.weight


def _sum(terms: Sequence[tuple[str, float, Objective]]) -> Objective | None:
    if not terms:
        return None
    return terms[0][2] if len(terms) == 1 and terms[0][1] == 1.0 else WeightedSum(terms)
