"""What is taught: one page a paper. An objective sees a Lesson; it runs no model and knows no scheme."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcore.objectives import activation_boundary, factor_transfer, fitnet, fsp
from kdcore.objectives.attention import AttentionTransfer, GradientAttention
from kdcore.objectives.byot import SelfDistillation
from kdcore.objectives.cc import CorrelationCongruence
from kdcore.objectives.crd import ContrastiveRepresentation
from kdcore.objectives.dist import CorrelationKd
from kdcore.objectives.dkd import DecoupledKd
from kdcore.objectives.feature import FeatureMatching
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.objectives.nkd import NormalizedKd
from kdcore.objectives.nst import NeuronSelectivityTransfer
from kdcore.objectives.objective import Objective, Setting, Staged
from kdcore.objectives.ofd import Overhaul
from kdcore.objectives.pkt import ProbabilisticTransfer
from kdcore.objectives.reviewkd import KnowledgeReview
from kdcore.objectives.rkd import RelationalKd
from kdcore.objectives.sp import SimilarityPreserving
from kdcore.objectives.standardized import Standardized
from kdcore.objectives.ttm import TransformedTeacher
from kdcore.objectives.vid import VariationalInformation
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec import Kd, Method, numbered
from kdcore.spec.methods import Attention, FitNet

__all__ = ["TAUGHT", "Curriculum", "Objective", "Setting", "Staged", "build"]


def _attention(options: Attention, setting: Setting) -> Objective:
    by_gradient = options.mapping == "gradient"
    return GradientAttention(options, setting) if by_gradient else AttentionTransfer(options, setting)


def _fitnet(options: FitNet, setting: Setting) -> Objective | Staged:
    if options.stages == "joint":
        return fitnet.Hints(options, setting)
    return fitnet.staged(options, setting, then=KnowledgeDistillation(Kd(), setting))


def _kl(_: Method, setting: Setting) -> Objective:
    return KnowledgeDistillation(Kd(form="kl"), setting)


def _cross_entropy(_: Method, setting: Setting) -> Objective:
    return KnowledgeDistillation(Kd(form="cross_entropy"), setting)


TAUGHT: dict[str, Callable[[Any, Setting], Objective | Staged]] = {
    "kd": KnowledgeDistillation,
    "dkd": DecoupledKd,
    "nkd": NormalizedKd,
    "dist": CorrelationKd,
    "ttm": TransformedTeacher,
    "fitnet": _fitnet,
    "attention": _attention,
    "nst": NeuronSelectivityTransfer,
    "factor_transfer": factor_transfer.staged,
    "activation_boundary": activation_boundary.staged,
    "fsp": fsp.staged,
    "feature": FeatureMatching,
    "vid": VariationalInformation,
    "ofd": Overhaul,
    "reviewkd": KnowledgeReview,
    "rkd": RelationalKd,
    "sp": SimilarityPreserving,
    "pkt": ProbabilisticTransfer,
    "cc": CorrelationCongruence,
    "crd": ContrastiveRepresentation,
    "dml": _kl,
    "one": _kl,
    "byot": SelfDistillation,
    "born_again": _cross_entropy,
}
"""Each method's objective, or its two stages."""


@dataclass(frozen=True)
class Curriculum:
    """What the methods of a job teach: some of them something first, alone; the rest beside the labels."""

    first: tuple[tuple[Method, Staged], ...]
    mainly: Objective | None


def build(methods: Sequence[Method], setting: Setting) -> Curriculum:
    """The objectives of resolved methods; of none, labels are all there is."""
    first: list[tuple[Method, Staged]] = []
    terms: list[tuple[str, float, Objective]] = []
    for method in methods:
        taught = TAUGHT[method.name](method, setting)
        if isinstance(taught, Staged):
            first.append((method, taught))
        objective = taught.then if isinstance(taught, Staged) else taught
        if objective is not None:
            terms.append((method.name, weight(method), _standardized(method, objective)))
    names = numbered([name for name, _, _ in terms])
    return Curriculum(tuple(first), _sum([(name, *term[1:]) for name, term in zip(names, terms, strict=True)]))


def weight(method: Method) -> float:
    """A method's share among others; one that stands alone has the whole."""
    return 1.0 if method.weight is None else method.weight


def _standardized(method: Method, objective: Objective) -> Objective:
    return Standardized(objective) if getattr(method, "standardize", False) else objective


def _sum(terms: Sequence[tuple[str, float, Objective]]) -> Objective | None:
    if not terms:
        return None
    return terms[0][2] if len(terms) == 1 and terms[0][1] == 1.0 else WeightedSum(terms)
