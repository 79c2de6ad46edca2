"""Alembic's revisions, one per change of store/tables.py."""
