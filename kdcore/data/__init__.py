"""Images to train on: read from files, decoded once, and augmented reproducibly."""

from kdcore.data.loading import enlarges, inspect, load, load_unlabelled, with_sizes

__all__ = ["enlarges", "inspect", "load", "load_unlabelled", "with_sizes"]
