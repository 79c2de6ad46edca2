"""Programs from files: the kind is known from the bytes, and the program is compared with the data and tried."""

import zipfile
from itertools import islice
from pathlib import Path

from base.errors import TeacherMismatch
from base.file_kinds import HEAD_BYTES, ONNX, kind_of
from base.zip_files import members
from kdcore.catalog.facts import DatasetFacts, ProgramFacts
from kdcore.programs.onnx_program import OnnxProgram, RunFailed, open_onnx
from kdcore.programs.program import Program, TakesTooMuch, refuse_other_images, try_out
from kdcore.programs.pt2 import MOST_MEMBERS
from kdcore.programs.traced import open_traced

MOST_BYTES = 1 << 30
"""The memory that the trial of a program may take, beside the size of its file."""
ANY_SIDE = 64
"""Pixels, where a program takes any number of them."""


def is_program(path: Path) -> bool:
    """Return True for an ONNX model or a torch.export program, False for checkpoints and all else."""
    return is_onnx(path) or _is_traced(path)


def is_onnx(path: Path) -> bool:
    with path.open("rb") as file:
        return kind_of(file.read(HEAD_BYTES)) is ONNX


def _is_traced(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            found = islice(members(file.fileno()), MOST_MEMBERS)
            return any(one.filename.rpartition("/")[2] == "archive_format" for one in found)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def inspect(path: Path) -> ProgramFacts:
    """Return the facts of a program. Raises TeacherMismatch if it cannot be a teacher, also because it takes too much
    memory."""
    # onnxruntime and oneDNN copy weights to the layouts that they need.
    return open_program(path, most_bytes=MOST_BYTES + path.stat().st_size).facts


def open_program(path: Path, data: DatasetFacts | None = None, most_bytes: int | None = None) -> Program:
    """Read a program, compare it with the data, and try it on a few images of their size. `most_bytes`: the memory that
    this may take.

    Without `data` the images have the size that it was exported for, or `ANY_SIDE` if it takes any: only a run shows
    how much memory and time it takes.
    """
    program = open_onnx(path) if is_onnx(path) else open_traced(path)
    if data is not None:
        refuse_other_images(program.facts, data)
    height, width = program.facts.image_size if data is None else data.image_size
    if height is not None and width is not None:
        try_out(program, height, width, most_bytes)
        return program
    # Such images may be too small for it; whether those of a data set are is found with the data.
    try:
        try_out(program, height or ANY_SIDE, width or ANY_SIDE, most_bytes)
    except TakesTooMuch:
        raise
    except TeacherMismatch as error:
        if isinstance(program, OnnxProgram) and not isinstance(error, RunFailed):
            raise
    return program
