"""The methods that a spec may name, and their options: one class each, its bounds and defaults from its paper."""

from typing import Annotated, get_args

from pydantic import Field

from kdcore.spec.base import named
from kdcore.spec.methods.base import OnLogits, Options, Pair, Taps
from kdcore.spec.methods.features import (
    ActivationBoundary,
    Attention,
    FactorTransfer,
    Feature,
    Features,
    FitNet,
    Fsp,
    Nst,
    Ofd,
    ReviewKd,
    Vid,
)
from kdcore.spec.methods.relations import Cc, Crd, Pkt, Relations, Rkd, Sp
from kdcore.spec.methods.response import Dist, Dkd, Kd, Nkd, Response, Ttm
from kdcore.spec.methods.schemes import BornAgain, Byot, Dml, One, Schemes, Supervised

__all__ = [
    "NAMES",
    "ActivationBoundary",
    "Attention",
    "BornAgain",
    "Byot",
    "Cc",
    "Crd",
    "Dist",
    "Dkd",
    "Dml",
    "FactorTransfer",
    "Feature",
    "FitNet",
    "Fsp",
    "Kd",
    "Method",
    "Nkd",
    "Nst",
    "Ofd",
    "OnLogits",
    "One",
    "Options",
    "Pair",
    "Pkt",
    "ReviewKd",
    "Rkd",
    "Sp",
    "Supervised",
    "Taps",
    "Ttm",
    "Vid",
]

Anything = Schemes | Response | Features | Relations

NAMES: tuple[str, ...] = tuple(options.model_fields["name"].default for options in get_args(Anything))

Method = Annotated[Anything, Field(discriminator="name"), named("name", Anything, NAMES)]
