"""Options of the methods that teach by relations between samples: who resembles whom."""

from typing import Literal

from pydantic import Field

from kdcore.spec.methods.base import OnEmbeddings, Options, Tap


class Rkd(OnEmbeddings):
    """Park et al., CVPR 2019 (arXiv:1904.05068): distances between two samples, angles between three."""

    name: Literal["rkd"] = "rkd"
    distance_weight: float = Field(default=25.0, ge=0, le=1e6, description="The paper's lambda_D. Default: CRD's code.")
    angle_weight: float = Field(default=50.0, ge=0, le=1e6, description="The paper's lambda_A. Default: CRD's code.")


class Sp(Options):
    """Tung & Mori, ICCV 2019 (arXiv:1907.09682): which samples of the batch activate alike."""

    name: Literal["sp"] = "sp"
    tap: Tap | None = Field(
        default=None,
        description="The activations whose likeness is kept. Default: the last stages' ends, as the paper.",
    )


class Pkt(OnEmbeddings):
    """Passalis & Tefas, ECCV 2018 (arXiv:1803.10837): each sample's probabilities of being another's neighbour."""

    name: Literal["pkt"] = "pkt"


class Cc(OnEmbeddings):
    """Peng et al., ICCV 2019 (arXiv:1904.01802): correlation congruence."""

    name: Literal["cc"] = "cc"
    form: Literal["pairs", "gaussian"] = Field(
        default="pairs",
        description="pairs (default): |difference| of a sample times that of the next, CRD's code, which beta 0.02 "
        "belongs to. gaussian: squared difference of the RBF kernel matrices, by their Taylor series: the paper's; "
        "beta is then 1 by default.",
    )
    width: int = Field(
        default=128,
        ge=1,
        le=4096,
        description="Both sides are mapped linearly to this width first. Default: CRD's code.",
    )
    gamma: float = Field(
        default=0.4, gt=0, le=10, description="Of gaussian's RBF kernel. Default: as public code has it."
    )
    order: int = Field(
        default=2, ge=1, le=5, description="Of gaussian's Taylor series. Default: as public code has it."
    )


class Crd(OnEmbeddings):
    """Tian, Krishnan & Isola, ICLR 2020 (arXiv:1910.10699): tell the teacher's view of this image from others'."""

    name: Literal["crd"] = "crd"
    width: int = Field(default=128, ge=1, le=4096, description="Of both embeddings. Default: the authors' code.")
    negatives: int = Field(
        default=16384,
        ge=1,
        le=1_000_000,
        description="Drawn for each sample, from other classes as far as labels are known. Default: the authors' code.",
    )
    temperature: float = Field(
        default=0.07,
        ge=0.02,
        le=10,
        description="The paper's tau, and its default; the job's temperature is another. From 0.02: exp(1/tau) has to "
        "stay a number of float32.",
    )
    momentum: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Of the memory: how much of it stays when a sample is seen again. Default: the authors' code.",
    )


Relations = Rkd | Sp | Pkt | Cc | Crd
