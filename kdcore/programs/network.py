"""A program as a network, to be put where a classifier's network stands."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from base.errors import TeacherMismatch
from kdcore.catalog.facts import ProgramFacts
from kdcore.programs.graph import Graph
from kdcore.programs.signature import Own, told


class Program(nn.Module):
    """Normalised images, float32 N × C × H × W, to logits, float32 N × K.

    Frozen: there is no train mode, and there are no gradients. It computes in the types that it was exported with,
    outside autocast, on the device that it is moved to.
    """

    def __init__(
        self,
        facts: ProgramFacts,
        graph: Graph,
        images: str,
        own: Sequence[Own],
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__()
        self.facts = facts
        self._graph, self._images, self._memory_format = graph, images, memory_format
        # Names in a graph need not be names that a module allows.
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
            raise TeacherMismatch(f"the program answers {len(images_NCHW)} images with {told(logits_NK.shape)} numbers")
        return logits_NK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Program":
        """Weights move, but keep their strides: views in the graph rely on the layout that it was traced with."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.stride() == tensor.stride():
                return moved
            as_traced = torch.empty_strided(tensor.shape, tensor.stride(), dtype=moved.dtype, device=moved.device)
            return as_traced.copy_(moved)

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self
