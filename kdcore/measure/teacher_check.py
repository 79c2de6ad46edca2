"""The teacher is measured before anything is trained: its accuracy on test images, and what looks wrong about it.

    check            the phase: the teacher's figures, as a line and as warnings
    sample           a bounded part of the test images, the same number of each class as far as possible
    class_order      is a confusion matrix a permutation, and of which order?
    normalization    does another usual normalization, or BGR, raise the accuracy much?

Every finding needs a paired test: the same images, answered in two ways. A weak teacher is not a wrong one.

Shapes: n images of the sample, K classes, k members.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from base.errors import TeacherMismatch
from base.warning import WarningItem
from kdcore.catalog import DatasetFacts
from kdcore.classifier import Classifier
from kdcore.data.images import Images
from kdcore.measure import chance, evaluate
from kdcore.measure.kept import Kept, part_of
from kdcore.protocol import Lines
from kdcore.spec import JobSpec, each_teacher
from kdcore.spec.classes import map_example
from kdcore.spec.measured import teacher_check_key

if TYPE_CHECKING:
    from kdcore.prepare import PreparedJob, Workspace
    from kdcore.stored_logits import StoredLogits

log = logging.getLogger("kdcore")

IMAGES = 1000
"""The largest sample."""
FEWEST = 128
"""The sample of large images or networks; of small ones it is as large as the same work allows."""
WORK = IMAGES * 64 * 64
"""Pixels of the sample, times the network's size in units of `SMALL_NETWORK`, if there are more than `FEWEST`."""
SMALL_NETWORK = 25_000_000
TRAINING_IMAGES = 10_000
"""The largest sample of training images on which logits in a file are measured."""
TRIED_IMAGES = 256
"""The largest sample on which other normalizations are tried; a quarter of it selects the one to be confirmed."""
SELECTING = 32
"""The smallest number of images for that selection."""
GAIN = 0.05
"""The smallest rise of the accuracy that is worth a warning."""
DROPPED = 0.25
"""The mean probability of outputs that no class has, above which a warning says it."""
FITS = 0.25
"""The smallest accuracy under another order, on the classes that it moves, at which that order is said to fit."""
SPREAD = 0.8
"""The smallest part of the classes that it moves which an order must make right, of those that chance would reach."""
MOST_CLASSES = 200
"""With more classes no order without a name is looked for: a sample has too few images of each."""

Order = npt.NDArray[np.int64]
"""For each class of the data, the output that answers it: int64 K."""


@dataclass(frozen=True)
class Normalization:
    """A usual normalization of pixels in 0..1; `bgr` if the network takes the channels in reverse."""

    title: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


class Known(Protocol):
    """Returns kept logits of a teacher, or those that `measure` returns: `Kept.logits` of its architecture."""

    def __call__(
        self,
        model: Classifier,
        images: Images,
        measure: Callable[[], Tensor],
        part: Sequence[Any] | None = None,
        rows: int | None = None,
        /,
    ) -> Tensor: ...


def _unknown(
    _model: Classifier, _images: Images, measure: Callable[[], Tensor], _part: object = None, _rows: object = None, /
) -> Tensor:
    """Measure now."""
    return measure()


