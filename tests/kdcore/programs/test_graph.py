"""Graphs written by hand, as the JSON has them, and networks whose graphs are out of the ordinary."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from base.errors import TeacherMismatch
from kdcore import programs
from kdcore.programs.graph import Graph
from tests.kdcore.programs.making import exported

CPU = torch.device("cpu")


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def node(target: str, outputs: list[Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    inputs = [{"name": f"argument{at}", "arg": argument, "kind": 1} for at, argument in enumerate(arguments)]
    inputs += [{"name": name, "arg": option, "kind": 2} for name, option in options.items()]
    return {"target": target, "inputs": inputs, "outputs": outputs}


def graph(*nodes: dict[str, Any], output: dict[str, Any] | None = None) -> Graph:
    return Graph.of({"inputs": [tensor("x")], "nodes": list(nodes), "outputs": [output or tensor("y")]})


def run(of: Graph, x: torch.Tensor, device: torch.device = CPU) -> Any:
    return of.run({"x": x}, device)[0]


X = torch.arange(6.0).view(2, 3)


def test_graph_arguments_of_every_kind():
    calls = graph(
        node("torch.ops.aten.sym_size.int", [{"as_sym_int": {"as_name": "n"}}], tensor("x"), {"as_int": 0}),
        node("_operator.mul", [{"as_sym_int": {"as_name": "m"}}], {"as_sym_int": {"as_name": "n"}}, {"as_int": 3}),
        node("torch.ops.aten.view.default", [tensor("a")], tensor("x"), {"as_sym_ints": [{"as_name": "m"}]}),
        node("torch.ops.aten.to.dtype", [tensor("b")], tensor("a"), {"as_scalar_type": 8}),
        node("torch.ops.aten.clamp.default", [tensor("c")], tensor("b"), {"as_none": True}, {"as_float": "Infinity"}),
        node(
            "torch.ops.aten.zeros.default", [tensor("d")], {"as_ints": [6]}, dtype={"as_scalar_type": 8},
            layout={"as_layout": 7}, device={"as_device": {"type": "cpu"}}, pin_memory={"as_bool": False},
        ),
        node("torch.ops.aten.cat.default", [tensor("e")], {"as_tensors": [{"name": "c"}, {"name": "d"}]}),
        node("torch.ops.aten.index.Tensor", [tensor("f")], tensor("e"), {"as_optional_tensors": [tensor("i")]}),
        node("torch.ops.aten.contiguous.default", [tensor("y")], tensor("f"), memory_format={"as_memory_format": 1}),
    )  # fmt: skip
    index = torch.tensor([5, 0, 7])
    assert calls.run({"x": X, "i": index}, CPU)[0].tolist() == [5, 0, 0]


def test_graph_results_of_every_kind():
    calls = graph(
        node("torch.ops.aten.max.dim", [tensor("most"), tensor("unused")], tensor("x"), {"as_int": 1}),
        node("torch.ops.aten.unbind.int", [{"as_tensors": [{"name": "one"}, {"name": "two"}]}], tensor("x")),
        node("torch.ops.aten.sum.default", [tensor("all")], tensor("most")),
        node("torch.ops.aten.add.Tensor", [tensor("y")], tensor("two"), tensor("all"), alpha={"as_int": 10}),
    )
    assert run(calls, X).tolist() == [73, 74, 75]


def test_graph_values_are_let_go_once_they_are_spent():
    names = "xabcdy"
    calls = graph(*(node("torch.ops.aten.relu.default", [tensor(to)], tensor(of)) for of, to in pairwise(names)))
    assert [call.spent for call in calls.calls] == [frozenset(name) for name in "xabcd"]
    values = {"x": X, "weight": X}
    calls.run(values, CPU)
    assert values.keys() == {"weight", "y", "the device"}


def test_a_device_in_the_graph_is_the_one_that_it_runs_on():
    calls = graph(
        node(
            "torch.ops.aten.zeros.default", [tensor("z")], {"as_ints": [2, 3]}, device={"as_device": {"type": "cuda"}}
        ),
        node("torch.ops.aten.add.Tensor", [tensor("y")], tensor("x"), tensor("z")),
    )
    assert torch.equal(run(calls, X), X)
    assert run(calls, X.to("meta"), torch.device("meta")).device.type == "meta"


def test_graph_what_tracing_asserted_is_left_out():
    calls = graph(
        node("torch.ops.aten._assert_tensor_metadata.default", [], tensor("x"), device={"as_device": {"type": "cuda"}}),
        node("torch.ops.aten.relu.default", [tensor("y")], tensor("x")),
    )
    assert len(calls.calls) == 1


@pytest.mark.parametrize("argument", [{"as_custom_obj": {}}, {"as_operator": "os.system"}, {"as_new_kind": 3}])
def test_graph_arguments_that_are_no_tensors_or_numbers_are_refused(argument: dict[str, Any]):
    with pytest.raises(TeacherMismatch, match=f"of an unknown kind .{next(iter(argument))}"):
        graph(node("torch.ops.aten.relu.default", [tensor("y")], argument))


# What torch.export makes of networks


class Frozen(nn.Module):
    """A body without gradients inside a network, twice deep, and two results out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.body(images)
            with torch.enable_grad():
                scale = features.amax((1, 2, 3)) + torch.arange(1)
        return self.head(features.mean((2, 3)) * scale[:, None])


