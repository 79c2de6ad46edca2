"""Options of the methods that teach by what the teacher sees on the way: its activations."""

from typing import Annotated, Literal

from pydantic import Field

from kdcore.spec.methods.base import Epochs, OnStages, Options, Tap, Taps

PretrainingEpochs = Annotated[Epochs, Field(ge=1)]


class FitNet(Options):
    """Romero et al., ICLR 2015 (arXiv:1412.6550): a regressor on the student's hint layer predicts the teacher's."""

    name: Literal["fitnet"] = "fitnet"
    tap: Tap | None = Field(
        default=None,
        description="The student's guided layer and the teacher's hint. Default: the middle stages' ends, as the paper "
        "takes middle layers.",
    )
    regressor: Literal["conv", "linear"] = Field(
        default="conv",
        description="conv (default, as the paper prefers): 1x1 convolution. linear: fully connected over the whole "
        "map.",
    )
    stages: Literal["joint", "two"] = Field(
        default="joint",
        description="joint (default, as CRD's code): hint loss beside the labels. two: the paper's; first the hint "
        "alone up to the guided layer, then kd with the job's temperature, alpha and beta.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the hint stage, of two. Default: 30 of 240, as CRD's code for staged methods, scaled to "
        "the job's epochs.",
    )


class Attention(Options):
    """Zagoruyko & Komodakis, ICLR 2017 (arXiv:1612.03928): where the teacher looks."""

    name: Literal["attention"] = "attention"
    mapping: Literal["sum", "sum_p", "max_p", "gradient"] = Field(
        default="sum_p",
        description="What is made of the channels. sum: of |A|. sum_p (default, as the authors' code): of |A|^p. "
        "max_p: largest |A|^p. gradient: the loss's gradient at the image instead of activations (section 3.2), which "
        "has no taps; beta is then 1 by default.",
    )
    p: float = Field(default=2.0, ge=1, le=8, description="The power of sum_p and max_p. Default: the authors' code's.")
    reduction: Literal["mean_squares", "norms"] = Field(
        default="mean_squares",
        description="mean_squares (default): the authors' code, which beta 1000 belongs to. norms: the paper's "
        "equation 2; beta is then 10 by default.",
    )
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep. Default: the ends of the stages, as the authors' code; where one network has "
        "fewer, they are matched from the deepest back.",
    )


class Nst(OnStages):
    """Huang & Wang 2017 (arXiv:1707.01219): match the distribution of where each channel fires (MMD)."""

    name: Literal["nst"] = "nst"
    kernel: Literal["linear", "polynomial", "gaussian"] = Field(
        default="polynomial",
        description="Of two channels, each a vector of length 1. linear: x·y. polynomial (default; the paper's best, "
        "and CRD's code): (x·y)². gaussian: exp(-‖x - y‖² / 2σ²), σ² the mean squared distance.",
    )


class FactorTransfer(Options):
    """Kim et al., NeurIPS 2018 (arXiv:1802.04977): a paraphraser of the teacher, a translator of the student."""

    name: Literal["factor_transfer"] = "factor_transfer"
    tap: Tap | None = Field(
        default=None, description="The maps that are paraphrased. Default: the last stages' ends, as the paper."
    )
    rate: float = Field(
        default=0.5,
        gt=0,
        le=4,
        description="The paper's k: the factor's channels over the teacher's. Default: the authors' code's.",
    )
    p: Literal[1, 2] = Field(
        default=1,
        description="Difference of the normalised factors. 1 (default, as the authors' code, whose beta 500 belongs to "
        "it): mean of absolute values. 2: mean of squares.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the paraphraser, which sees no student. Default: 30 of 240, as CRD's code (the authors: "
        "5), scaled to the job's epochs.",
    )


class ActivationBoundary(Options):
    """Heo et al., AAAI 2019 (arXiv:1811.03233): which neurons fire, learned before anything else."""

    name: Literal["activation_boundary"] = "activation_boundary"
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep, before their ReLU. Default: what stands before the last ReLU of each stage, as "
        "the authors' code; where one network has fewer stages, they are matched from the deepest back.",
    )
    margin: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="How far beyond the boundary a neuron has to be, on the teacher's side. Default: the authors' "
        "code's, and CRD's.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the boundary stage, before any label. Default: 30 of 240, as CRD's code, scaled to the "
        "job's epochs.",
    )


class Fsp(Options):
    """Yim et al., CVPR 2017: the flow of the solution procedure, a Gram matrix between two layers."""

    name: Literal["fsp"] = "fsp"
    taps: Annotated[tuple[Tap, ...], Field(min_length=2, max_length=16)] | None = Field(
        default=None,
        description="Shallow to deep; each and the next make a flow. Student and teacher need the same number of "
        "channels. Default: what enters the first stage, and the end of each, as the paper.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the flow stage, before any label. Default: 30 of 240, as CRD's code, scaled to the "
        "job's epochs.",
    )


class Feature(Options):
    """The plainest feature distillation: match one activation, through a projector where widths differ."""

    name: Literal["feature"] = "feature"
    tap: Tap | None = Field(
        default=None,
        description="What is matched, a vector or a map. Default: the classifiers' inputs, as timm's feature "
        "distillation.",
    )
    form: Literal["l2", "cosine", "kl"] = Field(
        default="l2",
        description="l2 (default, as timm's): mean squared difference. cosine: 1 - cos, the angle over channels. kl: "
        "KL(teacher‖student) of the softmax over channels, at temperature 1.",
    )
    projector: Literal["auto", "always"] = Field(
        default="auto",
        description="A learned linear map from the student's channels to the teacher's. auto (default): only where the "
        "widths differ. always: also where they agree.",
    )


class Vid(OnStages):
    """Ahn et al., CVPR 2019 (arXiv:1904.05835): maximise a bound on the mutual information with the teacher."""

    name: Literal["vid"] = "vid"


class Ofd(Options):
    """Heo et al., ICCV 2019 (arXiv:1904.01866): before the ReLU, with a margin and a partial distance."""

    name: Literal["ofd"] = "ofd"
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep, before their ReLU, the teacher's fed by a batch norm. Default: what stands "
        "before the last ReLU of each stage, as the authors' code.",
    )
    margins: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] | None = Field(
        default=None,
        description="Module paths of the teacher's batch norms, one for each tap; named together with taps. Default: "
        "those that feed the default taps.",
    )


class ReviewKd(Options):
    """Chen et al., CVPR 2021 (arXiv:2104.09044): the student's deep stages review the teacher's shallow ones."""

    name: Literal["reviewkd"] = "reviewkd"
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep, the classifier's input last. Default: as the authors' code, the ends of the "
        "stages (of the teacher before their ReLU), then the classifiers' inputs.",
    )
    mid_channels: int = Field(
        default=512,
        ge=1,
        le=4096,
        description="The fusion blocks are at most so wide, and never wider than the student's embedding: both as the "
        "authors' code.",
    )
    warmup_epochs: Annotated[Epochs, Field(ge=0)] | None = Field(
        default=None,
        description="The loss grows linearly over so many epochs. Default: 20 of 240, as the authors' code, scaled to "
        "the job's epochs.",
    )


Features = FitNet | Attention | Nst | FactorTransfer | ActivationBoundary | Fsp | Feature | Vid | Ofd | ReviewKd
