"""Pictures made on the spot."""

import io

from PIL import Image


def png(width: int = 4, height: int = 4, mode: str = "RGB", value: int = 100, kind: str = "PNG") -> bytes:
    """An even picture; lossless, so its value can be read again."""
    blob = io.BytesIO()
    Image.new(mode, (width, height), (value,) * len(mode) if mode != "L" else value).save(blob, kind)
    return blob.getvalue()


def class_folders(splits: tuple[str, ...] = ("train/", "test/"), each: int = 3, **how: object) -> dict[str, bytes]:
    """Two classes, `each` pictures apiece: cats are dark, dogs are light."""
    return {
        f"{split}{name}/{number}.png": png(value=value + number, **how)  # type: ignore[arg-type]
        for split in splits
        for name, value in (("cat", 10), ("dog", 200))
        for number in range(each)
    }
