"""The operators that an untrusted program may call: those of image networks, as torch.export and its decompositions
spell them.

The list contains what is allowed, not what is forbidden: PyTorch has thousands of operators, some of which open files
(`aten.from_file`), trust raw pointers (`aten.fbgemm_*`) or draw random numbers, and any library may add more. A name
includes all its overloads on tensors and the operator in place (`relu_`).
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from base.errors import TeacherMismatch

_ATEN = """
    abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh ceil clamp clamp_max clamp_min clip copysign
    cos cosh deg2rad div divide erf erfc erfinv exp exp2 expm1 fix floor floor_divide fmod frac hypot lerp lgamma log
    log10 log1p log2 logaddexp logit maximum minimum mul multiply nan_to_num neg negative positive pow rad2deg
    reciprocal remainder round rsqrt rsub sgn sigmoid sign sin sinc sinh sqrt square sub subtract tan tanh true_divide
    trunc xlogy

    __and__ __or__ __xor__ all any bitwise_and bitwise_not bitwise_or bitwise_xor eq ge greater greater_equal gt
    isfinite isinf isnan le less less_equal logical_and logical_not logical_or logical_xor lt ne not_equal where

    amax amin aminmax argmax argmin argsort count_nonzero cummax cummin cumprod cumsum kthvalue linalg_matrix_norm
    linalg_norm linalg_vector_norm logcumsumexp logsumexp max mean median min nanmean nansum norm prod sort std std_mean
    sum topk var var_mean

    addbmm addmm addmv addr baddbmm bilinear bmm cdist dot einsum inner kron linalg_matmul linear matmul mm mv outer
    tensordot cosine_similarity pairwise_distance _cdist_forward

    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution col2im im2col

    batch_norm group_norm instance_norm layer_norm native_batch_norm native_group_norm native_layer_norm rms_norm
    _fused_rms_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _weight_norm _weight_norm_interface

    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_sigmoid_forward log_softmax
    mish prelu relu relu6 rrelu selu silu softmax softplus softshrink threshold _log_softmax _prelu_kernel _safe_softmax
    _softmax alpha_dropout dropout feature_alpha_dropout feature_dropout native_dropout

    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d _adaptive_avg_pool2d _adaptive_avg_pool3d

    gru lstm rnn_relu rnn_tanh scaled_dot_product_attention _native_multi_head_attention
    _transformer_encoder_layer_fwd

    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat channel_shuffle chunk clone
    column_stack concat concatenate constant_pad_nd contiguous copy detach diag_embed diagonal dsplit expand expand_as
    flatten flip fliplr flipud hsplit hstack lift lift_fresh lift_fresh_copy meshgrid moveaxis movedim mT narrow
    numpy_T pad permute pixel_shuffle pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg
    roll rot90 select select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t
    tensor_split tile transpose tril triu unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as
    vsplit vstack _unsafe_view

    bucketize embedding gather index index_add index_copy index_fill index_put index_select masked_fill masked_scatter
    one_hot scatter scatter_add scatter_reduce searchsorted take take_along_dim _unsafe_index

    affine_grid_generator grid_sampler grid_sampler_2d upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d

    arange eye fill full full_like linspace logspace new_full new_ones new_zeros ones ones_like scalar_tensor
    tril_indices triu_indices zero zeros zeros_like

    complex conj fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_irfft fft_irfft2 fft_irfftn fft_rfft
    fft_rfft2 fft_rfftn imag polar real view_as_complex view_as_real _conj _fft_c2c _fft_c2r _fft_r2c

    to type_as _to_copy sym_numel sym_size sym_storage_offset sym_stride
"""
ATEN = frozenset(_ATEN.split())

_ASSERTIONS = """
    _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _functional_assert_scalar
    sym_constrain_range sym_constrain_range_for_size _functional_sym_constrain_range
    _functional_sym_constrain_range_for_size
"""
ASSERTIONS = frozenset(_ASSERTIONS.split())
"""Operators that only compare a run with the traced one, also its devices and strides. They are left out."""

_ARITHMETIC = "add sub mul floordiv truediv mod neg pos eq ne le lt ge gt and_ or_"
_SYMBOLIC = "sym_float sym_int sym_ite sym_max sym_min sym_not"
NUMBERS: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in _ARITHMETIC.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC.split()},
    "math.trunc": math.trunc,
}
"""Arithmetic on sizes. Powers are not allowed: a few of them make a number that fills the memory."""


def _attention_for_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale), None


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, _mask: bool = False,
    *, scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return scaled_dot_product_attention(query, key, value, None, dropout_p, is_causal, scale=scale), *[None] * 8


def _efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, _sums: bool, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return scaled_dot_product_attention(query, key, value, attn_bias, dropout_p, is_causal, scale=scale), *[None] * 3


ANYWHERE: dict[str, Callable[..., Any]] = {
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default": _attention_for_cpu,
    "torch.ops.aten._scaled_dot_product_flash_attention.default": _flash_attention,
    "torch.ops.aten._scaled_dot_product_efficient_attention.default": _efficient_attention,
}
"""Attention, which decompositions name by device kind. Their other results are for gradients only."""

ADVICE = (
    "export a network of PyTorch's own layers; ExportedProgram.run_decompositions() may spell it in plainer operators"
)


def is_assertion(target: str) -> bool:
    return target.removeprefix("torch.ops.aten.").partition(".")[0] in ASSERTIONS


def find(target: str) -> Callable[..., Any]:
    """Return the operator of a target. Raises TeacherMismatch if it is not allowed or does not exist."""
    if target in (ours := NUMBERS | ANYWHERE):
        return ours[target]
    name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    if not target.startswith("torch.ops.aten.") or _in_place_or_not(name) not in ATEN:
        raise TeacherMismatch(f"the program calls {target}, which is not among what a program may call", hint=ADVICE)
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        raise TeacherMismatch(
            f"the program calls {target}, which PyTorch {torch.__version__} does not have",
            hint="export it with the version of PyTorch that runs here",
        )
    op: torch._ops.OpOverload = getattr(packet, overload)
    # TorchScript's overloads, on plain numbers and text, return no tensor; overloads with `out` write into any tensor.
    computes = any("Tensor" in str(result.type) for result in op._schema.returns) or name.startswith("sym_")
    if not computes or any(argument.is_out for argument in op._schema.arguments):
        raise TeacherMismatch(f"the program calls {target}, which computes no new tensor", hint=ADVICE)
    return op


def _in_place_or_not(name: str) -> str:
    return name if name.startswith("__") else name.removesuffix("_")


def is_random(op: Callable[..., Any]) -> bool:
    """Return True for an op that can draw random numbers; dropout and attention may have that switched off."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
