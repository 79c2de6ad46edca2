"""What every word of the vocabulary is: frozen, typed, and closed to fields that nobody knows."""

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _name_is_required(schema: dict[str, Any]) -> None:
    """What is told apart by its name has to say it, whatever default the class gives it for us."""
    name = schema.get("properties", {}).get("name", {})
    if "const" in name:
        name.pop("default", None)
        schema["required"] = ["name", *schema.get("required", [])]


class Vocabulary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_name_is_required)


def named(field: str, of: Any, names: tuple[str, ...] = ()) -> BeforeValidator:
    """A plain name stands for an object that holds only that name; the schema says so too."""
    plain: Any = Literal[names] if names else str
    told_apart = Annotated[of, Field(discriminator="name")] if field == "name" else of
    return BeforeValidator(
        lambda given: {field: given} if isinstance(given, str) else given,
        json_schema_input_type=Union[plain, told_apart],  # noqa: UP007  # an | needs types that are written out
    )
