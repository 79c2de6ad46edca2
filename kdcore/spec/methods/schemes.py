"""The methods that define which model teaches which, and the training on labels alone."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field

from base.errors import Fault
from kdcore.catalog.facts import ArchitectureFacts
from kdcore.spec.methods.options import (
    Epochs,
    MethodFacts,
    Networks,
    OnLogits,
    Options,
    PublishedEpochs,
    SchemeKind,
    SchemeOptions,
    ShortBudget,
    wrong_shape,
)
from kdcore.spec.methods.response import Kd
from kdcore.spec.vocabulary import TapPath, at_most


class Supervised(Options):
    """Cross-entropy with the labels alone, for teachers, baselines and references."""

    facts = MethodFacts(
        title="Training on labels alone",
        paper="none: the reference for every distilled student",
        family="reference",
        matches="nothing; there is no teacher",
        scheme="alone",
        teacher="none",
        needs=["labels"],
        alpha=1,
        beta=None,
        defaults_from="CRD's code (RepDistiller): the recipe of its plain networks",
        cost="one forward and one backward pass of the student a step",
    )

    name: Literal["supervised"] = "supervised"


class Dml(OnLogits):
    """Zhang et al., CVPR 2018 (arXiv:1706.00384): students teach each other; `student` is a list of two or more."""

    facts = MethodFacts(
        title="Deep mutual learning",
        paper="Zhang et al., Deep Mutual Learning, CVPR 2018, arXiv:1706.00384",
        family="schemes",
        matches="the other students' probabilities, while all are learning",
        scheme="mutual",
        teacher="none",
        needs=["logits"],
        alpha=1,
        beta=1,
        temperature=1,
        defaults_from="the paper: cross-entropy plus the mean divergence from the peers, T 1",
        owns="the other students, which are exported too",
        cost="supervised, once for each student",
    )

    name: Literal["dml"] = "dml"

    @property
    def loss_options(self) -> Options:
        return Kd(form="kl")


class One(OnLogits):
    """Lan, Zhu & Gong, NeurIPS 2018 (arXiv:1806.04606): branches on one trunk; their gated ensemble teaches all."""

    facts = MethodFacts(
        title="On-the-fly native ensemble",
        paper="Lan, Zhu & Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, arXiv:1806.04606",
        family="schemes",
        matches="a gated ensemble of branches that share the student's lower stages",
        scheme="ensemble",
        teacher="none",
        needs=["logits"],
        alpha=1,
        beta=1,
        temperature=3,
        defaults_from="the authors' code: three branches, T 3, ramp-up over 80 of 300 epochs",
        owns="the other branches and the gate; the first branch is the student that is exported",
        cost="supervised, its last stage once for each branch",
    )
    published_epochs = PublishedEpochs("rampup_epochs", 80, of=300)
    short_budget = ShortBudget(216, +0.13)

    name: Literal["one"] = "one"
    branches: int = Field(
        default=3,
        ge=2,
        le=16,
        description="Copies of the student's last stage, including the exported one. Default: the authors' code.",
    )
    rampup_epochs: Annotated[Epochs, Field(ge=0)] | None = Field(
        default=None,
        description="Epochs over which the ensemble's weight rises. Default: 80 of 300, as the authors' code, scaled "
        "to the job's epochs.",
    )

    @property
    def loss_options(self) -> Options:
        return Kd(form="kl")

    @property
    def scheme(self) -> SchemeOptions:
        return SchemeOptions("ensemble", branches=self.branches, rampup_epochs=self.rampup_epochs or 0)


class Byot(Options):
    """Zhang et al., ICCV 2019 (arXiv:1905.08094): be your own teacher; the deepest classifier teaches earlier exits."""

    facts = MethodFacts(
        title="Be your own teacher",
        paper="Zhang et al., Be Your Own Teacher, ICCV 2019, arXiv:1905.08094",
        family="schemes",
        matches="the student's own deepest outputs and features, at an exit after every earlier stage",
        scheme="exits",
        teacher="none",
        needs=["logits", "maps", "embedding"],
        alpha=0.9,
        beta=0.1,
        temperature=3,
        defaults_from="a port of the authors' code: alpha 0.9, beta 0.1, T 3, lambda 1e-6 on a sum",
        owns="a bottleneck and a classifier at every earlier stage",
        cost="supervised plus the exits",
    )

    name: Literal["byot"] = "byot"
    exits: Annotated[tuple[TapPath, ...], Field(min_length=1, max_length=16), at_most(16)] | None = Field(
        default=None,
        description="Module paths of the early exits, shallow to deep. Default: the ends of all stages "
        "but the last, as the paper.",
    )
    hint_weight: float = Field(
        default=1.28e-3,
        ge=0,
        le=1000,
        description="Weight of the squared distance to the deepest features, multiplied by beta. Beta 0.1 times "
        "1.28e-3 is the authors' lambda 1e-6 for a sum over batches of 128; here it is a mean over the batch.",
    )

    @property
    def scheme(self) -> SchemeOptions:
        return SchemeOptions("exits", exits=self.exits or ())

    @property
    def places_are_open(self) -> bool:
        """True: a spec does not name the embedding, so the network must be known."""
        return True

    def named_places(self) -> Iterator[tuple[str, Literal["student", "teacher"], tuple[str, ...]]]:
        yield "exits", "student", self.exits or ()

    def with_places(self, student: ArchitectureFacts, teacher: ArchitectureFacts) -> Self:
        return self if self.exits is not None else self.model_copy(update={"exits": tuple(student.taps[:-1])})

    def misfits(self, networks: Networks) -> Iterator[Fault]:
        student = networks.student
        if self.exits is None and len(student.taps) < 2:
            text = f"{student.name} has no known places for exits: name the exits"
            yield Fault("/exits", text, "missing", "module paths")
        if student.embedding is None:
            text = f"'byot' compares the input of the classifier, and its place in {student.name} is not known"
            yield Fault("/name", text, "not_allowed", "a network whose classifier has one known input", "byot")
        for position, path in enumerate(self.exits or ()):
            shape = networks.shape(student, path)
            if shape is not None and len(shape) != 3:
                yield wrong_shape(f"/exits/{position}", path, student, shape, "an exit of 'byot' needs a map")


class BornAgain(OnLogits):
    """Furlanello et al., ICML 2018 (arXiv:1805.04770): each generation learns from the one before."""

    facts = MethodFacts(
        title="Born-again networks",
        paper="Furlanello et al., Born Again Neural Networks, ICML 2018, arXiv:1805.04770",
        family="schemes",
        matches="the probabilities of the generation before",
        scheme="generations",
        teacher="optional",
        needs=["logits"],
        alpha=1,
        beta=1,
        temperature=1,
        defaults_from="the paper: labels plus the earlier generation's probabilities, T 1, three generations",
        owns="the earlier generations",
        cost="kd, once for each generation",
    )

    name: Literal["born_again"] = "born_again"
    generations: int = Field(
        default=3, ge=1, le=9,
        description="Networks that are trained one after the other. The first learns from the teacher, or from the "
        "labels alone without one. Default: the paper's three.",
    )  # fmt: skip
    answer: Literal["last", "ensemble"] = Field(
        default="last",
        description="What is exported. last (default): the last generation. ensemble: all of them, their probabilities "
        "averaged. The report measures both.",
    )

    @property
    def loss_options(self) -> Options:
        return Kd(form="cross_entropy")

    @property
    def scheme(self) -> SchemeOptions:
        together = self.answer == "ensemble"
        return SchemeOptions("generations", generations=self.generations, ensemble_is_result=together)

    def contradictions(self, teachers: int | None, scheme: SchemeKind | None) -> Iterator[Fault]:
        if self.generations > 1:
            return
        if teachers == 0:
            text = "one generation without a teacher is the method 'supervised'"
            yield Fault("/generations", text, "not_allowed", "≥ 2, or a teacher", self.generations)
        if self.answer == "ensemble":
            yield Fault("/answer", "one generation makes no ensemble", "unused", ["last"], self.answer)


Schemes = Supervised | Dml | One | Byot | BornAgain