def check(spec: JobSpec, job: PreparedJob, workspace: Workspace, keep: Kept) -> None:
    """Measure the job's teacher, unless the service knows the result already; emit the result, and warn.

    `spec` is the spec as the engine got it: the service derives the same key from it. Raises TeacherMismatch if an
    output is not finite.
    """
    key = teacher_check_key(spec.as_json())
    result, known = None, workspace.known.teacher_check
    if known is not None and key is not None and known.get("key") == key:
        result = {name: known[name] for name in ("accuracy", "interval", "images", "test_samples", "warnings")}
        result["dropped"] = known.get("dropped")  # Earlier versions did not measure it.
        log.info("the teacher was measured by an earlier job")
    workspace.lines.phase("checking_teacher")
    if job.stored is not None and job.stored.of_test_images() is None:
        _check_on_training_images(job, job.stored, workspace)
        return
    if not job.teacher_answers:
        _require_finite_sample(job)
        log.info("the teacher has other classes than the data: its accuracy cannot be measured")
        return
    if result is None:
        result = measure(job, keep)
    low, high = result["interval"]
    log.info(
        "the teacher is right on %.1f %% of %d of the %d test images (95 %% interval: %.1f to %.1f %%)",
        *(100 * result["accuracy"], result["images"], result["test_samples"], 100 * low, 100 * high),
    )
    workspace.lines.emit("teacher_check", key=key, **result)
    for warning in result["warnings"]:
        log.warning("%s: %s", warning["code"], warning["message"])
        workspace.warn(WarningItem(**warning))


def measure(job: PreparedJob, keep: Kept | None = None) -> dict[str, Any]:
    """Return the figures of the teacher on the sample, and the warnings about each member. With `keep` its logits are
    taken from there, as far as an earlier job has measured them."""
    assert job.teacher is not None, "only a job with a teacher is checked"
    if job.stored is not None:
        return _measure_stored(job, job.stored)
    members, facts = job.teacher.members, job.data.facts
    rows = sample(job.data.test.labels, facts.num_classes, affordable(facts.image_size, members))
    images = job.data.test.take(rows)
    shares = _shares(job.data.test.labels, images.labels, facts.num_classes)
    logits_knK: list[Tensor] = []
    warnings: list[WarningItem] = []
    dropped: list[float] = []
    part = part_of("test", len(job.data.test), rows)
    for (pointer, spec), member in zip(each_teacher({"teacher": job.spec.teacher}), members, strict=True):
        known = _unknown if keep is None else partial(keep.logits, spec.architecture or "program")
        # A sample of all test images is what the report measures later.
        logits_nK, share = answers(member, images, known, None if len(rows) == len(job.data.test) else part)
        _require_finite(logits_nK, member, pointer)
        if share is not None:
            dropped.append(share)
            warnings += _dropped_warnings(share, pointer, len(images))
        if len(members) > 1:
            log.info("teacher %s: %.1f %%", pointer, 100 * _accuracy(logits_nK, images.labels, shares))
        warnings += findings(member, images, logits_nK, facts, shares, pointer, known, part)
        logits_knK.append(logits_nK)
    accuracy = _accuracy(job.teacher.combined(logits_knK), images.labels, shares)
    return {
        "accuracy": accuracy,
        "interval": list(chance.wilson(accuracy, _effective(shares))),
        "images": len(images),
        "test_samples": len(job.data.test),
        "dropped": max(dropped, default=None),
        "warnings": [warning.as_dict() for warning in warnings],
    }


def _measure_stored(job: PreparedJob, teacher: StoredLogits) -> dict[str, Any]:
    """Return the figures of logits in a file on all test images: they cost nothing."""
    logits_nK, labels = teacher.of_test_images(), job.data.test.labels.cpu()
    assert logits_nK is not None, "logits of training images alone are measured on these"
    accuracy = _accuracy(logits_nK, labels, torch.full((len(labels),), 1 / len(labels), dtype=torch.float64))
    return {
        "accuracy": accuracy,
        "interval": list(chance.wilson(accuracy, len(labels))),
        "images": len(labels),
        "test_samples": len(labels),
        "dropped": None,
        "warnings": [warning.as_dict() for warning in _stored_findings(job, logits_nK, labels, "test")],
    }


def _check_on_training_images(job: PreparedJob, teacher: StoredLogits, workspace: Workspace) -> None:
    """Measure logits in a file that has none of test images. There is no figure on test images to report."""
    logits_nK, labels = on_training_images(job, teacher)
    accuracy = evaluate.score(logits_nK, labels).accuracy
    log.info("the teacher is right on %.1f %% of %d training images", 100 * accuracy, len(labels))
    for warning in _stored_findings(job, logits_nK, labels, "training"):
        log.warning("%s: %s", warning.code, warning.message)
        workspace.warn(warning)


