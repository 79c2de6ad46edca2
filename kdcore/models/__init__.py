"""Networks by name, untrained: built, outlined without memory, or looked at."""

from kdcore.models.inspection import inspect, inspect_taps
from kdcore.models.networks import NETWORKS, build, skeleton

__all__ = ["NETWORKS", "build", "inspect", "inspect_taps", "skeleton"]
