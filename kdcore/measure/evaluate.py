"""The measurement of a model on images: its logits, accuracy, loss and size."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from base.errors import SpecFaults, TeacherMismatch, WarningRefused
from base.files import write_text
from base.references import FILE
from base.warning import refused_if_strict
from kdcore import data, device, models, programs, weights
from kdcore.catalog.facts import ProgramFacts
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.measure import chance, kept
from kdcore.programs import Program
from kdcore.protocol import EXIT_STOPPED
from kdcore.spec import (
    Dataset,
    EvaluationSpec,
    Teacher,
    Training,
    evaluation_warnings,
    fit_evaluation,
    resolve_evaluation,
)
from kdcore.spec.classes import class_order, outputs_of_map
from kdcore.weights import TeacherFile

if TYPE_CHECKING:
    from kdcore.prepare import Workspace

LARGEST_BATCH = 256
BATCH_PIXELS = 2**20
"""Height x width of all images in a batch: 256 images up to 64 pixels wide, 64 of 128, 20 of 224."""


@dataclass(frozen=True)
class Score:
    """Fractions of 1 over the split; the loss is cross-entropy in nats at temperature 1."""

    accuracy: float
    accuracy_top5: float
    loss: float


def batch_size(height: int, width: int) -> int:
    """Return the number of images in a batch of an evaluation, so that it needs less memory than a training step."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // (height * width)))


@torch.no_grad()
def logits_on(classifier: Classifier, images: Images, on_images: Callable[[int], None] | None = None) -> Tensor:
    """Return the logits of every image in order, on the CPU: n × K, in float32, as for the exported file.

    A folded teacher computes them as it teaches. It gets the images at its own size, and keeps its mode and precision.
    `on_images` is called after each batch with its number of images.
    """
    images = images.at(classifier.image_size)
    was_training, was_bf16 = classifier.training, classifier.bf16
    classifier.train(False)
    classifier.bf16 = False
    parts, size = [], batch_size(*images.pixels.shape[2:])
    for at in range(0, len(images), size):
        pixels = images.pixels[at : at + size].to(classifier.mean.device)
        parts.append(classifier(pixels).logits)
        if on_images is not None:
            on_images(len(pixels))
    classifier.train(was_training)
    classifier.bf16 = was_bf16
    return torch.cat(parts).cpu()


def score(logits_nK: Tensor, labels_n: Tensor) -> Score:
    labels_n = labels_n.cpu()
    top = logits_nK.topk(min(5, logits_nK.shape[1]), dim=1).indices
    # Of equal logits (a ReLU or a dead network gives them) argmax takes the first, as everywhere; topk takes any.
    right = logits_nK.argmax(1) == labels_n
    return Score(
        accuracy=right.double().mean().item(),
        accuracy_top5=(right | (top == labels_n.unsqueeze(1)).any(1)).double().mean().item(),
        loss=cross_entropy(logits_nK.double(), labels_n).item(),
    )


def agreement(logits_nK: Tensor, teacher_nK: Tensor) -> float:
    """Return the fraction of images whose most likely class is the same for both."""
    return (logits_nK.argmax(1) == teacher_nK.argmax(1)).double().mean().item()


def mean_of(logits_knK: Sequence[Tensor]) -> Tensor:
    """Return the log of the mean probabilities of several models: n × K."""
    return torch.stack([logits_nK.double().softmax(1) for logits_nK in logits_knK]).mean(0).log().float()


def paired_p(one_nK: Tensor, other_nK: Tensor, labels_n: Tensor) -> float:
    """Return the two-sided p-value of McNemar's exact test: that two models are right equally often on these images.

    Only images on which one model is right and the other one wrong count. If the models are equally good, each of
    these m images is a fair coin: p = 2 · P(Binomial(m, 1/2) ≤ the smaller count), at most 1.
    """
    labels_n = labels_n.cpu()
    one, other = (logits_nK.argmax(1) == labels_n for logits_nK in (one_nK, other_nK))
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return min(1.0, 2 * chance.sign_test(max(only_one, only_other), min(only_one, only_other)))


