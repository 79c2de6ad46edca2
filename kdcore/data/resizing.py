"""Boxes cut from pictures and resized, for a whole batch at once, in whole numbers: the same bytes on every device.

A box is given in pixels of a frame, a height and width: the picture itself, or the same picture at another size. So one
box can be cut from a picture that is stored at several sizes.

It resizes rows first, then columns, each rounded to bytes. A box of a picture that is no larger than the output is
interpolated (bilinear). A larger picture may shrink: then it is averaged by a triangle that reaches from one output
pixel's middle to the next ones', as in Pillow's bilinear resizing and torchvision's with antialias.

Shapes: N batch, C channels, H height, W width, P output places of one dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_WEIGHT_BITS = 7
_AT_ONCE = 8
"""Images of which a CPU averages rows at the same time: few enough for its cache."""


class Boxes(NamedTuple):
    """One box in each image, in pixels of the frame."""

    top_N: Tensor
    left_N: Tensor
    height_N: Tensor
    width_N: Tensor


class _Dimension(NamedTuple):
    """The boxes in one dimension: their first pixels and lengths in a frame, the stored and the output size."""

    start_N: Tensor
    length_N: Tensor
    frame: int
    stored: int
    size: int


def resized_crop(
    pixels: Tensor,
    boxes: Boxes,
    flipped_N: Tensor,
    frame: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Cut a box from each image, resize it to `size`, mirror if `flipped` is 1. Bytes N × C × H × W.

    `frame`: height and width in whose pixels the boxes are given; `size`: of the output. Default: those of the images.
    """
    height, width = pixels.shape[2:]
    frame, size = frame or (height, width), size or (height, width)
    down = _Dimension(boxes.top_N, boxes.height_N, frame[0], height, size[0])
    across = _Dimension(boxes.left_N, boxes.width_N, frame[1], width, size[1])
    tall = _resized_rows(pixels, down, None)
    return _resized_rows(tall.transpose(2, 3).contiguous(), across, flipped_N).transpose(2, 3).contiguous()


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return whole images in another size, in the same way."""
    count, _, height, width = pixels.shape
    zero = torch.zeros(count, dtype=torch.int64, device=pixels.device)
    return resized_crop(pixels, Boxes(zero, zero, zero + height, zero + width), zero, size=size)


def _resized_rows(pixels: Tensor, of: _Dimension, flipped_N: Tensor | None) -> Tensor:
    if of.stored <= of.size:
        return _stretched(pixels, *(_mirrored(x, flipped_N) for x in _neighbours(of)))
    first_NP, weights_NPk = _triangles(of)
    return _averaged(pixels, _mirrored(first_NP, flipped_N), _mirrored(weights_NPk, flipped_N))


def _mirrored(places_NP: Tensor, flipped_N: Tensor | None) -> Tensor:
    if flipped_N is None:
        return places_NP
    return torch.where(flipped_N.bool().view(-1, *[1] * (places_NP.dim() - 1)), places_NP.flip(1), places_NP)


def _stretched(pixels: Tensor, low_NP: Tensor, high_NP: Tensor, weight_NP: Tensor) -> Tensor:
    """Return rows that each blend two source rows; int16 holds a byte times 2⁷ exactly."""
    count, channels, height, width = pixels.shape
    rows = pixels.reshape(-1, width)
    plane_NC = torch.arange(count * channels, device=pixels.device).view(count, channels, 1) * height
    low, high = (rows.index_select(0, (plane_NC + x[:, None]).flatten()).short() for x in (low_NP, high_NP))
    weight = weight_NP[:, None].expand(-1, channels, -1).reshape(-1, 1)
    high.sub_(low).mul_(weight).add_(1 << _WEIGHT_BITS - 1).bitwise_right_shift_(_WEIGHT_BITS).add_(low)
    return high.to(torch.uint8).view(count, channels, -1, width)


def _middles(of: _Dimension) -> tuple[Tensor, int]:
    """Return the middle of each output place in the stored picture, as a numerator and its denominator."""
    output_P = torch.arange(of.size, device=of.start_N.device)
    start_N1, length_N1 = of.start_N[:, None], of.length_N[:, None]
    middle_NP = (2 * of.size * start_N1 + (2 * output_P + 1) * length_N1) * of.stored - of.size * of.frame
    return middle_NP, 2 * of.size * of.frame


def _neighbours(of: _Dimension) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two source positions around each output position's middle, inside of the box, and the second's weight
    in units of 2⁻⁷."""
    middle_NP, whole = _middles(of)
    first_N1 = 2 * of.size * of.stored * of.start_N[:, None]
    last_N1 = first_N1 + 2 * of.size * (of.stored * of.length_N[:, None] - of.frame)
    middle_NP = torch.maximum(torch.minimum(middle_NP, last_N1), first_N1)
    low_NP = middle_NP // whole
    weight_NP = ((middle_NP - low_NP * whole) << _WEIGHT_BITS) // whole
    return low_NP, (low_NP + 1).clamp(max=of.stored - 1), weight_NP.short()


