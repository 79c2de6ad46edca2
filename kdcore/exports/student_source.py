"""Writes `student.py`: a student's network, its loader and its preprocessing as one file that needs torch alone.

The text is that of the project's own modules: the definitions that the network needs, found by following the names in
their source. For the layers, the plain forms of `plain_layers.py` are taken. Networks of torchvision and timm are built
by these libraries: their file needs them, and says so.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

from torch import nn

from kdcore import models, vision
from kdcore.catalog.architectures import architecture, hidden_layers
from kdcore.exports import plain_layers, plain_student
from kdcore.exports.exporter import Deliverable
from kdcore.models import layers, networks

NAME = "student.py"
MEDIA_TYPE = "text/x-python"
OURS = "kdcore"
DROPPED = ("he_init",)
"""Functions whose calls are left out: the weights of a trained network need no initialisation."""


def student_source(student: Deliverable) -> str:
    """Return the text of a student's `student.py`."""
    text = _Text()
    bare, hidden = hidden_layers(student.architecture)
    source, classes = architecture(bare).source, len(student.class_names)
    if source == "torchvision":
        options = ", aux_logits=False, init_weights=True" if _bare(bare) in networks.WITHOUT_AUXILIARY_HEADS else ""
        text.include("torchvision", vision)
        built = f'torchvision().models.get_model("{_bare(bare)}", weights=None, num_classes={classes}{options})'
    elif source == "timm":
        text.include("torchvision", vision)
        model = f'"{_bare(bare)}", pretrained=False, num_classes={classes}, in_chans={student.channels}'
        built = f"timm.create_model({model})"
    else:
        built = _built(bare, classes, student.channels)
        text.include_names(ast.parse(built), networks)
    lines = [f"network = {built}"]
    if source == "timm":
        lines = ["torchvision()  # Before timm, which imports it.", "import timm", "", *lines]
    if hidden:
        path = networks.classifier_of(models.skeleton(bare, classes, student.channels), bare)
        lines.append(f"network.set_submodule({path!r}, {_sequence(student, path)})")
    return _joined(student, text, [*lines, "return network"], source)


def _bare(name: str) -> str:
    return name.partition("/")[2]


