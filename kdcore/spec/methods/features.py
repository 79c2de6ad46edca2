"""Options of the methods that teach by what the teacher sees on the way: its activations."""

from typing import Annotated, Literal

from pydantic import Field

from kdcore.spec.methods.base import OnStages, Options, Tap, Taps

PretrainingEpochs = Annotated[int, Field(ge=1)]


class FitNet(Options):
    """Romero et al., ICLR 2015 (arXiv:1412.6550): a regressor on the student's hint layer predicts the teacher's."""

    name: Literal["fitnet"] = "fitnet"
    tap: Tap | None = Field(default=None, description="The guided layer and the hint. Default: the middle stage's end.")
    regressor: Literal["conv", "linear"] = Field(
        default="conv", description="conv: 1x1 convolution. linear: fully connected over the whole map."
    )
    stages: Literal["joint", "two"] = Field(
        default="joint",
        description="joint: hint loss beside the labels. two: the paper's; first the hint alone up to the guided "
        "layer, then kd with temperature, alpha and beta.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the hint stage, of two. Default: 30 of 240, as CRD's code for staged methods.",
    )


class Attention(Options):
    """Zagoruyko & Komodakis, ICLR 2017 (arXiv:1612.03928): where the teacher looks."""

    name: Literal["attention"] = "attention"
    mapping: Literal["sum", "sum_p", "max_p", "gradient"] = Field(
        default="sum_p",
        description="What is made of the channels: sum of |A|, sum of |A|^p, max of |A|^p; gradient: the loss's "
        "gradient at the image instead of activations (section 3.2), which has no taps.",
    )
    p: float = Field(default=2.0, ge=1, le=8, description="The power of sum_p and max_p.")
    reduction: Literal["mean_squares", "norms"] = Field(
        default="mean_squares",
        description="mean_squares: the authors' code, which beta 1000 belongs to. norms: the paper's equation 2.",
    )
    taps: Taps | None = Field(
        default=None, description="Default: the ends of the stages, matched from the deepest back."
    )


class Nst(OnStages):
    """Huang & Wang 2017 (arXiv:1707.01219): match the distribution of where each channel fires (MMD)."""

    name: Literal["nst"] = "nst"
    kernel: Literal["linear", "polynomial", "gaussian"] = Field(
        default="polynomial",
        description="polynomial: (x·y + c)^d with d = 2, c = 0, the paper's best. gaussian: the mean squared distance "
        "is its variance.",
    )


class FactorTransfer(Options):
    """Kim et al., NeurIPS 2018 (arXiv:1802.04977): a paraphraser of the teacher, a translator of the student."""

    name: Literal["factor_transfer"] = "factor_transfer"
    tap: Tap | None = Field(default=None, description="Default: the last stage's end.")
    rate: float = Field(default=0.5, gt=0, le=4, description="The paper's k: the factor's channels over the teacher's.")
    p: Literal[1, 2] = Field(default=1, description="Norm of the difference between the normalised factors.")
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None, description="Epochs of the paraphraser, which sees no student. Default: 30 of 240, as CRD's code."
    )


class ActivationBoundary(Options):
    """Heo et al., AAAI 2019 (arXiv:1811.03233): which neurons fire, learned before anything else."""

    name: Literal["activation_boundary"] = "activation_boundary"
    taps: Taps | None = Field(
        default=None, description="Before their ReLU. Default: the stages' last sums, matched from the deepest back."
    )
    margin: float = Field(default=1.0, gt=0, le=100)
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None, description="Epochs of the boundary stage. Default: 30 of 240, as CRD's code."
    )


class Fsp(Options):
    """Yim et al., CVPR 2017: the flow of the solution procedure, a Gram matrix between two layers."""

    name: Literal["fsp"] = "fsp"
    taps: Annotated[tuple[Tap, ...], Field(min_length=2, max_length=16)] | None = Field(
        default=None,
        description="Shallow to deep; each and the next make a flow. Default: the ends of the stages. Student and "
        "teacher need the same number of channels.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None, description="Epochs of the flow stage. Default: 30 of 240, as CRD's code."
    )


class Feature(Options):
    """The plainest feature distillation: match one activation, through a projector where widths differ."""

    name: Literal["feature"] = "feature"
    tap: Tap | None = Field(default=None, description="Default: the classifiers' inputs.")
    form: Literal["l2", "cosine", "kl"] = Field(
        default="l2",
        description="l2: mean squared difference. cosine: 1 - cos over channels. kl: of the features' softmax over "
        "channels.",
    )
    projector: Literal["auto", "always"] = Field(
        default="auto", description="auto: only where the widths differ. always: also where they agree."
    )


class Vid(OnStages):
    """Ahn et al., CVPR 2019 (arXiv:1904.05835): maximise a bound on the mutual information with the teacher."""

    name: Literal["vid"] = "vid"


class Ofd(Options):
    """Heo et al., ICCV 2019 (arXiv:1904.01866): before the ReLU, with a margin and a partial distance."""

    name: Literal["ofd"] = "ofd"
    taps: Taps | None = Field(
        default=None,
        description="Before their ReLU, the teacher's fed by a batch norm. Default: the stages' last sums.",
    )
    margins: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] | None = Field(
        default=None,
        description="The teacher's batch norms, one for each tap. Default: those that feed the default taps.",
    )


class ReviewKd(Options):
    """Chen et al., CVPR 2021 (arXiv:2104.09044): the student's deep stages review the teacher's shallow ones."""

    name: Literal["reviewkd"] = "reviewkd"
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep, the classifier's input last. Default: the ends of the stages (of the teacher "
        "before their ReLU), then the classifiers' inputs.",
    )
    mid_channels: int = Field(
        default=512,
        ge=1,
        le=4096,
        description="The fusion blocks are at most so wide, and never wider than the student's embedding (the authors' "
        "code).",
    )
    warmup_epochs: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="The loss grows linearly over so many epochs. Default: 20 of 240, as the authors' code.",
    )


Features = FitNet | Attention | Nst | FactorTransfer | ActivationBoundary | Fsp | Feature | Vid | Ofd | ReviewKd
