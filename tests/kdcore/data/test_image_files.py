import io
import zlib

import numpy as np
import pytest
from PIL import Image

from base.errors import DatasetUnreadable
from kdcore import vision
from kdcore.data import image_files
from kdcore.spec import DataOptions


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    blob = io.BytesIO()
    Image.fromarray(pixels).save(blob, kind, **options)
    return blob.getvalue()


def test_header_says_size_and_colour():
    assert image_files.header(encoded(np.zeros((3, 5), np.uint8)), "a") == (3, 5, True, {"grey"})
    assert image_files.header(encoded(np.zeros((3, 5, 3), np.uint8)), "a") == (3, 5, False, {"colour"})


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
    assert image_files.decode(encoded(bands.repeat(2, 0)), "a", 1, DataOptions(image_size=4)).shape == (1, 4, 4)
    assert image_files.decode(encoded(bands), "a", 1, DataOptions(image_size=9)).shape == (1, 9, 9)


def options(**given: object) -> DataOptions:
    return DataOptions.model_validate(given)


def first_row(blob: bytes, channels: int = 3, **given: object) -> list[list[int]]:
    return image_files.decode(blob, "a", channels, options(**given))[:, 0].tolist()


def saved(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    blob = io.BytesIO()
    image.save(blob, kind, **how)
    return blob.getvalue()


def test_decode_transparency_is_over_white():
    """Red that is not, fully and 40 % opaque: 255 + (200 - 255) · 102 / 255 = 233."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 0], pixels[0, :, 3] = 200, (0, 255, 102)
    assert first_row(encoded(pixels)) == [[255, 200, 233], [255, 0, 153], [255, 0, 153]]
    assert first_row(encoded(pixels, "WEBP", lossless=True, exact=True))[1] == [255, 0, 153]


def test_decode_a_black_drawing_on_transparent_ground_is_not_all_black():
    grey_alpha = np.array([[[0, 0], [0, 255]]], np.uint8)
    assert first_row(encoded(grey_alpha), channels=1) == [[255, 0]]
    assert first_row(encoded(grey_alpha)) == [[255, 0]] * 3


def test_decode_a_colour_that_stands_for_transparency():
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert first_row(saved(image, transparency=(1, 2, 3))) == [[255, 9]] * 3


def test_decode_palettes_become_colours():
    """Of two entries the first is transparent."""
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putdata([0, 1])
    image.putpalette([5, 6, 7, 11, 22, 33])
    assert first_row(saved(image)) == [[5, 11], [6, 22], [7, 33]]
    assert first_row(saved(image, transparency=b"\x00\xff")) == [[255, 11], [255, 22], [255, 33]]
    assert first_row(saved(image, "GIF")) == [[5, 11], [6, 22], [7, 33]]


def test_decode_cmyk_becomes_colours():
    """No ink is white, full cyan has no red, black ink alone is black."""
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8).repeat(8, 1), "CMYK")
    tiff = first_row(saved(inks, "TIFF"))
    assert tiff == [[255] * 8 + [0] * 8 + [0] * 8, [255] * 16 + [0] * 8, [255] * 16 + [0] * 8]
    jpeg = np.array(first_row(saved(inks, "JPEG", quality=100)))
    assert abs(jpeg - np.array(tiff)).max() <= 4


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), "PNG", [0, 1, 255]),
        (np.array([[100, 1123, 4195]], np.uint16), "PNG", [0, 64, 255]),
        (np.array([[100, 1123, 4195]], np.uint16), "TIFF", [0, 64, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), "TIFF", [0, 128, 255]),
        (np.array([[0.0, 0.25, 0.5]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[7, 7, 7]], np.uint16), "PNG", [0, 0, 0]),
    ],
    ids=["whole range", "12 bits", "tiff", "signed", "floats", "one value"],
)
def test_decode_more_than_8_bits_are_scaled_by_their_own_range(values, kind, expected):
    blob = encoded(values, kind)
    assert image_files.decode(blob, "a", 1).flatten().tolist() == expected
    assert first_row(blob) == [expected] * 3
    assert image_files.header(blob, "a") == (1, 3, True, {"grey", "sixteen_bit"})


def test_decode_scales_large_pictures_in_strips(monkeypatch):
    values = np.arange(12, dtype=np.uint16).reshape(4, 3) * 1000
    whole = image_files.decode(encoded(values), "a", 1)
    monkeypatch.setattr(image_files, "_STRIP", 3)
    assert (image_files.decode(encoded(values), "a", 1) == whole).all()


def test_decode_values_that_are_not_finite_are_named():
    with pytest.raises(DatasetUnreadable, match=r"a\.tif cannot be decoded: it has values that are not finite"):
        image_files.decode(encoded(np.array([[0, np.nan]], np.float32), "TIFF"), "a.tif", 1)


def turned(tag: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return saved(Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)), kind, exif=exif.tobytes())


UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}
"""By the tag: which side of the upright picture the stored first row and first column are (Exif 2.32, table 6)."""


@pytest.mark.parametrize("tag", UPRIGHT)
def test_decode_applies_an_orientation_tag_on_request(tag):
    blob = turned(tag)
    applied = image_files.decode(blob, "a", 1, options(orientation="apply"))[0]
    assert applied.tolist() == UPRIGHT[tag]
    assert image_files.decode(blob, "a", 1).tolist() == [UPRIGHT[1]]
    header = image_files.header(blob, "a", options(orientation="apply"))
    assert (header.height, header.width) == applied.shape
    assert image_files.header(blob, "a")[:2] == (2, 3) and ("oriented" in header.marks) == (tag > 1)


def test_decode_the_tag_of_a_tiff_is_applied_by_pillow_and_not_again():
    exif = Image.Exif()
    exif[0x0112] = 3
    blob = saved(Image.fromarray(np.array([[1, 2, 3]], np.uint8)), "TIFF", exif=exif)
    for orientation in ("ignore", "apply"):
        assert image_files.decode(blob, "a", 1, options(orientation=orientation))[0].tolist() == [[3, 2, 1]]
    assert "oriented" not in image_files.header(blob, "a").marks


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_header_a_damaged_tag_is_none():
    blob = saved(Image.fromarray(np.zeros((2, 2), np.uint8)), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff")
    assert image_files.header(blob, "a") == (2, 2, True, {"grey"})


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_decode_the_first_frame_of_an_animated_file(kind):
    frames = [Image.fromarray(np.full((2, 2, 3), value, np.uint8)) for value in (40, 200)]
    blob = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert "animated" in image_files.header(blob, "a").marks
    assert np.unique(image_files.decode(blob, "a", 1)).tolist() == [40]
    assert "animated" not in image_files.header(saved(frames[0], kind), "a").marks


def test_header_marks_say_what_is_peculiar():
    clear, opaque = np.zeros((2, 2, 4), np.uint8), np.full((2, 2, 4), 255, np.uint8)
    marks = {name: image_files.header(blob, "a").marks for name, blob in {
        "clear": encoded(clear),
        "opaque": encoded(opaque),
        "palette": saved(Image.new("P", (2, 2))),
        "cmyk": saved(Image.new("CMYK", (2, 2)), "JPEG"),
    }.items()}  # fmt: skip
    assert marks == {
        "clear": {"colour", "alpha"},
        "opaque": {"colour"},
        "palette": {"colour", "palette"},
        "cmyk": {"colour", "cmyk"},
    }


BANDS = np.repeat(np.array([10, 20, 30, 40], np.uint8), 2)[None].repeat(4, 0)
"""4 x 8 in four vertical bands of two columns."""


def test_decode_squash_keeps_all_of_a_wide_picture():
    assert first_row(encoded(BANDS), 1, image_size=4, resize="squash", interpolation="nearest") == [[10, 20, 30, 40]]
    assert first_row(encoded(BANDS.T), 1, image_size=4, resize="squash", interpolation="nearest") == [[10] * 4]


def test_decode_pad_puts_black_bars_above_and_below():
    padded = image_files.decode(encoded(BANDS), "a", 1, options(image_size=8, resize="pad"))[0]
    assert padded.shape == (8, 8) and (padded[2:6] == BANDS).all()
    assert (padded[:2] == 0).all() and (padded[6:] == 0).all()
    tall = image_files.decode(encoded(BANDS.T), "a", 3, options(image_size=8, resize="pad"))
    assert (tall[:, :, 2:6] == BANDS.T).all() and (tall[:, :, [0, 1, 6, 7]] == 0).all()


def test_decode_resize_to_before_the_crop_is_torchvisions_evaluation():
    vision.torchvision()
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    for name, mode in (("bilinear", "BILINEAR"), ("bicubic", "BICUBIC"), ("nearest", "NEAREST")):
        how = transforms.InterpolationMode[mode]
        theirs = transforms.Compose([transforms.Resize(32, how), transforms.CenterCrop(28)])(Image.fromarray(pixels))
        given = options(image_size=28, resize_to=32, interpolation=name)
        assert (image_files.decode(encoded(pixels), "a", 3, given) == np.asarray(theirs).transpose(2, 0, 1)).all()


def test_decode_resize_to_also_crops_pictures_that_have_the_size():
    frame = np.full((8, 8), 100, np.uint8)
    frame[[0, -1]] = frame[:, [0, -1]] = 0
    given = options(image_size=8, resize_to=16, interpolation="nearest")
    assert (image_files.decode(encoded(frame), "a", 1, given) == 100).all()


def test_share_kept_by_hand():
    assert image_files.share_kept(32, 96, options(image_size=32)) == pytest.approx(1 / 3)
    assert image_files.share_kept(256, 256, options(image_size=224, resize_to=256)) == pytest.approx((224 / 256) ** 2)
    for whole in ({}, {"image_size": 32, "resize": "squash"}, {"image_size": 32, "resize": "pad"}):
        assert image_files.share_kept(32, 96, options(**whole)) == 1


def test_count_is_over_the_pixels_of_all_pictures():
    """A wide picture of 3 parts, of which 2 are cut, and a square one of 1 part: half of the pixels."""
    headers = [image_files.header(encoded(np.zeros(shape, np.uint8)), "a") for shape in ((8, 24), (8, 8))]
    assert image_files.count(headers, options(image_size=4)) == ({"grey": 2, "cut": 1}, 0.5)
    assert image_files.count(headers, options()) == ({"grey": 2}, 0.0)


def test_unreadable_names_the_first_and_the_number():
    faults = [DatasetUnreadable(f"{number}.png is broken.") for number in range(30)]
    error = image_files.unreadable(faults)
    assert str(error).startswith("30 pictures cannot be read. 0.png is broken. 1.png")
    assert "19.png" in str(error) and "20.png" not in str(error) and str(error).endswith("And 10 more.")
    assert "skip_unreadable" in str(error.hint)
    assert str(image_files.unreadable(faults[:1])) == "0.png is broken."


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "img.png is not an image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "img.png is not an image of a known kind"),
    ],
    ids=["empty", "postscript"],
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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DataOptions(), None),
        (DataOptions(image_size=8), 20),
        (DataOptions(image_size=8, resize="squash"), 20),
        (DataOptions(image_size=8, resize="pad"), 40),
        (DataOptions(image_size=8, resize_to=16), 10),
    ],
)
def test_own_side_is_what_half_of_the_pictures_have(options, expected):
    headers = [image_files.Header(*size, grey=True) for size in ((10, 90), (30, 20), (50, 40), (12, 12), (40, 20))]
    assert image_files.own_side(headers, options) == expected
