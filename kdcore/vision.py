"""The one place that imports torchvision.

torchvision's wheel carries compiled operators that do not load beside a CPU-only torch; its import then fails with
"operator torchvision::nms does not exist". We use none of them, so they are declared, without a body, where they are
absent. The import costs seconds: call `torchvision()` when it is needed, not on start.
"""

from functools import cache
from types import ModuleType

import torch

SIGNATURES = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@cache
def torchvision() -> ModuleType:
    """The torchvision package, with `datasets`, `models` and `transforms` loaded."""
    _declare_missing_operators()
    import torchvision
    import torchvision.datasets
    import torchvision.models
    import torchvision.transforms

    return torchvision


@cache
def timm() -> ModuleType:
    """The timm package, which imports torchvision itself. Raises ImportError where it is not installed."""
    torchvision()
    import timm

    return timm


@cache
def _declare_missing_operators() -> torch.library.Library | None:
    """The declaration lasts as long as the library object: the cache keeps it."""
    try:
        # torchvision loads its compiled part on import, too late for us: so ask whether it would load.
        from importlib.util import find_spec

        spec = find_spec("torchvision")
    except ValueError:
        spec = None
    return spec
