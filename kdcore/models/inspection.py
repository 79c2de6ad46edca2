"""Facts that need a built network: if it accepts these images, the shapes at its taps, and the taps of timm's networks.

The catalogue has no taps for timm's networks. Nearly all of them list modules at the ends of their block groups, with
channels and reduction (`feature_info`). Where these cannot be tapped, the last activation of each size is taken. Every
tap is read from a pass before it is listed.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import SpecInvalid
from kdcore.catalog.architectures import architecture
from kdcore.catalog.facts import ArchitectureFacts, TapFacts
from kdcore.models.networks import build, skeleton
from kdcore.models.taps import Taps

MOST = 4
"""The number of block ends that are tapped, from the deepest; everything before them counts as stem."""


def inspect(name: str, num_classes: int, channels: int, image_size: tuple[int, int]) -> ArchitectureFacts:
    """Return the facts of a network after a pass over two images of this size. Raises SpecInvalid if that fails."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # The facts depend on name and images only.
        network = build(name, num_classes, channels).eval()
        _run(network, name, num_classes, torch.zeros(2, channels, *image_size))
        facts = architecture(name)
        if facts.source != "timm":
            return facts
        ends = block_ends(network, (channels, *image_size))
        preactivations, margins = before_relus(network, (channels, *image_size), list(ends))
        taps = {"taps": list(ends), "tap_widths": list(ends.values())}
        before = {"preactivations": preactivations, "margins": margins}
        counts = _counts(network, name, num_classes, torch.zeros(1, channels, *image_size))
        return facts.model_copy(update={**taps, **before, **counts})


def inspect_taps(
    name: str, num_classes: int, channels: int, image_size: tuple[int, int], paths: Sequence[str]
) -> TapFacts:
    """Return the shapes at taps for one image of this size. Raises SpecInvalid for a tap that cannot be read."""
    with torch.random.fork_rng(devices=[]):
        network = build(name, num_classes, channels).eval()
        taps = Taps(network, paths)
        _run(network, name, num_classes, torch.zeros(2, channels, *image_size))
        return TapFacts(shapes={path: list(activation.shape[1:]) for path, activation in taps.read().items()})


