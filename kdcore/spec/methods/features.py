"""The methods that compare activations inside the networks."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field

from base.errors import Fault
from kdcore.catalog.facts import ArchitectureFacts
from kdcore.spec.methods.options import (
    Epochs,
    FirstStage,
    MethodFacts,
    Networks,
    OnStages,
    Options,
    PretrainingEpochs,
    PublishedEpochs,
    SchemeKind,
    ShortBudget,
    SmallStudent,
)
from kdcore.spec.methods.response import Kd
from kdcore.spec.vocabulary import Bounds, Pair, Path, Tap, Taps, at_most

_COST = "supervised plus one forward pass of the teacher a step"
_CRD_CODE = "CRD's code (RepDistiller, run_cifar_distill.sh)"
_CRD_STAGE = PublishedEpochs("pretraining_epochs", 30, of=240)


class FitNet(Options):
    """Romero et al., ICLR 2015 (arXiv:1412.6550): a regressor on the student's hint layer predicts the teacher's."""

    facts = MethodFacts(
        title="FitNets: hints for thin deep nets",
        paper="Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550",
        family="features",
        matches="the activations of a middle layer, through a regressor",
        needs=["maps"],
        taps="middle_stage",
        takes="maps_or_vectors",
        alpha=1,
        beta=100,
        defaults_from=f"{_CRD_CODE}: -b 100, joint; in two stages kd's alpha, beta and temperature",
        owns="a regressor: 1x1 convolution or fully connected, with batch norm",
        cost=_COST,
    )
    published_epochs = _CRD_STAGE

    name: Literal["fitnet"] = "fitnet"
    tap: Tap | None = Field(
        default=None,
        description="The student's guided layer and the teacher's hint layer. Default: the ends of the middle stages, "
        "as the paper takes middle layers.",
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
        description="Epochs of the hint stage, with two stages. Default: 30 of 240, as CRD's code for staged methods, "
        "scaled to the job's epochs.",
    )

    @property
    def first_stage(self) -> FirstStage | None:
        return FirstStage(self.pretraining_epochs) if self.stages == "two" else None

    @property
    def defaults(self) -> MethodFacts:
        """The facts with the default weights: in two stages, those of kd, beside which the labels are used."""
        return Kd.facts if self.stages == "two" else self.facts

    @property
    def no_temperature(self) -> str:
        return "'fitnet' has a temperature only in two stages, the second of which is kd"

    @property
    def takes(self) -> Literal["anything", "maps", "maps_or_vectors"]:
        return "anything" if self.regressor == "linear" else self.facts.takes

    def contradictions(self, teachers: int | None, scheme: SchemeKind | None) -> Iterator[Fault]:
        if self.stages == "joint" and self.pretraining_epochs is not None:
            text = "a joint training has no first stage"
            yield Fault("/pretraining_epochs", text, "unused", "leave it out", self.pretraining_epochs)


class Attention(Options):
    """Zagoruyko & Komodakis, ICLR 2017 (arXiv:1612.03928): match the teacher's attention maps."""

    facts = MethodFacts(
        title="Attention transfer",
        paper="Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928",
        family="features",
        matches="the places of the image at which the teacher's activations (or its loss's gradient) are large",
        needs=["maps"],
        taps="stages",
        takes="maps",
        alpha=1,
        beta=1000,
        defaults_from=f"{_CRD_CODE} and the authors' code: 1000 with the mean of squares, p 2; "
        "10 with norms and 1 with gradients are ours",
        cost=f"{_COST}; the gradient form about doubles the step",
    )
    short_budget = ShortBudget(216, -1.47)
    small_student = SmallStudent(14_458, -42.96)

    name: Literal["attention"] = "attention"
    mapping: Literal["sum", "sum_p", "max_p", "gradient"] = Field(
        default="sum_p",
        description="How channels become one map. sum: sum of |A|. sum_p (default, as the authors' code): sum of "
        "|A|^p. max_p: largest |A|^p. gradient: the loss's gradient at the image instead of activations (section 3.2), "
        "without taps; beta is then 1 by default.",
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

    @property
    def own_beta(self) -> float | None:
        """The default beta: 1000 belongs to the mean of squares."""
        if self.compares_gradients:
            return 1.0
        return 10.0 if self.reduction == "norms" else self.facts.beta

    @property
    def compares_gradients(self) -> bool:
        return self.mapping == "gradient"

    def contradictions(self, teachers: int | None, scheme: SchemeKind | None) -> Iterator[Fault]:
        if self.compares_gradients and scheme == "mutual":
            text = "students compare logits and activations with each other, not gradients"
            yield Fault("/mapping", text, "not_allowed", ["sum", "sum_p", "max_p"], self.mapping)
        if self.compares_gradients and self.pairs:
            yield Fault("/taps", "the gradient is taken at the image, not at taps", "unused", "leave it out")


class Nst(OnStages):
    """Huang & Wang 2017 (arXiv:1707.01219): match the distribution of the places at which channels are active (MMD)."""

    facts = MethodFacts(
        title="Neuron selectivity transfer",
        paper="Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, "
        "arXiv:1707.01219",
        family="features",
        matches="the distribution of the places at which the channels are active",
        needs=["maps"],
        taps="stages",
        takes="maps",
        alpha=1,
        beta=50,
        defaults_from=f"{_CRD_CODE}: -b 50, polynomial kernel",
        cost=f"{_COST}, and matrices of channels x channels for every image",
    )
    small_student = SmallStudent(3_778, -13.52)

    name: Literal["nst"] = "nst"
    kernel: Literal["linear", "polynomial", "gaussian"] = Field(
        default="polynomial",
        description="Of two channels, each a vector of length 1. linear: x·y. polynomial (default; the paper's best, "
        "and CRD's code): (x·y)². gaussian: exp(-‖x - y‖² / 2σ²), σ² the mean squared distance.",
    )


class FactorTransfer(Options):
    """Kim et al., NeurIPS 2018 (arXiv:1802.04977): a paraphraser of the teacher, a translator of the student."""

    facts = MethodFacts(
        title="Factor transfer",
        paper="Kim, Park & Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018, "
        "arXiv:1802.04977",
        family="features",
        matches="a compressed form of the teacher's last maps, learned first and without labels",
        needs=["maps"],
        taps="last_stage",
        takes="maps",
        alpha=1,
        beta=500,
        defaults_from="the authors' code: 500 with the mean of absolute differences, k 0.5; 30 epochs as CRD's code",
        owns="a paraphraser (three convolutions, three transposed) and a translator (three convolutions)",
        cost=f"{_COST}, after the epochs of the paraphraser",
    )
    published_epochs = _CRD_STAGE

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

    @property
    def first_stage(self) -> FirstStage | None:
        return FirstStage(self.pretraining_epochs, trains_student=False)


class ActivationBoundary(Options):
    """Heo et al., AAAI 2019 (arXiv:1811.03233): match which neurons are active, before the labels are used."""

    facts = MethodFacts(
        title="Activation boundaries",
        paper="Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019, arXiv:1811.03233",
        family="features",
        matches="which neurons are active, before the labels are used",
        needs=["preactivations"],
        taps="preactivations",
        takes="maps",
        alpha=1,
        beta=1,
        defaults_from=f"{_CRD_CODE}: margin 1, 30 of 240 epochs; beta weighs the first stage, labels alone follow",
        owns="a 1x1 convolution with batch norm at each tap where the widths differ",
        cost=f"{_COST} in the first stage, supervised after it",
    )
    published_epochs = _CRD_STAGE
    short_budget = ShortBudget(216, -6.67, first_stage_steps=84)

    name: Literal["activation_boundary"] = "activation_boundary"
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep, before their ReLU. Default: the input of the last ReLU of each stage, as "
        "the authors' code; where one network has fewer stages, they are matched from the deepest back.",
    )
    margin: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Distance beyond the boundary that a neuron must have, on the teacher's side. Default: the "
        "authors' code, and CRD's.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the boundary stage, before any label. Default: 30 of 240, as CRD's code, scaled to the "
        "job's epochs.",
    )

    @property
    def first_stage(self) -> FirstStage | None:
        return FirstStage(self.pretraining_epochs, then_labels_alone=True)


