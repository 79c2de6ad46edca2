"""What every word of the vocabulary is: frozen, typed, and closed to fields that nobody knows."""

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Vocabulary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def named(field: str) -> BeforeValidator:
    """A plain name stands for an object that holds only that name."""
    return BeforeValidator(lambda given: {field: given} if isinstance(given, str) else given)
