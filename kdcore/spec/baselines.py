"""The comparison of a job with an earlier one that is to be its baseline: the same student, trained alone; and the key
by which such a job is found."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from base.references import FILE
from base.text import STORED
from kdcore.catalog import DatasetFacts
from kdcore.spec.inputs import Dataset
from kdcore.spec.job import JobSpec
from kdcore.spec.methods.schemes import Supervised

DO_NOT_COUNT = ("checkpoint_every_s", "device", "threads", "kernels", "step", "overlap")
"""Fields of the training that do not change which student it makes, but for its rounding."""
MAY_DIFFER = ("checkpoint_every_s", "overlap")
"""Of these, the fields that do not change its rounding either: a student alone has no teacher beside it."""
NOT_RECORDED = "not recorded"
"""Stands for a field that the stored spec of a job lacks: the version that ran it did not have the field."""


@dataclass(frozen=True)
class Difference:
    """One field of a resolved spec, `training.epochs`, with its values in this job and in the other one."""

    field: str
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"{self.field} is {_text(self.here)} here and {_text(self.there)} there"


def alone(spec: JobSpec) -> JobSpec:
    """Return the supervised job that trains a spec's student alone: its baseline, as a job of its own."""
    return spec.model_copy(
        update={
            "method": Supervised(),
            "teacher": None,
            "assistants": (),
            "student": spec.students[0],
            "unlabelled": None,
            "temperature": None,
            "alpha": None,
            "beta": None,
            "baseline": "none",
        }
    )


def differences(spec: JobSpec, stored: Mapping[str, Any]) -> list[Difference]:
    """Return all fields in which the student that another job trained alone differs from this job's student alone.

    `spec` is resolved, of any method. `stored` is the resolved spec of the other job as it was stored: of a supervised
    job, or of one that trained its own baseline. Compared are network and normalisation, data set, labels' weight and
    recipe (seed and start included); names, scheduling, the device and the time between checkpoints are not.
    """
    mine = spec.as_json()
    # A baseline has only the labels' loss, with weight 1. A supervised job has an alpha of its own.
    supervised = JobSpec.model_validate(stored, context=STORED).scheme.kind == "alone"
    return [
        *_compare("student", _first(mine["student"]), _first(stored["student"])),
        # Options of the data that an earlier version did not have, and so did not record, were the defaults.
        *_compare("dataset", spec.dataset.resolved().model_dump(mode="json"), _dataset(stored)),
        *_compare("alpha", 1.0, stored["alpha"] if supervised else 1.0),
        *_compare("training", _that_count(mine), _that_count(stored)),
        *_compare("quantization.epochs", *(_aware_epochs(one) for one in (mine, stored))),
    ]


def baseline_key(resolved: Mapping[str, Any]) -> str | None:
    """Return the digest (sha256, hex) of all in a resolved spec that decides the bits of its student alone: network and
    start, data, recipe, and how it is computed as far as the spec says. None if a file is named by its path."""
    student, dataset = _first(resolved["student"]), _dataset(resolved)
    if not isinstance(student, Mapping):  # As the first versions wrote it.
        return None
    if any((name or "").startswith(FILE) for name in (student.get("checkpoint"), dataset["source"])):
        return None
    decides = {
        "student": student,
        "dataset": dataset,
        "training": {
            **_that_count(resolved),
            **{name: resolved["training"].get(name) for name in DO_NOT_COUNT if name not in MAY_DIFFER},
        },
        "quantization": _aware_epochs(resolved),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def offered_key(resolved: Mapping[str, Any]) -> str | None:
    """Return the key of the student alone that a job of this resolved spec trains; None if it trains none."""
    if resolved.get("baseline") == "train":
        return baseline_key(resolved)
    method = resolved.get("method")
    is_supervised = isinstance(method, Mapping) and method.get("name") == Supervised().name
    return baseline_key(resolved) if is_supervised and resolved.get("alpha") == 1 else None


def data_differences(facts: DatasetFacts, stored: Mapping[str, Any]) -> list[Difference]:
    """Return how the images differ from those of another job on the same file, which an earlier version may have read
    in another way. `stored` are the data set's facts in that job's report."""
    counted = {"num_classes", "train", "test", "validation"} if facts.kind != "named" else set()
    here = facts.model_dump(include=counted)
    return [
        Difference(f"dataset.{name}", value, there)
        for name, value in here.items()
        if (there := stored.get(name, 0 if name == "validation" else value)) != value
    ]


def _first(student: Any) -> Any:
    return student[0] if isinstance(student, list) else student


def _dataset(stored: Mapping[str, Any]) -> dict[str, Any]:
    return Dataset.model_validate(stored["dataset"], context=STORED).resolved().model_dump(mode="json")


def _that_count(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a spec's training that count. Boxes that are cut from pictures of the images' own size are
    those of versions without another size. Of a cache, only the number of views that students see counts."""
    training = {name: value for name, value in spec["training"].items() if name not in DO_NOT_COUNT}
    if not isinstance(training.get("teacher_cache"), dict):
        training.pop("teacher_cache", None)
    augmentation = training.get("augmentation")
    if augmentation and augmentation.get("store_size") in (
        None,
        Dataset.model_validate(spec["dataset"], context=STORED).image_size,
    ):
        training["augmentation"] = {name: value for name, value in augmentation.items() if name != "store_size"}
    return training


def _aware_epochs(spec: Mapping[str, Any]) -> int | None:
    """Return the number of epochs that train for int8. Those of versions without them had none."""
    asked = spec.get("quantization")
    return asked["epochs"] if asked and asked["aware"] else None


def _compare(field: str, here: Any, there: Any) -> Iterator[Difference]:
    """Yield the fields that differ. Of two objects with different names, only the names are given."""
    if not isinstance(here, dict) or not isinstance(there, dict):
        if here != there:
            yield Difference(field, here, there)
    elif here.get("name") != there.get("name"):
        yield Difference(field, here["name"], there["name"])
    else:
        for name in dict.fromkeys((*here, *there)):
            value = here.get(name)
            # A field that is new and not set means what its absence meant.
            yield from _compare(f"{field}.{name}", value, there.get(name, value and NOT_RECORDED))


def _text(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else value
    return "none" if name is None else str(name)
