"""The job spec: its vocabulary, how a body is read, the rules between its fields, and its defaults spelled out."""

from kdcore.spec.fitting import fit, images_to_train_on
from kdcore.spec.known import Known
from kdcore.spec.methods import Kd, Method, Pair, Supervised
from kdcore.spec.reading import Partial, as_typed, parse, read
from kdcore.spec.resolving import preprocessing, resolve
from kdcore.spec.rules import Named, references
from kdcore.spec.vocabulary import (
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
    Preprocessing,
    RandomResizedCrop,
    Schedule,
    Sgd,
    Student,
    Teacher,
    Training,
    Unlabelled,
)

__all__ = [
    "AdamW",
    "Augmentation",
    "Cosine",
    "CropFlip",
    "Cutmix",
    "Dataset",
    "JobSpec",
    "Kd",
    "Known",
    "Method",
    "Mix",
    "Mixup",
    "Multistep",
    "Named",
    "NoAugmentation",
    "Optimizer",
    "Pair",
    "Partial",
    "Preprocessing",
    "RandomResizedCrop",
    "Schedule",
    "Sgd",
    "Student",
    "Supervised",
    "Teacher",
    "Training",
    "Unlabelled",
    "as_typed",
    "fit",
    "images_to_train_on",
    "parse",
    "preprocessing",
    "read",
    "references",
    "resolve",
]
