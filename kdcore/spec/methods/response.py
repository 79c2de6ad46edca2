"""The methods that compare the logits of student and teacher."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from base.errors import Fault
from kdcore.spec.methods.options import Epochs, MethodFacts, OnLogits, PublishedEpochs, SchemeKind, ShortBudget, Weights

_COST = "supervised plus one forward pass of the teacher a step"


class Kd(OnLogits):
    """Hinton, Vinyals & Dean 2015 (arXiv:1503.02531): match the teacher's softened probabilities."""

    facts = MethodFacts(
        title="Knowledge distillation of logits",
        paper="Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531",
        family="response",
        matches="the teacher's class probabilities, softened by a temperature",
        needs=["logits"],
        alpha=0.1,
        beta=0.9,
        temperature=4,
        defaults_from="CRD's code (RepDistiller, run_cifar_distill.sh): -r 0.1 -a 0.9, T 4; standardized: beta 9 and T "
        "2 of the authors of logit standardisation. In a training of at most 259 images of each class, of students "
        "that start from nothing, alpha is 1 and beta 0.25 (measured here: docs/measured.md)",
        cost=_COST,
    )
    short_budget = ShortBudget(259, -9.72, helped_at=647)

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

    @property
    def own_beta(self) -> float | None:
        """The default beta. Standardised logits give less gradient, so their authors' weight is larger."""
        return 9.0 if self.standardize else self.facts.beta

    @property
    def own_temperature(self) -> float | None:
        if self.form == "logits_l2":
            return None
        return 2.0 if self.standardize else self.facts.temperature

    @property
    def short_weights(self) -> Weights | None:
        """Labels at full weight. With the usual 0.1 a student that starts from nothing learns more slowly than alone;
        measured by `python -m bench.budgets` (docs/measured.md, "What helps at small budgets")."""
        return Weights(1.0, 0.25, 4.0) if self.form == "kl" and not self.standardize else None

    def short_budget_with(self, weights: Weights) -> ShortBudget | None:
        if self.form != "kl":
            return None
        if self.standardize:
            return ShortBudget(216, -0.19, helped_at=259)
        return ShortBudget(216, +0.13, helped_at=259) if weights == self.short_weights else self.short_budget

    @property
    def no_temperature(self) -> str:
        return f"the form {self.form!r} has no temperature"

    def contradictions(self, teachers: int | None, scheme: SchemeKind | None) -> Iterator[Fault]:
        if self.form == "logits_l2" and teachers is not None and teachers > 1:
            text = "of several teachers only the probabilities are averaged, so there are no logits to match"
            yield Fault("/form", text, "not_allowed", ["kl", "cross_entropy", "probabilities_l2"], self.form)


class Dkd(OnLogits):
    """Zhao et al., CVPR 2022 (arXiv:2203.08679): match the target class and the other classes separately."""

    facts = MethodFacts(
        title="Decoupled knowledge distillation",
        paper="Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679",
        family="response",
        matches="the target class's probability, and how the rest is shared among the other classes",
        needs=["logits", "labels"],
        alpha=1,
        beta=1,
        temperature=4,
        defaults_from="the authors' code (mdistiller): CE 1, T 4, warm-up 20 of 240 epochs, beta 2 for ResNet-56 to 20",
        cost=_COST,
    )
    published_epochs = PublishedEpochs("warmup_epochs", 20, of=240)
    loss_parts = ("target_weight", "non_target_weight")

    name: Literal["dkd"] = "dkd"
    target_weight: float = Field(
        default=1.0, ge=0, le=1000, description="Weight of the target class: the paper's alpha. Default: its 1."
    )
    non_target_weight: float = Field(
        default=2.0,
        ge=0,
        le=1000,
        description="Weight of the other classes: the paper's beta. The authors' code has 2 for ResNet-56 to "
        "ResNet-20 (default) and 8 for most pairs. With two classes this part is 0.",
    )
    warmup_epochs: Annotated[Epochs, Field(ge=0)] | None = Field(
        default=None,
        description="Epochs over which the loss grows linearly. Default: 20 of 240, as the authors' code, scaled to "
        "the job's epochs.",
    )


class Nkd(OnLogits):
    """Yang et al., ICCV 2023 (arXiv:2303.13005): match the target's probability, and the others' normalised."""

    facts = MethodFacts(
        title="Normalized knowledge distillation",
        paper="Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv:2303.13005",
        family="response",
        matches="the target class's probability, and the other classes' normalised to one",
        needs=["logits", "labels"],
        alpha=1,
        beta=1,
        temperature=1,
        defaults_from="the authors' code (cls_KD) for ImageNet: gamma 1.5, T 1; its CIFAR-100 recipe for ResNet-34 to "
        "ResNet-18 has gamma 3.5, T 3",
        cost=_COST,
    )

    name: Literal["nkd"] = "nkd"
    gamma: float = Field(
        default=1.5,
        ge=0,
        le=1000,
        description="Weight of the classes other than the label. Default: the authors' for ImageNet; their CIFAR-100 "
        "recipe for ResNet-34 to ResNet-18 has 3.5, with temperature 3.",
    )


class Dist(OnLogits):
    """Huang et al., NeurIPS 2022 (arXiv:2205.10536): correlations between and within classes, not exact values."""

    facts = MethodFacts(
        title="Distillation from a stronger teacher",
        paper="Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536",
        family="response",
        matches="how probabilities correlate, between the classes of a sample and within a class over the batch",
        needs=["logits"],
        alpha=1,
        beta=2,
        temperature=4,
        defaults_from="as others report them for CIFAR-100, not read in the authors' code: 2 over all, T 4; that code "
        "has both relations at 1, and T 1 for ImageNet",
        cost=_COST,
    )
    loss_parts = ("between_weight", "within_weight")

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
    """Zheng & Yang, ICLR 2024 (arXiv:2402.11148): only the teacher's logits are divided by the temperature."""

    facts = MethodFacts(
        title="Transformed teacher matching",
        paper="Zheng & Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024, arXiv:2402.11148",
        family="response",
        matches="the teacher's probabilities raised to a power; the student has no temperature",
        needs=["logits"],
        alpha=1,
        beta=4,
        temperature=5,
        defaults_from="the authors' code, its example of WTTM (vgg13 to vgg8, beside CRD): CE 1, beta 4, "
        "gamma 0.2, which is T 5; they choose both by the pair",
        cost=_COST,
    )
    short_budget = ShortBudget(216, -3.98)

    name: Literal["ttm"] = "ttm"
    weighted: bool = Field(
        default=True,
        description="Weigh each sample by its power sum: WTTM, the paper's stronger form. Default: WTTM's beta 4 and "
        "temperature 5 are the authors' example; without weights theirs has beta 45 and temperature 10.",
    )


Response = Kd | Dkd | Nkd | Dist | Ttm
