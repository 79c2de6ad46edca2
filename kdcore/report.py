"""The proof: teacher, student and the same student alone, measured on the same test images."""

from typing import Any

from torch import Tensor, nn

from kdcore.evaluate import agreement, score
from kdcore.training import Outcome


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def size_bytes(network: nn.Module) -> int:
    """Bytes of all that a checkpoint of the network holds, buffers included; what two parts share counts once."""
    held = {(value.data_ptr(), value.shape): value for value in network.state_dict().values()}
    return sum(value.numel() * value.element_size() for value in held.values())


def of_model(
    architecture: str, network: nn.Module, logits_nK: Tensor, labels_n: Tensor, teacher_nK: Tensor | None = None
) -> dict[str, Any]:
    """One row: the teacher's, or (held against the teacher) that of a student trained elsewhere."""
    return {
        "architecture": architecture,
        "parameters": parameters(network),
        "bytes": size_bytes(network),
        **of_logits(logits_nK, labels_n, teacher_nK),
    }


def of_logits(logits_nK: Tensor, labels_n: Tensor, teacher_nK: Tensor | None = None) -> dict[str, Any]:
    """What of a row the answers tell."""
    measured = score(logits_nK, labels_n)
    return {
        "accuracy": measured.accuracy,
        "accuracy_top5": measured.accuracy_top5,
        "loss": measured.loss,
        "agreement": None if teacher_nK is None else agreement(logits_nK, teacher_nK),
    }


def of_training(outcome: Outcome, last_nK: Tensor, labels_n: Tensor) -> dict[str, Any]:
    """What a row adds for a model that this job trained: its figures are those of the epoch that the held-out part
    chose, and the last epoch stands beside it."""
    return {
        "best": {"epoch": outcome.best_epoch, "validation_accuracy": outcome.best_accuracy},
        "last": {"epoch": outcome.epochs, "accuracy": score(last_nK, labels_n).accuracy},
    }
