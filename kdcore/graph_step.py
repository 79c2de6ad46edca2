"""One training step as a CUDA graph: captured once, then replayed, so that the host launches it by one call.

A thin network's step is some 400 small kernels, which the host launches more slowly than a GPU runs them. A graph has
them all. It fixes shapes, places in memory and every number that the host gave, so that what differs from step to step
is a tensor that is overwritten in place before a replay: the batch, its epoch, and the learning rate.

    steps 1 to 3   eagerly, on the stream of the capture: libraries set themselves up, optimizers make their state
    step 4         captured, which runs nothing, and replayed
    steps after    replayed

They are all steps of the training. Generators of the device go on in a replay as they do eagerly, so that a resumed
training, which begins with three eager steps again, has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from base.errors import SpecInvalid
from kdcore.lesson import Batch

EAGER_STEPS = 3
Figures = dict[str, Tensor]


class Graph(Protocol):
    """What is captured and replayed. A CUDA graph; in tests, a record of operators."""

    def run(self, work: Callable[[], Figures]) -> Figures:
        """Run work eagerly, where a capture would have it."""

    def capture(self, work: Callable[[], Figures]) -> None:
        """Keep the device's part of some work, which need not run."""

    def replay(self) -> Figures:
        """Run the work that was captured, and return its figures, which the next replay leaves as they are."""


class GraphStep:
    """Steps that are captured and replayed. Their work gets a batch, always in the same tensors, and returns scalars by
    name. It is given with each step, and not kept, so that a training that is over is freed at once."""

    def __init__(self, graph: Callable[[], Graph] | None = None) -> None:
        self._make_graph = graph or CudaGraph
        self._graph: Graph | None = None
        self._held: Batch | None = None
        self._steps = 0

    def __call__(self, work: Callable[[Batch], Figures], batch: Batch) -> Figures:
        """Make a step. Raises SpecInvalid where it cannot be captured."""
        if self._graph is None:
            self._graph = self._make_graph()
        held = self._held = _overwritten(self._held or _of_its_shapes(batch), batch)
        self._steps += 1
        if self._steps <= EAGER_STEPS:
            return self._graph.run(lambda: work(held))
        if self._steps == EAGER_STEPS + 1:
            self._graph.capture(lambda: work(held))
        return self._graph.replay()


class CudaGraph:
    """A CUDA graph, with the stream on which it is captured."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph = torch.cuda.CUDAGraph()
        self.names: list[str] = []
        self.values: Tensor | None = None

    def run(self, work: Callable[[], Figures]) -> Figures:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            figures = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return figures

    def capture(self, work: Callable[[], Figures]) -> None:
        try:
            # Only of this thread: others may decode images and copy them meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                figures = work()
                self.names, self.values = list(figures), torch.stack([one.float() for one in figures.values()])
        except RuntimeError as error:
            # The end of a capture that failed raises an error of its own, in place of the first.
            text = str(error.__context__ or error).splitlines()[0]
            raise SpecInvalid(
                f"training.step is 'graph', and this job's step cannot be captured: {text}",
                hint="set training.step to 'eager'",
            ) from error

    def replay(self) -> Figures:
        assert self.values is not None, "a graph is captured first"
        self.graph.replay()
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


def _of_its_shapes(batch: Batch) -> Batch:
    """Return a batch of the same shapes in tensors of its own, with its epoch as one of them."""
    return replace(
        batch,
        inputs=torch.empty_like(batch.inputs),
        labels=torch.empty_like(batch.labels),
        index=torch.empty_like(batch.index),
        epoch=batch.inputs.new_empty((), dtype=torch.float32),
        view_ids=None if batch.view_ids is None else torch.empty_like(batch.view_ids),
        sized={side: torch.empty_like(views) for side, views in batch.sized.items()},
    )


def _overwritten(held: Batch, batch: Batch) -> Batch:
    """Return the first batch with the values of the second in its tensors."""
    for own, given in zip(_tensors(held), _tensors(batch), strict=True):
        assert own.shape == given.shape, "all batches of a stage are complete"
        own.copy_(given)
    assert isinstance(held.epoch, Tensor), "a batch that is held has its epoch as a tensor"
    held.epoch.fill_(batch.epoch)
    return held


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (batch.inputs, batch.labels, batch.index)
    if batch.view_ids is not None:
        yield batch.view_ids
    yield from (batch.sized[side] for side in sorted(batch.sized))
