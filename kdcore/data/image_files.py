"""The decoding of one image file to pixels of a given size, or to an error that names the file."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from base.errors import DatasetUnreadable
from kdcore.data.decoding import Pixels

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""The decoders that are safe for untrusted files; Pillow has others that start programs."""
MAX_PIXELS = 80_000_000
_GREY = ("1", "L", "LA")
_DECODING_FAILED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)


class Header(NamedTuple):
    """Size and colour of an image, from its first bytes."""

    height: int
    width: int
    grey: bool


def header(blob: bytes, name: str) -> Header:
    """Read size and colour without decoding the pixels."""
    with _open(blob, name) as image:
        return Header(image.height, image.width, image.mode in _GREY)


def decode(blob: bytes, name: str, channels: int, size: int | None) -> Pixels:
    """Return uint8 C × H × W. With a size: the shorter side resized to it (bilinear, antialiased), then the centre.

    Transparency is dropped and a camera's orientation tag is not applied, as in torchvision's loader.
    """
    with _open(blob, name) as image:
        try:
            return planes(image, channels, size)
        except _DECODING_FAILED as error:
            raise _broken(name, error) from error


def planes(image: Image.Image, channels: int, size: int | None) -> Pixels:
    """Return an opened image as uint8 C × H × W; see `decode`."""
    if image.mode == "P":
        image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")
    pixels: Pixels = np.asarray(image if size is None else fit(image, size))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square, at the given size; rounds as torchvision's Resize and CenterCrop do."""
    if image.size == (size, size):
        return image
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def _open(blob: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(blob), formats=FORMATS)
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise DatasetUnreadable(f"{name} is not an image of a known kind ({known}).") from error
    except Image.DecompressionBombError as error:
        raise DatasetUnreadable(f"{name}: {error}") from error
    except _DECODING_FAILED as error:
        raise _broken(name, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise DatasetUnreadable(f"{name} has {image.width} x {image.height} pixels; the most is {MAX_PIXELS:,}.")
    if image.mode[0] in "IF":
        raise DatasetUnreadable(
            f"{name} has more than 8 bits a channel (mode {image.mode}).", "Convert the images to 8 bits first."
        )
    return image


def _broken(name: str, error: Exception) -> DatasetUnreadable:
    return DatasetUnreadable(f"{name} cannot be decoded: {error}.", "Replace the file or leave it out.")
