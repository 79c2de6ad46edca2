"""The decoding of one image file to pixels of a given size, or to an error that names the file.

Transparent parts, also those of a palette, are read over white. Grey images of more than 8 bits (modes I;16, I and F of
Pillow) are scaled by the range of their own values: the smallest becomes 0, the largest 255. Of an animated file the
first frame is read. A camera's orientation tag is applied on request only, as in torchvision's loader; Pillow itself
applies that of a TIFF.
"""

import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from base.errors import DatasetUnreadable
from kdcore.data.archive import Limits
from kdcore.data.decoding import NAMED, Pixels
from kdcore.spec import DataOptions

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""The decoders that are safe for untrusted files; Pillow has others that start programs."""
SUFFIXES = tuple(f".{suffix.lower()}" for suffix in (*FORMATS, "jpg", "jpe", "jfif", "tif", "pgm", "pbm", "pnm"))
MAX_PIXELS = 80_000_000
HEAD_BYTES = 16
"""The bytes by which Pillow knows a kind."""
NOTICEABLE_CUT = 0.1
"""The share of a picture that a crop must leave out for the picture to count as cut."""
AS_IT_IS = DataOptions()
_GREY = ("1", "L", "LA", "La", "I", "F")
_MORE_THAN_8_BITS = ("I", "F")
_STRIP = 1 << 20
_DECODING_FAILED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by the value of its tag (Exif 2.32, table 6)."""
_SIDEWAYS = (5, 6, 7, 8)
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


class Header(NamedTuple):
    """Size and colour of an image, and its peculiarities: keys of `DatasetFacts.pictures`."""

    height: int
    width: int
    grey: bool
    marks: frozenset[str] = frozenset()


def begins_like_one(head: bytes) -> bool:
    """Return False if no file with these first `HEAD_BYTES` is of a known kind, as the decoders themselves say."""
    Image.preinit()
    Image.init()
    return any(accepts is None or bool(accepts(head)) for _, accepts in map(Image.OPEN.__getitem__, FORMATS))


def unknown(name: str) -> DatasetUnreadable:
    """Return the error of a file that is no picture."""
    return DatasetUnreadable(f"{name} is not an image of a known kind ({', '.join(FORMATS)}).")


def header(blob: bytes, name: str, options: DataOptions = AS_IT_IS) -> Header:
    """Read size and colour without decoding the pixels, unless there may be transparent ones."""
    with _open(blob, name) as image:
        width, height = image.size
        orientation = _orientation(image)
        if options.orientation == "apply" and orientation in _SIDEWAYS:
            width, height = height, width
        grey = _is_grey(image)
        marks = {
            "grey": grey,
            "colour": not grey,
            "alpha": _has_transparent_parts(image),
            "palette": image.mode in ("P", "PA"),
            "cmyk": image.mode == "CMYK",
            "sixteen_bit": _has_more_than_8_bits(image),
            "oriented": orientation in _TURNS,
            "animated": _is_animated(image),
        }
        return Header(height, width, grey, frozenset(mark for mark, present in marks.items() if present))


def decode(blob: bytes, name: str, channels: int, options: DataOptions | None = None) -> Pixels:
    """Return uint8 C × H × W, brought to size as the options say."""
    with _open(blob, name) as image:
        try:
            return planes(image, channels, options)
        except _DECODING_FAILED as error:
            raise _broken(name, error) from error


def check(blob: bytes, name: str, options: DataOptions) -> None:
    """Raise DatasetUnreadable if the file cannot be decoded."""
    decode(blob, name, 3, options)


