"""The methods that compare relations between the images of a batch."""

from typing import Literal

from pydantic import Field

from kdcore.spec.methods.options import MethodFacts, OnEmbeddings, Options, ShortBudget
from kdcore.spec.vocabulary import Tap

_COST = "supervised plus one forward pass of the teacher a step, and matrices of batch x batch"
_CRD_CODE = "CRD's code (RepDistiller, run_cifar_distill.sh)"


class Rkd(OnEmbeddings):
    """Park et al., CVPR 2019 (arXiv:1904.05068): distances between two samples, angles between three."""

    facts = MethodFacts(
        title="Relational knowledge distillation",
        paper="Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068",
        family="relations",
        matches="distances between two samples and angles between three",
        needs=["embedding"],
        taps="embedding",
        alpha=1,
        beta=1,
        defaults_from=f"{_CRD_CODE}: 25 for distances, 50 for angles, -b 1",
        cost=f"{_COST}; angles batch x batch x batch",
    )
    loss_parts = ("distance_weight", "angle_weight")
    short_budget = ShortBudget(216, -0.26)

    name: Literal["rkd"] = "rkd"
    distance_weight: float = Field(default=25.0, ge=0, le=1e6, description="The paper's lambda_D. Default: CRD's code.")
    angle_weight: float = Field(default=50.0, ge=0, le=1e6, description="The paper's lambda_A. Default: CRD's code.")


class Sp(Options):
    """Tung & Mori, ICCV 2019 (arXiv:1907.09682): which samples of the batch have similar activations."""

    facts = MethodFacts(
        title="Similarity-preserving distillation",
        paper="Tung & Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682",
        family="relations",
        matches="which samples of the batch have similar activations",
        needs=["maps"],
        taps="last_stage",
        alpha=1,
        beta=3000,
        defaults_from=f"{_CRD_CODE}: -b 3000",
        cost=_COST,
    )
    short_budget = ShortBudget(216, -0.06)

    name: Literal["sp"] = "sp"
    tap: Tap | None = Field(
        default=None, description="The activations that are compared. Default: the last stages' ends, as the paper."
    )


class Pkt(OnEmbeddings):
    """Passalis & Tefas, ECCV 2018 (arXiv:1803.10837): each sample's probabilities of being another's neighbour."""

    facts = MethodFacts(
        title="Probabilistic knowledge transfer",
        paper="Passalis & Tefas, Learning Deep Representations with PKT, ECCV 2018, arXiv:1803.10837",
        family="relations",
        matches="each sample's probabilities of being another's neighbour",
        needs=["embedding"],
        taps="embedding",
        alpha=1,
        beta=30000,
        defaults_from=f"{_CRD_CODE}: -b 30000, which belongs to a mean over batch x batch",
        cost=_COST,
    )

    name: Literal["pkt"] = "pkt"


class Cc(OnEmbeddings):
    """Peng et al., ICCV 2019 (arXiv:1904.01802): correlation congruence."""

    facts = MethodFacts(
        title="Correlation congruence",
        paper="Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv:1904.01802",
        family="relations",
        matches="how samples of the batch correlate",
        needs=["embedding"],
        taps="embedding",
        alpha=1,
        beta=0.02,
        defaults_from=f"{_CRD_CODE}: -b 0.02, which belongs to the form 'pairs'; 1 for 'gaussian' is ours",
        owns="a linear embedding of each side",
        cost=_COST,
    )
    short_budget = ShortBudget(216, -0.52)

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
        default=0.4, gt=0, le=10, description="Of gaussian's RBF kernel. Default: that of public code."
    )
    order: int = Field(default=2, ge=1, le=5, description="Of gaussian's Taylor series. Default: that of public code.")

    @property
    def own_beta(self) -> float | None:
        """The default beta. No weight of the gaussian form is published; 0.02 belongs to pairs."""
        return 1.0 if self.form == "gaussian" else self.facts.beta


class Crd(OnEmbeddings):
    """Tian, Krishnan & Isola, ICLR 2020 (arXiv:1910.10699): match the teacher's embedding of an image, not others'."""

    facts = MethodFacts(
        title="Contrastive representation distillation",
        paper="Tian, Krishnan & Isola, Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699",
        family="relations",
        matches="the teacher's embedding of the same image, against those of thousands of others",
        needs=["embedding", "sample_index"],
        taps="embedding",
        alpha=1,
        beta=0.8,
        defaults_from=f"{_CRD_CODE}: -b 0.8, 16384 negatives of other classes, tau 0.07, momentum 0.5",
        owns="a linear embedding of each side, and two memories of 128 numbers for every training image",
        cost="supervised plus one forward pass of the teacher, and batch x negatives x 128 products a step",
    )
    short_budget = ShortBudget(216, -0.59)

    name: Literal["crd"] = "crd"
    width: int = Field(default=128, ge=1, le=4096, description="Width of both embeddings. Default: the authors' code.")
    negatives: int = Field(
        default=16384,
        ge=1,
        le=1_000_000,
        description="Negatives of each sample, from other classes where labels are known. Default: the authors' code.",
    )
    temperature: float = Field(
        default=0.07,
        ge=0.02,
        le=10,
        description="The paper's tau, and its default; it is not the job's temperature. At least 0.02: exp(1/tau) must "
        "be finite in float32.",
    )
    momentum: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Part of a memory that is kept when its sample is seen again. Default: the authors' code.",
    )


Relations = Rkd | Sp | Pkt | Cc | Crd
