"""Options of the methods that are more than an objective: who teaches whom."""

from typing import Annotated, Literal

from pydantic import Field

from kdcore.spec.methods.base import OnLogits, Options, TapPath


class Supervised(Options):
    """Cross-entropy with the labels alone: trains teachers, baselines and references."""

    name: Literal["supervised"] = "supervised"


class Dml(OnLogits):
    """Zhang et al., CVPR 2018 (arXiv:1706.00384): students teach each other; `student` is a list of two or more."""

    name: Literal["dml"] = "dml"


class One(OnLogits):
    """Lan, Zhu & Gong, NeurIPS 2018 (arXiv:1806.04606): branches on one trunk; their gated ensemble teaches all."""

    name: Literal["one"] = "one"
    branches: int = Field(default=3, ge=2, le=16, description="The deployed one is counted.")
    rampup_epochs: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="The ensemble's weight rises over so many epochs. Default: 80 of 300, as the authors' code.",
    )


class Byot(Options):
    """Zhang et al., ICCV 2019 (arXiv:1905.08094): be your own teacher; the deepest classifier teaches earlier exits."""

    name: Literal["byot"] = "byot"
    exits: Annotated[tuple[TapPath, ...], Field(min_length=1, max_length=16)] | None = Field(
        default=None, description="Where the student is left early. Default: the ends of all stages but the last."
    )
    hint_weight: float = Field(
        default=1.28e-3,
        ge=0,
        le=1000,
        description="Of the squared distance to the deepest features, beside beta. Beta 0.1 times 1.28e-3 is the "
        "lambda 1e-6 of the authors' sum over batches of 128; ours is a mean over the batch.",
    )


class BornAgain(OnLogits):
    """Furlanello et al., ICML 2018 (arXiv:1805.04770): each generation learns from the one before."""

    name: Literal["born_again"] = "born_again"
    generations: int = Field(
        default=3, ge=1, le=9,
        description="The first learns from the teacher, or from the labels alone where there is none.",
    )  # fmt: skip
    answer: Literal["last", "ensemble"] = Field(
        default="last",
        description="What is exported: the last generation, or all of them, their probabilities averaged.",
    )


Schemes = Supervised | Dml | One | Byot | BornAgain
