"""Images to train on: read from files, decoded, and augmented reproducibly."""

from kdcore.data.loading import enlarges, inspect, load, load_unlabelled, with_sizes
from kdcore.data.streaming import Room

__all__ = ["Room", "enlarges", "inspect", "load", "load_unlabelled", "with_sizes"]
