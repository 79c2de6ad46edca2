"""The answers of a job's teacher and students to one image that its data set need not have.

The image comes from outside. It is decoded in this process, which a worker bounds in memory and time, as an image
of the job's data set is: by the same decoders, with the options of that set, at the size of each network's images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.errors import DatasetUnreadable, TeacherMismatch
from base.references import BLOB, blobs_in
from kdcore import data, device, models
from kdcore.catalog import DatasetFacts
from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble
from kdcore.data import resizing
from kdcore.data.decoding import Pixels, with_channels
from kdcore.data.image_files import MAX_PIXELS, Header, decode, header
from kdcore.data.images import Data, Images
from kdcore.prepare import Workspace, frozen_teacher, teacher_file
from kdcore.spec import DataOptions, Dataset, JobSpec, Student, each_teacher
from kdcore.spec.classes import answers_classes
from kdcore.spec.kinds import TOP, PredictionSpec
from kdcore.stored_logits import StoredLogits

NAME = "the image"
"""What errors call the file: its own name is not sent."""
CROP = "crop"


def run_prediction(spec: PredictionSpec, workspace: Workspace) -> dict[str, Any]:
    """Return what the job's models say of the image: `teacher`, `student` and `alone`, each with its most probable
    classes; None for a model that the job does not have, with the reason in `notes`.

    Raises DatasetUnreadable for a file that is no image, or too large. It writes no file.
    """
    started = time.monotonic()
    workspace.lines.phase("preparing")
    threads, _ = device.choose_threads()
    torch.set_num_threads(threads)
    device.make_exact(0)
    blob = workspace.file(spec.image).read_bytes()
    facts, dataset = spec.dataset, spec.job.dataset
    found = _checked_header(blob, dataset, facts)
    teacher, teacher_names, note = _teacher(spec.job, facts, workspace)
    students = {"student": spec.student, "alone": spec.alone}
    workspace.lines.phase("evaluating")
    shown = Shown(blob, dataset, facts)
    answers: dict[str, dict[str, Any] | None] = {"teacher": None}
    if teacher is not None:
        names = [one.architecture or "program" for one in spec.job.teachers]
        probabilities_K = probabilities_of_teacher(teacher, shown)
        answers["teacher"] = {"architecture": " + ".join(names), "top": top(probabilities_K, teacher_names)}
    for name, reference in students.items():
        answers[name] = None
        if reference is not None:
            student = spec.job.students[0]
            probabilities_K = _of_student(workspace.file(reference), student, facts, shown)
            answers[name] = {"architecture": student.architecture, "top": top(probabilities_K, facts.class_names)}
    first = {name: answer["top"][0]["class"] for name, answer in answers.items() if answer is not None}
    return {
        **answers,
        "agree": first["teacher"] == first["student"] if "teacher" in first else None,
        "image": {
            "width": found.width,
            "height": found.height,
            "kinds": sorted(found.marks),
            "shown": _in_words(found, dataset, facts),
        },
        "notes": [] if note is None else [note],
        "seconds": round(time.monotonic() - started, 3),
    }


def top(probabilities_K: Tensor, names: Sequence[str], count: int = TOP) -> list[dict[str, Any]]:
    """Return the most probable classes, the first one first: name, number and probability of each."""
    values, places = probabilities_K.topk(min(count, len(probabilities_K)))
    return [
        {"class": names[place], "number": place, "probability": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]


class Shown:
    """One image as networks get it: uint8 1 × C × H × W, at the size of the data set or at one of a network's own."""

    def __init__(self, blob: bytes, dataset: Dataset, facts: DatasetFacts) -> None:
        self._blob, self._dataset, self._facts = blob, dataset, facts
        self._by_side: dict[int | None, Tensor] = {}

    def at(self, side: int | None) -> Tensor:
        """Return the image at a side of a network's own; with None, at the size of the data set's images."""
        if side not in self._by_side:
            self._by_side[side] = self._made(side)
        return self._by_side[side]

    def _made(self, side: int | None) -> Tensor:
        height, width = self._facts.image_size
        if side is not None and data.enlarges(self._dataset) and side > height:
            # As in the training: all pixels of such data are stored, and are enlarged when they are read.
            return resizing.resized(self.at(None), (side, side))
        if side is None and height != width:
            pixels = _as_rectangle(decode(self._blob, NAME, 3, _without_size(self._dataset)), height, width)
        else:
            pixels = decode(self._blob, NAME, 3, options_at(self._dataset, side or height))
        if self._facts.channels == 1:
            pixels = with_channels(pixels[None], 1)[0]
        return torch.from_numpy(np.array(pixels[None]))


def options_at(dataset: Dataset, side: int) -> DataOptions:
    """Return how an image becomes a square of this side, so that the same part of it is seen as at the data's size."""
    options = dataset.options
    resize_to = options.resize_to
    if resize_to is not None and options.image_size is not None:
        resize_to = max(side, round(resize_to * side / options.image_size))
    return options.model_copy(update={"image_size": side, "resize_to": resize_to})


def _without_size(dataset: Dataset) -> DataOptions:
    return dataset.options.model_copy(update={"image_size": None, "resize_to": None})


