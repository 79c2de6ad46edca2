"""What every `student.py` has beside its network: `load` and `preprocess`. No import of the project: the text of these
definitions is copied (see `student_source.py`), and the constants above them are replaced by those of the student.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 3
IMAGE_SIZE = (32, 32)
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
RESIZE = "crop"
RESIZE_TO = 32
INTERPOLATION = "bilinear"
TURNS_UPRIGHT = False


def build() -> nn.Module:
    """Return the untrained network."""
    raise NotImplementedError("student_source.py writes it")


def load(path: str | Path = "student.safetensors") -> nn.Module:
    """Return the trained network: the output of `preprocess` to logits N x K. Its `class_names` are the names of the K
    classes, its `facts` all that the file says."""
    tensors, facts = read(path)
    network = build()
    network.load_state_dict(tensors)
    vars(network).update(class_names=facts["class_names"], facts=facts)
    return network.eval().requires_grad_(False)


def preprocess(image: Any) -> Tensor:
    """Return the network's input, float N x C x H x W, of a picture (an image of Pillow) or of pixels in 0..255.

    A picture is brought to size as those of the training were. Pixels are uint8 and have that size already: a tensor
    C x H x W or N x C x H x W, or an array H x W x C (H x W of one channel).
    """
    pixels = _pixels_of(image) if hasattr(image, "getbands") else torch.as_tensor(image)
    if pixels.dim() == 2 and CHANNELS == 1:
        pixels = pixels.unsqueeze(0)
    if pixels.dim() == 3 and pixels.shape[0] != CHANNELS and pixels.shape[2] == CHANNELS:
        pixels = pixels.permute(2, 0, 1)
    if pixels.dim() == 3:
        pixels = pixels.unsqueeze(0)
    wanted = (CHANNELS, *IMAGE_SIZE)
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != wanted:
        given = f"{pixels.dtype} {' x '.join(map(str, pixels.shape))}"
        raise ValueError(f"uint8 pixels N x {' x '.join(map(str, wanted))} are needed, not {given}")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def _pixels_of(picture: Any) -> Tensor:
    """Return a picture as uint8 C x H x W, in the network's size."""
    from PIL import Image, ImageOps

    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"a picture of more than 8 bits ({picture.mode}): scale its values to 0..255 first")
    upright = ImageOps.exif_transpose(picture) if TURNS_UPRIGHT else picture
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        white.alpha_composite(upright.convert("RGBA"))
        upright = white
    sized = _fit(upright.convert("L" if CHANNELS == 1 else "RGB"))
    flat = torch.frombuffer(bytearray(sized.tobytes()), dtype=torch.uint8)
    return flat.view(*IMAGE_SIZE, CHANNELS).permute(2, 0, 1)


def _fit(picture: Any) -> Any:
    """Return a picture in the network's size: resized as RESIZE says, in the way of the training data."""
    from PIL import Image

    height, width = IMAGE_SIZE
    filters = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
    how = filters.get(INTERPOLATION, Image.Resampling.BILINEAR)
    if RESIZE == "squash" or height != width:
        return picture.resize((width, height), how)
    if RESIZE == "pad":
        longer = max(picture.size)
        inner = tuple(max(1, width * side // longer) for side in picture.size)
        padded = Image.new(picture.mode, (width, height))
        padded.paste(picture.resize(inner, how), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return padded
    if picture.size == (width, height) and width == RESIZE_TO:
        return picture
    shorter = min(picture.size)
    resized = picture.resize(tuple(RESIZE_TO * side // shorter for side in picture.size), how)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a safetensors file by their names, and the facts in its metadata.

    The format: the size of a header, 8 bytes; the header, JSON; the bytes of all tensors.
    """
    content = bytearray(Path(path).read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    facts = json.loads(header.pop("__metadata__")["distillery"])
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(content[begin:end], dtype=kinds[entry["dtype"]]).view(entry["shape"])
    return tensors, facts
