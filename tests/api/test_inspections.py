"""What was seen once is not looked at again, but for verdicts about us."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from api.inspections import Inspections
from api.inspector import Inspector, Refused
from kdcore.catalog import TapFacts
from tests.api.conftest import DATASET, Service

pytestmark = pytest.mark.anyio

NO_SUCH_TAP = Refused("spec_invalid", "tap 'layer9': the network has no such module", "near it: layer3")
TOO_LONG = Refused("timeout", "looking at the file took longer than 1 s", final=False)


class TapInspector(Inspector):
    """Gives the same answer to every question, and counts them."""

    def __init__(self, answer: TapFacts | Refused) -> None:
        super().__init__(Path("never used"))
        self.answer = answer
        self.asked: list[tuple[str, Sequence[str], tuple[int, int]]] = []

    async def taps(
        self, name: str, num_classes: int, channels: int, image_size: tuple[int, int], paths: Sequence[str]
    ) -> TapFacts | Refused:
        self.asked.append((name, paths, image_size))
        return self.answer


def asking(service: Service, answer: TapFacts | Refused) -> tuple[Inspections, TapInspector]:
    inspector = TapInspector(answer)
    return Inspections(service.db, service.files, inspector), inspector


async def test_taps_are_read_once_for_a_network_its_paths_and_images(service: Service) -> None:
    inspections, inspector = asking(service, TapFacts(shapes={"layer3": [64, 8, 8]}))
    for _ in range(2):
        assert await inspections.taps("resnet20", ("layer3",), DATASET) == {"layer3": [64, 8, 8]}
    assert inspector.asked == [("resnet20", ("layer3",), (8, 8))]
    await inspections.taps("resnet56", ("layer3",), DATASET)
    await inspections.taps("resnet20", ("layer2",), DATASET)
    await inspections.taps("resnet20", ("layer3",), DATASET.model_copy(update={"image_size": (32, 32)}))
    assert len(inspector.asked) == 4


@pytest.mark.parametrize(("refused", "times"), [(NO_SUCH_TAP, 1), (TOO_LONG, 2)], ids=["about the spec", "about us"])
async def test_a_verdict_about_us_is_asked_again(service: Service, refused: Refused, times: int) -> None:
    inspections, inspector = asking(service, refused)
    for _ in range(2):
        assert await inspections.taps("resnet20", ("layer9",), DATASET) == refused
    assert len(inspector.asked) == times