class Fsp(Options):
    """Yim et al., CVPR 2017: the flow of the solution procedure, a Gram matrix between two layers."""

    facts = MethodFacts(
        title="Flow of the solution procedure",
        paper="Yim et al., A Gift from Knowledge Distillation, CVPR 2017",
        family="features",
        matches="how one layer's channels turn into the next's: a Gram matrix between the two",
        needs=["maps"],
        taps="flows",
        takes="maps",
        alpha=1,
        beta=1,
        defaults_from=f"{_CRD_CODE}: its first stage minimises the bare sum of flows (-b 50 is never used), 30 of 240 "
        "epochs; beta weighs the first stage, labels alone follow",
        cost=f"{_COST} in the first stage, supervised after it",
    )
    published_epochs = _CRD_STAGE
    short_budget = ShortBudget(216, +0.54)

    name: Literal["fsp"] = "fsp"
    taps: Annotated[tuple[Tap, ...], Field(min_length=2, max_length=16), at_most(16)] | None = Field(
        default=None,
        description="Shallow to deep; each tap and the next make a flow. Student and teacher need the same number of "
        "channels. Default: the input of the first stage and the end of each, as the paper.",
    )
    pretraining_epochs: PretrainingEpochs | None = Field(
        default=None,
        description="Epochs of the flow stage, before any label. Default: 30 of 240, as CRD's code, scaled to the "
        "job's epochs.",
    )

    @property
    def first_stage(self) -> FirstStage | None:
        return FirstStage(self.pretraining_epochs, then_labels_alone=True)

    def misfit_pairs(self, pairs: tuple[Pair, ...], networks: Networks) -> Iterator[Fault]:
        student, teacher = networks.student, networks.teacher
        for pair in pairs:
            ours, theirs = networks.width(student, pair.student), networks.width(teacher, pair.teacher)
            if ours is not None and theirs is not None and ours != theirs:
                widths = f"{student.name} has {ours} at {pair.student}, {teacher.name} {theirs} at {pair.teacher}"
                text = f"'fsp' compares channel with channel: {widths}"
                yield Fault("/taps", text, "not_allowed", "taps of equal width, or a student as wide")
                return


