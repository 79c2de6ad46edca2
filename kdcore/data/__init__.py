"""Images to train on: read from files, decoded, and augmented reproducibly."""

from kdcore.data.loading import enlarges, inspect, load, load_unlabelled, with_sizes
from kdcore.data.streaming import Room
from kdcore.data.thumbnails import Thumbnails

__all__ = ["Room", "Thumbnails", "enlarges", "inspect", "load", "load_unlabelled", "with_sizes"]
