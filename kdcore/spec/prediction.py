"""The spec of a prediction: a finished job's teacher and students on one image of anybody's."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from base.errors import Fault, SpecFaults
from base.text import STORED
from kdcore.catalog import DatasetFacts
from kdcore.spec.job import JobSpec, Reference
from kdcore.spec.vocabulary import Vocabulary

TOP = 5
"""The classes that an answer names for each model, the most probable first."""


class PredictionSpec(Vocabulary):
    """What `python -m kdcore run` accepts beside a `JobSpec` to run a job's models on one image."""

    kind: Literal["prediction"] = Field(description="Tells it from the spec of a distillation.")
    image: Reference = Field(description="The file of a picture: PNG, JPEG, WebP, BMP, GIF, PPM or TIFF.")
    job: JobSpec = Field(description="The job's resolved spec: its teacher, its student, and how its images are read.")
    dataset: DatasetFacts = Field(description="The facts of the job's data set, as its report has them.")
    student: Reference = Field(description="The job's student.safetensors.")
    alone: Reference | None = Field(default=None, description="The same student without a teacher, if the job has one.")

    @property
    def method_name(self) -> str:
        return self.kind

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def parse_prediction(body: dict[str, Any]) -> PredictionSpec:
    """Return the spec. Raises SpecFaults with every fault. The job in it may be of an earlier version."""
    try:
        return PredictionSpec.model_validate(body, context=STORED)
    except ValidationError as error:
        faults = (
            Fault("".join(f"/{step}" for step in detail["loc"]), detail["msg"], detail["type"], got=detail["input"])
            for detail in error.errors(include_url=False)
        )
        raise SpecFaults(list(faults)) from error
