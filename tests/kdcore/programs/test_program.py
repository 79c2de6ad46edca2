"""What all programs share."""

import pytest
import torch
from torch import Tensor

from base.errors import TeacherMismatch
from kdcore.catalog.facts import ProgramFacts
from kdcore.programs.program import Program, are_probabilities, try_out

FACTS = ProgramFacts(num_classes=2, channels=1, parameters=0, bytes=0, image_size=(4, 4))


class Mean(Program):
    """The mean pixel as the first output, and what a test makes of it."""

    def __init__(self, changed) -> None:
        super().__init__(FACTS)
        self.changed = changed

    def outputs(self, images_NCHW: Tensor) -> Tensor:
        mean_N = images_NCHW.mean((1, 2, 3))
        return self.changed(torch.stack([mean_N, -mean_N], 1))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.25, 0.75], [1, 0]], True),
        ([[0.25, 0.7502]], True),
        ([[0.25, 0.76]], False),
        ([[1.5, -0.5]], False),
        ([[1.0], [1.0]], False),
    ],
    ids=["probabilities", "of half precision", "another sum", "negative", "one class"],
)
def test_are_probabilities(rows, expected):
    assert are_probabilities(torch.tensor(rows)) is expected


def test_try_out_notes_probabilities_and_their_logarithm_is_returned():
    program = Mean(lambda outputs: outputs.softmax(1))
    images = torch.full((1, 1, 4, 4), 0.5)
    try_out(program, 4, 4)
    assert program.facts.outputs == "probabilities"
    assert torch.allclose(program(images), torch.tensor([[0.5, -0.5]]).log_softmax(1))


def test_try_out_refuses_outputs_that_depend_on_the_place_in_the_batch():
    with pytest.raises(TeacherMismatch, match="depend on the batch"):
        try_out(Mean(lambda outputs: outputs + torch.arange(len(outputs)).view(-1, 1)), 4, 4)


def test_program_refuses_outputs_of_another_shape():
    with pytest.raises(TeacherMismatch, match="answers 3 images with 3 x 1 numbers"):
        Mean(lambda outputs: outputs[:, :1])(torch.zeros(3, 1, 4, 4))
