"""The methods that a spec may name: one class each, in the file of its family."""

from collections.abc import Sequence
from typing import Annotated, get_args

from pydantic import Field

from kdcore.spec.methods.features import Features
from kdcore.spec.methods.options import FirstStage, MethodFacts, Networks, Options, SchemeOptions
from kdcore.spec.methods.relations import Relations
from kdcore.spec.methods.response import Response
from kdcore.spec.methods.schemes import Schemes
from kdcore.spec.vocabulary import named

__all__ = [
    "METHODS",
    "FirstStage",
    "Method",
    "MethodFacts",
    "Networks",
    "Options",
    "SchemeOptions",
    "scheme_of",
]

_Any = Schemes | Response | Features | Relations

METHODS: dict[str, type[Options]] = {options.model_fields["name"].default: options for options in get_args(_Any)}
"""The class of each method, by the name that a job gives it."""

Method = Annotated[_Any, Field(discriminator="name"), named("name", _Any, tuple(METHODS))]


def scheme_of(methods: Sequence[Options]) -> SchemeOptions:
    """Return the scheme of these methods: that of `dml` and the like, else offline, else labels alone."""
    rank = {"offline": 1, "alone": 2}
    schemes = (method.scheme for method in methods)
    return min(schemes, key=lambda scheme: rank.get(scheme.kind, 0), default=SchemeOptions("alone"))
