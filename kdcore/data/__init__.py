"""Images to train on: read from files, decoded, and augmented reproducibly."""

from kdcore.data.loading import inspect, load, load_unlabelled
from kdcore.data.streaming import Room

__all__ = ["Room", "inspect", "load", "load_unlabelled"]
