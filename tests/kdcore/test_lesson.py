import pytest
import torch

from kdcore.lesson import Batch

NOTHING = torch.empty(0)


@pytest.mark.parametrize(
    ("epoch", "epochs", "weight"), [(0, 20, 0.05), (9, 20, 0.5), (19, 20, 1), (20, 20, 1), (0, 0, 1)], ids=str
)
def test_warmed_up_rises_in_a_line_to_one_as_a_number_and_as_a_tensor(epoch, epochs, weight):
    assert Batch(NOTHING, NOTHING, NOTHING, epoch).warmed_up(epochs) == pytest.approx(weight)
    captured = Batch(NOTHING, NOTHING, NOTHING, torch.tensor(float(epoch))).warmed_up(epochs)
    assert isinstance(captured, torch.Tensor) and captured.item() == pytest.approx(weight)
