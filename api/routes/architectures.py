"""The networks that can be teachers or students, by name."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import Caller
from api.schemas import Filter, Page, page
from kdcore.catalog import ARCHITECTURES, ArchitectureFacts

router = APIRouter(prefix="/v1/architectures", tags=["catalogue"])


class ArchitectureView(ArchitectureFacts):
    parameters_counted: int | None = None
    """For the requested classes and channels; null if only building the network can tell."""


@router.get("", response_model=Page[ArchitectureView])
async def listing(
    caller: Caller,
    family: Annotated[Filter | None, Query()] = None,
    source: Annotated[Filter | None, Query(description="kdcore, torchvision or timm.")] = None,
    classes: Annotated[int, Query(ge=2, le=1_000_000)] = 10,
    channels: Annotated[int, Query(ge=1, le=64)] = 3,
) -> Response:
    """Every architecture, with its number of parameters for these classes and channels, if that is known."""
    return page(
        [
            {**facts.model_dump(mode="json"), "parameters_counted": facts.parameters(classes, channels)}
            for _, facts in sorted(ARCHITECTURES.items())
            if family in (None, facts.family) and source in (None, facts.source)
        ]
    )