def on_training_images(job: PreparedJob, teacher: StoredLogits) -> tuple[Tensor, Tensor]:
    """Return logits in a file for a sample of the training images as they are, n × K, and their labels."""
    labels = job.data.train.labels.cpu()
    rows = sample(labels, job.data.facts.num_classes, TRAINING_IMAGES)
    return teacher.of_rows(rows), labels[rows]


def _stored_findings(job: PreparedJob, logits_nK: Tensor, labels_n: Tensor, split: str) -> list[WarningItem]:
    """Return what looks wrong about logits in a file: their columns, or their rows, are in another order."""
    names, answers_n = job.data.facts.class_names, logits_nK.argmax(1)
    found: list[WarningItem] = []
    order = class_order(labels_n.numpy(), answers_n.numpy(), names)
    if order is not None:
        outputs = [names[at] for at in np.argsort(order.order)]
        text = (
            f"the columns of logits are in another order than the data set's classes: they fit the {order.title}. "
            f"{_percent(order.accuracy)} of {len(labels_n)} {split} images are right in that order, "
            f"{_percent(order.before)} in the data's"
        )
        hint = f"send the columns in the order {_listed(names, 20)}; they seem to be {_listed(outputs, 20)}"
        found.append(WarningItem("class_order_wrong", "/teacher/logits", text, hint))
    counts = torch.bincount(labels_n, minlength=len(names)).tolist()
    accuracy, level = float((answers_n == labels_n).double().mean()), chance.chance_level(counts)
    if chance.is_at_chance(accuracy, len(labels_n), level) or accuracy <= min(2 * level, level + GAIN):
        text = (
            f"the teacher's logits are right on {_percent(accuracy)} of {len(labels_n)} {split} images; guessing gives "
            f"{_percent(level)}"
        )
        hint = "rows must be in the order of the data set's: add labels to the file, which are compared"
        found.append(WarningItem("teacher_near_chance", "/teacher/logits", text, hint))
    return found


def answers(
    member: Classifier, images: Images, known: Known = _unknown, part: Sequence[Any] | None = None
) -> tuple[Tensor, float | None]:
    """Return the logits of the data's classes, n × K, and the mean probability of the outputs that no class has.

    None if the network's outputs are the data's classes, in whatever order. `part`: which images these are.
    """
    if member.merged is None:
        return known(member, images, partial(evaluate.logits_on, member, images), part), None
    whole = member.with_all_outputs()
    all_nR = known(whole, images, partial(evaluate.logits_on, whole, images), part)
    merged = member.merged[member.merged >= 0].cpu()
    kept = all_nR.double().softmax(1).index_select(1, merged).sum(1)
    logits_nK = member.of_classes(all_nR.to(member.merged.device)).cpu()
    return logits_nK, round(max(0.0, 1 - float(kept.mean())), 6)


def _dropped_warnings(share: float, pointer: str, images: int) -> list[WarningItem]:
    if not share > DROPPED:
        return []
    text = (
        f"{_who(pointer)} gives {_percent(share)} of its probability, on {images} test images, to classes that "
        "class_map leaves out: the rest says less than it knows, and may be wrong"
    )
    hint = "give each class of the data all outputs that mean it (a list); or a teacher of these classes"
    return [WarningItem("probability_dropped", f"{pointer}/class_map", text, hint)]


