"""What is compared: one page for each paper. An objective gets a Lesson; it runs no model and knows no scheme.

The page of a method is the module of the same name. Its `from_options(options, setting)` returns the method's
objective, or both stages of it.
"""

from collections.abc import Sequence
from importlib import import_module

from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.standardized import Standardized
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec import Method, Options, numbered

__all__ = ["Objective", "Setting", "TwoStages", "build", "of_page"]


def build(methods: Sequence[Method], setting: Setting) -> list[Objective | None]:
    """The objective of each stage of a trial: of its first stages, then of the last (None: labels alone)."""
    first: list[Objective | None] = []
    terms: list[tuple[str, float, Objective]] = []
    for method in methods:
        objective: Objective | None
        match of_page(method.loss_options, setting):
            case TwoStages(first=early, then=objective):
                first.append(early)
            case objective:
                pass
        if objective is not None:
            terms.append((method.name, weight(method), _standardized(method, objective)))
    names = numbered([name for name, _, _ in terms])
    return [*first, _sum([(name, *term[1:]) for name, term in zip(names, terms, strict=True)])]


def of_page(options: Options, setting: Setting) -> Objective | TwoStages:
    """The objective, or the two stages, that the page of these options makes."""
    made: Objective | TwoStages = import_module(f"kdcore.objectives.{options.name}").from_options(options, setting)
    return made


def weight(method: Method) -> float:
    """A method's share among others; one that stands alone has the whole."""
    return 1.0 if method.weight is None else method.weight


def _standardized(method: Method, objective: Objective) -> Objective:
    return Standardized(objective) if getattr(method, "standardize", False) else objective


def _sum(terms: Sequence[tuple[str, float, Objective]]) -> Objective | None:
    if not terms:
        return None
    return terms[0][2] if len(terms) == 1 and terms[0][1] == 1.0 else WeightedSum(terms)
