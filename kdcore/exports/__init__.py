"""The files of a student that a job delivers, each measured after it was written.

`shipping.py` writes, measures and announces them, and reads top to bottom; a module for each format is behind the
interface `Exporter`.
"""

from kdcore.exports.exporter import CannotExport, Deliverable, Exporter, FileRow
from kdcore.exports.int8 import int8_table
from kdcore.exports.shipping import EXPORTERS, make, ship, write_students

__all__ = [
    "EXPORTERS",
    "CannotExport",
    "Deliverable",
    "Exporter",
    "FileRow",
    "int8_table",
    "make",
    "ship",
    "write_students",
]
