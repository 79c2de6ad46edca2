"""Augmented views of samples: pure functions of (seed, epoch, row), computed for a whole batch at once.

A view does not depend on the device nor, unless images are mixed, on the batch around it: every random number is a hash
(`counter_rng`), and all arithmetic on pixels is on integers. So a resumed run gets the same views, and a teacher's
outputs can be cached by row and view id. Padding is black before normalisation, as in the usual RandomCrop →
ToTensor → Normalize.

Shapes: N batch, C channels, H height, W width, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kdcore.data import counter_rng, mixing
from kdcore.data.images import Images
from kdcore.lesson import Batch
from kdcore.spec import Augmentation, CropFlip, Mix, RandomResizedCrop

_ORDER, _VIEW, _MIX = 1, 2, 3
_RATIO_STEPS = 4096
_WEIGHT_BITS = 7


def order(n: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the order of the n samples in an epoch, a permutation of 0..n-1."""
    states = counter_rng.streams(counter_rng.key(_ORDER, seed, epoch), torch.arange(n, device=device))
    return torch.argsort(counter_rng.draws(states, 1)[0], stable=True)


class Views:
    """Batches of augmented samples."""

    def __init__(self, augmentation: Augmentation, mix: Mix | None, num_classes: int) -> None:
        self.augmentation = augmentation
        self.mix = mix
        self.num_classes = num_classes
        self._quantiles = mixing.beta_quantiles(mix.alpha) if mix is not None else None

    def batch(self, images: Images, index: Tensor, seed: int, epoch: int) -> Batch:
        """Return views of the rows `index` in an epoch, counted from 0: pixels uint8 N × C × H × W, labels int64 N.

        Mixed images are float32 in 0..255 and their labels float32 N × K. The batch's rows determine which images are
        mixed. An image without a label (-1) then has weight 0 in every class.
        """
        index = index.to(images.pixels.device)
        states = counter_rng.streams(counter_rng.key(_VIEW, seed, epoch), index)
        pixels, view_ids = self._augmented(images.pixels.index_select(0, index), states)
        labels = images.labels.index_select(0, index)
        if self.mix is None or self._quantiles is None:
            return Batch(pixels, labels, index, epoch + 1, view_ids)
        mix = mixing.mixup if self.mix.name == "mixup" else mixing.cutmix
        self._quantiles = self._quantiles.to(index.device)
        states = counter_rng.streams(counter_rng.key(_MIX, seed, epoch), index)
        targets_NK = one_hot(labels + 1, self.num_classes + 1)[:, 1:].float()
        return Batch(*mix(pixels, targets_NK, states, self._quantiles), index, epoch + 1)

    def _augmented(self, pixels: Tensor, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return views and ids: 0..161 for a crop of 32 from 40 with flips, 0 without augmentation, None for boxes."""
        match self.augmentation:
            case CropFlip(padding=padding, flip=flip) as how:
                top, left, flipped = _offsets(how, states)
                view_ids = (top * (2 * padding + 1) + left) * (2 if flip else 1) + flipped
                return crop_flip(pixels, top, left, flipped, padding), view_ids
            case RandomResizedCrop() as how:
                *box, coin = counter_rng.draws(states, 5)
                flipped = counter_rng.below(coin, 2) if how.flip else torch.zeros_like(coin)
                return resized_crop(pixels, _boxes(how, box, *pixels.shape[2:]), flipped), None
            case _:
                return pixels, torch.zeros_like(states)


def crop_flip(pixels: Tensor, top_N: Tensor, left_N: Tensor, flipped_N: Tensor, padding: int) -> Tensor:
    """Pad with zeros, cut N × C × H × W back out at (top, left), then mirror where `flipped` is 1.

    One gather of pixel rows, from the padded batch or from its mirror image, where the column counts from the other
    side.
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
    """Cut a box from each image, resize it to full size (bilinear, as a crop only grows), mirror if `flipped` is 1.

    It resizes rows first, then columns, each rounded to bytes, as Pillow does.
    """
    height, width = pixels.shape[2:]
    tall = _stretched(pixels, *_neighbours(boxes.top_N, boxes.height_N, height))
    columns = (
        torch.where(flipped_N.bool()[:, None], x.flip(1), x) for x in _neighbours(boxes.left_N, boxes.width_N, width)
    )
    return _stretched(tall.transpose(2, 3).contiguous(), *columns).transpose(2, 3).contiguous()


def _stretched(pixels: Tensor, low_NH: Tensor, high_NH: Tensor, weight_NH: Tensor) -> Tensor:
    """Return rows that each blend two source rows; int16 holds a byte times 2⁷ exactly."""
    count, channels, height, width = pixels.shape
    rows = pixels.reshape(-1, width)
    plane_NC = torch.arange(count * channels, device=pixels.device).view(count, channels, 1) * height
    low, high = (rows.index_select(0, (plane_NC + x[:, None]).flatten()).short() for x in (low_NH, high_NH))
    weight = weight_NH[:, None].expand(-1, channels, -1).reshape(-1, 1)
    high.sub_(low).mul_(weight).add_(1 << _WEIGHT_BITS - 1).bitwise_right_shift_(_WEIGHT_BITS).add_(low)
    return high.to(torch.uint8).view(pixels.shape)


def _offsets(how: CropFlip, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return top and left in 0..2·padding, and 1 for a mirrored image."""
    top, left, coin = counter_rng.draws(states, 3)
    places = 2 * how.padding + 1
    flipped = counter_rng.below(coin, 2) if how.flip else torch.zeros_like(coin)
    return counter_rng.below(top, places), counter_rng.below(left, places), flipped


def _boxes(how: RandomResizedCrop, draws: list[Tensor], height: int, width: int) -> Boxes:
    """Return boxes of random area and random aspect ratio (uniform in its logarithm).

    A box that is wider or taller than the image is cut to it; torchvision draws again instead, up to ten times.
    """
    low, high = how.scale
    area = (low + (high - low) * counter_rng.unit(draws[0])) * (height * width)
    roots = _root_ratios(how.ratio).to(area.device)
    root = roots[counter_rng.below(draws[1], _RATIO_STEPS)]
    side = area.sqrt()
    tall = (side / root).round().long().clamp(1, height)
    wide = (side * root).round().long().clamp(1, width)
    top = (counter_rng.unit(draws[2]) * (height - tall + 1)).long()
    left = (counter_rng.unit(draws[3]) * (width - wide + 1)).long()
    return Boxes(top, left, tall, wide)


def _root_ratios(ratio: tuple[float, float]) -> Tensor:
    """Return a table of square roots of aspect ratios, because exp differs in the last bit between CPU and GPU."""
    low, high = torch.tensor(ratio, dtype=torch.float64).log()
    middles = (torch.arange(_RATIO_STEPS, dtype=torch.float64) + 0.5) / _RATIO_STEPS
    roots: Tensor = ((low + (high - low) * middles) / 2).exp()
    return roots


def _neighbours(start_N: Tensor, length_N: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two source positions around each output position's centre, and the second's weight in units of 2⁻⁷."""
    whole = 2 * size
    middle = (2 * torch.arange(size, device=start_N.device) + 1) * length_N[:, None] - size
    middle = middle.clamp(min=0)
    low = middle // whole
    weight = ((middle - low * whole) << _WEIGHT_BITS) // whole
    last = length_N[:, None] - 1
    high = torch.minimum(low + 1, last)
    return start_N[:, None] + low, start_N[:, None] + high, weight.short()
