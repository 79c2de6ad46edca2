"""Options of the methods that are more than an objective: who teaches whom."""

from typing import Annotated, Literal

from pydantic import Field

from kdcore.spec.methods.base import Epochs, OnLogits, Options, TapPath


class Supervised(Options):
    """Cross-entropy with the labels alone: trains teachers, baselines and references."""

    name: Literal["supervised"] = "supervised"


class Dml(OnLogits):
    """Zhang et al., CVPR 2018 (arXiv:1706.00384): students teach each other; `student` is a list of two or more."""

    name: Literal["dml"] = "dml"


class One(OnLogits):
    """Lan, Zhu & Gong, NeurIPS 2018 (arXiv:1806.04606): branches on one trunk; their gated ensemble teaches all."""

    name: Literal["one"] = "one"
    branches: int = Field(
        default=3,
        ge=2,
        le=16,
        description="Copies of the student's last stage; the deployed one is counted. Default: the authors' code's.",
    )
    rampup_epochs: Annotated[Epochs, Field(ge=0)] | None = Field(
        default=None,
        description="The ensemble's weight rises over so many epochs. Default: 80 of 300, as the authors' code, scaled "
        "to the job's epochs.",
    )


class Byot(Options):
    """Zhang et al., ICCV 2019 (arXiv:1905.08094): be your own teacher; the deepest classifier teaches earlier exits."""

    name: Literal["byot"] = "byot"
    exits: Annotated[tuple[TapPath, ...], Field(min_length=1, max_length=16)] | None = Field(
        default=None,
        description="Module paths where the student is left early, shallow to deep. Default: the ends of all stages "
        "but the last, as the paper.",
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
        description="The first learns from the teacher, or from the labels alone where there is none. Default: the "
        "paper's three.",
    )  # fmt: skip
    answer: Literal["last", "ensemble"] = Field(
        default="last",
        description="What is exported. last (default): the last generation. ensemble: all of them, their probabilities "
        "averaged. The report measures both.",
    )


Schemes = Supervised | Dml | One | Byot | BornAgain
