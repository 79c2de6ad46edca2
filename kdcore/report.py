"""The proof: teacher, student and the same student alone, measured on the same test images."""

from typing import Any

from torch import Tensor, nn

from kdcore.evaluate import Score, agreement, score
from kdcore.training import Trained


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def size_bytes(network: nn.Module) -> int:
    """Bytes of all that a checkpoint of the network holds, buffers included."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def of_teacher(architecture: str, network: nn.Module, logits_nK: Tensor, labels_n: Tensor) -> dict[str, Any]:
    return _row(architecture, network, score(logits_nK, labels_n))


def of_student(
    architecture: str,
    network: nn.Module,
    trained: Trained,
    best_nK: Tensor,
    last_nK: Tensor,
    labels_n: Tensor,
    teacher_nK: Tensor | None,
) -> dict[str, Any]:
    """The exported weights are those of the epoch that the held-out part chose; the last epoch stands beside it."""
    row = _row(architecture, network, score(best_nK, labels_n))
    row["agreement"] = None if teacher_nK is None else agreement(best_nK, teacher_nK)
    row["best"] = {"epoch": trained.best_epoch, "validation_accuracy": trained.best_accuracy}
    row["last"] = {"epoch": trained.epochs, "accuracy": score(last_nK, labels_n).accuracy}
    return row


def _row(architecture: str, network: nn.Module, measured: Score) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "parameters": parameters(network),
        "bytes": size_bytes(network),
        "accuracy": measured.accuracy,
        "accuracy_top5": measured.accuracy_top5,
        "loss": measured.loss,
        "agreement": None,
    }