class Feature(Options):
    """The simplest feature distillation: match one activation, through a projector if the widths differ."""

    facts = MethodFacts(
        title="Feature matching",
        paper="the simplest form, as in FitNets (arXiv:1412.6550) and timm's feature distillation",
        family="features",
        matches="one activation: its values, its direction, or its shares over channels",
        needs=["embedding"],
        taps="embedding",
        takes="maps_or_vectors",
        alpha=1,
        beta=1,
        defaults_from="timm's feature distillation: penultimate activation, linear projector, weight 1; 1 for cosine "
        "and kl is ours",
        owns="a projector where the widths differ",
        cost=_COST,
    )

    name: Literal["feature"] = "feature"
    tap: Tap | None = Field(
        default=None,
        description="The vector or map that is compared. Default: the classifiers' inputs, as timm's feature "
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

    facts = MethodFacts(
        title="Variational information distillation",
        paper="Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv:1904.05835",
        family="features",
        matches="the stages' maps, by a Gaussian with a learned variance for each channel",
        needs=["maps"],
        taps="stages",
        takes="maps",
        alpha=1,
        beta=1,
        defaults_from=f"{_CRD_CODE}: -b 1, variances begin at 5",
        owns="three 1x1 convolutions and a variance for each channel, at each tap",
        cost=_COST,
    )

    name: Literal["vid"] = "vid"


class Ofd(Options):
    """Heo et al., ICCV 2019 (arXiv:1904.01866): match maps before the ReLU, with a margin and a partial distance."""

    facts = MethodFacts(
        title="A comprehensive overhaul of feature distillation",
        paper="Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv:1904.01866",
        family="features",
        matches="maps before their ReLU: positive values exactly, negative ones down to a margin",
        needs=["preactivations", "batch_norm"],
        taps="margins",
        takes="maps",
        alpha=1,
        beta=1e-3,
        defaults_from="the authors' CIFAR code: 1e-3 beside the labels",
        owns="a 1x1 convolution with batch norm at each tap",
        cost=_COST,
    )

    needs_places = " (the teacher's taps need a batch norm directly before their ReLU)"

    name: Literal["ofd"] = "ofd"
    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep, before their ReLU, the teacher's fed by a batch norm. Default: the input "
        "of the last ReLU of each stage, as the authors' code.",
    )
    margins: Annotated[tuple[Path, ...], Field(fail_fast=True), Bounds(max_length=16)] | None = Field(
        default=None,
        description="Module paths of the teacher's batch norms, one for each tap; named together with taps. Default: "
        "those that feed the default taps.",
    )

    def named_places(self) -> Iterator[tuple[str, Literal["student", "teacher"], tuple[str, ...]]]:
        yield "margins", "teacher", self.margins or ()
        yield from super().named_places()

    def with_places(self, student: ArchitectureFacts, teacher: ArchitectureFacts) -> Self:
        tapped = super().with_places(student, teacher)
        if tapped is self:
            return self
        return tapped.model_copy(update={"margins": tuple(teacher.margins[-len(tapped.pairs) :])})

    def contradictions(self, teachers: int | None, scheme: SchemeKind | None) -> Iterator[Fault]:
        taps, margins = len(self.taps or ()), len(self.margins or ())
        if taps and not margins:
            text = "named taps need the teacher's batch norms, one for each tap"
            yield Fault("/margins", text, "missing", f"{taps} paths")
        elif margins and not taps:
            text = "margins belong to taps: name both, or neither"
            yield Fault("/taps", text, "missing", f"{margins} taps")
        elif margins != taps:
            yield Fault("/margins", "one batch norm for each tap", "not_allowed", f"{taps} paths", margins)

    def misfit_pairs(self, pairs: tuple[Pair, ...], networks: Networks) -> Iterator[Fault]:
        teacher = networks.teacher
        for position, (pair, margin) in enumerate(zip(self.pairs, self.margins or (), strict=False)):
            width, own = networks.width(teacher, pair.teacher), networks.width(teacher, margin)
            if width is not None and own is not None and width != own:
                text = f"{margin} of {teacher.name} has {own} channels, the tap {pair.teacher} has {width}"
                yield Fault(f"/margins/{position}", text, "not_allowed", width, own)


