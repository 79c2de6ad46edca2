"""A job spec from a file and flags; and the local files that it names, brought to the service.

A file on this machine is written as the engine by hand writes it: `file:<path>`. Before a spec is sent, each such file
is uploaded, and registered if it is data or a checkpoint; the name that it then has stands in the spec instead.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from base.references import REFERENCE_PREFIXES
from client.errors import ApiError, Unusable
from client.sdk import Distillery
from client.transfer import Tell, digest_of

Spec = dict[str, Any]

SHORT_FOR = {
    "dataset": "source",
    "unlabelled": "source",
    "student": "architecture",
    "assistants": "architecture",
    "method": "name",
    "optimizer": "name",
    "schedule": "name",
    "augmentation": "name",
    "mix": "name",
}
"""`"method": "kd"` is short for `{"name": "kd"}`: the field that a plain name stands for, also inside a list."""

DATA_FILES = (".npz", ".zip", ".tar", ".tar.gz", ".tgz")
PROGRAM_FILE = ".pt2"
"""What torch.export writes: a teacher that is a program, not a checkpoint."""

LOCAL = "file:"

SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


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
    """`training.batch_size=64`: set one field by its path. The value is JSON where it is any, else text.

    In a list, a step is a place or a name: `teacher.0.weight=2`, `method.attention.p=1`.
    """
    path, found, text = setting.partition("=")
    steps = path.split(".")
    if not found or not all(steps):
        raise Unusable(f"--set {setting!r}: write it as path.to.field=value, such as training.batch_size=64")
    place: Any = spec
    above = ""
    for step in steps[:-1]:
        above, place = (above if isinstance(place, list) else step), _opened(place, step, above, setting)
    if isinstance(place, list):
        place[_position(place, steps[-1], above, setting)] = _value(text)
    elif isinstance(place, dict):
        place[steps[-1]] = _value(text)
    else:
        raise Unusable(f"--set {setting!r}: {steps[-2]} holds no fields")


def _opened(place: Any, step: str, above: str, setting: str) -> Any:
    """The object behind a step; a plain name becomes the object that it is short for. `above` is the list's field."""
    if isinstance(place, list):
        at = _position(place, step, above, setting)
        if isinstance(place[at], str) and above in SHORT_FOR:
            place[at] = {SHORT_FOR[above]: place[at]}
        return place[at]
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


def _position(several: list[Any], step: str, above: str, setting: str) -> int:
    """Where in a list, by place or by a name that only one in it has."""
    names = [one.get(SHORT_FOR.get(above, "")) if isinstance(one, dict) else one for one in several]
    if step.isdigit() and int(step) < len(several):
        return int(step)
    if names.count(step) == 1:
        return names.index(step)
    told = ", ".join(f"{place} ({name})" if isinstance(name, str) else str(place) for place, name in enumerate(names))
    raise Unusable(f"--set {setting!r}: {above} is a list, {told or 'empty'}; {step!r} is none of it")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def seconds(text: str) -> float:
    """`90`, `30m`, `8h`, `1h30m`, `2d` in seconds."""
    whole = f"{text}s" if text.replace(".", "", 1).isdecimal() else text
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", whole)
    if not parts or "".join(number + unit for number, unit in parts) != whole:
        raise Unusable(f"--deadline {text!r}: write it in seconds, or as 30m, 8h, 1h30m or 2d")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def weighed(methods: Sequence[str]) -> Any:
    """`kd`; or, where several are named, their sum: `kd=0.9` and `attention=1000`."""
    each = [_weighed(text) for text in methods]
    return each[0] if len(each) == 1 else each


def _weighed(text: str) -> Any:
    name, found, number = text.partition("=")
    if not found:
        return name
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise Unusable(f"--method {text!r}: write it as NAME, or as NAME=WEIGHT in a sum, such as kd=0.9")
    return {"name": name, "weight": weight}


