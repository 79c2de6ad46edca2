"""The networks that may teach or learn, by name."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.answers import page
from api.auth import Who
from api.schemas import Page
from kdcore.catalog import ARCHITECTURES, ArchitectureFacts

router = APIRouter(prefix="/v1/architectures", tags=["catalogue"])


class ArchitectureView(ArchitectureFacts):
    parameters_counted: int | None = None
    """For the classes and channels asked for; null where only building the network can tell."""


@router.get("", response_model=Page[ArchitectureView])
async def listing(
    who: Who,
    family: Annotated[str | None, Query(max_length=100)] = None,
    source: Annotated[str | None, Query(max_length=100, description="kdcore, torchvision or timm.")] = None,
    classes: Annotated[int, Query(ge=2, le=1_000_000)] = 10,
    channels: Annotated[int, Query(ge=1, le=64)] = 3,
) -> Response:
    """Every architecture, with its parameter count for so many classes and channels where that can be counted."""
    chosen = [
        facts
        for _, facts in sorted(ARCHITECTURES.items())
        if family in (None, facts.family) and source in (None, facts.source)
    ]
    return page(
        [
            {**facts.model_dump(mode="json"), "parameters_counted": facts.parameters(classes, channels)}
            for facts in chosen
        ]
    )
