"""The only module that imports torchvision, and timm, which imports torchvision.

torchvision's wheel has compiled operators that do not load beside a CPU-only torch; its import then fails with
"operator torchvision::nms does not exist". These operators are not used here, so two are declared without a body if the
compiled part does not load. The imports take seconds: call these functions when they are needed, not at start.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from base.errors import SpecInvalid

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def torchvision() -> Any:
    """Return the torchvision package with `datasets` and `models` loaded."""
    _declare_missing_operators()
    import torchvision
    import torchvision.datasets
    import torchvision.models

    return torchvision


@cache
def timm() -> Any:
    """Return the timm package, an optional extra. Raises SpecInvalid if it is not installed."""
    if find_spec("timm") is None:
        raise SpecInvalid("timm is not installed here", hint="pip install 'distillery[timm]'")
    torchvision()
    import timm

    return timm


@cache
def _declare_missing_operators() -> Any:
    """Declare the operators if torchvision's own do not load. A declaration lasts as long as its library object."""
    package = find_spec("torchvision")
    if package is None or package.origin is None:
        return None
    for compiled in Path(package.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(compiled)
            return None
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for signature in OPERATORS:
        library.define(signature)
    return library
