"""Registered teachers: a name for a checkpoint that was inspected."""

from store import tables
from store.registry import Entry, Registry


class Model(Entry):
    """`facts` are the engine's ModelFacts."""


_registry = Registry(tables.models, Model, "model", "mdl")

register = _registry.register
get = _registry.get
list_page = _registry.list_page
delete = _registry.delete
