"""Images to train on: read from files, decoded once, and augmented reproducibly."""

from kdcore.data.loading import inspect, load, load_unlabelled
from kdcore.data.thumbnails import Thumbnails

__all__ = ["Thumbnails", "inspect", "load", "load_unlabelled"]
