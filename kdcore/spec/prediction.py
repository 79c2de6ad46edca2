"""The spec of a prediction: a finished job's teacher and students on one image of anybody's."""

from typing import Literal

from pydantic import Field

from kdcore.catalog import DatasetFacts
from kdcore.spec.inputs import Reference
from kdcore.spec.job import JobSpec
from kdcore.spec.kinds import KindSpec

TOP = 5
"""The classes that an answer names for each model, the most probable first."""


class PredictionSpec(KindSpec):
    """What `python -m kdcore run` accepts beside a `JobSpec` to run a job's models on one image."""

    kind: Literal["prediction"] = Field(default="prediction", description="Tells it from the spec of a distillation.")
    image: Reference = Field(description="The file of a picture: PNG, JPEG, WebP, BMP, GIF, PPM or TIFF.")
    job: JobSpec = Field(description="The job's resolved spec: its teacher, its student, and how its images are read.")
    dataset: DatasetFacts = Field(description="The facts of the job's data set, as its report has them.")
    student: Reference = Field(description="The job's student.safetensors.")
    alone: Reference | None = Field(default=None, description="The same student without a teacher, if the job has one.")
