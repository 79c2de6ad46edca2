import io
import zlib

import numpy as np
import pytest
from PIL import Image

from base.errors import DatasetUnreadable
from kdcore.data import image_files
from kdcore.spec import DataOptions


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    blob = io.BytesIO()
    Image.fromarray(pixels).save(blob, kind, **options)
    return blob.getvalue()


def test_header_says_size_and_colour():
    assert image_files.header(encoded(np.zeros((3, 5), np.uint8)), "a") == (3, 5, True)
    assert image_files.header(encoded(np.zeros((3, 5, 3), np.uint8)), "a") == (3, 5, False)


def test_pixels_come_back_as_planes():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert (image_files.decode(encoded(pixels), "a", 3, None) == pixels.transpose(2, 0, 1)).all()


def test_decode_grey_as_one_channel_and_as_three():
    grey = np.array([[7, 9]], dtype=np.uint8)
    assert image_files.decode(encoded(grey), "a", 1, None).tolist() == [[[7, 9]]]
    assert image_files.decode(encoded(grey), "a", 3, None).tolist() == [[[7, 9]]] * 3


def test_decode_shorter_side_then_centre():
    """4 × 8 in four vertical bands of two columns: the centre 4 × 4 keeps the middle two."""
    bands = np.repeat(np.array([10, 20, 30, 40], np.uint8), 2)[None].repeat(4, 0)
    assert image_files.decode(encoded(bands), "a", 1, DataOptions(image_size=4))[0].tolist() == [[20, 20, 30, 30]] * 4
    assert image_files.decode(encoded(bands), "a", 1, DataOptions(image_size=2)).shape == (1, 2, 2)
    assert image_files.decode(encoded(bands), "a", 1, DataOptions(image_size=9)).shape == (1, 9, 9)


def test_decode_transparency_is_dropped():
    see_through = np.zeros((2, 2, 4), np.uint8)
    see_through[..., 0] = 200
    assert image_files.decode(encoded(see_through), "a", 3, None)[0].tolist() == [[200, 200], [200, 200]]


def test_decode_palettes_become_colours():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 11, 22, 33])
    blob = io.BytesIO()
    image.save(blob, "PNG", transparency=b"\x00\x80")
    assert image_files.decode(blob.getvalue(), "a", 3, None).flatten().tolist() == [11, 22, 33]


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "img.png is not an image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "img.png is not an image of a known kind"),
        (encoded(np.zeros((2, 2), np.uint16)), "img.png has more than 8 bits a channel"),
    ],
    ids=["empty", "postscript", "16 bits"],
)
def test_header_what_is_refused(blob, said):
    with pytest.raises(DatasetUnreadable, match=said):
        image_files.header(blob, "img.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_decode_half_a_file_names_itself(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    blob = encoded(noise, kind)
    with pytest.raises(DatasetUnreadable, match=r"^half\."):
        image_files.decode(blob[: len(blob) // 2], "half.img", 3, None)


def test_header_a_small_file_of_huge_dimensions_is_not_decoded():
    """A PNG header that claims 20,000 × 20,000."""
    blob = bytearray(encoded(np.zeros((2, 2), np.uint8)))
    blob[16:24] = (20_000).to_bytes(4) * 2
    blob[29:33] = zlib.crc32(bytes(blob[12:29])).to_bytes(4)
    with pytest.raises(DatasetUnreadable, match=r"huge\.png"):
        image_files.header(bytes(blob), "huge.png")
