"""The warnings about a spec and its files that are known before anything runs: at registration, at submit."""

from collections.abc import Iterator

from base.warning import WarningItem
from kdcore.catalog import DatasetFacts, ModelFacts
from kdcore.spec.fitting import Known
from kdcore.spec.job import JobSpec
from kdcore.spec.rules import each_teacher


def model_warnings(facts: ModelFacts) -> Iterator[WarningItem]:
    """Yield what is doubtful about a model that is registered."""
    if facts.mean is None or facts.std is None:
        yield WarningItem(
            "normalization_guessed",
            "/preprocessing",
            "the file does not say how its images were normalized: jobs will use the mean and std of their data set",
            "register it with the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
        )


def dataset_warnings(facts: DatasetFacts, pointer: str = "/blob") -> Iterator[WarningItem]:
    """Yield what is doubtful about a data set; `pointer` is its place in the registration or the spec."""
    if facts.test_carved:
        yield WarningItem(
            "test_split_carved",
            pointer,
            f"the data has no test split: {facts.test} of its {facts.train + facts.test} images were set aside for it",
            "add a folder test/<class>/ (or arrays x_test and y_test) with images that are never trained on",
        )


def spec_warnings(spec: JobSpec, known: Known) -> list[WarningItem]:
    """Return what is doubtful about a spec as the client sent it, before `resolve` writes out its defaults."""
    warnings: list[WarningItem] = []
    if known.dataset is not None:
        warnings += dataset_warnings(known.dataset, "/dataset")
    for pointer, teacher in each_teacher(vars(spec)):
        facts = known.teachers.get(pointer)
        if facts is not None and teacher.preprocessing is None and (facts.mean is None or facts.std is None):
            warnings.append(
                WarningItem(
                    "normalization_guessed",
                    f"{pointer}/preprocessing",
                    "nothing says how the teacher's images were normalized: it gets the mean and std of the data set",
                    "give the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
                )
            )
    return warnings
