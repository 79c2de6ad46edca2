"""A job spec from a file and flags, and the upload of the local files that it names.

A local file is written as `file:<path>`, as in the engine's own specs. Before a spec is submitted, each such file is
uploaded, and registered if it is a data set or a checkpoint; the spec then holds the registered name.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml

from base.references import FILE, REFERENCE_PREFIXES
from base.wire import Registered
from client.errors import ApiError, InvalidInput
from client.sdk import Distillery
from client.transfer import OnProgress, digest_of, packed

R = TypeVar("R", bound=Registered)

Spec = dict[str, Any]
ProgressOf = Callable[[str], OnProgress | None]
"""Makes the progress callback of a file from its name."""

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
"""The field that a plain name sets, also inside a list: `"method": "kd"` is short for `{"name": "kd"}`."""

DEFAULT_NAMES = {"optimizer": "sgd", "schedule": "multistep"}
"""What `--set training.optimizer.lr=0.1` changes where the spec names none: the service's default."""

DATA_SUFFIXES = (".npz", ".zip", ".tar", ".tgz", ".gz", ".parquet", "-ubyte")
OF_LABELLED = ("limit", "limit_seed", "class_names")
"""Options of a data set that mean nothing for unlabelled images beside it."""
PROGRAM_SUFFIXES = (".pt2", ".onnx")
"""Files of torch.export and of ONNX: a teacher that is a program, not a checkpoint."""

UNIT_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


class _Yaml(yaml.SafeLoader):
    """PyYAML reads 1e-3 as text, which JSON and YAML 1.2 read as a number."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_spec(path: str) -> Spec:
    """Read a spec from a JSON or YAML file; `-` is standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        spec = json.loads(text) if path.endswith(".json") else _Yaml(text).get_single_data()
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, dict):
        raise InvalidInput(f"{path} is not a job spec: it must be an object with fields such as dataset and student")
    return spec


def labels_of(given: Sequence[str] | None) -> dict[str, str]:
    """Return the labels of flags such as `team=vision`. Raises InvalidInput."""
    labels = {}
    for one in given or ():
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise InvalidInput(f"label {one!r}: write it as name=value, such as team=vision")
        labels[name] = value
    return labels


def label_filters(given: Sequence[str] | None) -> list[str] | None:
    """Return the filters of flags such as `team=vision`, or `team` for any value, as the service takes them."""
    return [one.replace("=", ":", 1) for one in given] if given else None


def set_field(spec: Spec, setting: str) -> None:
    """Set one field by its path: `training.batch_size=64`. A value that is not valid JSON is text.

    An element of a list is selected by its index or its name: `teacher.0.weight=2`, `method.attention.p=1`.
    """
    path, equals, text = setting.partition("=")
    steps = path.split(".")
    if not equals or not all(steps):
        raise InvalidInput(f"--set {setting!r}: write it as path.to.field=value, such as training.batch_size=64")
    parent: Any = spec
    field = ""
    """The name of the field that holds `parent`; for an element of a list, that of the list."""
    for step in steps[:-1]:
        field, parent = (field if isinstance(parent, list) else step), _child(parent, step, field, setting)
    if isinstance(parent, list):
        parent[_index(parent, steps[-1], field, setting)] = _value(text)
    elif isinstance(parent, dict):
        parent[steps[-1]] = _value(text)
    else:
        raise InvalidInput(f"--set {setting!r}: {steps[-2]} has no fields")


def _child(parent: Any, step: str, field: str, setting: str) -> Any:
    """Return the object below `parent`. A plain name becomes the object that it is short for, and a field that is not
    set its default object."""
    if isinstance(parent, list):
        index = _index(parent, step, field, setting)
        if isinstance(parent[index], str) and field in SHORT_FOR:
            parent[index] = {SHORT_FOR[field]: parent[index]}
        return parent[index]
    if not isinstance(parent, dict):
        raise InvalidInput(f"--set {setting!r}: {field} has no field {step!r}")
    child = parent.get(step)
    if child is None:
        parent[step] = {SHORT_FOR[step]: DEFAULT_NAMES[step]} if step in DEFAULT_NAMES else {}
    elif isinstance(child, str):
        if step not in SHORT_FOR:
            raise InvalidInput(f"--set {setting!r}: {step} is {child!r} and has no fields")
        parent[step] = {SHORT_FOR[step]: child}
    return parent[step]


