"""Weights that torchvision and timm publish: found by name without a download, then fetched once into the cache.

    find    what the library says about the weights: network, classes, size, normalization, the file's name
    fetch   the file: from the operator's folder or mirror, else from where the library publishes it

A name is an entry of torchvision (`ResNet50_Weights.IMAGENET1K_V2`), `torchvision/resnet50` for the default ones of a
network, `torchvision/resnet50.IMAGENET1K_V1` or `timm/resnet18.a1_in1k` for those of a tag.

In the cache, `downloads/weights.<file>/` holds one file, named by its SHA-256. `DISTILLERY_WEIGHTS` names a folder in
which files are looked for first, or the address of a mirror; both have the files under their published names.
"""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from base.data_cache import DOWNLOADS, lock_of, partial_of
from base.errors import SpecInvalid, WeightsUnavailable
from base.files import DISK_FULL, sha256_of, sync
from kdcore import vision
from kdcore.catalog import PublishedFacts
from kdcore.data.decoding import alone
from kdcore.models.networks import skeleton
from kdcore.weights import loading
from kdcore.weights.content import read_content
from kdcore.weights.names import flat

SETTING = "DISTILLERY_WEIGHTS"
PREFIX = "weights:"
HUB_FILE = "model.safetensors"
TIMEOUT_S = 30.0
"""For an answer of a server, in the place of none at all."""
NORMALISE_AGAIN = ("torchvision/googlenet", "torchvision/inception_v3")
"""These two, as torchvision loads them, normalise their input again, to a mean and deviation of one half."""


@dataclass(frozen=True)
class Published:
    """Weights of a library, and where their file is published: at a URL, or in a repository of the Hugging Face hub."""

    name: str
    facts: PublishedFacts
    url: str | None = None
    repository: str | None = None
    sha256_prefix: str = ""
    licence: str | None = None
    """As the library states it; torchvision states none of its weights."""


def find(name: str) -> Published:
    """Return the weights of a name without the prefix `weights:`. Raises SpecInvalid for a name that no library has."""
    return _of_timm(name) if name.startswith("timm/") else _of_torchvision(name)


def inspect(name: str) -> PublishedFacts:
    """Return the facts of published weights. Nothing is downloaded."""
    return find(name).facts


def _of_torchvision(name: str) -> Published:
    architecture, entry = _entry(name)
    transforms = entry.transforms()
    again = architecture in NORMALISE_AGAIN
    file = Path(urlsplit(entry.url).path).name
    classes = list(entry.meta["categories"])
    size = transforms.crop_size[0]
    facts = PublishedFacts(
        **_size(architecture, len(classes), 3),
        format="pytorch",
        mean=[0.5] * 3 if again else list(transforms.mean),
        std=[0.5] * 3 if again else list(transforms.std),
        class_names=classes,
        image_size=(size, size),
        file=file,
    )
    # torchvision's file names end in the first digits of their SHA-256.
    return Published(f"{PREFIX}{name}", facts, url=entry.url, sha256_prefix=Path(file).stem.rpartition("-")[2])


def _entry(name: str) -> tuple[str, Any]:
    """Return the architecture and torchvision's own record of the weights."""
    library = vision.torchvision().models
    networks = library.list_models(module=library)
    network, _, tag = name.removeprefix("torchvision/").partition(".")
    if network in networks:
        entries = library.get_model_weights(network)
        if not tag:
            return f"torchvision/{network}", entries.DEFAULT
        if tag in entries.__members__:
            return f"torchvision/{network}", entries[tag]
        raise SpecInvalid(f"torchvision publishes no weights {tag!r} of {network}", hint=_such_as(entries.__members__))
    try:
        entry = library.get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        near = get_close_matches(network, networks, n=3)
        hint = f"did you mean torchvision/{near[0]}?" if near else "such as ResNet50_Weights.IMAGENET1K_V2"
        raise SpecInvalid(f"torchvision publishes no weights {name!r}", hint=hint) from error
    for network in networks:
        if library.get_model_weights(network) is type(entry):
            return f"torchvision/{network}", entry
    raise SpecInvalid(f"{name} are not the weights of an image classifier")


def _of_timm(name: str) -> Published:
    timm = vision.timm()
    given = name.removeprefix("timm/")
    network, _, tag = given.partition(".")
    if not timm.is_model(network):
        near = get_close_matches(network, timm.list_models(), n=3)
        raise SpecInvalid(f"timm has no model {network!r}", hint=f"did you mean {', '.join(near)}?" if near else None)
    published = timm.list_pretrained(f"{network}.*") or timm.list_pretrained(network)
    try:
        config = timm.get_pretrained_cfg(given)
    except RuntimeError:
        config = None
    if config is None or not (config.hf_hub_id or config.url):
        what = f"with the tag {tag!r} of {network}" if tag else f"of {network}"
        raise SpecInvalid(f"timm publishes no weights {what}", hint=_such_as(f"timm/{one}" for one in published))
    if config.custom_load:
        raise SpecInvalid(
            f"timm publishes {given} in a format of its own, which is not read here",
            hint=_such_as(f"timm/{one}" for one in published if one != given)
            or "load them with timm, and upload network.state_dict()",
        )
    channels, height, width = config.input_size
    if config.hf_hub_id:
        file = f"{config.hf_hub_id}/{config.hf_hub_filename or HUB_FILE}"
    else:
        file = Path(urlsplit(config.url).path).name
    facts = PublishedFacts(
        **_size(f"timm/{network}", config.num_classes, channels),
        format="safetensors" if file.endswith(".safetensors") else "pytorch",
        mean=list(config.mean),
        std=list(config.std),
        class_names=list(config.label_names) if config.label_names else None,
        image_size=(height, width),
        file=file,
    )
    return Published(
        f"{PREFIX}{name}", facts, url=config.url or None, repository=config.hf_hub_id, licence=config.license
    )


