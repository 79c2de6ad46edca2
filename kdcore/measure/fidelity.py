"""How far a student answers as its teacher does, and where both err: figures from logits on test images.

Shapes: n images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from base.wire import ConfusedPair, Confusion, ExampleView, Fidelity, SimilarClasses, WorstClass
from kdcore.measure.calibration import parts

LEAST_LOG = -69.0
"""Logarithms of probabilities are not counted below this, about 1e-30: a program may give a class none at all."""
MATRIX_CLASSES = 50
"""The most classes of which a confusion matrix is given as a whole."""
LARGEST = 50
"""The most pairs of classes of which it is given how often one is taken for the other."""
WORST = 10
"""The most classes that are given as those of the lowest accuracy."""
EXAMPLES = 4
"""The most images that are given of each of these."""
SIMILAR = 20
"""The most pairs of classes that are given as similar."""
DIGITS = 4
"""Figures that there is one of for each class are rounded to so many digits, so that a report of many stays small."""


def kl_n(teacher_nK: Tensor, model_nK: Tensor) -> Tensor:
    """Return KL(teacher ‖ model) of each image at temperature 1, in nats: Σ_k p_k (log p_k - log q_k), float64 n."""
    sums = []
    for teacher, model in zip(parts(teacher_nK), parts(model_nK), strict=True):
        log_p = teacher.double().log_softmax(1).clamp(min=LEAST_LOG)
        log_q = model.double().log_softmax(1).clamp(min=LEAST_LOG)
        sums.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(sums)


def fidelity(model_nK: Tensor, teacher_nK: Tensor, labels_n: Tensor, classes: int) -> Fidelity:
    """Return how far a model answers as the teacher does."""
    theirs_n = teacher_nK.argmax(1)
    agrees_n, errs_n = model_nK.argmax(1) == theirs_n, theirs_n != labels_n
    return Fidelity(
        agreement=agrees_n.double().mean().item(),
        kl=max(0.0, kl_n(teacher_nK, model_nK).mean().item()),
        where_teacher_errs=agrees_n[errs_n].double().mean().item() if errs_n.any() else None,
        per_class=by_class(agrees_n, labels_n, classes),
    )


def by_class(true_n: Tensor, labels_n: Tensor, classes: int) -> list[float | None]:
    """Return the share of images for which something is true, of each class; None for a class without images."""
    counts = torch.bincount(labels_n, minlength=classes).tolist()
    true = torch.bincount(labels_n[true_n], minlength=classes).tolist()
    return [round(part / count, DIGITS) if count else None for part, count in zip(true, counts, strict=True)]


def confusion(predicted_n: Tensor, labels_n: Tensor, classes: int) -> Confusion:
    """Return how often each class was taken for another. Of equally frequent errors the earlier classes come first."""
    matrix_KK = torch.bincount(labels_n * classes + predicted_n, minlength=classes * classes).reshape(classes, classes)
    wrong = matrix_KK.clone().fill_diagonal_(0).flatten()
    order = torch.sort(wrong, descending=True, stable=True).indices[:LARGEST]
    largest = [
        ConfusedPair(true=place // classes, predicted=place % classes, images=images)
        for place, images in zip(order.tolist(), wrong[order].tolist(), strict=True)
        if images
    ]
    return Confusion(matrix=matrix_KK.tolist() if classes <= MATRIX_CLASSES else None, largest=largest)


def worst_classes(
    predicted_n: Tensor,
    probability_n: Tensor,
    teacher_n: Tensor | None,
    labels_n: Tensor,
    names: Sequence[str],
) -> list[WorstClass]:
    """Return the classes with the lowest accuracy, those without an error left out, and images on which the model is
    wrong: the surest first. `probability_n`: that of the predicted class. `teacher_n`: what the teacher predicts."""
    right_n = predicted_n == labels_n
    accuracies = by_class(right_n, labels_n, len(names))
    order = sorted((accuracy, number) for number, accuracy in enumerate(accuracies) if accuracy is not None)
    found = []
    for accuracy, number in order[:WORST]:
        rows = torch.nonzero((labels_n == number) & ~right_n).flatten()
        if not len(rows):
            continue
        surest = torch.sort(probability_n[rows], descending=True, stable=True).indices[:EXAMPLES]
        examples = [
            ExampleView(
                image=row,
                predicted=int(predicted_n[row]),
                probability=round(float(probability_n[row]), DIGITS),
                teacher=None if teacher_n is None else int(teacher_n[row]),
            )
            for row in rows[surest].tolist()
        ]
        found.append(WorstClass(number=number, name=names[number], accuracy=accuracy, examples=examples))
    return found


def similar_classes(teacher_nK: Tensor, labels_n: Tensor, temperature: float, classes: int) -> list[SimilarClasses]:
    """Return the pairs of classes that the teacher finds most similar: ½ (m_ij + m_ji), where m_ij is the mean of its
    probability of j on images of i, at a temperature. Pairs of which a class has no images are left out."""
    sums_KK = torch.zeros(classes, classes, dtype=torch.float64)
    for part, labels in zip(parts(teacher_nK), parts(labels_n), strict=True):
        sums_KK.index_add_(0, labels, (part.double() / temperature).softmax(1))
    counts_K = torch.bincount(labels_n, minlength=classes)
    means_KK = sums_KK / counts_K.clamp(min=1).unsqueeze(1)
    both_KK = (means_KK + means_KK.T) / 2
    seen_K = counts_K > 0
    both_KK = both_KK.masked_fill(~(seen_K.unsqueeze(0) & seen_K.unsqueeze(1)), 0.0).triu(diagonal=1)
    order = torch.sort(both_KK.flatten(), descending=True, stable=True).indices[:SIMILAR]
    return [
        SimilarClasses(first=place // classes, second=place % classes, probability=round(probability, 6))
        for place, probability in zip(order.tolist(), both_KK.flatten()[order].tolist(), strict=True)
        if probability > 0
    ]
