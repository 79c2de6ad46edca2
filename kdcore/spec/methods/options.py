"""The base class of every method: its facts as data, its options as fields, and the hooks that the engine calls.

A method overrides only the hooks in which it differs. Only code in this package and `kdcore/objectives/` depends on
which method a job has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from base.errors import Fault
from kdcore.catalog.facts import ArchitectureFacts, Facts
from kdcore.spec.methods.tap_choice import TapKind, choose
from kdcore.spec.vocabulary import Pair, Tap, Taps, Vocabulary

Need = Literal["logits", "labels", "maps", "embedding", "preactivations", "batch_norm", "sample_index"]
SchemeKind = Literal["alone", "offline", "mutual", "ensemble", "exits", "generations"]

Epochs = Annotated[int, Field(le=100_000)]
PretrainingEpochs = Annotated[Epochs, Field(ge=1)]


class MethodFacts(Facts):
    """The facts of a method: its source, what it needs of a job, and its default weights."""

    title: str
    paper: str
    """Citation."""
    family: Literal["reference", "response", "features", "relations", "schemes"]
    matches: str
    """The quantity of the teacher that the student matches."""
    scheme: SchemeKind = "offline"
    """The roles. alone: there is no teacher. offline: a trained teacher. mutual: students teach each other.
    ensemble: the branches of a student together teach each. exits: a student's deepest part teaches the shallower ones.
    generations: each network teaches the next."""
    teacher: Literal["required", "optional", "none"] = "required"
    """The teacher in a job: required, optional, or not allowed."""
    needs: list[Need]
    """The inputs that it reads, with its default options."""
    taps: TapKind = "none"
    """The activations of student and teacher that it compares by default."""
    takes: Literal["anything", "maps", "maps_or_vectors"] = "anything"
    """The required shape of a tap for an image: maps are channels x height x width; a vector may count as a map of one
    place."""
    alpha: float
    """Default weight of the labels' loss."""
    beta: float | None
    """Default weight of its own loss; null for a method without a distillation loss."""
    temperature: float | None = None
    """Default temperature; null for a method without one."""
    defaults_from: str
    """The source of the default weights, temperature and options."""
    owns: str = "nothing"
    """The parts that are trained beside the student and not exported."""
    cost: str


class PublishedEpochs(NamedTuple):
    """The default of an option that counts epochs: a part of the published training, scaled to the job's epochs."""

    option: str
    epochs: int
    of: int


class ShortBudget(NamedTuple):
    """The longest training for which the method was measured here, and did not help: docs/methods.md ("Results at a
    short budget") and docs/measured.md ("What helps at small budgets"), CIFAR-100 or digits."""

    images_per_class: int
    """Images that the student sees: epochs x training images / classes."""
    gain: float
    """Over the same student alone, in points of accuracy."""
    helped_at: int | None = None
    """Images per class with which it was measured to help; None if no longer training was measured here."""
    first_stage_steps: int = 0
    """Steps of a first stage that were too few."""


class SmallStudent(NamedTuple):
    """The largest student that the method was measured to harm with its default weight, because it is small:
    docs/measured.md ("What helps at small budgets"), digits for 10 epochs."""

    parameters: int
    gain: float
    """Over the same student alone, in points of accuracy."""


class Weights(NamedTuple):
    """The numbers of the loss: alpha of the labels, beta of the method, and the temperature."""

    alpha: float
    beta: float | None
    temperature: float | None


@dataclass(frozen=True)
class FirstStage:
    """A stage of training before the labels are used: the method's loss alone."""

    epochs: int | None
    """None until the spec is resolved."""
    trains_student: bool = True
    """False if the stage trains only the objective's own parameters."""
    then_labels_alone: bool = False
    """True if the method adds no loss to the labels afterwards."""


@dataclass(frozen=True)
class SchemeOptions:
    """The scheme of a job (which model teaches which), with its numbers."""

    kind: SchemeKind
    branches: int = 1
    """Networks that are built for one student."""
    rampup_epochs: int = 0
    exits: tuple[str, ...] = ()
    """Module paths, shallow to deep."""
    generations: int = 0
    ensemble_is_result: bool = False
    """True if all generations together are exported, not only the last."""


