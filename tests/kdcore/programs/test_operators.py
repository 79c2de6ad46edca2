import operator

import pytest
import torch

from base.errors import TeacherMismatch
from kdcore.programs import operators

TEXT = {
    "approximate", "equation", "indexing", "mode", "norm", "ord", "padding", "padding_side", "reduce", "rounding_mode",
    "side",
    # Names of dimensions, which PyTorch has given up.
    "dim", "dim0", "dim1", "dim2", "dims", "end_dim", "names", "out_dim", "outdim", "start_dim",
}  # fmt: skip
"""The meanings of text arguments in the allowed operators: never a file."""


def test_find_operators_are_found_in_place_or_not():
    assert operators.find("torch.ops.aten.relu.default") is torch.ops.aten.relu.default
    assert operators.find("torch.ops.aten.relu_.default") is torch.ops.aten.relu_.default
    assert operators.find("torch.ops.aten.__and__.Tensor") is torch.ops.aten.__and__.Tensor
    assert operators.find("torch.ops.aten.sym_size.int")(torch.zeros(2, 3), 1) == 3
    assert operators.find("_operator.mul") is operator.mul


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.fbgemm_linear_fp16_weight.default",
        "torch.ops.aten.randn.default",
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.torchvision.nms.default",
        "torch.ops.mine.op.default",
        "torch.os.system",
        "torch.load",
        "_operator.pow",
        "_operator.attrgetter",
        "math.factorial",
        "os.system",
        "#namespace:op",
        "",
    ],
)
def test_find_what_is_not_on_the_list_is_refused_by_name(target: str):
    with pytest.raises(TeacherMismatch, match=r"which is not among what a program may call") as caught:
        operators.find(target)
    assert f"calls {target}," in caught.value.message


@pytest.mark.parametrize("target", ["torch.ops.aten.relu.out", "torch.ops.aten.mul.Fancy", "torch.ops.aten.mul"])
def test_find_what_this_pytorch_lacks_is_told_apart(target: str):
    with pytest.raises(
        TeacherMismatch, match=rf"which PyTorch {torch.__version__.split('+')[0]}.* does not have|no new"
    ):
        operators.find(target)


@pytest.mark.parametrize(
    "target", ["torch.ops.aten.mul.out", "torch.ops.aten.pow.int_to_int", "torch.ops.aten.add.str"]
)
def test_find_only_what_computes_a_new_tensor_is_called(target: str):
    with pytest.raises(TeacherMismatch, match="computes no new tensor"):
        operators.find(target)


def test_find_every_name_on_the_list_is_an_operator_and_none_takes_a_files_name():
    for name in operators.ATEN:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            try:
                found = operators.find(f"torch.ops.aten.{name}.{overload}")
            except TeacherMismatch:
                continue
            text = {one.name for one in found._schema.arguments if "str" in str(one.type)}
            assert text <= TEXT, f"{found} takes {text}"


@pytest.mark.parametrize("target", operators.ANYWHERE)
def test_find_attention_is_computed_wherever_the_tensors_are(target: str):
    """However the device spells it that the program was decomposed on."""
    name = target.split(".")[3]
    schema = getattr(torch.ops.aten, name).default._schema
    query, key, value = (torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(at)) for at in range(3))
    required = {"attn_bias": None, "compute_log_sumexp": False}
    more = [required[one.name] for one in schema.arguments[3:] if not one.has_default_value()]
    found, *beside = operators.find(target)(query, key, value, *more, is_causal=True, scale=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    assert torch.equal(found, expected) and len(beside) == len(schema.returns) - 1
    assert "dropout_p" in {one.name for one in schema.arguments}


def test_is_random_dropout_draws_and_relu_does_not():
    assert operators.is_random(torch.ops.aten.dropout.default)
    assert operators.is_random(torch.ops.aten.scaled_dot_product_attention.default)
    assert not operators.is_random(torch.ops.aten.relu.default) and not operators.is_random(operator.add)
