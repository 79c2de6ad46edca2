"""Options of the methods that teach by the teacher's answers: its logits."""

from typing import Annotated, Literal

from pydantic import Field

from kdcore.spec.methods.base import Epochs, OnLogits


class Kd(OnLogits):
    """Hinton, Vinyals & Dean 2015 (arXiv:1503.02531): match the teacher's softened probabilities."""

    name: Literal["kd"] = "kd"
    form: Literal["kl", "cross_entropy", "logits_l2", "probabilities_l2"] = Field(
        default="kl",
        description="kl (default; the paper's, as CRD's code): T²·KL(teacher‖student). cross_entropy: the same "
        "gradient, another value. logits_l2: mean squared difference of logits (Ba & Caruana 2014), no temperature. "
        "probabilities_l2: T²·‖p_t - p_s‖².",
    )
    standardize: bool = Field(
        default=False,
        description="Bring each sample's logits, the student's and the teacher's, to mean 0 and standard deviation 1 "
        "first (Sun et al., CVPR 2024, arXiv:2403.01427). Switched on, the defaults become temperature 2 and beta 9, "
        "as theirs.",
    )


class Dkd(OnLogits):
    """Zhao et al., CVPR 2022 (arXiv:2203.08679): the target class and the other classes apart."""

    name: Literal["dkd"] = "dkd"
    target_weight: float = Field(
        default=1.0, ge=0, le=1000, description="The paper's alpha, and its 1: of the target class."
    )
    non_target_weight: float = Field(
        default=2.0,
        ge=0,
        le=1000,
        description="The paper's beta, of the other classes. The authors' code has 2 for ResNet-56 to ResNet-20 "
        "(default) and 8 for most pairs; of two classes there is one other, and this part is 0.",
    )
    warmup_epochs: Annotated[Epochs, Field(ge=0)] | None = Field(
        default=None,
        description="The loss grows linearly over so many epochs. Default: 20 of 240, as the authors' code, scaled to "
        "the job's epochs.",
    )


class Nkd(OnLogits):
    """Yang et al., ICCV 2023 (arXiv:2303.13005): the target's probability, and the others' normalised."""

    name: Literal["nkd"] = "nkd"
    gamma: float = Field(
        default=1.5,
        ge=0,
        le=1000,
        description="Weight of the classes but the label. Default: the authors' for ImageNet; their CIFAR-100 recipe "
        "for ResNet-34 to ResNet-18 has 3.5, with temperature 3.",
    )


class Dist(OnLogits):
    """Huang et al., NeurIPS 2022 (arXiv:2205.10536): correlations between and within classes, not exact values."""

    name: Literal["dist"] = "dist"
    between_weight: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="The paper's beta: relations between the classes of a sample, row by row. Default: the authors' "
        "code, which has both at 1.",
    )
    within_weight: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="The paper's gamma: relations within a class over the batch, column by column. Default: the "
        "authors' code. The batch size changes this part.",
    )


class Ttm(OnLogits):
    """Zheng & Yang, ICLR 2024 (arXiv:2402.11148): the temperature on the teacher alone, unsure answers weighed up."""

    name: Literal["ttm"] = "ttm"
    weighted: bool = Field(
        default=True,
        description="Weigh each sample by its power sum: WTTM, the paper's stronger form. Default: WTTM's beta 4 and "
        "temperature 5 are the authors' example; without weights theirs has beta 45 and temperature 10.",
    )


Response = Kd | Dkd | Nkd | Dist | Ttm