def planes(image: Image.Image, channels: int, options: DataOptions | None = None) -> Pixels:
    """Return an opened image as uint8 C × H × W; see `decode`."""
    options = options or AS_IT_IS
    turn = _TURNS.get(_orientation(image)) if options.orientation == "apply" else None
    if _has_more_than_8_bits(image):
        image = Image.fromarray(_scaled(np.asarray(image)))
    elif image.has_transparency_data:
        image = _over_white(image)
    image = image.convert("L" if channels == 1 else "RGB")
    image = fit(image if turn is None else image.transpose(turn), options)
    pixels: Pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def fit(image: Image.Image, options: DataOptions) -> Image.Image:
    """Return the image as a square of `image_size`: cropped, squashed or padded; unchanged without that option.

    A crop rounds as torchvision's Resize and CenterCrop do.
    """
    size = options.image_size
    if size is None:
        return image
    how = _FILTERS[options.interpolation or "bilinear"]
    if options.resize == "squash":
        return image.resize((size, size), how)
    if options.resize == "pad":
        longer = max(image.size)
        width, height = (max(1, size * side // longer) for side in image.size)
        padded = Image.new(image.mode, (size, size))
        padded.paste(image.resize((width, height), how), ((size - width) // 2, (size - height) // 2))
        return padded
    shorter, target = min(image.size), options.resize_to or size
    if image.size == (size, size) and target == size:
        return image
    width, height = (target * side // shorter for side in image.size)
    resized = image.resize((width, height), how)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def share_kept(height: int, width: int, options: DataOptions) -> float:
    """Return the share of an image's pixels that the crop does not leave out."""
    size = options.image_size
    if size is None or options.resize in ("squash", "pad"):
        return 1.0
    side = min(height, width) * size / (options.resize_to or size)
    return side * side / (height * width)


def own_side(headers: Iterable[Header], options: DataOptions) -> int | None:
    """Return `own_side` of a data set's facts."""
    size = options.image_size
    if size is None:
        return None
    # What is read of a picture becomes a square of `size`; a crop leaves out more if the picture is resized to more.
    side_of = max if options.resize == "pad" else min
    sides = sorted(side_of(one.height, one.width) * size // (options.resize_to or size) for one in headers)
    return sides[(len(sides) - 1) // 2] if sides else None


def count(headers: Iterable[Header], options: DataOptions) -> tuple[dict[str, int], float]:
    """Return `pictures` and `pixels_cut` of a data set's facts."""
    counts: Counter[str] = Counter()
    pixels = kept = 0.0
    for one in headers:
        share = share_kept(one.height, one.width, options)
        counts.update(one.marks)
        counts["cut"] += share < 1 - NOTICEABLE_CUT
        pixels += one.height * one.width
        kept += share * one.height * one.width
    return {kind: number for kind, number in sorted(counts.items()) if number}, round(1 - kept / max(pixels, 1), 4)


def unreadable(faults: Sequence[DatasetUnreadable]) -> DatasetUnreadable:
    """Return one error for all files that cannot be read; it names the first of them and their number."""
    hint = "Replace the files, or leave them out with skip_unreadable: true."
    if len(faults) == 1:
        return DatasetUnreadable(str(faults[0]), hint)
    more = f" And {len(faults) - NAMED:,} more." if len(faults) > NAMED else ""
    named = " ".join(str(fault) for fault in faults[:NAMED])
    return DatasetUnreadable(f"{len(faults):,} pictures cannot be read. {named}{more}", hint)


class Broken:
    """Counts the files that are no pictures: a hostile data set has a million of them, each with an error."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pictures = self._others = 0
        self._faults: list[DatasetUnreadable] = []
        """Of files that are named as pictures, or stand where pictures belong."""

    def count(self, found: Header | DatasetUnreadable | None, is_named: bool = True) -> None:
        """Count a file; None is one that need not be a picture. `is_named`: it is named as one.

        Raises DatasetUnreadable if the rest is not worth reading.
        """
        if isinstance(found, Header):
            self._pictures += 1
        elif found is not None and is_named:
            self._faults.append(found)
            if len(self._faults) >= self._limits.broken and len(self._faults) > self._pictures:
                error, seen = unreadable(self._faults), len(self._faults) + self._pictures
                raise DatasetUnreadable(f"{error.message} The rest behind {seen:,} pictures was not read.", error.hint)
        elif found is not None:
            self._others += 1
            if self._others >= self._limits.no_pictures and not self._pictures:
                text = f"The archive holds no images among its first {self._others:,} files. {found.message}"
                raise DatasetUnreadable(text, "Pack the pictures alone.")


def _open(blob: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(blob), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise unknown(name) from error
    except Image.DecompressionBombError as error:
        raise DatasetUnreadable(f"{name}: {error}") from error
    except _DECODING_FAILED as error:
        raise _broken(name, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise DatasetUnreadable(f"{name} has {image.width} x {image.height} pixels; the most is {MAX_PIXELS:,}.")
    return image


def _is_grey(image: Image.Image) -> bool:
    return image.mode in _GREY or _has_more_than_8_bits(image)


def _has_more_than_8_bits(image: Image.Image) -> bool:
    """True for the modes I;16, I and F. Pillow itself reads colours of 16 bits as 8."""
    return image.mode.startswith(_MORE_THAN_8_BITS)


def _has_transparent_parts(image: Image.Image) -> bool:
    """True if any pixel is not opaque: many files have an alpha channel that says nothing."""
    if _has_more_than_8_bits(image) or not image.has_transparency_data:
        return False
    try:
        low, _ = image.convert("RGBA").getchannel("A").getextrema()
    except _DECODING_FAILED:
        return False  # Its decoding fails as well, and says so.
    return isinstance(low, int | float) and low < 255


def _is_animated(image: Image.Image) -> bool:
    """True for several frames. A phone's JPEG with a second picture (MPO) is not animated."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except _DECODING_FAILED:
        return False


def _orientation(image: Image.Image) -> int:
    """Return the value of a camera's orientation tag, 1 (upright) without one. Pillow turns a TIFF itself, so that its
    tag is no longer true."""
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION)
    except (*_DECODING_FAILED, TypeError, OverflowError):
        return 1
    return value if isinstance(value, int) else 1


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


def _scaled(values: npt.NDArray[np.generic]) -> Pixels:
    """Return values scaled to 0..255 by their own range. A picture of one value becomes black."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("it has values that are not finite numbers")
    scaled = np.zeros(values.shape, dtype=np.uint8)
    rows = max(1, _STRIP // values.shape[1])
    for start in range(0, len(values) if high > low else 0, rows):
        part = values[start : start + rows].astype(np.float64)
        scaled[start : start + rows] = np.rint((part - low) * (255 / (high - low)))
    return scaled


def _broken(name: str, error: Exception) -> DatasetUnreadable:
    return DatasetUnreadable(f"{name} cannot be decoded: {error}.", "Replace the file or leave it out.")
