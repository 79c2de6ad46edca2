"""Measure a finished checkpoint on a data set's test images, as its report claims to have done."""

from pathlib import Path
from typing import Any

from base.errors import TeacherMismatch
from kdcore import data, evaluate, models, weights
from kdcore.classifier import Classifier
from kdcore.parts import Place
from kdcore.report import parameters
from kdcore.spec import Dataset


def measure(path: Path, architecture: str | None, dataset: str, place: Place) -> dict[str, Any]:
    """Accuracy (fractions of 1), loss in nats and parameter count of the checkpoint at `path`.

    Normalised as the checkpoint says, or by the data's own mean and std where it says nothing.
    """
    loaded = data.load(Dataset(source=dataset), place.source(dataset), place.cache)
    file = weights.open_teacher(path, architecture, loaded.facts.channels)
    if file.facts.num_classes != loaded.facts.num_classes:
        given, needed = file.facts.num_classes, loaded.facts.num_classes
        raise TeacherMismatch(f"the checkpoint tells {given} classes apart, the data set has {needed}")
    network = models.build(file.facts.architecture, file.facts.num_classes, file.facts.channels)
    weights.load_into(network, file.state, str(path))
    mean, std = file.facts.mean or loaded.facts.mean, file.facts.std or loaded.facts.std
    score = evaluate.score(evaluate.logits_on(Classifier(network, mean, std), loaded.test), loaded.test.labels)
    return {
        "architecture": file.facts.architecture,
        "parameters": parameters(network),
        "accuracy": score.accuracy,
        "accuracy_top5": score.accuracy_top5,
        "loss": score.loss,
        "test_samples": len(loaded.test),
    }
