"""A program's graph: operator calls on named values, run one after the other.

Nothing is compiled or evaluated, and every operator is on a list (`operators`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from base.errors import TeacherMismatch
from kdcore.programs import operators
from kdcore.programs.program import EVAL_FIRST
from kdcore.programs.pt2 import DTYPES, KEYWORD, MEMORY_FORMATS, STRIDED

NO_GRAD = "torch.ops.higher_order.wrap_with_set_grad_enabled"
"""The graph's name of `with torch.no_grad():` inside a network. It has no effect: nothing has gradients here."""


@dataclass(frozen=True)
class Named:
    """A reference, in a call, to a value that was computed earlier."""

    name: str


DEVICE = Named("the device")
"""A placeholder for the images' device, in place of the device that the graph was traced on."""


@dataclass(frozen=True)
class Call:
    """`results = operator(*arguments, **options)`; `spent` are the values that no later call needs."""

    operator: Callable[..., Any]
    arguments: list[Any]
    options: dict[str, Any]
    results: Any
    spent: frozenset[str]


@dataclass(frozen=True)
class Graph:
    inputs: list[Any]
    calls: list[Call]
    outputs: list[Any]

    @classmethod
    def of(cls, graph: Mapping[str, Any]) -> "Graph":
        """Read the JSON. Raises TeacherMismatch for an operator that is not allowed."""
        outputs = [_value(argument) for argument in graph["outputs"]]
        calls: list[Call] = []
        needed = set(_names(outputs))
        for node in reversed(graph["nodes"]):
            if not operators.is_assertion(node["target"]):
                calls.append(_call(node, needed))
                needed.update(_names([calls[-1].arguments, *calls[-1].options.values()]))
        return cls([_value(argument) for argument in graph["inputs"]], calls[::-1], outputs)

    def run(self, values: dict[str, Any], device: torch.device) -> list[Any]:
        """Return the outputs. `values` holds the inputs by name; spent values are removed, to free their memory."""
        values[DEVICE.name] = device
        for call in self.calls:
            arguments = [_filled(argument, values) for argument in call.arguments]
            options = {name: _filled(option, values) for name, option in call.options.items()}
            _bind(call.results, call.operator(*arguments, **options), values)
            for name in call.spent:
                values.pop(name, None)
        return [_filled(output, values) for output in self.outputs]

    def run_inside(self, device: torch.device, *given: Any) -> list[Any]:
        """Return the outputs of a graph within a graph, whose inputs come in order."""
        values: dict[str, Any] = {}
        _bind(self.inputs, given, values)
        return self.run(values, device)


def _call(node: Mapping[str, Any], needed: set[str]) -> Call:
    target = node["target"]
    given = [(argument["name"], argument["kind"], _value(argument["arg"])) for argument in node["inputs"]]
    arguments = [value for _, kind, value in given if kind != KEYWORD]
    options = {name: value for name, kind, value in given if kind == KEYWORD}
    outputs = [_value(output) for output in node["outputs"]]
    # A single result is returned without a list, except by a graph within a graph.
    results = outputs[0] if len(outputs) == 1 and (target != NO_GRAD or isinstance(outputs[0], list)) else outputs
    touched = {*_names([arguments, *options.values(), results])}
    return Call(_operator(target, given), arguments, options, results, frozenset(touched - needed - {DEVICE.name}))


def _operator(target: str, given: list[tuple[str, int, Any]]) -> Callable[..., Any]:
    if target == NO_GRAD:
        return lambda _, inside, *operands: inside(*operands)
    if target.startswith("torch.ops.higher_order."):
        raise TeacherMismatch(
            f"the program calls {target}: a part of its network runs otherwise than the rest",
            hint="export without autocast, checkpointing, conditions or loops inside forward",
        )
    operator = operators.find(target)
    _refuse_training(target, operators.is_random(operator), {name: value for name, _, value in given})
    return operator


def _refuse_training(target: str, is_random: bool, given: Mapping[str, Any]) -> None:
    """Raise TeacherMismatch for dropout and batch norm in train mode.

    A batch norm without running statistics may be standardised weights or a decomposed instance norm: whether it mixes
    images is found when the program is tried.
    """
    training = given.get("train", given.get("training", None if "dropout" in target else False))
    draws = given.get("dropout_p", 0) != 0 or (is_random and training is not False)
    if draws or (training and given.get("running_mean") is not None):
        raise TeacherMismatch(f"the program was exported in train mode: {target} is switched on", hint=EVAL_FIRST)


def _value(argument: Mapping[str, Any]) -> Any:
    """Return an argument of the JSON as a number, a named value, or a list of them."""
    [(kind, value)] = argument.items()
    if kind not in _VALUES:
        raise TeacherMismatch(
            f"the program gives an operator an argument of an unknown kind ({kind})", hint=operators.ADVICE
        )
    return _VALUES[kind](value)


_VALUES: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_tensor": lambda one: Named(one["name"]),
    "as_tensors": lambda several: [Named(one["name"]) for one in several],
    "as_name": Named,
    # JSON has no infinity, so it is text.
    "as_float": float,
    "as_floats": lambda several: [float(one) for one in several],
    "as_scalar_type": DTYPES.__getitem__,
    "as_memory_format": MEMORY_FORMATS.__getitem__,
    "as_layout": {STRIDED: torch.strided}.__getitem__,
    "as_device": lambda _: DEVICE,
    "as_graph": lambda one: Graph.of(one["graph"]),
    **dict.fromkeys(("as_int", "as_ints", "as_bool", "as_bools", "as_string"), lambda value: value),
    **dict.fromkeys(("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"), _value),
    **dict.fromkeys(
        ("as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"),
        lambda several: [_value(one) for one in several],
    ),
}


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Named):
        yield value.name
    elif isinstance(value, list):
        for one in value:
            yield from _names(one)


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Return the argument with each named value replaced by the value itself."""
    if isinstance(value, Named):
        return values[value.name]
    if isinstance(value, list):
        return [_filled(one, values) for one in value]
    if isinstance(value, Graph):
        return partial(value.run_inside, values[DEVICE.name])
    return value


def _bind(names: Any, results: Any, values: dict[str, Any]) -> None:
    if isinstance(names, Named):
        values[names.name] = results
    elif isinstance(names, list):
        for name, result in zip(names, results, strict=True):
            _bind(name, result, values)
