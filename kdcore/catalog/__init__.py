"""Torch-free facts: architectures, data sets, methods, and what an inspection can see."""

from kdcore.catalog.architectures import ARCHITECTURES, UnknownName, architecture
from kdcore.catalog.datasets import DATASETS, named_facts
from kdcore.catalog.facts import ArchitectureFacts, DatasetFacts, MethodFacts, ModelFacts, NamedDataset, TapFacts
from kdcore.catalog.methods import METHODS

__all__ = [
    "ARCHITECTURES",
    "DATASETS",
    "METHODS",
    "ArchitectureFacts",
    "DatasetFacts",
    "MethodFacts",
    "ModelFacts",
    "NamedDataset",
    "TapFacts",
    "UnknownName",
    "architecture",
    "named_facts",
]