def _index(elements: list[Any], step: str, field: str, setting: str) -> int:
    """Return the index in a list that `step` selects: a number, or a name that only one element has."""
    names = [one.get(SHORT_FOR.get(field, "")) if isinstance(one, dict) else one for one in elements]
    if step.isdigit() and int(step) < len(elements):
        return int(step)
    if names.count(step) == 1:
        return names.index(step)
    known = ", ".join(f"{place} ({name})" if isinstance(name, str) else str(place) for place, name in enumerate(names))
    raise InvalidInput(f"--set {setting!r}: {field} is a list, {known or 'empty'}; {step!r} selects no single element")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_duration(text: str) -> float:
    """Return the seconds of `90`, `30m`, `8h`, `1h30m`, `2d`."""
    whole = f"{text}s" if text.replace(".", "", 1).isdecimal() else text
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", whole)
    if not parts or "".join(number + unit for number, unit in parts) != whole:
        raise InvalidInput(f"--deadline {text!r}: write it in seconds, or as 30m, 8h, 1h30m or 2d")
    return sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)


def parse_numbers(flag: str, text: str) -> list[float]:
    """Return the numbers of `0.507,0.487,0.441`, one for each channel."""
    parts = text.replace(",", " ").split()
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InvalidInput(f"{flag} {text!r}: write one number for each channel, such as 0.507,0.487,0.441")
    return numbers


def read_class_names(text: str) -> list[str]:
    """Return the class names of `cat,dog,…`, or of a file: a name on each line, or a JSON list. In the order of the
    network's outputs."""
    path = Path(text).expanduser()
    if not path.is_file():
        if "," not in text:
            raise InvalidInput(
                f"--class-names {text!r}: there is no such file; give a file with one name on each line, or a,b,c"
            )
        return [name.strip() for name in text.split(",")]
    try:
        content = path.read_text(encoding="utf-8")
        names = json.loads(content) if path.suffix == ".json" else [line.strip() for line in content.splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--class-names: cannot read {path}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"--class-names: {path} must be a JSON list of names, in the order of the network's outputs")
    return [name for name in names if name]


def read_class_map(text: str) -> dict[str, Any]:
    """Return the class map of a JSON object, `{"cat": ["tabby", 282]}`, or of a JSON file."""
    path = Path(text).expanduser()
    try:
        found = json.loads(text if text.lstrip().startswith("{") else path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--class-map {text}: neither a JSON object nor a file of one: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f'--class-map {text}: must be a JSON object, such as {{"cat": ["tabby", 282], "dog": 207}}')
    return found


def parse_methods(texts: Sequence[str]) -> Any:
    """Return the field `method`: one method, or the list of a weighted sum (`kd=0.9` and `attention=1000`)."""
    methods = [_parse_method(text) for text in texts]
    return methods[0] if len(methods) == 1 else methods


def _parse_method(text: str) -> Any:
    name, equals, number = text.partition("=")
    if not equals:
        return name
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise InvalidInput(f"--method {text!r}: write it as NAME, or as NAME=WEIGHT in a sum, such as kd=0.9")
    return {"name": name, "weight": weight}