def parameters(network: nn.Module) -> int:
    own: int = sum(parameter.numel() for parameter in network.parameters())
    return own + sum(facts.parameters for facts in _elsewhere(network))


def _elsewhere(network: nn.Module) -> list[ProgramFacts]:
    """Return the facts of the network's programs whose weights PyTorch does not hold."""
    return [one.facts for one in network.modules() if isinstance(one, Program) and not one.holds_tensors]


def size_bytes(network: nn.Module) -> int:
    """Return the bytes of all tensors in a checkpoint of the network, buffers included; shared tensors count once. Of a
    program whose weights PyTorch does not hold, they are those of its file."""
    tensors = {(value.data_ptr(), value.shape): value for value in network.state_dict().values()}
    own: int = sum(value.numel() * value.element_size() for value in tensors.values())
    return own + sum(facts.bytes for facts in _elsewhere(network))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of the fraction `correct / total` (Wilson 1927, JASA 22(158)).

    Unlike the normal approximation, it is meaningful for few images and near 0 and 1. Raises ValueError without images.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is no fraction")
    return chance.wilson(correct / total, total)


def per_class(logits_nK: Tensor, labels_n: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, accuracy and test images of each class, in the order of classes; a class without images has None."""
    labels_n, classes = labels_n.cpu(), logits_nK.shape[1]
    totals = torch.bincount(labels_n, minlength=classes).tolist()
    rights = torch.bincount(labels_n[logits_nK.argmax(1) == labels_n], minlength=classes).tolist()
    return [
        {"name": name, "accuracy": right / total if total else None, "test_samples": total}
        for name, right, total in zip(class_names, rights, totals, strict=True)
    ]


def evaluate_checkpoint(path: Path, architecture: str | None, dataset: Dataset, workspace: Workspace) -> dict[str, Any]:
    """Return the figures of the checkpoint at `path` on all test images; see `run_evaluation`.

    Images are normalised by the checkpoint's mean and std, if it has them, or else by the data's own.
    """
    model = Teacher(checkpoint=f"{FILE}{path}", architecture=architecture)
    return _measured(EvaluationSpec(model=model, dataset=dataset), workspace)


def run_evaluation(spec: EvaluationSpec, workspace: Workspace) -> dict[str, Any]:
    """Run a job of the kind `evaluation`. Returns its report, which is also in `report.json`.

    Raises an EngineError if it fails. A stop ends the process: an evaluation is short, so it saves no checkpoint and
    starts again.
    """
    started = time.monotonic()
    report = _measured(spec, workspace)
    report["seconds"] = round(time.monotonic() - started, 3)
    report["timings"] = {activity: round(seconds, 3) for activity, seconds in workspace.seconds.items()}
    workspace.lines.phase("exporting")
    written = write_text(workspace.out / "report.json", json.dumps(report, indent=2) + "\n")
    workspace.announce("artifact", written, name="report.json", media_type="application/json")
    return report


def _measured(spec: EvaluationSpec, workspace: Workspace) -> dict[str, Any]:
    workspace.lines.phase("preparing")
    threads, why = device.choose_threads()
    torch.set_num_threads(threads)
    source, path = spec.dataset.source, workspace.file(spec.model.program or spec.model.checkpoint or "")
    with workspace.timing("data"):
        loaded = data.load(spec.dataset, workspace.source(source), workspace.cache, workspace.room())
    facts = loaded.facts
    file: Program | TeacherFile
    if spec.model.program is not None or programs.is_program(path):
        file = programs.open_program(path, facts)
    else:
        choice = weights.chosen(spec.model, workspace.known)
        file = weights.open_teacher(path, spec.model.architecture, facts.channels, choice)
    if faults := fit_evaluation(spec, file.facts, facts):
        raise TeacherMismatch(str(SpecFaults(faults)))
    for warning in evaluation_warnings(spec, file.facts, facts):
        workspace.warn(warning)
    if refused := refused_if_strict(workspace.warnings) if spec.strict else []:
        raise WarningRefused("; ".join(f"{one.code}: {one.message}" for one in refused), refused[0].hint)
    spec = resolve_evaluation(spec, file.facts, facts)
    assert spec.model.preprocessing is not None, "resolve_evaluation() gives the model its normalisation"
    device.make_exact(0)
    if isinstance(file, Program):
        network: nn.Module = file
    else:
        network = models.build(file.facts.architecture, file.facts.num_classes, file.facts.channels)
        weights.load_into(network, file.state, "the checkpoint")
    mean, std = spec.model.preprocessing.mean, spec.model.preprocessing.std
    classifier = Classifier(
        network, mean, std, order=class_order(spec.model.class_names, facts), outputs=outputs_of_map(spec.model, facts)
    )

    workspace.lines.phase("evaluating")
    labels = loaded.test.labels
    where = device.choose(Training())
    computing = device.Computing("cuda" if where.type == "cuda" else "cpu", bf16=False, threads=threads, why=why)
    classifier = classifier.to(where)
    keep = kept.Kept(workspace.cache, workspace.room(), spec.dataset, facts, computing)
    with workspace.timing("evaluating"):
        logits_nK = keep.logits(
            file.facts.architecture,
            classifier,
            loaded.test,
            lambda: logits_with_progress(classifier, loaded.test, workspace),
        )
    return {
        **figures(file.facts.architecture, network, logits_nK, labels),
        "per_class": per_class(logits_nK, labels, facts.class_names),
        "preprocessing": spec.model.preprocessing.model_dump(mode="json"),
        "dataset": facts.model_dump(mode="json"),
        "computing": {**computing.as_json(), "allocator": device.allocator()},
        "kept_logits": keep.report(),
        "warnings": [warning.as_dict() for warning in workspace.warnings],
    }


def figures(architecture: str, network: nn.Module, logits_nK: Tensor, labels_n: Tensor) -> dict[str, Any]:
    """Return one model in figures: its size, and how it answers all test images."""
    measured, images = score(logits_nK, labels_n), len(labels_n)
    return {
        "architecture": architecture,
        "parameters": parameters(network),
        "bytes": size_bytes(network),
        "accuracy": measured.accuracy,
        "interval": list(wilson(round(measured.accuracy * images), images)),
        "accuracy_top5": measured.accuracy_top5,
        "loss": measured.loss,
        "test_samples": images,
    }


def logits_with_progress(classifier: Classifier, images: Images, workspace: Workspace) -> Tensor:
    """Return `logits_on` of all images: after each batch the progress is reported, and a stop is obeyed."""
    began, total, done = time.monotonic(), len(images), 0

    def on_images(count: int) -> None:
        nonlocal done
        done += count
        if workspace.stop_requested:
            sys.exit(EXIT_STOPPED)
        if done == total or workspace.lines.progress_is_due():
            left_s = (time.monotonic() - began) / done * (total - done)
            percent, seconds = round(100 * done / total, 2), round(left_s, 1)
            workspace.lines.progress(step=done, total_steps=total, percent=percent, seconds_remaining=seconds)

    return logits_on(classifier, images, on_images)


def write_images(
    path: Path, dataset: Dataset, workspace: Workspace, split: Literal["train", "test"] = "test"
) -> dict[str, Any]:
    """Write a split of a data set to a safetensors file, in the order of its rows, as a network gets it before its
    normalization.

    `images`: N x channels x height x width, uint8; `labels`: N, int64. Returns the number of images, and the names of
    the classes in the order of labels.
    """
    loaded = data.load(dataset, workspace.source(dataset.source), workspace.cache, workspace.room())
    images = loaded.train if split == "train" else loaded.test
    save_file({"images": images.pixels[:].contiguous(), "labels": images.labels.contiguous()}, path)
    return {f"{split}_samples": len(images), "class_names": list(loaded.class_names)}