def findings(
    member: Classifier,
    images: Images,
    logits_nK: Tensor,
    data: DatasetFacts,
    shares: Tensor,
    pointer: str,
    known: Known = _unknown,
    part: Sequence[Any] = (),
) -> list[WarningItem]:
    """Return what looks wrong about one network. `shares`: the part of the accuracy that each image stands for; `part`:
    which images these are."""
    labels, answers = images.labels.cpu().numpy(), logits_nK.argmax(1).numpy()
    who = _who(pointer)
    accuracy = _accuracy(logits_nK, images.labels, shares)
    found: list[WarningItem] = []
    better = normalization(member, images, answers, data, known, part)
    order = class_order(labels, answers, data.class_names)
    if better is not None and (order is None or better.accuracy > order.accuracy - _lead(order)):
        found.append(_normalization_warning(better, who, pointer))  # Wrong pixels move whole classes, too.
    elif order is not None and member.merged is not None:
        found.append(_map_warning(order, member.merged, data.class_names, who, pointer, len(labels)))
    elif order is not None:
        own = order.order if member.order is None else member.order.cpu().numpy()[order.order]
        outputs = [data.class_names[at] for at in np.argsort(own)]
        assumed = outputs_of(member, data.class_names)
        found.append(_order_warning(order, outputs, assumed, who, pointer, len(labels)))
    by_class = torch.zeros(data.num_classes, dtype=shares.dtype).index_add(0, images.labels.cpu(), shares)
    level = max(float(by_class.max()), 1 / data.num_classes)
    if chance.is_at_chance(accuracy, _effective(shares), level) or accuracy <= min(2 * level, level + GAIN):
        text = f"{who} is right on {_percent(accuracy)} of {len(labels)} test images; guessing gives {_percent(level)}"
        hint = "see the other warnings" if found else "is it the right file, trained for these classes and images?"
        found.append(WarningItem("teacher_near_chance", pointer, text, hint))
    return found


# The sample


def affordable(image_size: tuple[int, int], members: Sequence[Classifier]) -> int:
    """Return the size of the sample: it depends on images and networks only, never on how fast a machine is.

    `image_size`: height and width of the data's images, which members get that have no size of their own.
    """
    height, width = image_size
    work = max(
        (member.image_size**2 if member.image_size is not None else height * width)
        * max(1.0, evaluate.parameters(member.network) / SMALL_NETWORK)
        for member in members
    )
    return min(IMAGES, max(FEWEST, int(WORK / work)))


