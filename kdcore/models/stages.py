"""Where the stages of a network end that the catalogue does not know.

timm says it of nearly all its networks (`feature_info`): modules, their channels, and how far each has shrunk the
image. Where that leads to nothing that can be tapped, the last activation of each size is taken. Nothing is believed
that has not been read from a pass.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import SpecInvalid
from kdcore.taps import Taps

MOST = 4
"""Stages that are tapped, from the deepest; what stands before them is stem."""


def stage_ends(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Taps of a network in eval mode, shallow to deep, and the channels at each."""
    images = _marked(*image_shape)
    outputs = _outputs(network, images)
    told = _working(network, images, _told(network, outputs))
    return told if len(told) > 1 else max(told, _working(network, images, _measured(network, outputs)), key=len)


def before_relus(network: nn.Module, image_shape: tuple[int, int, int], ends: list[str]) -> tuple[list[str], list[str]]:
    """Taps before the ReLUs that give `ends`, and batch norms that feed them; of either all or none."""
    images = _marked(*image_shape)
    relus = _relus(network, images, ends)
    taps = [f"{relu}@in" for relu in relus if relu is not None]
    maps = readable(network, images, taps)
    if len(maps) < len(ends):
        return [], []
    norms = [norm for tap in taps if (norm := _feeding(network, images, tap, maps[tap])) is not None]
    return taps, norms if len(norms) == len(taps) else []


def _relus(network: nn.Module, images: Tensor, ends: list[str]) -> list[str | None]:
    """The ReLU, if any, whose output is that of each stage."""
    outputs: dict[int, str] = {}
    held: list[Tensor] = []  # An id is that of one tensor only as long as it lives.

    def note(path: str, output: Tensor) -> None:
        held.append(output)
        outputs[id(output)] = path

    def hook(path: str) -> Any:
        return lambda _module, _args, output: note(path, output)

    relus = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.ReLU)]
    handles = [module.register_forward_hook(hook(path)) for path, module in relus]
    maps = readable(network, images, ends)
    for handle in handles:
        handle.remove()
    return [outputs.get(id(maps[end])) for end in ends]


def _feeding(network: nn.Module, images: Tensor, tap: str, maps_NCHW: Tensor) -> str | None:
    """The batch norm beside a ReLU of which one more in the shift is one more in what the ReLU is given; of several the
    last on the block's own way, not on its shortcut, which timm calls `downsample`."""
    block, width = tap.rpartition(".")[0], maps_NCHW.shape[1]
    norms = {
        path: norm
        for path, norm in network.named_modules()
        if path.startswith(f"{block}.") and isinstance(norm, nn.BatchNorm2d) and norm.num_features == width
    }
    for path in sorted(reversed(norms), key=lambda path: (".downsample." in path, path.count("."))):
        norms[path].bias.data += 1
        moved = readable(network, images, [tap])[tap]
        norms[path].bias.data -= 1
        if torch.allclose(moved, maps_NCHW + 1, atol=1e-4):
            return path
    return None


