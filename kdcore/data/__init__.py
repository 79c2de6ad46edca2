"""Images to train on: read from files, decoded once, and augmented reproducibly."""

from kdcore.data.loading import inspect, load, load_unlabelled

__all__ = ["inspect", "load", "load_unlabelled"]