def sample(labels_n: Tensor, classes: int, limit: int) -> Tensor:
    """Return rows of a split, rising: all if there are no more than `limit`, else as many of each class as possible.

    Which of a class is a function of the labels alone, and nothing is drawn from torch's own generator.
    """
    labels_n = labels_n.cpu()
    if len(labels_n) <= limit:
        return torch.arange(len(labels_n))
    shuffled = torch.randperm(len(labels_n), generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(shuffled)
    for label in range(classes):
        own = shuffled[labels_n[shuffled] == label]
        rank[own] = torch.arange(len(own))
    # The first of each class, then the second of each, and so on.
    return torch.argsort(rank * classes + labels_n)[:limit].sort().values


def _shares(all_labels: Tensor, labels_n: Tensor, classes: int) -> Tensor:
    """Return the part of the accuracy on all test images that each sampled image stands for: float64 n, sum 1."""
    whole = torch.bincount(all_labels.cpu(), minlength=classes).double()
    taken = torch.bincount(labels_n.cpu(), minlength=classes).double()
    # A class that the sample lacks, because there are more classes than places, is left out.
    whole = torch.where(taken > 0, whole, 0.0)
    return ((whole / whole.sum()) / taken.clamp(min=1))[labels_n.cpu()]


def _effective(shares: Tensor) -> float:
    """Return the number of equally weighted images that tell as much (Kish 1965)."""
    return 1 / float(shares.square().sum())


def _accuracy(logits_nK: Tensor, labels_n: Tensor, shares: Tensor) -> float:
    right = logits_nK.argmax(1) == labels_n.cpu()
    return round(min(1.0, float(shares[right].sum())), 12)  # The sum of n equal shares is 1 but for rounding.


def _who(pointer: str) -> str:
    """Return which teacher: its place in the spec says it, if there are several."""
    return "the teacher" if pointer == "/teacher" else f"the teacher {pointer}"


def _require_finite(logits_nK: Tensor, member: Classifier, pointer: str) -> None:
    bad = ~logits_nK.isfinite().all(1)
    if not bad.any():
        return
    what = "NaN" if logits_nK.isnan().any() else "infinite numbers"
    negative = [
        name
        for name, value in member.network.named_buffers()
        if name.endswith("running_var") and bool((value < 0).any())
    ]
    cause = f"its {negative[0]} holds negative variances; " if negative else ""
    raise TeacherMismatch(
        f"{_who(pointer)} answers {what} on {int(bad.sum())} of {len(bad)} images",
        hint=f"{cause}the file is damaged, or its mean and std are not those of its training",
    )


def _require_finite_sample(job: PreparedJob) -> None:
    """Raise TeacherMismatch if an output on the sample is not finite, of a teacher that is not measured otherwise."""
    assert job.teacher is not None, "only a job with a teacher is checked"
    facts = job.data.facts
    rows = sample(job.data.test.labels, facts.num_classes, affordable(facts.image_size, job.teacher.members))
    images = job.data.test.take(rows)
    for (pointer, _), member in zip(each_teacher({"teacher": job.spec.teacher}), job.teacher.members, strict=True):
        _require_finite(evaluate.logits_on(member, images), member, pointer)


def require_finite_in_training(job: PreparedJob, lines: Lines) -> None:
    """Raise TeacherMismatch if an output on the training images is not finite: the loss has diverged because of it.

    The check before the training sees a sample of the test images, and an image outside of it may be the only one.
    """
    if job.teacher is None or job.stored is not None:
        return
    for (pointer, _), member in zip(each_teacher({"teacher": job.spec.teacher}), job.teacher.members, strict=True):
        logits_nK = evaluate.logits_on(member, job.data.train, lambda count: lines.working(count, len(job.data.train)))
        _require_finite(logits_nK, member, pointer)


# The order of the classes


UNNAMED = "following order"


@dataclass(frozen=True)
class Fitting:
    """An order under which the answers are right, and the accuracy before and with it."""

    title: str
    order: Order
    before: float
    accuracy: float


def class_order(labels_n: Order, answers_n: Order, names: Sequence[str]) -> Fitting | None:
    """Return the order of classes that the answers fit much better than the data's own; None if there is none.

    Orders with a name are tested on all images. Any other is found on one half of them (the assignment of outputs to
    classes with the most right answers, Kuhn 1955) and confirmed on the other: the best of K! orders always gains on
    the images that selected it.
    """
    classes = len(names)
    before = float((answers_n == labels_n).mean())
    if classes < 2 or before > 1 - GAIN:
        return None
    fitting = []
    named = _named_orders(names)
    for title, order in named:
        if _fits(labels_n, answers_n, order, len(named)):
            accuracy = float((answers_n == order[labels_n]).mean())
            fitting.append(Fitting(title, order, before, accuracy))
    first = _first_half(labels_n)
    if classes <= MOST_CLASSES and first.sum() >= 2 * classes:
        counts_KK = np.zeros((classes, classes))
        np.add.at(counts_KK, (labels_n[first], answers_n[first]), 1.0)
        found = assignment(-(counts_KK + 0.5 * np.eye(classes)))  # Of equal ones, the one that moves least.
        if _fits(labels_n[~first], answers_n[~first], found, 1):
            fitting.append(Fitting(UNNAMED, found, before, float((answers_n == found[labels_n]).mean())))
    # An order with a name is the likelier cause, if it explains as much.
    return max(fitting, key=lambda one: one.accuracy - _lead(one), default=None)


def _lead(found: Fitting) -> float:
    """Return how much more than another cause an order must explain: one without a name is rarely the cause."""
    return GAIN if found.title == UNNAMED else 0.0


def outputs_of(member: Classifier, names: Sequence[str]) -> list[str]:
    """Return the class for which each output of the network is taken."""
    if member.order is None:
        return list(names)
    return [names[at] for at in torch.argsort(member.order).tolist()]


def _fits(labels_n: Order, answers_n: Order, order: Order, tests: int) -> bool:
    """Return True if the answers are certainly right in this order, where it differs from the data's.

    The images must say so, one by one, and the classes: a teacher that always answers the same, or that sees wrong
    pixels, is right more often in some other order too, but only for a few of its classes.
    """
    moved = order[labels_n] != labels_n
    if not moved.any():
        return False
    own, other = answers_n == labels_n, answers_n == order[labels_n]
    better, worse = int((other & ~own & moved).sum()), int((own & ~other & moved).sum())
    if chance.sign_test(better, worse) * tests > chance.CERTAIN / 10:
        return False
    accuracy = float(other[moved].mean())
    if accuracy < max(FITS, 3 * float(own[moved].mean())):
        return False
    gaining, losing, expected = 0, 0, 0.0
    for label in np.unique(labels_n[moved]):
        of_class = labels_n == label
        gain = int(other[of_class].sum()) - int(own[of_class].sum())
        gaining, losing = gaining + (gain > 0), losing + (gain < 0)
        # If right answers fall on all classes alike, so many classes have one at least.
        expected += 1 - (1 - accuracy) ** int(of_class.sum())
    return gaining >= SPREAD * expected and losing <= 0.1 * gaining


def _first_half(labels_n: Order) -> npt.NDArray[np.bool_]:
    """Return True for every second image of each class."""
    half = np.zeros(len(labels_n), dtype=np.bool_)
    for label in np.unique(labels_n):
        half[np.flatnonzero(labels_n == label)[::2]] = True
    return half


def _named_orders(names: Sequence[str]) -> list[tuple[str, Order]]:
    """Return the usual orders of class names that differ from the data's, each once.

    The data's own order is that of sorted folders, or of the numbers in an archive of arrays.
    """
    classes = len(names)
    by_name = {
        "natural order (1, 2, 10)": sorted(range(classes), key=lambda at: _natural(names[at])),
        "order by characters (1, 10, 2; capitals first)": sorted(range(classes), key=lambda at: names[at]),
        "order without regard to capitals": sorted(range(classes), key=lambda at: names[at].lower()),
        "reversed order": list(reversed(range(classes))),
    }
    # The list of a training names the class of each output; what is needed is the output of each class.
    orders = [(title, np.argsort(np.array(listed, dtype=np.int64))) for title, listed in by_name.items()]
    places = np.arange(classes, dtype=np.int64)
    orders.append(("order shifted up by one, as with a background class in front", (places + 1) % classes))
    orders.append(("order shifted down by one, as with labels that count from 1", (places - 1) % classes))
    different: list[tuple[str, Order]] = []
    for title, order in orders:
        if not any(np.array_equal(order, other) for other in (places, *(one for _, one in different))):
            different.append((title, order))
    return different


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares the numbers in a name as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.findall(r"\d+|\D+", name)]


