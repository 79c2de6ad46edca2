"""What could be looked up of all that a spec names."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts, UnknownName, architecture


@dataclass(frozen=True)
class Known:
    """Absent is what could not be found, or what only a download will tell."""

    dataset: DatasetFacts | None = None
    unlabelled: DatasetFacts | None = None
    teachers: Mapping[str, ModelFacts] = field(default_factory=dict)
    """By their pointer in the spec."""
    inspected: Mapping[str, ArchitectureFacts] = field(default_factory=dict)
    """Networks that only building could tell about, by name."""
    shapes: Mapping[tuple[str, str], list[int]] = field(default_factory=dict)
    """Of the taps that the spec names, without the batch, by architecture and path."""

    def network(self, name: str | None) -> ArchitectureFacts | None:
        """Facts of an architecture."""
        if name is None or name in self.inspected:
            return self.inspected.get(name or "")
        try:
            return architecture(name)
        except UnknownName:
            return None

    def is_mystery(self, network: ArchitectureFacts) -> bool:
        """Whether only building the network would tell its insides, and nobody has."""
        return network.source == "timm" and network.name not in self.inspected
