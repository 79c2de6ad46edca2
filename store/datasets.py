"""Registered data sets: a name for an archive or arrays that were inspected."""

from store import tables
from store.registry import Entry, Registry


class Dataset(Entry):
    """`facts` are the engine's DatasetFacts."""


_registry = Registry(tables.datasets, Dataset, "data set", "ds")

register = _registry.register
get = _registry.get
list_page = _registry.list_page
delete = _registry.delete
