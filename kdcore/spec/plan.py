"""What a job trains, in order: trials, each a network from a fresh start, and the stages of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdcore.catalog import DatasetFacts
from kdcore.spec.fitting import images_to_train_on
from kdcore.spec.job import JobSpec, Student
from kdcore.spec.methods import Method, SchemeOptions, scheme_of
from kdcore.spec.vocabulary import Pair

GIVEN = "teacher"
"""What `taught_by` says of the teacher (or teachers) that the spec names."""


@dataclass(frozen=True)
class Trial:
    """One training from a fresh start."""

    name: str
    students: tuple[Student, ...]
    taught_by: str | None
    """GIVEN, the name of an earlier trial, or None: nobody, or the students themselves."""
    methods: tuple[Method, ...]
    """None for labels alone."""
    seed: int

    @property
    def first_stages(self) -> tuple[Method, ...]:
        """The methods that have a stage of their own before the labels are used."""
        return tuple(method for method in self.methods if method.first_stage is not None)

    @property
    def scheme(self) -> SchemeOptions:
        """Who teaches whom."""
        return scheme_of(self.methods)


@dataclass(frozen=True)
class Leg:
    """One stage of one trial: `name` is the trial's for the last stage, `<trial>/<method>` before it."""

    name: str
    epochs: int
    steps: int


def trials(spec: JobSpec) -> list[Trial]:
    """Assistants or generations first, then the student, then its baseline."""
    found = list(_generations(spec) if spec.scheme.generations else _chain(spec))
    if spec.baseline == "train":
        found.append(Trial("alone", spec.students[:1], None, (), spec.training.seed))
    return found


def legs(spec: JobSpec, dataset: DatasetFacts, unlabelled: DatasetFacts | None) -> list[Leg]:
    """Every stage of every trial, with its length in steps: each batch is whole."""
    found = []
    for trial in trials(spec):
        pool = unlabelled if trial.name != "alone" else None
        images = images_to_train_on(dataset, pool, spec.unlabelled, spec.training)
        for name, epochs in stages(spec, trial):
            found.append(Leg(name, epochs, epochs * (images // spec.training.batch_size)))
    return found


def stages(spec: JobSpec, trial: Trial) -> list[tuple[str, int]]:
    """Name and epochs of each stage of a trial."""
    names = numbered([f"{trial.name}/{method.name}" for method in trial.first_stages])
    first = zip(names, map(_pretraining, trial.first_stages), strict=True)
    return [*first, (trial.name, spec.training.epochs)]


def numbered(names: Sequence[str]) -> list[str]:
    """Names that tell apart what is called the same: a, b, a-2, a-3."""
    times = [names[:position].count(name) for position, name in enumerate(names, 1)]
    return [name if time == 1 else f"{name}-{time}" for name, time in zip(names, times, strict=True)]


def _pretraining(method: Method) -> int:
    stage = method.first_stage
    assert stage is not None and stage.epochs is not None, "resolve() counts the epochs of every stage"
    return stage.epochs


def _chain(spec: JobSpec) -> Iterator[Trial]:
    """The student, by way of its assistants: each learns from the one before it alone."""
    methods = () if spec.scheme.kind == "alone" else spec.methods
    taught_by = GIVEN if spec.teachers else None
    for number, assistant in enumerate(spec.assistants, 1):
        yield Trial(f"assistant-{number}", (assistant,), taught_by, methods, spec.training.seed)
        taught_by = f"assistant-{number}"
    yield Trial("student", spec.students, taught_by, methods, spec.training.seed)


def _generations(spec: JobSpec) -> Iterator[Trial]:
    """Each a fresh start, with a seed of its own, that learns from the one before."""
    count = spec.scheme.generations
    taught_by = GIVEN if spec.teachers else None
    methods = spec.methods if spec.teachers else ()
    for number in range(1, count + 1):
        name = "student" if number == count else f"generation-{number}"
        yield Trial(name, spec.students, taught_by, methods, spec.training.seed + number - 1)
        taught_by, methods = name, tuple(_among_twins(method) for method in spec.methods)


def _among_twins(method: Method) -> Method:
    """Where the teacher is an earlier student, it is tapped where the student is."""
    pairs = tuple(Pair(student=pair.student, teacher=pair.student) for pair in method.pairs)
    return method.at(pairs) if pairs else method
