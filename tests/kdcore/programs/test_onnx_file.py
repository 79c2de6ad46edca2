"""What is found in an ONNX file before onnxruntime reads it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from base.errors import EngineError, TeacherMismatch
from kdcore import programs
from kdcore.programs import onnx_file
from tests.kdcore.programs.onnx_making import MEAN_COLOUR, needs_onnx, node, plain, saved, tensor

pytestmark = needs_onnx


def outside(name: str = "w", where: str = "../../etc/passwd") -> Any:
    """A tensor that another file holds."""
    from onnx import StringStringEntryProto, TensorProto

    return TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[3, 4], data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key="location", value=where)],
    )  # fmt: skip


def graph_of(*nodes: Any) -> Any:
    from onnx import helper

    output = helper.make_tensor_value_info("inner", 1, ["N", 4])
    return helper.make_graph(list(nodes), "inner", [], [output])


def with_initializer(value: Any) -> Any:
    content = plain()
    content.graph.initializer[0].CopyFrom(value)
    return content


def with_function() -> Any:
    from onnx import helper

    content = plain()
    identity = helper.make_node("Identity", ["a"], ["b"])
    made = helper.make_function("own", "Twice", ["a"], ["b"], [identity], [helper.make_opsetid("", 17)])
    content.functions.append(made)
    return content


def branch(inner: Any) -> Any:
    return plain(node("If", "c", "y", then_branch=graph_of(inner), else_branch=graph_of(inner)))


HOSTILE: list[tuple[str, Callable[[], Any], str]] = [
    ("weights outside", lambda: with_initializer(outside()), r"'w' in another file \('../../etc/passwd'\)"),
    ("an absolute path", lambda: with_initializer(outside(where="/etc/passwd")), "'/etc/passwd'.*never opened"),
    ("an attribute outside", lambda: plain(node("Constant", "", "y", value=outside())), "in another file"),
    ("a branch outside", lambda: branch(node("Constant", "", "inner", value=outside())), "in another file"),
    ("a loop", lambda: plain(node("Loop", "n c logits", "y", body=graph_of())), "uses Loop: a loop"),
    ("a scan", lambda: plain(node("Scan", "logits", "y", num_scan_inputs=1, body=graph_of())), "uses Scan: a loop"),
    ("a loop in a branch", lambda: branch(node("Loop", "n c logits", "inner", body=graph_of())), "uses Loop"),
    ("random numbers", lambda: plain(("RandomNormalLike", "logits", "y")), "RandomNormalLike: random numbers"),
    ("a custom operator", lambda: plain(node("Secret", "logits", "y", domain="own.ops")), r"operator own\.ops\.Secret"),
    ("an operator of onnxruntime", lambda: plain(node("Gelu", "logits", "y", domain="com.microsoft")), r"microsoft\.G"),
    ("image files", lambda: plain(("ImageDecoder", "logits", "y")), "decoding of image files"),
    ("functions", with_function, "operators of its own, first Twice"),
    ("no nodes", lambda: type(plain())(ir_version=8), "holds no graph"),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_look_through_refuses_what_is_not_one_file_of_standard_operators(
    tmp_path: Path, make: Callable[[], Any], words: str
):
    with pytest.raises(TeacherMismatch, match=words) as caught:
        onnx_file.look_through(saved(tmp_path / "t.onnx", make()))
    assert caught.value.hint


def test_look_through_refuses_a_file_that_is_cut_short_wherever_it_is_cut(tmp_path: Path):
    whole, path = saved(tmp_path / "t.onnx", plain()).read_bytes(), tmp_path / "cut.onnx"
    for end in range(3, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(TeacherMismatch):
            programs.inspect(path)


def test_look_through_refuses_a_file_of_too_many_bytes_or_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path / "t.onnx", plain())
    for name, words in (("BYTES", "a protocol buffer has at most 10"), ("PARTS", "more than 10 parts")):
        with monkeypatch.context() as patch, pytest.raises(TeacherMismatch, match=words):
            patch.setattr(onnx_file, name, 10)
            onnx_file.look_through(path)


def test_look_through_counts_the_numbers_of_weights_only(tmp_path: Path):
    shape = tensor("s", 1, 4, whole=True)
    content = plain(("Reshape", "logits s", "y"), constants=[shape], images=(1, 3, 8, 8), logits=(1, 4))
    assert onnx_file.look_through(saved(tmp_path / "t.onnx", content)).parameters == 12
    assert len(MEAN_COLOUR) == len(content.graph.node) - 1


def test_look_through_names_a_text_that_is_none_as_damage(tmp_path: Path):
    path = saved(tmp_path / "t.onnx", plain())
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatM\xff\xfe"))
    with pytest.raises(TeacherMismatch, match=r"damaged|cannot read"):
        programs.inspect(path)


def test_inspect_ends_with_an_error_of_the_engine_for_changed_bytes(tmp_path: Path):
    """A sample; 2,500 others were tried by hand."""
    whole, path, random = saved(tmp_path / "t.onnx", plain()).read_bytes(), tmp_path / "t.onnx", Random(1)
    for _ in range(60):
        changed = bytearray(whole)
        changed[random.randrange(3, len(whole))] = random.randrange(256)
        path.write_bytes(changed)
        with suppress(EngineError):
            programs.inspect(path)