def assignment(costs_KK: npt.NDArray[np.float64]) -> Order:
    """Return the column of each row in the one-to-one assignment of least total cost, in O(K³).

    The Hungarian method with potentials (Kuhn 1955; Jonker & Volgenant 1987: shortest augmenting paths).
    """
    size = len(costs_KK)
    row_potential, column_potential = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)  # By column, both from 1; 0 is the start of a path.
    for row in range(1, size + 1):
        row_of[0] = row
        column = 0
        shortest, came_from = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int64)
        visited = np.zeros(size + 1, dtype=np.bool_)
        while row_of[column] != 0:
            visited[column] = True
            at = row_of[column]
            reduced = costs_KK[at - 1] - row_potential[at] - column_potential[1:]
            nearer = ~visited[1:] & (reduced < shortest[1:])
            shortest[1:][nearer] = reduced[nearer]
            came_from[1:][nearer] = column
            following = 1 + int(np.argmin(np.where(visited[1:], np.inf, shortest[1:])))
            step = shortest[following]
            row_potential[row_of[visited]] += step
            column_potential[visited] -= step
            shortest[~visited] -= step
            column = following
        while column != 0:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    columns = np.empty(size, dtype=np.int64)
    columns[row_of[1:] - 1] = np.arange(size)
    return columns