def _triangles(of: _Dimension) -> tuple[Tensor, Tensor]:
    """Return the first source position of each output position, and the weights of the k positions from there on, in
    units of 2⁻⁷. Positions outside of the box have no weight."""
    middle_NP, whole = _middles(of)
    reach_N1 = (2 * of.stored * of.length_N[:, None]).clamp(min=whole)
    first_NP = (middle_NP - reach_N1) // whole + 1
    count = 2 * -(-of.stored // of.size) + 1
    position_NPk = first_NP[:, :, None] + torch.arange(count, device=middle_NP.device)
    begin_N = (2 * of.start_N * of.stored + of.frame) // (2 * of.frame)
    end_N = (2 * (of.start_N + of.length_N) * of.stored + of.frame) // (2 * of.frame)
    end_N = torch.maximum(end_N, begin_N + 1).clamp(max=of.stored)
    begin_N = torch.minimum(begin_N, end_N - 1)
    inside_NPk = (position_NPk >= begin_N[:, None, None]) & (position_NPk < end_N[:, None, None])
    weight_NPk = (reach_N1[:, :, None] - (position_NPk * whole - middle_NP[:, :, None]).abs()).clamp(min=0)
    weight_NPk = weight_NPk * inside_NPk
    total_NP1 = weight_NPk.sum(2, keepdim=True)
    weight_NPk = ((weight_NPk << _WEIGHT_BITS) + total_NP1 // 2) // total_NP1
    # The largest weight takes what rounding has left: their sum is 1, and a byte times it fits into int16.
    rest_NP1 = (1 << _WEIGHT_BITS) - weight_NPk.sum(2, keepdim=True)
    return first_NP, weight_NPk.scatter_add(2, weight_NPk.argmax(2, keepdim=True), rest_NP1).short()


def _averaged(pixels: Tensor, first_NP: Tensor, weights_NPk: Tensor) -> Tensor:
    """Return rows that are each a weighted mean of k source rows."""
    if pixels.device.type == "cpu" and len(pixels) > _AT_ONCE:
        parts = (torch.split(x, _AT_ONCE) for x in (pixels, first_NP, weights_NPk))
        return torch.cat([_averaged(*part) for part in zip(*parts, strict=True)])
    count, channels, height, width = pixels.shape
    rows = pixels.reshape(-1, width)
    plane_NC = torch.arange(count * channels, device=pixels.device).view(count, channels, 1) * height
    total = pixels.new_full((count * channels * first_NP.shape[1], width), 1 << _WEIGHT_BITS - 1, dtype=torch.int16)
    for k in range(weights_NPk.shape[2]):
        place_NP = (first_NP + k).clamp(0, height - 1)
        weight = weights_NPk[:, None, :, k].expand(-1, channels, -1).reshape(-1, 1)
        total.addcmul_(rows.index_select(0, (plane_NC + place_NP[:, None]).flatten()).short(), weight)
    return (total >> _WEIGHT_BITS).to(torch.uint8).view(count, channels, -1, width)