def set_teachers(spec: Spec, teachers: Sequence[str], architectures: Sequence[str]) -> None:
    """Set the teachers: each is a reference such as `model:<name>`, or the path of a local file.

    Architectures belong to the teachers in the same order. One teacher keeps the other fields of the spec's teacher;
    several replace it.
    """
    previous = spec.get("teacher") or {}
    result = [_copy(one) for one in previous] if isinstance(previous, list) else [_copy(previous)]
    if len(teachers) > 1:
        result = [{} for _ in teachers]
    elif teachers and len(result) > 1:
        raise InvalidInput(f"--teacher names one teacher, but the spec has several: name all {len(result)}")
    if architectures and len(architectures) != len(result):
        raise InvalidInput(
            f"--teacher-architecture is given {len(architectures)} times, --teacher {len(result)}: give one for each, "
            "in the same order"
        )
    for teacher, text in zip(result, teachers, strict=False):
        _set_source(teacher, text)
    for teacher, architecture in zip(result, architectures, strict=False):
        teacher["architecture"] = architecture
    spec["teacher"] = result if isinstance(previous, list) or len(result) > 1 else result[0]


def _copy(teacher: Any) -> Spec:
    if not isinstance(teacher, dict):
        raise InvalidInput(f"--teacher cannot change {teacher!r}: in a spec a teacher is an object with a checkpoint")
    return dict(teacher)


def _set_source(teacher: Spec, text: str) -> None:
    """Set the teacher's checkpoint or program. A teacher is one file."""
    text = _reference(text, "--teacher")
    for kind in ("checkpoint", "program", "logits"):
        teacher.pop(kind, None)
    teacher["program" if _is_local(text) and text.lower().endswith(PROGRAM_SUFFIXES) else "checkpoint"] = text