def _such_as(names: Any) -> str | None:
    few = list(names)[:4]
    return f"there are {', '.join(few)}" if few else None


def _size(architecture: str, num_classes: int, channels: int) -> dict[str, Any]:
    parameters = sum(one.numel() for one in skeleton(architecture, num_classes, channels).parameters())
    counts = {"num_classes": num_classes, "channels": channels, "parameters": parameters, "bytes": 4 * parameters}
    return {"architecture": architecture, **counts}


def fetch(published: Published, cache: Path) -> Path:
    """Return the file of published weights, which is downloaded unless it is in the cache.

    Jobs that need the same file wait for one download. A process that is killed leaves nothing that looks whole.
    Raises WeightsUnavailable if the file is nowhere to be had.
    """
    folder = cache / DOWNLOADS / f"weights.{published.facts.file.replace('/', '.')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(lock_of(folder)):
        path = _whole(folder)
        if path is None:
            path = _filled(folder, published)
        os.utime(folder)  # The cache is trimmed by the time of the last use.
    return path


def _whole(folder: Path) -> Path | None:
    """Return the one file of an entry if its bytes are those of its name."""
    for path in folder.glob("*"):
        if sha256_of(path) == path.stem:
            return path
    return None


def _filled(folder: Path, published: Published) -> Path:
    partial = partial_of(folder)
    for rest in (folder, partial):
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir()
    path = _obtained(published, partial)
    digest = sha256_of(path)
    name = f"{digest}{Path(published.facts.file).suffix}"
    path.rename(partial / name)
    for rest in partial.iterdir():
        if rest.is_dir():  # The hub's client keeps notes beside the file.
            shutil.rmtree(rest)
    for one in (partial / name, partial):
        sync(one)
    partial.rename(folder)
    sync(folder.parent)
    return folder / name


def _obtained(published: Published, folder: Path) -> Path:
    """Return the file in `folder`: copied from the operator's folder or torch's own cache, else downloaded."""
    setting, file = os.environ.get(SETTING, ""), published.facts.file
    is_mirror = "://" in setting
    kept = [Path(torch.hub.get_dir()) / "checkpoints" / Path(file).name] if not published.repository else []
    for place in ([] if is_mirror or not setting else [Path(setting) / file]) + kept:
        if place.is_file():
            copied = folder / "copied"
            shutil.copyfile(place, copied)
            digest = sha256_of(copied)
            if digest.startswith(published.sha256_prefix):
                return copied
            text = f"{place} are not the published weights: its SHA-256 begins with {digest[:8]}, "
            raise WeightsUnavailable(f"{text}and not with {published.sha256_prefix}", "copy the file again")
    if is_mirror:
        address = f"{setting.rstrip('/')}/{file}"
        return _downloaded(published, address, lambda: _by_url(address, folder, published.sha256_prefix))
    if published.repository:
        return _downloaded(published, f"huggingface.co/{file}", lambda: _from_hub(published, folder))
    url = published.url
    assert url is not None, "find() refuses weights that are published nowhere"
    return _downloaded(published, url, lambda: _by_url(url, folder, published.sha256_prefix))


def _downloaded(published: Published, address: str, download: Callable[[], Path]) -> Path:
    try:
        with _answers_in_time():
            return download()
    except Exception as error:  # The hub's client and its own HTTP library have many kinds.
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsUnavailable(
            f"the weights {published.name.removeprefix(PREFIX)} could not be downloaded from {address}: {reason}",
            hint=f"download {published.facts.file} on a machine with internet; then upload and register it (distillery "
            f"models add NAME FILE --architecture {published.facts.architecture}) and give 'checkpoint': 'model:NAME', "
            f"or put it into the folder that {SETTING} names",
        ) from error


@contextmanager
def _answers_in_time() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _by_url(url: str, folder: Path, sha256_prefix: str) -> Path:
    path = folder / "downloaded"
    torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix or None, progress=False)
    return path


def _from_hub(published: Published, folder: Path) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not listed there

    disable_progress_bars()
    assert published.repository is not None, "the file is on the hub"
    name = published.facts.file.removeprefix(f"{published.repository}/")
    return Path(huggingface_hub.hf_hub_download(published.repository, name, local_dir=folder))


def state(published: Published, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a published file under the names of its network. timm's own code renames those of other
    origins; the file is read without it, so that no pickle is run."""
    facts = published.facts
    if not published.name.startswith(f"{PREFIX}timm/"):
        return loading.open_teacher(path, facts.architecture).state
    own = flat(read_content(path)).tensors
    network = vision.timm().create_model(
        published.name.removeprefix(f"{PREFIX}timm/"),
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(own)},
        num_classes=facts.num_classes,
        in_chans=facts.channels,
    )
    return dict(network.state_dict())