def _run(network: nn.Module, name: str, num_classes: int, images: Tensor) -> None:
    """Run the network on images; raise SpecInvalid where it fails or does not return one tensor of logits."""
    height, width = images.shape[2:]
    try:
        with torch.no_grad():
            logits = network(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecInvalid(f"{name} cannot take images of {height} x {width} pixels: {first_line}") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        raise SpecInvalid(f"{name} is no plain classifier: it does not answer N x {num_classes} logits")


def _counts(network: nn.Module, name: str, num_classes: int, images: Tensor) -> dict[str, Any]:
    """Return the embedding and its width if one module makes the logits, and parameters if it is linear with bias."""
    channels = images.shape[1]
    other = skeleton(name, num_classes + 1, channels)
    shapes = {key: weight.shape for key, weight in other.named_parameters()}
    changed = [key for key, weight in network.named_parameters() if weight.shape != shapes[key]]
    path = changed[0].rpartition(".")[0] if changed else ""
    if not path or any(key.rpartition(".")[0] != path for key in changed):
        return {}
    embedding = readable(network, images, [f"{path}@in"]).get(f"{path}@in")
    if embedding is None or embedding.dim() < 2 or embedding[0].numel() != embedding.shape[1]:
        return {}
    width = embedding.shape[1]
    facts = {"embedding": f"{path}@in", "embedding_width": width}
    if not isinstance(network.get_submodule(path), nn.Linear) or changed != [f"{path}.weight", f"{path}.bias"]:
        return facts
    stem = _parameters(skeleton(name, num_classes, channels + 1)) - _parameters(network)
    body = _parameters(network) - num_classes * (width + 1) - channels * stem
    return {**facts, "body_parameters": body, "stem_parameters_per_channel": stem}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def block_ends(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the taps of a network in eval mode, shallow to deep, and the channels at each."""
    images = _probe_images(*image_shape)
    outputs = _outputs(network, images)
    listed = _tappable(network, images, _listed_by_timm(network, outputs))
    if len(listed) > 1:
        return listed
    return max(listed, _tappable(network, images, _last_of_each_size(network, outputs)), key=len)


def before_relus(network: nn.Module, image_shape: tuple[int, int, int], ends: list[str]) -> tuple[list[str], list[str]]:
    """Return the taps before the ReLUs whose outputs are `ends`, and their batch norms. A list is complete or empty."""
    if not any(isinstance(module, nn.ReLU) for module in network.modules()):
        return [], []
    images = _probe_images(*image_shape)
    relus = _relus(network, images, ends)
    taps = [f"{relu}@in" for relu in relus if relu is not None]
    maps = readable(network, images, taps)
    if len(maps) < len(ends):
        return [], []
    norms = [norm for tap in taps if (norm := _feeding_norm(network, images, tap, maps[tap])) is not None]
    return taps, norms if len(norms) == len(taps) else []


def _relus(network: nn.Module, images: Tensor, ends: list[str]) -> list[str | None]:
    """Return the ReLU that made each block end, or None."""
    outputs: dict[int, str] = {}
    held: list[Tensor] = []  # While a tensor is referenced, no other tensor can have its id.

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


def _feeding_norm(network: nn.Module, images: Tensor, tap: str, maps_NCHW: Tensor) -> str | None:
    """Return the batch norm whose shift is added to a ReLU's input; of several, the last on the main path, not
    on the shortcut, which timm calls `downsample`."""
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


def _probe_images(channels: int, height: int, width: int) -> Tensor:
    """Return a black image, one with noise in its upper right corner, and one with noise in its lower left."""
    images = torch.rand(3, channels, height, width)
    images[0] = 0
    images[1, :, height // 2 :] = images[1, :, :, : width // 2] = 0
    images[2, :, : height // 2] = images[2, :, :, width // 2 :] = 0
    return images


def _outputs(network: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """Return the output shapes of modules that run once, in the order of their ends: maps or tokens for each image."""
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
    return {path: each[0] for path, each in shapes.items() if len(each) == 1 and each[0] is not None}


def _listed_by_timm(network: nn.Module, outputs: dict[str, torch.Size]) -> list[str]:
    """Return the last module that timm lists for each size; for a single size, the one at each quarter of the depth."""
    info: Any = getattr(network, "feature_info", [])
    named: dict[Any, list[str]] = {}
    for feature in info if isinstance(info, list) else info.get_dicts():
        shape = outputs.get(feature["module"])
        if shape is not None:
            channels_last = shape[-1] == feature["num_chs"] != shape[1]
            tap = _tap(feature["module"], shape, channels_last or _is_channels_last(network))
            named.setdefault(feature["reduction"], []).append(tap)
    if len(named) == 1:
        (layers,) = named.values()
        return list(dict.fromkeys(layers[(quarter * len(layers) - 1) // MOST] for quarter in range(1, MOST + 1)))
    return [layers[-1] for layers in named.values()][-MOST:]


def _last_of_each_size(network: nn.Module, outputs: dict[str, torch.Size]) -> list[str]:
    """Return the last module of each size, large maps first, without maps of one place.

    Deeply nested modules, such as queries and keys, are left out, because they end no block.
    """
    last: dict[int, str] = {}
    for path, shape in outputs.items():
        if path.count(".") > 2:
            continue
        tap = _tap(path, shape, _is_channels_last(network))
        if tap.endswith("@tokens"):
            places = isqrt(shape[1]) ** 2
        else:
            places = shape[1:3].numel() if tap.endswith("@nhwc") else shape[2:].numel()
        last[places] = tap
    return [last[places] for places in sorted(last, reverse=True) if places > 1][-MOST:]


def _is_channels_last(network: nn.Module) -> bool:
    return str(getattr(network, "output_fmt", "")) == "NHWC"


def _tap(path: str, shape: torch.Size, channels_last: bool) -> str:
    if len(shape) == 3:
        return f"{path}@tokens"
    return f"{path}@nhwc" if channels_last else path


def _tappable(network: nn.Module, images: Tensor, paths: list[str]) -> dict[str, int]:
    """Return the taps that can be read, and the channels at each."""
    return {path: maps.shape[1] for path, maps in readable(network, images, paths).items() if _keeps_places(path, maps)}


def readable(network: nn.Module, images: Tensor, paths: list[str]) -> dict[str, Tensor]:
    """Return the activations at the taps that can be read: all in one pass if possible, otherwise one by one."""
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


def _keeps_places(path: str, maps_NCHW: Tensor) -> bool:
    """Return True if the noise is still in its corner: some transformers keep their tokens in another order.

    Also True if that is unknown because no small part of the places changed far more than the rest.
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
