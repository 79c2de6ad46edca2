"""Facts about architectures, data sets and model files, without torch."""

from kdcore.catalog.architectures import ARCHITECTURES, UnknownName, architecture
from kdcore.catalog.datasets import DATASETS, named_facts
from kdcore.catalog.facts import (
    ArchitectureFacts,
    DatasetFacts,
    LogitsFacts,
    ModelFacts,
    NamedDataset,
    NamedStartFacts,
    ProgramFacts,
    PublishedFacts,
    StartFacts,
    TapFacts,
)

__all__ = [
    "ARCHITECTURES",
    "DATASETS",
    "ArchitectureFacts",
    "DatasetFacts",
    "LogitsFacts",
    "ModelFacts",
    "NamedDataset",
    "NamedStartFacts",
    "ProgramFacts",
    "PublishedFacts",
    "StartFacts",
    "TapFacts",
    "UnknownName",
    "architecture",
    "named_facts",
]