@dataclass(frozen=True)
class Networks:
    """The two networks that a method compares, and the shapes of the places that the spec names in them."""

    student: ArchitectureFacts
    teacher: ArchitectureFacts
    shapes: Mapping[tuple[str, str], list[int]]
    """For one image, by architecture and path; only of places that were inspected."""

    def shape(self, network: ArchitectureFacts, path: str) -> list[int] | None:
        return self.shapes.get((network.name, path))

    def width(self, network: ArchitectureFacts, path: str) -> int | None:
        """Channels at a place; None if they are not known."""
        shape = self.shape(network, path)
        return shape[0] if shape else dict(zip(network.taps, network.tap_widths, strict=False)).get(path)


class Options(Vocabulary):
    """The options of a method.

    Faults that its hooks return point to fields of the method itself, such as `/taps`.
    """

    facts: ClassVar[MethodFacts]
    published_epochs: ClassVar[PublishedEpochs | None] = None
    short_budget: ClassVar[ShortBudget | None] = None
    small_student: ClassVar[SmallStudent | None] = None
    needs_places: ClassVar[str] = ""
    """The end of the fault's text if no default places are found."""
    loss_parts: ClassVar[tuple[str, ...]] = ()
    """Options that weigh the parts of the loss. They cannot all be 0."""

    name: str
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="Its weight in a list of methods; beta, which multiplies the sum, is then 1 by default. Default: "
        "the method's own beta (GET /v1/methods). A single method is weighed by the job's beta instead.",
    )

    # Weights and temperature.

    @property
    def defaults(self) -> MethodFacts:
        """The facts that hold the default alpha, beta and temperature."""
        return self.facts

    @property
    def own_beta(self) -> float | None:
        """The default weight of the method's loss beside labels; None for a method without one."""
        return self.defaults.beta

    @property
    def own_temperature(self) -> float | None:
        """The default temperature; None if these options use none."""
        return self.defaults.temperature

    @property
    def short_weights(self) -> Weights | None:
        """The default weights in a training no longer than `short_budget`; None if they are the usual ones."""
        return None

    def short_budget_with(self, weights: Weights) -> ShortBudget | None:
        """Return the short training in which the method was measured not to help with these numbers of the loss; None
        if it was not measured, or helped."""
        return self.short_budget

    @property
    def no_temperature(self) -> str:
        """The text of the fault if a job gives a temperature that these options do not use."""
        return f"the method {self.name!r} has no temperature"

    # The comparison.

    @property
    def loss_options(self) -> "Options":
        """The options whose module under `kdcore/objectives/` is the loss."""
        return self

    @property
    def scheme(self) -> SchemeOptions:
        return SchemeOptions(self.facts.scheme)

    @property
    def first_stage(self) -> FirstStage | None:
        """The stage before the labels are used; None for a method without one."""
        return None

    @property
    def standardizes(self) -> bool:
        """True where logits are standardised before they are compared."""
        return False

    @property
    def compares_gradients(self) -> bool:
        """True if the teacher's gradient at the image is compared."""
        return False

    @property
    def compares_taps(self) -> bool:
        """True if activations of a teacher are compared."""
        return self.facts.taps != "none" and not self.compares_gradients

    @property
    def looks_inside(self) -> bool:
        """True if more of a teacher is needed than its logits."""
        return self.compares_taps or self.compares_gradients

    @property
    def compares_at_label(self) -> bool:
        """True if the loss reads the one label of an image."""
        return self.compares_gradients or "labels" in self.facts.needs

    # Places in networks.

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Its taps, shallow to deep; empty for a method without taps, or before they are chosen."""
        tap, taps = getattr(self, "tap", None), getattr(self, "taps", None)
        return taps or ((tap,) if tap else ())

    @property
    def tap_field(self) -> str:
        return "taps" if "taps" in type(self).model_fields else "tap"

    @property
    def takes(self) -> Literal["anything", "maps", "maps_or_vectors"]:
        """The required shape of a tap for one image."""
        return self.facts.takes

    @property
    def places_are_open(self) -> bool:
        """True if places in the networks are still to be chosen."""
        return self.compares_taps and not self.pairs

    def named_places(self) -> Iterator[tuple[str, Literal["student", "teacher"], tuple[str, ...]]]:
        """Yield the module paths that a spec names: field, network, paths."""
        yield self.tap_field, "student", tuple(pair.student for pair in self.pairs)
        yield self.tap_field, "teacher", tuple(pair.teacher for pair in self.pairs)

    def choose(self, student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
        """Return the default taps; none if such a place is not known in one of the networks."""
        return choose(self.facts.taps, student, teacher)

    def at(self, pairs: tuple[Pair, ...]) -> Self:
        """Return the same method with these taps."""
        return self.model_copy(update={self.tap_field: pairs if self.tap_field == "taps" else pairs[0]})

    # Steps from a spec to a job.

    def contradictions(self, teachers: int | None, scheme: SchemeKind | None) -> Iterator[Fault]:
        """Yield the faults of its options, also with this number of teachers and scheme (None for an invalid field)."""
        yield from ()

    def misfits(self, networks: Networks) -> Iterator[Fault]:
        """Yield the faults of its places in these networks."""
        if not self.compares_taps:
            return
        yield from self._misshapen(networks)
        pairs = self.pairs or self.choose(networks.student, networks.teacher)
        if pairs:
            yield from self.misfit_pairs(pairs, networks)
        else:
            yield self._no_place(networks)

    def misfit_pairs(self, pairs: tuple[Pair, ...], networks: Networks) -> Iterator[Fault]:
        """Yield the faults of these taps, named or chosen."""
        yield from ()

    def resolved(self, epochs: int, student: ArchitectureFacts | None, teacher: ArchitectureFacts | None) -> Self:
        """Return the same method with its epochs resolved, and with its places if both networks are known."""
        method = self._in_epochs(epochs)
        return method if student is None or teacher is None else method.with_places(student, teacher)

    def with_places(self, student: ArchitectureFacts, teacher: ArchitectureFacts) -> Self:
        """Return the same method with its default places, if the spec names none."""
        pairs = self.choose(student, teacher) if self.places_are_open else ()
        return self.at(pairs) if pairs else self

    def _in_epochs(self, epochs: int) -> Self:
        published = self.published_epochs
        if published is None or getattr(self, published.option) is not None:
            return self
        is_stage = published.option == "pretraining_epochs"
        if is_stage and self.first_stage is None:
            return self
        # A warm-up may round to 0 epochs; a stage has at least one.
        scaled = max(round(epochs * published.epochs / published.of), int(is_stage))
        return self.model_copy(update={published.option: scaled})

    def _misshapen(self, networks: Networks) -> Iterator[Fault]:
        if self.takes == "anything":
            return
        ranks, needed = {"maps": ({3}, "a map"), "maps_or_vectors": ({1, 3}, "a map or a vector")}[self.takes]
        for position, pair in enumerate(self.pairs):
            place = f"/taps/{position}" if self.tap_field == "taps" else "/tap"
            for side in ("student", "teacher"):
                network, path = getattr(networks, side), getattr(pair, side)
                shape = networks.shape(network, path)
                if shape is not None and len(shape) not in ranks:
                    yield wrong_shape(f"{place}/{side}", path, network, shape, f"{self.name!r} needs {needed}")

    def _no_place(self, networks: Networks) -> Fault:
        student, teacher, field = networks.student.name, networks.teacher.name, self.tap_field
        text = f"{self.name!r} has no default places to compare {student} with {teacher}: name its {field}"
        text += self.needs_places
        return Fault(f"/{field}", text, "missing", '{"student": "<module path>", "teacher": "<module path>"}')


def wrong_shape(pointer: str, path: str, network: ArchitectureFacts, shape: list[int], needed: str) -> Fault:
    given = " x ".join(map(str, shape))
    text = f"{path} of {network.name} gives {given} for each image; {needed}"
    return Fault(pointer, text, "not_allowed", "channels x height x width", given)


class OnLogits(Options):
    """The options of a method that compares logits."""

    standardize: bool = Field(
        default=False,
        description="Bring each sample's logits, the student's and the teacher's, to mean 0 and standard deviation 1 "
        "first (Sun et al., CVPR 2024, arXiv:2403.01427). Default: off, as in the method's own paper.",
    )

    @property
    def standardizes(self) -> bool:
        return self.standardize


class OnEmbeddings(Options):
    """The options of a method that compares one vector for each image."""

    tap: Tap | None = Field(
        default=None, description="The taps of the vectors. Default: the classifiers' inputs, as in the paper."
    )


class OnStages(Options):
    """The options of a method that compares maps at several depths."""

    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep. Default: the ends of the stages, as CRD's code; where one network has fewer, "
        "they are matched from the deepest back.",
    )
