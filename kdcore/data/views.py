"""Augmented views of samples: pure functions of (seed, epoch, row), computed for a whole batch at once.

A view does not depend on the device nor, unless images are mixed, on the batch around it: every random number is a hash
(`counter_rng`), and all arithmetic on pixels is on integers. So a resumed run gets the same views, and a teacher's
outputs can be cached by row and view id. Padding is black before normalisation, as in the usual RandomCrop →
ToTensor → Normalize.

With `most`, an approximation, each image has few views: epoch e shows that of epoch e mod `most`. Student and teacher
see the same ones, and a frozen teacher runs `most` times over the data at most.

A teacher may have an image size of its own. What is drawn for a view (place, box, mirroring, partner) is drawn once, in
pixels of the data's own size, and cut from the picture as it is stored at each size. Boxes are cut from a larger store
if there is one, so that a small box has the pixels of the picture itself.

Shapes: N batch, C channels, H height, W width, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kdcore.data import counter_rng, mixing
from kdcore.data.images import Images, TrainingSet
from kdcore.data.resizing import Boxes, resized_crop
from kdcore.lesson import Batch
from kdcore.spec import Augmentation, CachedViews, CropFlip, Mix, RandomResizedCrop, Training

_ORDER, _VIEW, _MIX = 1, 2, 3
_RATIO_STEPS = 4096
Whole = TypeVar("Whole", int, Tensor)
_Cut = Callable[[Tensor, tuple[int, int] | None], Tensor]
"""Makes views of pixels; a box also in another size than that of the pixels."""


def order(n: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the order of the n samples in an epoch, a permutation of 0..n-1."""
    states = counter_rng.streams(counter_rng.key(_ORDER, seed, epoch), torch.arange(n, device=device))
    return torch.argsort(counter_rng.draws(states, 1)[0], stable=True)