def _order_warning(
    found: Fitting, outputs: Sequence[str], assumed: Sequence[str], who: str, pointer: str, images: int
) -> WarningItem:
    """`outputs`: the names of the teacher's outputs, in their order; `assumed`: those for which they are taken."""
    pairs = [
        f"output {at} is {own}" for at, (own, other) in enumerate(zip(outputs, assumed, strict=True)) if own != other
    ]
    return WarningItem(
        "class_order_wrong",
        f"{pointer}/class_names",
        f"{who} has its classes in another order than they are taken for: its answers fit the {found.title} "
        f"({_listed(pairs, 5)}). "
        f"{_percent(found.accuracy)} of {images} test images are right in that order, "
        f"{_percent(found.before)} in the data's",
        "register the model with its class_names, or give the teacher's class_names in the spec, in the order of its "
        f"outputs: {_listed(outputs, 20)}",
    )


def _map_warning(
    found: Fitting, merged_KM: Tensor, names: Sequence[str], who: str, pointer: str, images: int
) -> WarningItem:
    """`merged_KM`: the outputs by which each class is answered, filled up with -1."""
    outputs = [[place for place in row if place >= 0] for row in merged_KM.tolist()]
    right = {name: outputs[place] for name, place in zip(names, found.order.tolist(), strict=True)}
    moved = [f"{names[place]} answers {name}" for name, place in zip(names, found.order, strict=True)]
    moved = [text for text, at, place in zip(moved, range(len(names)), found.order, strict=True) if at != place]
    return WarningItem(
        "class_order_wrong",
        f"{pointer}/class_map",
        f"the outputs of {who} fit the classes in another order than class_map says: {found.title} (what is mapped to "
        f"{_listed(moved, 5)}). {_percent(found.accuracy)} of {images} test images are right in that order, "
        f"{_percent(found.before)} as they are mapped",
        f"the numbers of outputs that fit: {map_example(right)}",
    )


def _listed(words: Sequence[str], most: int) -> str:
    return ", ".join(words[:most]) + (f", … ({len(words)} in all)" if len(words) > most else "")


# The normalization


@dataclass(frozen=True)
class Better:
    """Another normalization, and the accuracy with it and before it on the same images."""

    normalization: Normalization
    accuracy: float
    before: float
    images: int


