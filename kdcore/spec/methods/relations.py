"""Options of the methods that teach by relations between samples: who resembles whom."""

from typing import Literal

from pydantic import Field

from kdcore.spec.methods.base import OnEmbeddings, Options, Tap


class Rkd(OnEmbeddings):
    """Park et al., CVPR 2019 (arXiv:1904.05068): distances between two samples, angles between three."""

    name: Literal["rkd"] = "rkd"
    distance_weight: float = Field(default=25.0, ge=0, le=1e6, description="The paper's lambda_D; CRD's code has 25.")
    angle_weight: float = Field(default=50.0, ge=0, le=1e6, description="The paper's lambda_A; CRD's code has 50.")


class Sp(Options):
    """Tung & Mori, ICCV 2019 (arXiv:1907.09682): which samples of the batch activate alike."""

    name: Literal["sp"] = "sp"
    tap: Tap | None = Field(default=None, description="Default: the last stage's end.")


class Pkt(OnEmbeddings):
    """Passalis & Tefas, ECCV 2018 (arXiv:1803.10837): each sample's probabilities of being another's neighbour."""

    name: Literal["pkt"] = "pkt"


class Cc(OnEmbeddings):
    """Peng et al., ICCV 2019 (arXiv:1904.01802): correlation congruence."""

    name: Literal["cc"] = "cc"
    form: Literal["pairs", "gaussian"] = Field(
        default="pairs",
        description="pairs: |difference| of a sample times that of the next, CRD's code, which beta 0.02 belongs to. "
        "gaussian: squared difference of the RBF kernel matrices, by their Taylor series: the paper's.",
    )
    width: int = Field(default=128, ge=1, le=4096, description="Both sides are mapped linearly to this width first.")
    gamma: float = Field(default=0.4, gt=0, le=10, description="Of the RBF kernel.")
    order: int = Field(default=2, ge=1, le=5, description="Of the Taylor series.")


class Crd(OnEmbeddings):
    """Tian, Krishnan & Isola, ICLR 2020 (arXiv:1910.10699): tell the teacher's view of this image from others'."""

    name: Literal["crd"] = "crd"
    width: int = Field(default=128, ge=1, le=4096, description="Of both embeddings.")
    negatives: int = Field(default=16384, ge=1, le=1_000_000, description="Drawn for each sample, from other classes.")
    temperature: float = Field(
        default=0.07, ge=0.02, le=10, description="The paper's tau; the job's temperature is another."
    )
    momentum: float = Field(
        default=0.5, ge=0, lt=1, description="Of the memory: what stays when a sample is seen again."
    )


Relations = Rkd | Sp | Pkt | Cc | Crd
