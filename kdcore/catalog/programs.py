"""What is known about a teacher that is a program. Torch-free."""

from typing import Literal

from kdcore.catalog.facts import ModelFacts


class ProgramFacts(ModelFacts):
    """What an inspection saw in a torch.export program: a model that is its own architecture."""

    architecture: str = "program"
    format: Literal["pt2"] = "pt2"  # type: ignore[assignment]  # neither of the formats that checkpoints have
    image_size: tuple[int | None, int | None]
    """Height and width in pixels; None where the program takes any."""
    batch: int | Literal["any"] = "any"
    """How many images at once it was exported for, at most."""

    def takes(self, image_size: tuple[int, int]) -> bool:
        return all(own in (None, asked) for own, asked in zip(self.image_size, image_size, strict=True))
