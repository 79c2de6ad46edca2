"""The plan of a job: its trials in order, each from a new start, and the stages of each trial."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kdcore.catalog import DatasetFacts
from kdcore.spec.fitting import images_to_train_on
from kdcore.spec.inputs import Student
from kdcore.spec.job import JobSpec
from kdcore.spec.methods import Method, SchemeOptions, scheme_of
from kdcore.spec.shipping import default_aware_epochs
from kdcore.spec.vocabulary import Pair

GIVEN = "teacher"
"""The value of `taught_by` for a trial whose teacher (or teachers) the spec names."""
ASSISTANT, GENERATION = "assistant-", "generation-"
"""How the names of trials of assistants and of earlier generations begin; their number follows."""
FURTHER_SEED = "-seed-"
"""In the names of the trials of further seeds: `student-seed-1`."""


@dataclass(frozen=True)
class Stage:
    """One stage of a trial. `<trial>/<method>` trains one method before the labels; the last has the trial's name."""

    name: str
    epochs: int
    steps: int
    method: Method | None = None
    """The method of a stage before the labels; None in the last stage, which uses all methods and the labels."""
    aware_epochs: int = 0
    """The last of its epochs, which train for int8."""

    @property
    def aware_name(self) -> str:
        """The name under which these epochs are measured: their steps take longer than the others."""
        return f"{self.name}/int8"


@dataclass(frozen=True)
class Trial:
    """A training from a new start: of the student, an assistant, a generation or the baseline."""

    name: str
    students: tuple[Student, ...]
    taught_by: str | None
    """GIVEN, the name of an earlier trial, or None: no teacher, or the students themselves."""
    methods: tuple[Method, ...]
    """The methods; empty for labels alone."""
    seed: int
    stages: tuple[Stage, ...] = ()
    run: int = 0
    """The number of the run with another seed; 0 is the one that is delivered."""

    @property
    def is_baseline(self) -> bool:
        return self.name == run_name("alone", self.seed, self.run)

    @property
    def scheme(self) -> SchemeOptions:
        """The scheme: which model teaches which."""
        return scheme_of(self.methods)


def run_seeds(spec: JobSpec) -> range:
    """Return the seeds of a job's runs; the first is the delivered one's."""
    return range(spec.training.seed, spec.training.seed + spec.seeds)


def run_name(trial: str, seed: int, run: int) -> str:
    """Return the name of a trial in the run with this number: `student`, then `student-seed-1`."""
    return trial if run == 0 else f"{trial}{FURTHER_SEED}{seed}"


def trials(spec: JobSpec, dataset: DatasetFacts, unlabelled: DatasetFacts | None) -> tuple[Trial, ...]:
    """Return a job's trials with their stages. The student's is the last of the first run, except for its baseline.

    Each further run trains student and baseline as the job with that seed would. Assistants are trained once.
    """
    planned = list(_generations(spec) if spec.scheme.generations else _chain(spec))
    if spec.trains_baseline:
        planned.append(Trial("alone", spec.students[:1], None, (), spec.training.seed))
    repeated = [trial for trial in planned if trial.name in ("student", "alone")]
    for run, seed in enumerate(run_seeds(spec)):
        planned += [replace(one, name=run_name(one.name, seed, run), seed=seed, run=run) for one in repeated if run]
    return tuple(
        replace(trial, stages=tuple(_stages(trial, spec, dataset, None if trial.is_baseline else unlabelled)))
        for trial in planned
    )


def aware_epochs(spec: JobSpec) -> int:
    """Return the number of last epochs that train for int8; 0 if none do."""
    asked = spec.quantization
    if asked is None or not asked.aware:
        return 0
    return asked.epochs if asked.epochs is not None else default_aware_epochs(spec.training.epochs)


def numbered(names: Sequence[str]) -> list[str]:
    """Return distinct names: a, b, a-2, a-3."""
    times = [names[:position].count(name) for position, name in enumerate(names, 1)]
    return [name if time == 1 else f"{name}-{time}" for name, time in zip(names, times, strict=True)]


def _stages(trial: Trial, spec: JobSpec, dataset: DatasetFacts, unlabelled: DatasetFacts | None) -> Iterator[Stage]:
    """Yield every stage with its length in steps; only whole batches count."""
    images = images_to_train_on(dataset, unlabelled, spec.unlabelled, spec.training)
    steps_per_epoch = images // spec.training.batch_size
    first = [(method, method.first_stage) for method in trial.methods if method.first_stage is not None]
    names = numbered([f"{trial.name}/{method.name}" for method, _ in first])
    for name, (method, stage) in zip(names, first, strict=True):
        assert stage.epochs is not None, "resolve() counts the epochs of every stage"
        yield Stage(name, stage.epochs, stage.epochs * steps_per_epoch, method)
    # Assistants and earlier generations teach as float networks.
    aware = 0 if trial.name.startswith((ASSISTANT, GENERATION)) else aware_epochs(spec)
    yield Stage(trial.name, spec.training.epochs, spec.training.epochs * steps_per_epoch, aware_epochs=aware)


def _chain(spec: JobSpec) -> Iterator[Trial]:
    """Yield the assistants, each taught by the one before it, then the student."""
    methods = () if spec.scheme.kind == "alone" else spec.methods
    taught_by = GIVEN if spec.teachers else None
    for number, assistant in enumerate(spec.assistants, 1):
        yield Trial(f"{ASSISTANT}{number}", (assistant,), taught_by, methods, spec.training.seed)
        taught_by = f"{ASSISTANT}{number}"
    yield Trial("student", spec.students, taught_by, methods, spec.training.seed)


def _generations(spec: JobSpec) -> Iterator[Trial]:
    """Yield the generations, each with its own seed and taught by the one before it."""
    count = spec.scheme.generations
    taught_by = GIVEN if spec.teachers else None
    methods = spec.methods if spec.teachers else ()
    for number in range(1, count + 1):
        name = "student" if number == count else f"{GENERATION}{number}"
        yield Trial(name, spec.students, taught_by, methods, spec.training.seed + number - 1)
        taught_by, methods = name, tuple(_among_twins(method) for method in spec.methods)


def _among_twins(method: Method) -> Method:
    """Return the method for a teacher that is an earlier student: its taps are the student's."""
    pairs = tuple(Pair(student=pair.student, teacher=pair.student) for pair in method.pairs)
    return method.at(pairs) if pairs else method