def _marked(channels: int, height: int, width: int) -> Tensor:
    """A black image, one with noise in its upper right corner, and one with noise in its lower left."""
    images = torch.rand(3, channels, height, width)
    images[0] = 0
    images[1, :, height // 2 :] = images[1, :, :, : width // 2] = 0
    images[2, :, : height // 2] = images[2, :, :, width // 2 :] = 0
    return images


def _outputs(network: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """Shapes of what modules give that run once, in the order in which they end: maps or tokens, one for each image."""
    shapes: dict[str, list[torch.Size | None]] = {}

    def note(path: str, output: Any) -> None:
        one_for_each = isinstance(output, Tensor) and output.dim() in (3, 4) and len(output) == len(images)
        shapes.setdefault(path, []).append(output.shape if one_for_each else None)

    def hook(path: str) -> Any:
        return lambda _module, _args, output: note(path, output)

    handles = [module.register_forward_hook(hook(path)) for path, module in network.named_modules() if path]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return {path: seen[0] for path, seen in shapes.items() if len(seen) == 1 and seen[0] is not None}


def _told(network: nn.Module, outputs: dict[str, torch.Size]) -> list[str]:
    """The last module that timm names for each size; of a network of one size, that after each quarter of its depth."""
    info: Any = getattr(network, "feature_info", [])
    named: dict[Any, list[str]] = {}
    for feature in info if isinstance(info, list) else info.get_dicts():
        shape = outputs.get(feature["module"])
        if shape is not None:
            channels_last = shape[-1] == feature["num_chs"] != shape[1]
            tap = _tap(feature["module"], shape, channels_last or _says_channels_last(network))
            named.setdefault(feature["reduction"], []).append(tap)
    if len(named) == 1:
        (layers,) = named.values()
        return list(dict.fromkeys(layers[(quarter * len(layers) - 1) // MOST] for quarter in range(1, MOST + 1)))
    return [layers[-1] for layers in named.values()][-MOST:]


def _measured(network: nn.Module, outputs: dict[str, torch.Size]) -> list[str]:
    """The last module of each size, large maps first, without what has been averaged to one place.

    Modules that stand deep inside of others are left out: queries and keys are no ends of stages.
    """
    last: dict[int, str] = {}
    for path, shape in outputs.items():
        if path.count(".") > 2:
            continue
        tap = _tap(path, shape, _says_channels_last(network))
        if tap.endswith("@tokens"):
            places = isqrt(shape[1]) ** 2
        else:
            places = shape[1:3].numel() if tap.endswith("@nhwc") else shape[2:].numel()
        last[places] = tap
    return [last[places] for places in sorted(last, reverse=True) if places > 1][-MOST:]


def _says_channels_last(network: nn.Module) -> bool:
    return str(getattr(network, "output_fmt", "")) == "NHWC"


def _tap(path: str, shape: torch.Size, channels_last: bool) -> str:
    if len(shape) == 3:
        return f"{path}@tokens"
    return f"{path}@nhwc" if channels_last else path


def _working(network: nn.Module, images: Tensor, paths: list[str]) -> dict[str, int]:
    """Those that can be read, and the channels at each."""
    return {path: maps.shape[1] for path, maps in readable(network, images, paths).items() if _shows(path, maps)}


def readable(network: nn.Module, images: Tensor, paths: list[str]) -> dict[str, Tensor]:
    """What taps give, without those that give nothing: all in one pass where all can be read, else one by one."""
    taps = Taps(network, paths)
    try:
        with torch.no_grad():
            network(images)
        return taps.read()
    except SpecInvalid:
        if len(paths) == 1:
            return {}
    finally:
        taps.close()
    return {path: maps for one in paths for path, maps in readable(network, images, [one]).items()}


def _shows(path: str, maps_NCHW: Tensor) -> bool:
    """Whether the noise is in its corner; some transformers keep their tokens in another order.

    Only where a few places have changed far more than the rest can that be told: some layers mix all places at once.
    """
    rows, columns = maps_NCHW.shape[2] // 2, maps_NCHW.shape[3] // 2
    if not path.endswith("@tokens") or rows == 0:
        return True
    changes_NHW = (maps_NCHW[1:] - maps_NCHW[0]).square().sum(dim=1)
    corners_NHW = torch.zeros_like(changes_NHW)
    corners_NHW[0, :rows, -columns:] = corners_NHW[1, -rows:, :columns] = 1
    order = changes_NHW.flatten(1).argsort(dim=1, descending=True)
    changes, corners = changes_NHW.flatten(1).gather(1, order), corners_NHW.flatten(1).gather(1, order)
    most = rows * columns
    few_changed = changes[:, :most].mean() > 5 * changes[:, most:].mean()
    return bool(~few_changed or corners[:, :most].mean() > 1 / 2)