def _as_rectangle(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return the middle of an image, of this shape, in this size; an image of this size as it is."""
    _, own_height, own_width = pixels.shape
    if (own_height, own_width) == (height, width):
        return pixels
    scale = min(own_height / height, own_width / width)
    down, across = scale * height, scale * width
    box = ((own_width - across) / 2, (own_height - down) / 2, (own_width + across) / 2, (own_height + down) / 2)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    resized: Pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return resized.transpose(2, 0, 1)


def _checked_header(blob: bytes, dataset: Dataset, facts: DatasetFacts) -> Header:
    """Return size and peculiarities of the image. Raises DatasetUnreadable if it would become too large on its way."""
    found = header(blob, NAME, dataset.options)
    side = max(facts.image_size)
    longer, shorter = max(found.height, found.width), max(1, min(found.height, found.width))
    enlarged = max(dataset.resize_to or 0, side) ** 2 * longer // shorter
    if (dataset.resize or CROP) == CROP and enlarged > MAX_PIXELS:
        raise DatasetUnreadable(
            f"{NAME} has {found.width} x {found.height} pixels: it is too long and thin, its shorter side cannot be "
            f"resized to {side}.",
            "Cut out the part that matters.",
        )
    return found


def _in_words(found: Header, dataset: Dataset, facts: DatasetFacts) -> str:
    """Return what the networks were shown of the image."""
    height, width = facts.image_size
    size = f"{width} x {height} pixels"
    if (found.height, found.width) == (height, width) and dataset.resize_to is None:
        text = f"as it is, {size}"
    elif height != width:
        text = f"its middle, resized to {size}"
    elif dataset.resize == "squash":
        text = f"the whole, each side resized by itself to {size}"
    elif dataset.resize == "pad":
        text = f"the whole on black ground, {size}"
    else:
        text = f"the square in its middle, {size}"
    return f"{text}, {'grey' if facts.channels == 1 else 'in colour'}"


def _teacher(
    spec: JobSpec, facts: DatasetFacts, workspace: Workspace
) -> tuple[FrozenTeacher | TeacherEnsemble | None, Sequence[str], str | None]:
    """Return the job's teacher, the names of its classes, and why there is none, or what is special about it."""
    if not spec.teachers:
        return None, (), "the job has no teacher of its own"
    if any(one.logits is not None for one in spec.teachers):
        return None, (), "the teacher is a file of logits: it has no network that could see another image"
    needed = blobs_in([one.model_dump(mode="json") for one in spec.teachers])
    if any(f"{BLOB}{digest}" not in workspace.inputs for digest in needed):
        return None, (), "the teacher's file is not stored any more"
    nothing = Images(torch.empty(0, facts.channels, *facts.image_size, dtype=torch.uint8), torch.empty(0).long())
    only_facts = Data(nothing, nothing, tuple(facts.class_names), facts)
    named = dict(each_teacher({"teacher": spec.teacher}))
    files = {pointer: teacher_file(one, only_facts, workspace) for pointer, one in named.items()}
    computing = device.Computing("cpu", bf16=False, threads=torch.get_num_threads())
    teacher = frozen_teacher(spec, only_facts, files, computing)
    assert not isinstance(teacher, StoredLogits), "a file of logits is no network"
    if all(answers_classes(one, files[pointer].facts, facts) for pointer, one in named.items()):
        return teacher, facts.class_names, None
    (one,), (file,) = named.values(), files.values()  # Rules refuse several teachers of other classes.
    own = one.class_names or getattr(file.facts, "class_names", None)
    count = file.facts.num_classes
    names = own if own and len(own) == count else [f"output {number}" for number in range(count)]
    return teacher, names, "the teacher has other classes than the data set"


@torch.no_grad()
def probabilities_of_teacher(teacher: FrozenTeacher | TeacherEnsemble, shown: Shown) -> Tensor:
    """Return the teacher's probabilities at temperature 1, of several networks their weighted mean: K."""
    logits_k1K = [member(shown.at(member.image_size)).logits for member in teacher.members]
    return teacher.soft_targets(logits_k1K, 1.0)[0]


@torch.no_grad()
def _of_student(path: Path, student: Student, facts: DatasetFacts, shown: Shown) -> Tensor:
    """Return the probabilities of a student, of an ensemble their mean: K."""
    assert student.preprocessing is not None, "a resolved spec has the normalisation of every student"
    total_K = torch.zeros(facts.num_classes)
    states = _states(path)
    for state in states:
        network = models.build(student.architecture, facts.num_classes, facts.channels)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise TeacherMismatch(f"the student's file does not fit its architecture: {error}") from error
        own = Classifier(network, student.preprocessing.mean, student.preprocessing.std).eval()
        total_K += own(shown.at(None)).logits.softmax(1)[0]
    return total_K / len(states)


def _states(path: Path) -> list[Mapping[str, Tensor]]:
    """Return the weights in a job's own file: of one network, or of each member of an ensemble."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get("distillery", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError) as error:
        raise TeacherMismatch(f"the student's file cannot be read: {error}") from error
    if (members := notes.get("members", 1)) == 1:
        return [tensors]
    return [
        {name.removeprefix(f"{number}."): value for name, value in tensors.items() if name.startswith(f"{number}.")}
        for number in range(members)
    ]
