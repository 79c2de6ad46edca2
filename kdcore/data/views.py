"""What a sample looks like in an epoch: a pure function of (seed, epoch, row), computed for a whole batch at once.

The same sample gives the same bytes in whatever batch it stands, on a CPU and on a GPU: every random number is a hash
(see counters), and all arithmetic on pixels is on integers. So a resumed run goes on with the views it would have had,
and a teacher's outputs may be kept by (row, view). Padding is black before normalisation, as in the field's
RandomCrop → ToTensor → Normalize.

Shapes: N batch, C channels, H × W places, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kdcore.data import counters, mixing
from kdcore.data.resident import Images
from kdcore.spec import Augmentation, CropFlip, Mix, RandomResizedCrop

_ORDER, _VIEW, _MIX = 1, 2, 3
_RATIO_STEPS = 4096
_WEIGHT_BITS = 7


def order(n: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The permutation of 0..n-1 in which an epoch goes through n samples."""
    states = counters.streams(counters.key(_ORDER, seed, epoch), torch.arange(n, device=device))
    return torch.argsort(counters.draws(states, 1)[0], stable=True)


class Views:
    """Batches of augmented samples."""

    def __init__(self, augmentation: Augmentation, mix: Mix | None, num_classes: int) -> None:
        self.augmentation = augmentation
        self.mix = mix
        self.num_classes = num_classes
        self._quantiles = mixing.beta_quantiles(mix.alpha) if mix is not None else None

    def batch(self, images: Images, index: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Views of the rows `index`: pixels uint8 N × C × H × W and labels int64 N.

        Mixed: pixels float32 in 0..255 and labels float32 N × K; who is mixed with whom depends on the batch's rows.
        An image without a label (-1) then weighs nothing in any class.
        """
        index = index.to(images.pixels.device)
        states = self._states(index, seed, epoch)
        pixels = self._augmented(images.pixels.index_select(0, index), states)
        labels = images.labels.index_select(0, index)
        if self.mix is None or self._quantiles is None:
            return pixels, labels
        mix = mixing.mixup if self.mix.name == "mixup" else mixing.cutmix
        self._quantiles = self._quantiles.to(index.device)
        states = counters.streams(counters.key(_MIX, seed, epoch), index)
        return mix(pixels, self._targets(labels), states, self._quantiles)

    def distinct(self) -> int | None:
        """How many views one sample has: 162 for a crop of 32 from 40 with flips. None: too many to count or keep."""
        if self.mix is not None or isinstance(self.augmentation, RandomResizedCrop):
            return None
        if isinstance(self.augmentation, CropFlip):
            return (2 * self.augmentation.padding + 1) ** 2 * (2 if self.augmentation.flip else 1)
        return 1

    def view_id(self, index: Tensor, seed: int, epoch: int) -> Tensor:
        """Which of its `distinct` views each row shows (int64 N): equal numbers are equal bytes."""
        assert self.distinct() is not None, "these views are not numbered"
        if not isinstance(self.augmentation, CropFlip):
            return torch.zeros_like(index)
        top, left, flipped = _offsets(self.augmentation, self._states(index, seed, epoch))
        return (top * (2 * self.augmentation.padding + 1) + left) * (2 if self.augmentation.flip else 1) + flipped

    def _targets(self, labels_N: Tensor) -> Tensor:
        return one_hot(labels_N + 1, self.num_classes + 1)[:, 1:].float()

    def _states(self, index: Tensor, seed: int, epoch: int) -> Tensor:
        return counters.streams(counters.key(_VIEW, seed, epoch), index)

    def _augmented(self, pixels: Tensor, states: Tensor) -> Tensor:
        match self.augmentation:
            case CropFlip() as how:
                return crop_flip(pixels, *_offsets(how, states), how.padding)
            case RandomResizedCrop() as how:
                *box, coin = counters.draws(states, 5)
                flipped = counters.below(coin, 2) if how.flip else torch.zeros_like(coin)
                return resized_crop(pixels, _boxes(how, box, *pixels.shape[2:]), flipped)
            case _:
                return pixels


def crop_flip(pixels: Tensor, top_N: Tensor, left_N: Tensor, flipped_N: Tensor, padding: int) -> Tensor:
    """Pad with zeros, cut N × C × H × W back out at (top, left), then mirror where `flipped` is 1.

    One gather of pixel rows: rows are cut from the padded batch, or from its mirror image where the column counts from
    the other side.
    """
    count, channels, height, width = pixels.shape
    tall, wide = height + 2 * padding, width + 2 * padding
    both = pixels.new_zeros(2, count, channels, tall, wide)
    inner = both[..., padding : padding + height, padding : padding + width]
    inner[0] = pixels
    inner[1] = pixels.flip(-1)
    left_N = torch.where(flipped_N.bool(), 2 * padding - left_N, left_N)
    device = pixels.device
    sample_N = flipped_N * count + torch.arange(count, device=device)
    first_N = sample_N * (channels * tall * wide) + top_N * wide + left_N
    step_CH = (
        torch.arange(channels, device=device)[:, None] * (tall * wide) + torch.arange(height, device=device) * wide
    )
    windows = both.as_strided((both.numel() - width + 1, width), (1, 1))
    rows = windows.index_select(0, (first_N[:, None, None] + step_CH).flatten())
    return rows.view(count, channels, height, width)


class Boxes(NamedTuple):
    """One box in each image."""

    top_N: Tensor
    left_N: Tensor
    height_N: Tensor
    width_N: Tensor


def resized_crop(pixels: Tensor, boxes: Boxes, flipped_N: Tensor) -> Tensor:
    """Cut a box from each image, bring it back to full size (bilinear, as a crop only grows), mirror where asked.

    Rows first, then columns, each rounded to bytes, as Pillow does.
    """
    height, width = pixels.shape[2:]
    tall = _stretched(pixels, *_taps(boxes.top_N, boxes.height_N, height))
    columns = (torch.where(flipped_N.bool()[:, None], x.flip(1), x) for x in _taps(boxes.left_N, boxes.width_N, width))
    return _stretched(tall.transpose(2, 3).contiguous(), *columns).transpose(2, 3).contiguous()


def _stretched(pixels: Tensor, low_NH: Tensor, high_NH: Tensor, weight_NH: Tensor) -> Tensor:
    """Each output row is a blend of two source rows; int16 holds a byte times 2⁷ exactly."""
    count, channels, height, width = pixels.shape
    rows = pixels.reshape(-1, width)
    plane_NC = torch.arange(count * channels, device=pixels.device).view(count, channels, 1) * height
    low, high = (rows.index_select(0, (plane_NC + x[:, None]).flatten()).short() for x in (low_NH, high_NH))
    weight = weight_NH[:, None].expand(-1, channels, -1).reshape(-1, 1)
    high.sub_(low).mul_(weight).add_(1 << _WEIGHT_BITS - 1).bitwise_right_shift_(_WEIGHT_BITS).add_(low)
    return high.to(torch.uint8).view(pixels.shape)


def _offsets(how: CropFlip, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top and left in 0..2·padding, and 1 where mirrored."""
    top, left, coin = counters.draws(states, 3)
    places = 2 * how.padding + 1
    flipped = counters.below(coin, 2) if how.flip else torch.zeros_like(coin)
    return counters.below(top, places), counters.below(left, places), flipped


def _boxes(how: RandomResizedCrop, draws: list[Tensor], height: int, width: int) -> Boxes:
    """Top, left, height and width of a box of random area and of random aspect ratio (even in its logarithm).

    A box that is wider or taller than the image is narrowed to it. Where torchvision draws again, up to ten times.
    """
    low, high = how.scale
    area = (low + (high - low) * counters.unit(draws[0])) * (height * width)
    roots = _root_ratios(how.ratio).to(area.device)
    root = roots[counters.below(draws[1], _RATIO_STEPS)]
    side = area.sqrt()
    tall = (side / root).round().long().clamp(1, height)
    wide = (side * root).round().long().clamp(1, width)
    top = (counters.unit(draws[2]) * (height - tall + 1)).long()
    left = (counters.unit(draws[3]) * (width - wide + 1)).long()
    return Boxes(top, left, tall, wide)


def _root_ratios(ratio: tuple[float, float]) -> Tensor:
    """Square roots of aspect ratios to draw from: a table, because exp on a CPU and a GPU differ in the last bit."""
    low, high = torch.tensor(ratio, dtype=torch.float64).log()
    middles = (torch.arange(_RATIO_STEPS, dtype=torch.float64) + 0.5) / _RATIO_STEPS
    roots: Tensor = ((low + (high - low) * middles) / 2).exp()
    return roots


def _taps(start_N: Tensor, length_N: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each output place: the two source places around its centre, and the second one's weight in units of 2⁻⁷."""
    whole = 2 * size
    middle = (2 * torch.arange(size, device=start_N.device) + 1) * length_N[:, None] - size
    middle = middle.clamp(min=0)
    low = middle // whole
    weight = ((middle - low * whole) << _WEIGHT_BITS) // whole
    last = length_N[:, None] - 1
    high = torch.minimum(low + 1, last)
    return start_N[:, None] + low, start_N[:, None] + high, weight.short()
