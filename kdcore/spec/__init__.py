"""The job spec: its classes, how a body is read, the rules between its fields, and how its defaults are resolved."""

from kdcore.spec.doubts import dataset_warnings, model_warnings, spec_warnings
from kdcore.spec.fitting import Known, fit
from kdcore.spec.job import (
    AdamW,
    Augmentation,
    Cosine,
    CropFlip,
    Cutmix,
    Dataset,
    JobSpec,
    Mix,
    Mixup,
    Multistep,
    NoAugmentation,
    Optimizer,
    RandomResizedCrop,
    Schedule,
    Sgd,
    Student,
    Teacher,
    Training,
    Unlabelled,
)
from kdcore.spec.methods import METHODS, Method, MethodFacts, Options
from kdcore.spec.plan import GIVEN, Stage, Trial, numbered, trials
from kdcore.spec.reading import as_typed, parse, read
from kdcore.spec.resolving import preprocessing, resolve
from kdcore.spec.rules import (
    each_assistant,
    each_method,
    each_student,
    each_teacher,
    not_the_own_images,
)
from kdcore.spec.vocabulary import Pair

__all__ = [
    "GIVEN",
    "METHODS",
    "AdamW",
    "Augmentation",
    "Cosine",
    "CropFlip",
    "Cutmix",
    "Dataset",
    "JobSpec",
    "Known",
    "Method",
    "MethodFacts",
    "Mix",
    "Mixup",
    "Multistep",
    "NoAugmentation",
    "Optimizer",
    "Options",
    "Pair",
    "RandomResizedCrop",
    "Schedule",
    "Sgd",
    "Stage",
    "Student",
    "Teacher",
    "Training",
    "Trial",
    "Unlabelled",
    "as_typed",
    "dataset_warnings",
    "each_assistant",
    "each_method",
    "each_student",
    "each_teacher",
    "fit",
    "model_warnings",
    "not_the_own_images",
    "numbered",
    "parse",
    "preprocessing",
    "read",
    "resolve",
    "spec_warnings",
    "trials",
]
