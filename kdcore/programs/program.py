"""A program as a classifier's network: opened from its file, compared with the data, and tried."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from base.errors import TeacherMismatch
from base.files import sha256_of
from kdcore.catalog.facts import DatasetFacts, ProgramFacts
from kdcore.programs import pt2, signature
from kdcore.programs.graph import EVAL_FIRST, Graph

TRIED = 3
CLOSE = 1e-2
"""The largest allowed change of an image's logits with its batch, as a fraction of the largest logit: rounding differs
between kernels; batch norm in train mode changes more."""


class Program(nn.Module):
    """A frozen network from normalised images, float32 N × C × H × W, to logits, float32 N × K.

    It has no train mode and no gradients. It computes in the types that it was exported with, outside autocast,
    on the device that it is moved to.
    """

    def __init__(
        self,
        facts: ProgramFacts,
        graph: Graph,
        images: str,
        own: Sequence[signature.Own],
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__()
        self.facts = facts
        self._graph, self._images, self._memory_format = graph, images, memory_format
        # Some names of a graph are not allowed as names of a module's attributes.
        self._places = {one.name: f"tensor_{at}" for at, one in enumerate(own)}
        # Tied weights, one tensor under two names, stay one parameter: counted once, moved once.
        parameters: dict[int, nn.Parameter] = {}
        for one in own:
            if one.is_parameter:
                parameter = parameters.setdefault(id(one.tensor), nn.Parameter(one.tensor, requires_grad=False))
                self.register_parameter(self._places[one.name], parameter)
            else:
                self.register_buffer(self._places[one.name], one.tensor)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        values = {name: getattr(self, place) for name, place in self._places.items()}
        values[self._images] = images_NCHW.float().contiguous(memory_format=self._memory_format)
        with torch.no_grad(), torch.autocast(images_NCHW.device.type, enabled=False):
            logits_NK: Tensor = self._graph.run(values, images_NCHW.device)[0]
        if logits_NK.shape != (len(images_NCHW), self.facts.num_classes):
            shape = signature.format_sizes(logits_NK.shape)
            raise TeacherMismatch(f"the program answers {len(images_NCHW)} images with {shape} numbers")
        return logits_NK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Program":
        """Move the weights with their strides: views in the graph depend on the layout that it was traced with."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.stride() == tensor.stride():
                return new
            as_traced = torch.empty_strided(tensor.shape, tensor.stride(), dtype=new.dtype, device=new.device)
            return as_traced.copy_(new)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def inspect(path: Path) -> ProgramFacts:
    """Return the facts of a program. Raises TeacherMismatch if it cannot be a teacher."""
    return open_program(path).facts


def open_program(path: Path, data: DatasetFacts | None = None) -> Program:
    """Read a program, compare it with the data, and try it on a few images of their size.

    Without `data` the images have the size that it was exported for; a program for any size is not tried then.
    """
    contents = pt2.read(path)
    with pt2.reading():
        images, own = signature.inputs(contents)
        shape = signature.shape(contents, images, signature.logits(contents))
        graph = Graph.of(contents.model["graph_module"]["graph"])
    parameters = {id(one.tensor): one.tensor.numel() for one in own if one.is_parameter}
    facts = ProgramFacts(
        num_classes=shape.classes,
        channels=shape.channels,
        parameters=sum(parameters.values()),
        bytes=path.stat().st_size,
        digest=f"sha256:{sha256_of(path)}",
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
        sizes = (
            f"{signature.format_sizes(facts.image_size)} pixels, the data has {signature.format_sizes(data.image_size)}"
        )
        raise TeacherMismatch(
            f"the program takes images of {sizes}",
            hint="bring the images to its size with dataset.image_size, or export it for any height and width",
        )


def _try(program: Program, height: int, width: int) -> None:
    """Raise TeacherMismatch unless the logits are finite and depend on the image alone."""
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
