"""What the options of every method share: a name, a weight among others, and taps."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field

from kdcore.spec.base import Vocabulary

TapPath = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.-]+(@(in|nhwc|tokens))?$")]


class Pair(Vocabulary):
    """Where student and teacher are compared: module paths, `layer3` for an output, `fc@in` for an input."""

    student: TapPath
    teacher: TapPath


def _both(given: Any) -> Any:
    return {"student": given, "teacher": given} if isinstance(given, str) else given


Tap = Annotated[Pair, BeforeValidator(_both, json_schema_input_type=TapPath | Pair)]
"""A plain path stands for the same path on both sides."""

Taps = Annotated[tuple[Tap, ...], Field(min_length=1, max_length=16)]


Epochs = Annotated[int, Field(le=100_000)]


class Options(Vocabulary):
    """The options of a method."""

    name: str
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="Its share in a list of methods; beta, which multiplies the sum, is then 1 unless given. Default: "
        "the method's own beta (GET /v1/methods). A method that stands alone is weighed by the job's beta instead.",
    )

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Its taps, shallow to deep; none where it has none, or where they are still to be chosen."""
        tap, taps = getattr(self, "tap", None), getattr(self, "taps", None)
        return taps or ((tap,) if tap else ())

    def at(self, pairs: tuple[Pair, ...]) -> Self:
        """The same method with these taps."""
        update = {"taps": pairs} if "taps" in type(self).model_fields else {"tap": pairs[0]}
        return self.model_copy(update=update)


class OnLogits(Options):
    """The options of a method that compares logits."""

    standardize: bool = Field(
        default=False,
        description="Bring each sample's logits, the student's and the teacher's, to mean 0 and standard deviation 1 "
        "first (Sun et al., CVPR 2024, arXiv:2403.01427). Default: off, as in the method's own paper.",
    )


class OnEmbeddings(Options):
    """The options of a method that compares one vector for each image."""

    tap: Tap | None = Field(
        default=None, description="Where the vectors are read. Default: the classifiers' inputs, as the paper."
    )


class OnStages(Options):
    """The options of a method that compares maps at several depths."""

    taps: Taps | None = Field(
        default=None,
        description="Shallow to deep. Default: the ends of the stages, as CRD's code; where one network has fewer, "
        "they are matched from the deepest back.",
    )
