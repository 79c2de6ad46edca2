"""A torch.export program as a classifier's network. Its weights are PyTorch's, and its graph is run call by call."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from base.files import sha256_of
from kdcore.catalog.facts import ProgramFacts
from kdcore.programs import pt2, signature
from kdcore.programs.graph import Graph
from kdcore.programs.program import Program


class TracedProgram(Program):
    """A program of torch.export. It computes on the device that it is moved to."""

    def __init__(
        self,
        facts: ProgramFacts,
        graph: Graph,
        images: str,
        own: Sequence[signature.Own],
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__(facts)
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

    def outputs(self, images_NCHW: Tensor) -> Tensor:
        values = {name: getattr(self, place) for name, place in self._places.items()}
        values[self._images] = images_NCHW.float().contiguous(memory_format=self._memory_format)
        with torch.no_grad(), torch.autocast(images_NCHW.device.type, enabled=False):
            outputs_NK: Tensor = self._graph.run(values, images_NCHW.device)[0]
        return outputs_NK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TracedProgram":
        """Move the weights with their strides: views in the graph depend on the layout that it was traced with."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.stride() == tensor.stride():
                return new
            as_traced = torch.empty_strided(tensor.shape, tensor.stride(), dtype=new.dtype, device=new.device)
            return as_traced.copy_(new)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def open_traced(path: Path) -> TracedProgram:
    """Read a .pt2 file. Raises TeacherMismatch if it cannot be a teacher."""
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
    return TracedProgram(facts, graph, images, own, shape.memory_format)
