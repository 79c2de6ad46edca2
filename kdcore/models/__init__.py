"""Untrained networks by name: built, built without memory, or inspected."""

from kdcore.models.inspection import inspect, inspect_taps
from kdcore.models.networks import NETWORKS, build, skeleton

__all__ = ["NETWORKS", "build", "inspect", "inspect_taps", "skeleton"]