class Views:
    """Batches of augmented samples."""

    def __init__(self, augmentation: Augmentation, mix: Mix | None, num_classes: int, most: int | None = None) -> None:
        """With `most`, each image has so many views, drawn by seed and row, which epochs take in turn."""
        self.augmentation, self.most = augmentation, most
        self.mix = mix
        self.num_classes = num_classes
        self._quantiles = mixing.beta_quantiles(mix.alpha) if mix is not None else None

    @classmethod
    def of(cls, recipe: Training, num_classes: int) -> "Views":
        """Return the views of a recipe."""
        assert recipe.augmentation is not None, "resolve() names the augmentation"
        most = recipe.teacher_cache.views if isinstance(recipe.teacher_cache, CachedViews) else None
        return cls(recipe.augmentation, recipe.mix, num_classes, most)

    def batch(self, images: Images, index: Tensor, seed: int, epoch: int) -> Batch:
        """Return views of the rows `index` in an epoch, counted from 0: pixels uint8 N × C × H × W, labels int64 N.

        Mixed images are float32 in 0..255 and their labels float32 N × K. The batch's rows determine which images are
        mixed. An image without a label (-1) then has weight 0 in every class.
        """
        index = index.to(images.pixels.device)
        height, width = images.pixels.shape[2:]
        cut, view_ids = self._drawn((height, width), index, seed, epoch)
        if images.wide is not None and isinstance(self.augmentation, RandomResizedCrop):
            stored = images.wide.index_select(0, index)
            views = [cut(stored, size) for size in ((height, width), *((side, side) for side in images.sized))]
        else:
            views = [cut(pixels, None) for pixels in images.read(index)]
        labels = images.labels.index_select(0, index)
        if self.mix is None or self._quantiles is None:
            return Batch(views[0], labels, index, epoch, view_ids, dict(zip(images.sized, views[1:], strict=True)))
        mix = mixing.mixup if self.mix.name == "mixup" else mixing.cutmix
        self._quantiles = self._quantiles.to(index.device)
        states = counter_rng.streams(counter_rng.key(_MIX, seed, epoch), index)
        targets_NK = one_hot(labels + 1, self.num_classes + 1)[:, 1:].float()
        views, targets_NK = mix(views, targets_NK, states, self._quantiles)
        return Batch(views[0], targets_NK, index, epoch, None, dict(zip(images.sized, views[1:], strict=True)))

    def ids(self, index: Tensor, seed: int, epoch: int) -> Tensor | None:
        """Return the views' ids of the rows `index` in an epoch, counted from 0, as `batch` gives them."""
        # Ids do not depend on the images' size, which only boxes and cuts need.
        return None if self.mix is not None else self._drawn((1, 1), index, seed, epoch)[1]

    def _drawn(self, frame: tuple[int, int], index: Tensor, seed: int, epoch: int) -> tuple[_Cut, Tensor | None]:
        """Return what makes views of these samples' pixels at any size, and the views' ids: 0..161 for a crop of 32
        from 40 with flips, 0 without augmentation; of boxes their number among `most`, else None. `frame`: the data's
        own height and width."""
        number = epoch if self.most is None else epoch % self.most
        states = counter_rng.streams(counter_rng.key(_VIEW, seed, number), index)
        match self.augmentation:
            case CropFlip(padding=padding, flip=flip) as how:
                top, left, flipped = _offsets(how, states)
                view_ids = (top * (2 * padding + 1) + left) * (2 if flip else 1) + flipped
                return lambda pixels, _: _cut_at_size(pixels, top, left, flipped, padding, frame), view_ids
            case RandomResizedCrop() as how:
                *draws, coin = counter_rng.draws(states, 5)
                mirrored = counter_rng.below(coin, 2) if how.flip else torch.zeros_like(coin)
                boxes = _boxes(how, draws, *frame)
                numbers = None if self.most is None else torch.full_like(index, number)
                return lambda pixels, size: resized_crop(pixels, boxes, mirrored, frame, size), numbers
            case _:
                return lambda pixels, _: pixels, torch.zeros_like(states)


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch, counted from 0, from a step on. They are made as they are taken.

    All are complete: the remainder of an epoch, other images each time, is left out.
    """

    training_set: TrainingSet
    recipe: Training
    views: Views
    epoch: int
    first_step: int = 0

    def rows(self) -> Tensor:
        """Return the rows of the whole epoch in their order, int64 on the images' device."""
        rows, size = self.training_set.rows, self.recipe.batch_size
        shuffled = rows[order(len(rows), self.recipe.seed, self.epoch).to(rows.device)]
        return shuffled[: len(rows) // size * size]

    def of(self, rows: Tensor) -> Batch:
        """Return any rows as this epoch shows them."""
        return self.views.batch(self.training_set.images, rows, self.recipe.seed, self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        size = self.recipe.batch_size
        to_come = self.rows()[self.first_step * size :]
        self.training_set.images.expect(to_come)
        return (self.of(to_come[at : at + size]) for at in range(0, len(to_come), size))


def _cut_at_size(
    pixels: Tensor, top_N: Tensor, left_N: Tensor, flipped_N: Tensor, padding: int, frame: tuple[int, int]
) -> Tensor:
    """Return `crop_flip` of pixels at any size. Places and padding are in pixels of the frame; those in pixels of the
    picture are rounded to whole ones."""
    stored, own = pixels.shape[2], frame[0]
    if stored == own:
        return crop_flip(pixels, top_N, left_N, flipped_N, padding)
    margin = _rounded(padding * stored, own)
    top_N, left_N = (margin + _rounded((place_N - padding) * stored, own) for place_N in (top_N, left_N))
    return crop_flip(pixels, top_N, left_N, flipped_N, margin)


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


def _rounded(numerator: Whole, denominator: int) -> Whole:
    """Return the nearest whole number to a quotient: of a number, or of each number of a tensor."""
    return (2 * numerator + denominator) // (2 * denominator)


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
    roots = _root_ratios(how.ratio, area.device)
    root = roots[counter_rng.below(draws[1], _RATIO_STEPS)]
    side = area.sqrt()
    tall = (side / root).round().long().clamp(1, height)
    wide = (side * root).round().long().clamp(1, width)
    top = (counter_rng.unit(draws[2]) * (height - tall + 1)).long()
    left = (counter_rng.unit(draws[3]) * (width - wide + 1)).long()
    return Boxes(top, left, tall, wide)


@cache
def _root_ratios(ratio: tuple[float, float], device: torch.device) -> Tensor:
    """Return a table of square roots of aspect ratios, made on the CPU, because exp differs in the last bit between CPU
    and GPU. It is kept, because a GPU waits for a copy."""
    low, high = torch.tensor(ratio, dtype=torch.float64).log()
    middles = (torch.arange(_RATIO_STEPS, dtype=torch.float64) + 0.5) / _RATIO_STEPS
    roots: Tensor = ((low + (high - low) * middles) / 2).exp()
    return roots.to(device)
