"""Teachers that are programs: any network that torch.export can write down, run as the graph that it became.

    open_program   a network that answers normalised images with logits, and what is known about it
    inspect        only what is known

A file comes from anybody. It is read (`archive`), held against what a teacher has to be (`signature`), and run
(`graph`) by calls to a list of operators (`operators`); it can make nothing else happen.
"""

from pathlib import Path

import torch

from base.errors import TeacherMismatch
from base.files import sha256
from kdcore.catalog.facts import DatasetFacts, ProgramFacts
from kdcore.programs import archive, signature
from kdcore.programs.graph import EVAL_FIRST, Graph
from kdcore.programs.network import Program

__all__ = ["Program", "inspect", "open_program"]

TRIED = 3
CLOSE = 1e-2
"""How much an image's logits may change with the batch around it, as a part of the largest: other kernels round
otherwise, batch norm in train mode does more."""


def inspect(path: Path) -> ProgramFacts:
    """What is known about a program. Raises TeacherMismatch where it cannot teach, and says why."""
    return open_program(path).facts


def open_program(path: Path, data: DatasetFacts | None = None) -> Program:
    """Read a program, hold it against the images that it is to see, and try it on a few of their size.

    Without `data` that size is the one it was exported for; a program that takes any is not tried then.
    """
    contents = archive.read(path)
    with archive.reading():
        images, own = signature.inputs(contents)
        shape = signature.shape(contents, images, signature.logits(contents))
        graph = Graph.of(contents.model["graph_module"]["graph"])
    parameters = {id(one.tensor): one.tensor.numel() for one in own if one.is_parameter}
    facts = ProgramFacts(
        num_classes=shape.classes,
        channels=shape.channels,
        parameters=sum(parameters.values()),
        bytes=path.stat().st_size,
        digest=f"sha256:{sha256(path)}",
        image_size=(shape.height, shape.width),
        batch=shape.largest_batch or "any",
    )
    program = Program(facts, graph, images, own, shape.memory_format)
    if data is not None:
        _refuse_other_images(facts, data)
    height, width = facts.image_size if data is None else data.image_size
    if height is not None and width is not None:
        _try(program, height, width)
    return program


def _refuse_other_images(facts: ProgramFacts, data: DatasetFacts) -> None:
    if facts.channels != data.channels:
        raise TeacherMismatch(f"the program takes images of {facts.channels} channels, the data has {data.channels}")
    if not facts.takes(data.image_size):
        sizes = f"{signature.told(facts.image_size)} pixels, the data has {signature.told(data.image_size)}"
        raise TeacherMismatch(
            f"the program takes images of {sizes}",
            hint="bring the images to its size with dataset.image_size, or export it for any height and width",
        )


def _try(program: Program, height: int, width: int) -> None:
    """An image's logits must be numbers, and must depend on nothing but the image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TRIED, program.facts.channels, height, width, generator=generator)
    try:
        together, alone = program(images), program(images[:1])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherMismatch(f"the program fails on images of {height} x {width} pixels: {first_line}") from error
    if not together.isfinite().all():
        raise TeacherMismatch("the program's logits are no numbers (NaN or infinite)")
    if not torch.allclose(together[:1], alone, rtol=0, atol=CLOSE * together.abs().max().item()):
        raise TeacherMismatch("the program's logits for an image depend on the batch around it", hint=EVAL_FIRST)