def normalization(
    member: Classifier,
    images: Images,
    answers_n: Order,
    data: DatasetFacts,
    known: Known = _unknown,
    part: Sequence[Any] = (),
) -> Better | None:
    """Return a usual normalization that certainly raises the accuracy by 5 points or more; None if there is none.

    Each is tried on a quarter of the images first; only the best is confirmed on all. `part`: which images these are.
    """
    rows = sample(images.labels, data.num_classes, TRIED_IMAGES)
    labels = images.labels.cpu()
    before = torch.from_numpy(answers_n)[rows] == labels[rows]
    if float(before.double().mean()) > 1 - GAIN:
        return None
    own = Normalization("its own", tuple(member.mean.flatten().tolist()), tuple(member.std.flatten().tolist()))
    candidates = [one for one in _usual(data) if not _same(one, own)]
    if data.channels == 3:  # First, because of equal ones the first is named, and this one changes least.
        candidates.insert(0, replace(own, title="BGR channels", bgr=True))
    few = sample(labels[rows], data.num_classes, max(SELECTING, len(rows) // 4))
    gains = [int(right.sum()) for right in _right(member, images, rows[few], candidates, known, part)]
    if max(gains) <= int(before[few].sum()):
        return None
    best = candidates[gains.index(max(gains))]
    (after,) = _right(member, images, rows, [best], known, part)
    better, worse = int((after & ~before).sum()), int((before & ~after).sum())
    accuracy, was = float(after.double().mean()), float(before.double().mean())
    level = chance.chance_level(torch.bincount(labels[rows], minlength=data.num_classes).tolist())
    if chance.is_at_chance(accuracy, len(rows), level):
        return None  # Below chance to chance: something else is wrong, such as the order of the classes.
    if accuracy - was < GAIN or chance.sign_test(better, worse) * len(candidates) > chance.CERTAIN:
        return None
    return Better(best, accuracy, was, len(rows))


def _usual(data: DatasetFacts) -> list[Normalization]:
    count, imagenet, byte = data.channels, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1 / 255
    found = [
        Normalization("the data's mean and std", tuple(data.mean), tuple(data.std)),
        Normalization("mean 0.5 and std 0.5", (0.5,) * count, (0.5,) * count),
        Normalization("pixels in 0..1", (0.0,) * count, (1.0,) * count),
        Normalization("pixels in 0..255", (0.0,) * count, (byte,) * count),
    ]
    if count == 3:
        found += [
            Normalization("ImageNet's mean and std", *imagenet),
            Normalization("CIFAR-10's mean and std", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            Normalization("CIFAR-100's mean and std", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            Normalization("BGR channels in 0..255 minus ImageNet's mean", imagenet[0][::-1], (byte,) * 3, bgr=True),
        ]
    elif count == 1:
        found.append(Normalization("MNIST's mean and std", (0.1307,), (0.3081,)))
    return found


def _same(one: Normalization, other: Normalization) -> bool:
    means = all(abs(a - b) < 0.01 for a, b in zip(one.mean, other.mean, strict=True))
    return means and one.bgr == other.bgr and all(0.95 < a / b < 1.05 for a, b in zip(one.std, other.std, strict=True))


def _right(
    member: Classifier,
    images: Images,
    rows: Tensor,
    under: Sequence[Normalization],
    known: Known,
    part: Sequence[Any],
) -> list[Tensor]:
    """Return whether each of these images is answered rightly, under each normalization: bool."""
    seen = images.at(member.image_size).take(rows)

    def measured() -> Tensor:
        return torch.cat([_under(member, seen, one) for one in under])

    part = [*part, rows.tolist(), [asdict(one) for one in under]]
    all_nR = known(member, images, measured, part, len(under) * len(rows)).to(member.mean.device)
    labels_n = seen.labels.cpu()
    return [member.of_classes(one).argmax(1).cpu() == labels_n for one in torch.chunk(all_nR, len(under))]


def _under(member: Classifier, seen: Images, under: Normalization) -> Tensor:
    """Return the network's outputs for images under a normalization, n × R."""
    assert isinstance(seen.pixels, Tensor), "take() copies into one tensor"
    pixels = seen.pixels.flip(1) if under.bgr else seen.pixels
    # In eval mode from the start: the network is the teacher's own, and must stay in it.
    tried = Classifier(member.network, under.mean, under.std).to(member.mean.device).eval()
    return evaluate.logits_on(tried, Images(pixels, seen.labels))


def _normalization_warning(found: Better, who: str, pointer: str) -> WarningItem:
    under = found.normalization
    values = json.dumps({"mean": [round(one, 6) for one in under.mean], "std": [round(one, 6) for one in under.std]})
    text = (
        f"{who} is right on {_percent(found.accuracy)} of {found.images} test images with {under.title}, "
        f"on {_percent(found.before)} as the job shows them to it"
    )
    if under.bgr:
        hint = "reverse the input channels of its first layer (weight[:, [2, 1, 0]]) and save it again"
        return WarningItem("channel_order_wrong", pointer, text, f'{hint}; then "preprocessing": {values}')
    hint = f'if it was trained so, give "preprocessing": {values}'
    return WarningItem("normalization_wrong", f"{pointer}/preprocessing", text, hint)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
