"""The spec of an evaluation: a job that measures a model on the test images of a data set, and trains nothing."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from base.errors import Fault, SpecFaults
from base.warning import WarningItem
from kdcore.catalog import DatasetFacts, ModelFacts, ProgramFacts
from kdcore.spec.doubts import dataset_warnings, loading_warnings, normalization_warnings, teacher_warnings
from kdcore.spec.fitting import Known, fit
from kdcore.spec.inputs import Dataset, Preprocessing, Teacher
from kdcore.spec.kinds import KindSpec
from kdcore.spec.resolving import loaded_as, named_classes, preprocessing


class EvaluationSpec(KindSpec):
    """What a job of the kind `evaluation` runs, and `python -m kdcore run` accepts beside a `JobSpec`."""

    kind: Literal["evaluation"] = Field(default="evaluation", description="Tells it from the spec of a distillation.")
    model: Teacher = Field(description="The model: a checkpoint, with its architecture and preprocessing.")
    dataset: Dataset = Field(description="The model is measured on all its test images.")


def parse_evaluation(body: dict[str, Any], *, stored: bool = False) -> EvaluationSpec:
    """Return the spec. Raises SpecFaults with every fault. `stored`: an earlier version may have accepted it."""
    spec = EvaluationSpec.parse(body, stored=stored)
    if spec.model.logits is not None:
        text = "an evaluation runs a network on images, and a file of logits has none"
        raise SpecFaults([Fault("/model/logits", text, "not_allowed", "a checkpoint or a program", spec.model.logits)])
    return spec


def fit_evaluation(spec: EvaluationSpec, model: ModelFacts, dataset: DatasetFacts) -> list[Fault]:
    """Return the faults of a spec, given the facts of its model and its data set; pointers are those of the spec."""
    if spec.model.image_size is not None:
        text = "an evaluation shows the images at the data set's size"
        return [Fault("/model/image_size", text, "unused", "dataset.image_size", spec.model.image_size)]
    if faults := spec.metric_faults():
        return faults
    height, width = dataset.image_size
    shown = spec.model.model_copy(update={"image_size": height if height == width else None})
    faults = fit({"teacher": shown}, Known(dataset=dataset, teachers={"/teacher": model}))
    return [Fault(_own_pointer(fault.pointer), fault.message, fault.code, fault.allowed, fault.got) for fault in faults]


def _own_pointer(pointer: str) -> str:
    """Return a pointer of a job's spec as one of an evaluation's: its model is the teacher there, and has no size."""
    return "/dataset/image_size" if pointer == "/teacher/image_size" else pointer.replace("/teacher", "/model", 1)


def evaluation_warnings(spec: EvaluationSpec, model: ModelFacts, dataset: DatasetFacts) -> Iterator[WarningItem]:
    """Yield what is doubtful about a spec, before `resolve_evaluation` writes out its defaults."""
    yield from dataset_warnings(dataset, "/dataset", spec.dataset)
    yield from loading_warnings(model.loading, model.architecture, "/model", "/model/checkpoint")
    if spec.model.preprocessing is None:
        yield from normalization_warnings(model)
    yield from teacher_warnings(spec.model, model, dataset, "/model", dataset.image_size)


def resolve_evaluation(spec: EvaluationSpec, model: ModelFacts, dataset: DatasetFacts) -> EvaluationSpec:
    """Return the spec with every default written out."""
    own: Preprocessing = spec.model.preprocessing or preprocessing(model, dataset)
    architecture = None if isinstance(model, ProgramFacts) else model.architecture
    update: dict[str, Any] = {"architecture": architecture, "preprocessing": own, **loaded_as(model)}
    update |= named_classes(spec.model, model, dataset)
    return spec.model_copy(update={"model": spec.model.model_copy(update=update), "dataset": spec.dataset.resolved()})
