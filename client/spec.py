"""A job spec from a file and flags; and the local files that it names, brought to the service.

A file on this machine is written as the engine by hand writes it: `file:<path>`. Before a spec is sent, each such file
is uploaded and registered, and its name stands in the spec instead.
"""

import json
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from client.errors import ApiError, Unusable
from client.sdk import Distillery
from client.transfer import Tell, digest_of

Spec = dict[str, Any]

SHORT_FOR = {
    "dataset": "source",
    "student": "architecture",
    "method": "name",
    "optimizer": "name",
    "schedule": "name",
    "augmentation": "name",
    "mix": "name",
}
"""`"method": "kd"` is short for `{"name": "kd"}`: the field that a plain name stands for."""

REFERENCES = ("model:", "job:", "blob:sha256:", "weights:", "file:")
DATA_FILES = (".npz", ".zip", ".tar", ".tar.gz", ".tgz")
LOCAL = "file:"


def read_spec(path: str) -> Spec:
    """A spec from a JSON or YAML file; `-` is standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        spec = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise Unusable(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, dict):
        raise Unusable(f"{path} holds no job spec: the top must be an object with fields such as dataset and student")
    return spec


def assign(spec: Spec, setting: str) -> None:
    """`training.batch_size=64`: set one field by its path. The value is JSON where it is any, else text."""
    path, found, text = setting.partition("=")
    steps = path.split(".")
    if not found or not all(steps):
        raise Unusable(f"--set {setting!r}: write it as path.to.field=value, such as training.batch_size=64")
    place: Any = spec
    for step in steps[:-1]:
        place = _opened(place, step, setting)
    if not isinstance(place, dict):
        raise Unusable(f"--set {setting!r}: {steps[-2]} holds no fields")
    place[steps[-1]] = _value(text)


def _opened(place: Any, step: str, setting: str) -> Any:
    """The object behind a step; a plain name becomes the object that it is short for."""
    if isinstance(place, list):
        if not step.isdigit() or int(step) >= len(place):
            raise Unusable(f"--set {setting!r}: {step!r} is no place in a list of {len(place)}")
        return place[int(step)]
    if not isinstance(place, dict):
        raise Unusable(f"--set {setting!r}: there are no fields above {step!r}")
    inner = place.get(step)
    if inner is None:
        place[step] = {}
    elif isinstance(inner, str):
        if step not in SHORT_FOR:
            raise Unusable(f"--set {setting!r}: {step} is {inner!r} and holds no fields")
        place[step] = {SHORT_FOR[step]: inner}
    return place[step]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def teach(spec: Spec, checkpoint: str | None, architecture: str | None) -> None:
    """Name the teacher: a reference such as `model:<name>`, or the path of a checkpoint here."""
    told = spec.get("teacher")
    if isinstance(told, list):
        raise Unusable("--teacher and --teacher-architecture name one teacher; this spec has several")
    teacher = dict(told or {})
    if checkpoint is not None:
        if not checkpoint.startswith(REFERENCES):
            if not Path(checkpoint).is_file():
                raise Unusable(f"--teacher {checkpoint!r} is no file here, and no reference ({', '.join(REFERENCES)})")
            checkpoint = LOCAL + checkpoint
        teacher["checkpoint"] = checkpoint
    if architecture is not None:
        teacher["architecture"] = architecture
    spec["teacher"] = teacher


def feed(spec: Spec, source: str) -> None:
    """Name the data: a set that the service knows, or the path of a file here."""
    if not source.startswith((LOCAL, "blob:")) and (source.endswith(DATA_FILES) or "/" in source):
        source = LOCAL + source
    told = spec.get("dataset")
    spec["dataset"] = {**told, "source": source} if isinstance(told, dict) else source


def bring_files(distillery: Distillery, spec: Spec, tell: Callable[[str], Tell | None] = lambda _: None) -> Spec:
    """The same spec with every local file uploaded and registered. `tell` makes a progress callback for a file."""
    brought = deepcopy(spec)
    dataset = brought.get("dataset")
    if isinstance(dataset, str) and dataset.startswith(LOCAL):
        brought["dataset"] = _dataset(distillery, _path(dataset), None, tell)
    elif isinstance(dataset, dict) and _is_local(dataset.get("source")):
        dataset["source"] = _dataset(distillery, _path(dataset["source"]), dataset.get("image_size"), tell)
    teachers = brought.get("teacher")
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if isinstance(teacher, dict) and _is_local(teacher.get("checkpoint")):
            teacher["checkpoint"] = _model(distillery, _path(teacher["checkpoint"]), teacher, tell)
    if _is_local(brought.get("baseline")):
        path = _path(brought["baseline"])
        brought["baseline"] = f"blob:{distillery.upload(path, tell=tell(path.name))}"
    return brought


def _model(distillery: Distillery, path: Path, teacher: Spec, tell: Callable[[str], Tell | None]) -> str:
    """Registered under a name that says file, architecture and content: the same file is sent once."""
    digest, architecture = digest_of(path), teacher.get("architecture")
    name = _name(path, architecture, digest)
    if not _known(distillery.model, name):
        distillery.register_model(name, path, architecture, tell=tell(path.name))
    return f"model:{name}"


def _dataset(distillery: Distillery, path: Path, image_size: int | None, tell: Callable[[str], Tell | None]) -> str:
    name = _name(path, None if image_size is None else str(image_size), digest_of(path))
    if not _known(distillery.dataset, name):
        distillery.register_dataset(name, path, image_size=image_size, tell=tell(path.name))
    return name


def _known(look: Callable[[str], object], name: str) -> bool:
    try:
        look(name)
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return True


def _name(path: Path, detail: str | None, digest: str) -> str:
    """A name that the registry takes: letters, digits, `.`, `_` and `-`, at most 100."""
    words = [path.name.partition(".")[0][:50], (detail or "")[:30], digest[:12]]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(word for word in words if word)).lstrip("._-")


def _is_local(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith(LOCAL)


def _path(reference: str) -> Path:
    path = Path(reference.removeprefix(LOCAL)).expanduser()
    if not path.is_file():
        raise Unusable(f"{path} is {'a folder' if path.is_dir() else 'no file here'}; pack folders as .zip or .tar")
    return path
