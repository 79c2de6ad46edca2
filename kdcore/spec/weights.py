"""What every loss weighs, where a spec does not say: each method's own weights, as its catalogue page gives them."""

from kdcore.catalog import METHODS, MethodFacts
from kdcore.spec.methods import ActivationBoundary, Attention, Cc, FitNet, Fsp, Kd, Method


def uses_temperature(method: Method) -> bool:
    if isinstance(method, Kd):
        return method.form != "logits_l2"
    return _as_taught(method).temperature is not None


def temperature(methods: tuple[Method, ...]) -> float | None:
    """That of the first method that has one."""
    for method in methods:
        if uses_temperature(method):
            return 2.0 if isinstance(method, Kd) and method.standardize else _as_taught(method).temperature
    return None


def alpha(methods: tuple[Method, ...]) -> float:
    """Of the labels' loss: the first method's."""
    return _as_taught(methods[0]).alpha


def beta(methods: tuple[Method, ...]) -> float | None:
    """Of the distillation loss: 1 where methods have weights of their own, as in a list of several they always do."""
    weighed = len(methods) > 1 or methods[0].weight is not None
    return 1.0 if weighed else own_weight(methods[0])


def own_weight(method: Method) -> float | None:
    """What a method weighs beside labels of weight alpha; None where there is no distillation loss."""
    if isinstance(method, Kd) and method.standardize:
        return 9.0  # Theirs: standardised logits carry less gradient.
    if isinstance(method, Attention) and (method.mapping == "gradient" or method.reduction == "norms"):
        return 1.0 if method.mapping == "gradient" else 10.0  # The catalogue's 1000 belongs to the mean of squares.
    if isinstance(method, Cc) and method.form == "gaussian":
        return 1.0  # No weight of it is published; 0.02 belongs to pairs.
    return _as_taught(method).beta


def weigh(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """The members of a list, each with its weight spelled out. One alone is weighed by beta."""
    if len(methods) == 1:
        return methods
    return tuple(
        method if method.weight is not None else method.model_copy(update={"weight": own_weight(method)})
        for method in methods
    )


def is_staged(method: Method) -> bool:
    """Whether something is learned before the labels are seen."""
    return "pretraining_epochs" in type(method).model_fields and not _is_joint(method)


def leaves_labels_alone(method: Method) -> bool:
    """Whether all that a method teaches comes before the labels are seen."""
    return isinstance(method, ActivationBoundary | Fsp)


def _is_joint(method: Method) -> bool:
    return isinstance(method, FitNet) and method.stages == "joint"


def _as_taught(method: Method) -> MethodFacts:
    """FitNets in two stages end as kd: their weights are its."""
    two_stages = isinstance(method, FitNet) and method.stages == "two"
    return METHODS["kd" if two_stages else method.name]