class ReviewKd(Options):
    """Chen et al., CVPR 2021 (arXiv:2104.09044): the student's deep stages review the teacher's shallow ones."""

    facts = MethodFacts(
        title="Knowledge review",
        paper="Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044",
        family="features",
        matches="each of the teacher's stages, by a fusion of the student's stage with all deeper ones",
        needs=["maps", "embedding"],
        taps="review",
        takes="maps_or_vectors",
        alpha=1,
        beta=0.6,
        defaults_from="the authors' code: 0.6 for ResNet-20 (1 for ResNet-32, 5 for most pairs), warm-up 20 of 240 "
        "epochs",
        owns="a fusion block at each tap",
        cost=f"{_COST}, and the fusion blocks, which can outweigh a small student",
    )
    published_epochs = PublishedEpochs("warmup_epochs", 20, of=240)

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
        description="Largest width of the fusion blocks, which are never wider than the student's embedding: both as "
        "the authors' code.",
    )
    warmup_epochs: Annotated[Epochs, Field(ge=0)] | None = Field(
        default=None,
        description="Epochs over which the loss grows linearly. Default: 20 of 240, as the authors' code, scaled to "
        "the job's epochs.",
    )


Features = FitNet | Attention | Nst | FactorTransfer | ActivationBoundary | Fsp | Feature | Vid | Ofd | ReviewKd
