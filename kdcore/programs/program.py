"""What all programs share: a frozen network whose weights and operators are in one file, tried before it teaches.

Shapes: N batch, C channels, H × W pixels, K classes.
"""

from typing import NoReturn

import torch
from torch import Tensor, nn

from base.errors import EngineError, TeacherMismatch
from base.memory import peak_bytes
from kdcore.catalog.facts import DatasetFacts, ProgramFacts

TRIED = 3
CLOSE = 1e-2
"""The largest allowed change of an image's outputs with its batch, as a fraction of the largest output: rounding
differs between kernels; batch norm in train mode changes more."""
SUMS_TO_ONE = 1e-3
"""The largest distance from 1 of a row's sum that is still one of probabilities; half precision rounds by 5e-4."""
EVAL_FIRST = "call model.eval() before torch.export.export"
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class Program(nn.Module):
    """A frozen network from normalised images, float32 N × C × H × W, to logits, float32 N × K.

    It has no train mode and no gradients. It computes in the types of its file, outside autocast. Probabilities, which
    a network with a softmax at its end returns, become logits: log p, which differs from the logits by a number that
    is the same for all classes of an image, so that every softmax of it is the same. A probability that is rounded to
    0 becomes the smallest normal number of float32, e^-87.
    """

    eval_first = EVAL_FIRST
    """How to write the file again, so that no image changes the outputs of another one."""

    holds_tensors = True
    """True if its weights are tensors of this module."""

    def __init__(self, facts: ProgramFacts) -> None:
        super().__init__()
        self.facts = facts

    def forward(self, images_NCHW: Tensor) -> Tensor:
        outputs_NK = self.outputs(images_NCHW)
        if outputs_NK.shape != (len(images_NCHW), self.facts.num_classes):
            self.wrong_shape(len(images_NCHW), outputs_NK.shape)
        if self.facts.outputs == "probabilities":
            return outputs_NK.clamp(min=torch.finfo(torch.float32).tiny).log()
        return outputs_NK

    def outputs(self, images_NCHW: Tensor) -> Tensor:
        """Return what the file's graph returns: N × K."""
        raise NotImplementedError

    @staticmethod
    def wrong_shape(count: int, shape: tuple[int, ...]) -> NoReturn:
        numbers = " x ".join(map(str, shape))
        raise TeacherMismatch(f"the program answers {count} images with {numbers} numbers")


def refuse_other_images(facts: ProgramFacts, data: DatasetFacts) -> None:
    """Raise TeacherMismatch unless the program takes the data's images."""
    if facts.channels != data.channels:
        raise TeacherMismatch(f"the program takes images of {facts.channels} channels, the data has {data.channels}")
    if not facts.takes(data.image_size):
        own = " x ".join("any" if side is None else str(side) for side in facts.image_size)
        given = " x ".join(map(str, data.image_size))
        raise TeacherMismatch(
            f"the program takes images of {own} pixels, the data has {given}",
            hint="bring the images to its size with dataset.image_size, or export it for any height and width",
        )


class TakesTooMuch(TeacherMismatch):
    """A program takes more memory for a few images than any teacher needs."""


def try_out(program: Program, height: int, width: int, most_bytes: int | None = None) -> None:
    """Raise TeacherMismatch unless the outputs are finite and depend on the image alone; note if they are
    probabilities. With `most_bytes`, raise TakesTooMuch if this process's memory has to grow by more for that."""
    before = peak_bytes()
    try:
        _try_out(program, height, width)
    finally:
        taken = peak_bytes() - before
        if most_bytes is not None and taken > most_bytes:
            raise TakesTooMuch(
                f"the program takes {taken / 1e9:.1f} GB of memory for {TRIED} images of {height} x {width} pixels; "
                f"the most is {most_bytes / 1e9:.1f} GB",
                hint="look for a tensor in its graph that is larger than the network needs",
            )


def _try_out(program: Program, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    try:
        images = torch.randn(TRIED, program.facts.channels, height, width, generator=generator)
        together, alone = program(images), program(images[:1])
        # One place further: also in a fixed batch of two, each image has another place in its batch.
        moved = program(images.roll(1, 0)).roll(-1, 0)
    except EngineError:
        raise
    except _FAILURES as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherMismatch(f"the program fails on images of {height} x {width} pixels: {first_line}") from error
    if not together.isfinite().all():
        raise TeacherMismatch("the program's logits are no numbers (NaN or infinite)")
    far = CLOSE * together.abs().max().item()
    if not all(torch.allclose(together[: len(other)], other, rtol=0, atol=far) for other in (alone, moved)):
        raise TeacherMismatch(
            "the program's logits for an image depend on the batch around it", hint=program.eval_first
        )
    if are_probabilities(together):
        program.facts = program.facts.model_copy(update={"outputs": "probabilities"})


def are_probabilities(outputs_NK: Tensor) -> bool:
    """Return True if each row has no negative number and sums to 1. Logits of several images never do."""
    sums = outputs_NK.double().sum(1)
    return outputs_NK.shape[1] > 1 and bool((outputs_NK >= 0).all() and ((sums - 1).abs() < SUMS_TO_ONE).all())