def set_student(spec: Spec, checkpoint: str | None, freeze: Sequence[str], head_lr: float | None) -> None:
    """Set what the student starts from: a reference such as `weights:<name>`, or the path of a local file. Of several
    students each has its own: --set student.0.checkpoint=…"""
    flags = {"checkpoint": checkpoint, "freeze": list(freeze) or None, "head_lr": head_lr}
    given = {field: value for field, value in flags.items() if value is not None}
    if given and isinstance(spec.get("student"), list):
        field, value = next(iter(given.items()))
        flag = {"checkpoint": "--student-checkpoint", "freeze": "--freeze", "head_lr": "--head-lr"}[field]
        raise InvalidInput(f"{flag} is for one student; of several: --set student.0.{field}={_text(value)}")
    if checkpoint is not None:
        given["checkpoint"] = _reference(checkpoint, "--student-checkpoint")
    for field, value in given.items():
        set_field(spec, f"student.{field}={_text(value)}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _reference(text: str, flag: str) -> str:
    """Return a reference as it is, and the path of a local file as one. Raises InvalidInput for other text."""
    if text.startswith(REFERENCE_PREFIXES):
        return text
    if not Path(text).is_file():
        raise InvalidInput(f"{flag} {text!r} is neither a local file nor a reference ({', '.join(REFERENCE_PREFIXES)})")
    return FILE + text


def set_data(spec: Spec, source: str, field: str = "dataset") -> None:
    """Set `dataset` or `unlabelled`: the name of a data set, or the path of a local file."""
    if not source.startswith((FILE, "blob:")) and (source.endswith(DATA_SUFFIXES) or "/" in source):
        source = FILE + source
    previous = spec.get(field)
    spec[field] = {**previous, "source": source} if isinstance(previous, dict) else source


def upload_files(
    distillery: Distillery,
    spec: Spec,
    progress_of: ProgressOf = lambda _: None,
    inspection_of: ProgressOf = lambda _: None,
) -> Spec:
    """Return the spec with every local file uploaded and registered. The two callbacks report the progress of transfers
    and of inspections."""
    spec = deepcopy(spec)
    dataset = spec.get("dataset")
    # Unlabelled images are read like the labelled ones, which alone have classes.
    given = dataset if isinstance(dataset, dict) else {}
    labelled = {name: value for name, value in given.items() if name != "source" and value is not None}
    unlabelled = {name: value for name, value in labelled.items() if name not in OF_LABELLED}
    for field, options in (("dataset", labelled), ("unlabelled", unlabelled)):
        data = spec.get(field)
        if isinstance(data, str) and _is_local(data):
            spec[field] = _dataset(distillery, _path(data, field), options, progress_of, inspection_of)
        elif isinstance(data, dict) and _is_local(data.get("source")):
            data["source"] = _dataset(distillery, _path(data["source"], field), options, progress_of, inspection_of)
    teachers = spec.get("teacher")
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if isinstance(teacher, dict) and _is_local(teacher.get("checkpoint")):
            teacher["checkpoint"] = _model(distillery, _path(teacher["checkpoint"], "teacher"), teacher, progress_of)
        for kind in ("program", "logits"):
            if isinstance(teacher, dict) and _is_local(teacher.get(kind)):
                teacher[kind] = _blob(distillery, _path(teacher[kind], "teacher"), progress_of)
    students = [spec.get("student"), *(spec.get("assistants") or [])]
    for student in [one for each in students for one in (each if isinstance(each, list) else [each])]:
        if isinstance(student, dict) and _is_local(student.get("checkpoint")):
            student["checkpoint"] = _blob(distillery, _path(student["checkpoint"], "student"), progress_of)
    if _is_local(spec.get("baseline")):
        spec["baseline"] = _blob(distillery, _path(spec["baseline"], "baseline"), progress_of)
    return spec


def _blob(distillery: Distillery, path: Path, progress_of: ProgressOf) -> str:
    return f"blob:{distillery.upload(path, on_progress=progress_of(path.name))}"


def _model(distillery: Distillery, path: Path, teacher: Spec, progress_of: ProgressOf) -> str:
    architecture = teacher.get("architecture")
    name = _name(path, architecture, digest_of(path))
    model = _registered(distillery.model, name)
    if model is None:
        distillery.register_model(name, path, architecture, on_progress=progress_of(path.name))
    else:
        distillery.wait_for_model(model)
    return f"model:{name}"


def _dataset(
    distillery: Distillery,
    path: Path,
    options: Mapping[str, Any],
    progress_of: ProgressOf,
    inspection_of: ProgressOf,
) -> str:
    """Register the data set unless it is; a folder is packed first. Returns its name."""
    more = dict(options)
    size = more.pop("image_size", None)
    # The options are a part of the name, so that the same file read in another way is another data set.
    named = [] if size is None else [str(size)]
    named += [hashlib.sha256(json.dumps(more, sort_keys=True).encode()).hexdigest()[:8]] if more else []
    with packed(path, progress_of(f"packing {path.name}") if path.is_dir() else None) as file:
        name = _name(file, "-".join(named), digest_of(file))
        dataset = _registered(distillery.dataset, name)
        if dataset is None:
            given: dict[str, Any] = {"image_size": size, "options": more, "on_progress": progress_of(file.name)}
            dataset = distillery.register_dataset(name, file, wait=False, **given)
        distillery.wait_for_dataset(dataset, on_progress=inspection_of(file.name))
    return name


def _registered(get: Callable[[str], R], name: str) -> R | None:
    """Return a registered file, perhaps one that is still being inspected; None if there is none that can be used."""
    try:
        found = get(name)
    except ApiError as error:
        if error.status != 404:
            raise
        return None
    return None if found.get("state") == "refused" else found


def _name(path: Path, detail: str | None, digest: str) -> str:
    """Return a name made of file, detail and digest, so that the same file is uploaded only once.

    The registry allows letters, digits, `.`, `_` and `-`, at most 100.
    """
    words = [path.name.partition(".")[0][:50], (detail or "")[:30], digest[:12]]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(word for word in words if word)).lstrip("._-")


def _is_local(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith(FILE)


def _path(reference: str, field: str) -> Path:
    path = Path(reference.removeprefix(FILE)).expanduser()
    if path.is_dir() and field not in ("dataset", "unlabelled"):
        raise InvalidInput(f"{field}: {path} is a folder, not a file")
    if not path.exists():
        raise InvalidInput(f"{field}: there is no file {path}")
    return path