def teach(spec: Spec, teachers: Sequence[str], architectures: Sequence[str]) -> None:
    """Name the teachers: each a reference such as `model:<name>`, or the path of a file here. Architectures belong to
    them in their order. Several are named anew; one keeps what the spec says of its own."""
    told = spec.get("teacher") or {}
    each = [_object(one) for one in told] if isinstance(told, list) else [_object(told)]
    if len(teachers) > 1:
        each = [{} for _ in teachers]
    elif teachers and len(each) > 1:
        raise Unusable(f"--teacher names one teacher, and this spec has several: name all {len(each)}")
    if architectures and len(architectures) != len(each):
        raise Unusable(
            f"--teacher-architecture is given {len(architectures)} times, --teacher {len(each)}: they belong together, "
            "in their order"
        )
    for teacher, text in zip(each, teachers, strict=False):
        _name_teacher(teacher, text)
    for teacher, architecture in zip(each, architectures, strict=False):
        teacher["architecture"] = architecture
    spec["teacher"] = each if isinstance(told, list) or len(each) > 1 else each[0]


def _object(teacher: Any) -> Spec:
    if not isinstance(teacher, dict):
        raise Unusable(f"--teacher cannot change {teacher!r}: in a spec a teacher is an object with a checkpoint")
    return dict(teacher)


def _name_teacher(teacher: Spec, text: str) -> None:
    """A teacher is a checkpoint or a program: one takes the other's place."""
    if not text.startswith(REFERENCE_PREFIXES):
        if not Path(text).is_file():
            raise Unusable(f"--teacher {text!r} is no file here, and no reference ({', '.join(REFERENCE_PREFIXES)})")
        text = LOCAL + text
    for kind in ("checkpoint", "program"):
        teacher.pop(kind, None)
    teacher["program" if _is_local(text) and text.endswith(PROGRAM_FILE) else "checkpoint"] = text


def feed(spec: Spec, source: str, field: str = "dataset") -> None:
    """Name the data, or `unlabelled` images: a set that the service knows, or the path of a file here."""
    if not source.startswith((LOCAL, "blob:")) and (source.endswith(DATA_FILES) or "/" in source):
        source = LOCAL + source
    told = spec.get(field)
    spec[field] = {**told, "source": source} if isinstance(told, dict) else source


def bring_files(distillery: Distillery, spec: Spec, tell: Callable[[str], Tell | None] = lambda _: None) -> Spec:
    """The same spec with every local file uploaded and registered. `tell` makes a progress callback for a file."""
    brought = deepcopy(spec)
    dataset = brought.get("dataset")
    # Unlabelled images are brought to the size of the labelled ones.
    image_size = dataset.get("image_size") if isinstance(dataset, dict) else None
    for field in ("dataset", "unlabelled"):
        given = brought.get(field)
        if isinstance(given, str) and _is_local(given):
            brought[field] = _dataset(distillery, _path(given, field), image_size, tell)
        elif isinstance(given, dict) and _is_local(given.get("source")):
            given["source"] = _dataset(distillery, _path(given["source"], field), image_size, tell)
    teachers = brought.get("teacher")
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if isinstance(teacher, dict) and _is_local(teacher.get("checkpoint")):
            teacher["checkpoint"] = _model(distillery, _path(teacher["checkpoint"], "teacher"), teacher, tell)
        if isinstance(teacher, dict) and _is_local(teacher.get("program")):
            teacher["program"] = _blob(distillery, _path(teacher["program"], "teacher"), tell)
    if _is_local(brought.get("baseline")):
        brought["baseline"] = _blob(distillery, _path(brought["baseline"], "baseline"), tell)
    return brought


def _blob(distillery: Distillery, path: Path, tell: Callable[[str], Tell | None]) -> str:
    return f"blob:{distillery.upload(path, tell=tell(path.name))}"


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


def _path(reference: str, field: str) -> Path:
    path = Path(reference.removeprefix(LOCAL)).expanduser()
    if path.is_dir():
        raise Unusable(f"{field}: {path} is a folder; pack it as .zip or .tar")
    if not path.is_file():
        raise Unusable(f"{field}: {path} is no file here")
    return path