def _built(name: str, classes: int, channels: int) -> str:
    """Return the expression that builds a network of `kdcore/models`, with numbers for its arguments."""
    entry = next(
        value
        for node in _tree(networks).body
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "NETWORKS"
        and isinstance(node.value, ast.Dict)
        for key, value in zip(node.value.keys, node.value.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == name
    )
    if not isinstance(entry, ast.Lambda):
        return f"{ast.unparse(entry)}({classes}, {channels})"
    values = dict(zip((one.arg for one in entry.args.args), (classes, channels), strict=True))

    class Filled(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:  # the name that ast calls
            return ast.Constant(values[node.id]) if node.id in values else node

    body: ast.expr = Filled().visit(ast.parse(ast.unparse(entry.body), mode="eval").body)
    return ast.unparse(body)


def _sequence(student: Deliverable, path: str) -> str:
    """Return the expression of a deepened classifier: PyTorch's layers print as they are made."""
    member = student.network if student.members == 1 else student.network.get_submodule("0")
    classifier = member.get_submodule(path)
    assert isinstance(classifier, nn.Sequential)
    return f"nn.Sequential({', '.join(f'nn.{layer!r}' for layer in classifier)})"


class _Text:
    """Definitions and imports, collected from modules: what is needed comes before what needs it."""

    def __init__(self) -> None:
        self.imports: dict[str, None] = {}
        self.definitions: dict[tuple[str, str], str] = {}

    def include(self, name: str, module: ModuleType) -> None:
        """Include a name of a module, with all that it needs."""
        if module is layers and name in _definitions(plain_layers):
            module = plain_layers
        key = module.__name__, name
        if key in self.definitions or name in DROPPED:
            return
        node = _definitions(module).get(name)
        if node is None:
            self._include_import(name, module)
            return
        self.definitions[key] = ""  # Its place, so that a definition that names itself ends here.
        self.include_names(node, module)
        del self.definitions[key]
        self.definitions[key] = _segment(module, node)

    def include_names(self, node: ast.AST, module: ModuleType) -> None:
        """Include all names of a module that a piece of code has."""
        for one in ast.walk(node):
            if isinstance(one, ast.Name):
                self.include(one.id, module)

    def _include_import(self, name: str, module: ModuleType) -> None:
        found = _imports(module).get(name)
        if found is None:
            return  # A local variable, or a name of Python's own.
        origin, line = found
        if origin.startswith(OURS):
            self.include(name, importlib.import_module(origin))
        else:
            self.imports[line] = None


@cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


@cache
def _definitions(module: ModuleType) -> dict[str, ast.stmt]:
    """Return the functions, classes and constants of a module by name."""
    found: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


@cache
def _imports(module: ModuleType) -> dict[str, tuple[str, str]]:
    """Return for each imported name of a module the module that it is from, and its import alone."""
    found = {}
    for node in _tree(module).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                one: ast.stmt
                if isinstance(node, ast.Import):
                    origin, one = alias.name, ast.Import([alias])
                else:
                    origin, one = node.module or "", ast.ImportFrom(node.module, [alias], node.level)
                found[alias.asname or alias.name] = origin, ast.unparse(one)
    return found


def _segment(module: ModuleType, node: ast.stmt) -> str:
    """Return the text of a definition, without the calls of functions in DROPPED."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
    statements = [one for one in ast.walk(node) if isinstance(one, ast.Expr)]
    dropped = {one.lineno for one in statements if _is_dropped(one)}
    lines = inspect.getsource(module).splitlines()
    return "\n".join(lines[at - 1] for at in range(first, (node.end_lineno or first) + 1) if at not in dropped)


def _is_dropped(node: ast.Expr) -> bool:
    call = node.value
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in DROPPED


def _joined(student: Deliverable, text: _Text, build: list[str], source: str) -> str:
    """Return the whole file."""
    for name in ("load", "preprocess"):
        text.include(name, plain_student)
    if student.members > 1:
        text.include("Ensemble", plain_layers)
        build = [*("    " + line if line else line for line in build), ""]
        build = ["def one() -> nn.Module:", *build, f"return Ensemble(one() for _ in range({student.members}))"]
    text.imports["from torch import nn"] = None
    constants, own = _constants(student), plain_student.__name__
    layers_and_networks = [one for (module, _), one in text.definitions.items() if module != own]
    functions = [
        one for (module, name), one in text.definitions.items() if module == own and name not in {*constants, "build"}
    ]
    body = [
        "def build() -> nn.Module:",
        '    """Return the untrained network."""',
        *(f"    {one}".rstrip() for one in build),
    ]
    parts = [
        _docstring(student, source),
        "\n".join(_sorted(text.imports)),
        "\n".join(f"{name} = {value!r}" for name, value in constants.items()),
        *layers_and_networks,
        "\n".join(body),
        *functions,
    ]
    return _spaced(parts)


def _constants(student: Deliverable) -> dict[str, Any]:
    """Return the student's values of the constants of `plain_student.py`."""
    data, (height, _) = student.spec.dataset, student.image_size
    return {
        "CHANNELS": student.channels,
        "IMAGE_SIZE": tuple(student.image_size),
        "MEAN": tuple(student.mean),
        "STD": tuple(student.std),
        "RESIZE": (data.resize or "crop") if data.image_size is not None else "squash",
        "RESIZE_TO": data.resize_to or height,
        "INTERPOLATION": data.interpolation or "bilinear",
        "TURNS_UPRIGHT": data.orientation == "apply",
    }


def _docstring(student: Deliverable, source: str) -> str:
    several = f"{student.members} x " if student.members > 1 else ""
    needs = "PyTorch alone" if source not in ("torchvision", "timm") else f"PyTorch and {source}, which builds it"
    return f'''"""The student of a distillation: {several}{student.architecture} for {len(student.class_names)} classes.
Needs {needs}.

    import torch, student
    from PIL import Image

    net = student.load("student.safetensors")
    x = student.preprocess(Image.open("picture.jpg"))
    print(net.class_names[net(x).argmax()])
"""'''


def _sorted(imports: Iterable[str]) -> list[str]:
    """Return imports in order: the standard library first; those from one module are one line."""
    names: dict[str, list[str]] = {}
    lines = []
    for line in imports:
        if line.startswith("from "):
            module, _, name = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, []).append(name)
        else:
            lines.append(line)
    lines += [f"from {module} import {', '.join(sorted(own))}" for module, own in names.items()]
    ordered = sorted(lines, key=lambda line: (line.startswith("from"), line))
    of_torch = [line for line in ordered if line.split()[1].partition(".")[0] == "torch"]
    return [*(line for line in ordered if line not in of_torch), "", *of_torch]


def _spaced(parts: list[str]) -> str:
    """Return parts with two empty lines around functions and classes, and one around the rest."""
    text = parts[0]
    for before, part in pairwise(parts):
        is_block = part.startswith(("def ", "class ", "@")) or before.startswith(("def ", "class ", "@"))
        text += ("\n\n\n" if is_block else "\n\n") + part
    return text + "\n"