def test_graph_a_part_without_gradients_runs_inside(tmp_path: Path):
    torch.manual_seed(0)
    network, images = Frozen().eval(), torch.randn(4, 3, 6, 6)
    program = programs.open_program(exported(network, tmp_path / "frozen.pt2", images))
    assert torch.equal(program(images), network(images))


class Autocast(nn.Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(images.flatten(1)).float()


class Block(nn.Module):
    """Takes images, so that any layer can stand in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(images).mean((2, 3)))


def test_graph_a_part_in_other_precision_is_refused(tmp_path: Path):
    network = nn.Sequential(Autocast(48, 3), nn.ReLU())
    with pytest.raises(TeacherMismatch, match=r"wrap_with_autocast.*otherwise than the rest"):
        programs.inspect(exported(network, tmp_path / "t.pt2", torch.zeros(2, 3, 4, 4)))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Dropout2d(0.5)], ids=lambda it: it._get_name()
)
@pytest.mark.parametrize("plainer", [False, True], ids=["", "plainer"])
def test_graph_train_mode_is_refused(tmp_path: Path, layer: nn.Module, plainer: bool):
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TeacherMismatch) as caught:
        programs.inspect(exported(Block(layer).train(), tmp_path / "t.pt2", images, plainer=plainer))
    assert "model.eval()" in str(caught.value.hint) or "bernoulli" in caught.value.message
    programs.inspect(exported(Block(layer).eval(), tmp_path / "e.pt2", images, plainer=plainer))


def test_graph_instance_norm_is_no_train_mode(tmp_path: Path):
    torch.manual_seed(0)
    network, images = Block(nn.InstanceNorm2d(3)).eval(), torch.randn(3, 3, 6, 6) ** 2
    program = programs.open_program(exported(network, tmp_path / "t.pt2", images, plainer=True))
    assert torch.allclose(program(images), network(images), atol=1e-6)


class Standardized(nn.Conv2d):
    """Weight standardisation as normaliser-free networks write it: batch norm of the weights."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return nn.functional.conv2d(images, weight)


@pytest.mark.parametrize("plainer", [False, True], ids=["", "plainer"])
def test_graph_weight_standardisation_is_no_train_mode(tmp_path: Path, plainer: bool):
    torch.manual_seed(0)
    network, images = Block(Standardized(3, 3, 2)).eval(), torch.randn(3, 3, 6, 6)
    program = programs.open_program(exported(network, tmp_path / "t.pt2", images, plainer=plainer))
    assert torch.allclose(program(images), network(images), atol=1e-6)


def test_graph_batch_norm_without_memory_is_found_out_by_trial(tmp_path: Path):
    network = Block(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    network.layer.weight.data = torch.tensor([1.0, 2.0, 3.0])
    path = exported(network, tmp_path / "t.pt2", torch.zeros(2, 3, 4, 4))
    with pytest.raises(TeacherMismatch, match="depend on the batch around it"):
        programs.open_program(path)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"])
def test_graph_attention_draws_only_with_dropout(name: str, p: float):
    outputs = [tensor("y"), tensor("sums")] if name.startswith("_") else [tensor("y")]
    call = node(f"torch.ops.aten.{name}.default", outputs, tensor("x"), tensor("x"), tensor("x"))
    call["inputs"].append({"name": "dropout_p", "arg": {"as_float": p}, "kind": 2})
    if p:
        with pytest.raises(TeacherMismatch, match="exported in train mode"):
            graph(call)
    else:
        assert run(graph(call), X[None, None]).shape == (1, 1, 2, 3)
