"""Logits of finished models, kept in this host's cache: jobs with the same teacher and data measure it once. They are
those of the test images, of the held-out ones, and of the samples of the teacher check.

An entry `<key>-logits/` of the cache has one file, `logits.safetensors`, with the checksum of its numbers. The key is
a digest of everything that decides the bits of the logits, so that a report is the same with and without an entry.
What cannot be read, or has another checksum, is measured and written again. Entries are trimmed as decoded data is
(`base.data_cache`).

Shapes: n images, K classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from base.data_cache import LOGITS, lock_of
from base.errors import StorageFull
from base.files import write_whole
from kdcore.catalog.facts import DATASET_READING, DatasetFacts
from kdcore.classifier import Classifier
from kdcore.data import Room
from kdcore.data.decoding import alone
from kdcore.data.images import Images
from kdcore.device import Computing
from kdcore.kernels import building
from kdcore.programs import Program
from kdcore.spec import Dataset

log = logging.getLogger("kdcore")

VERSION = 1
"""Increase it when `evaluate.logits_on` would give other bits than before."""
_FILE = "logits.safetensors"
_CHECKSUM = "sha256"


class Kept:
    """The kept logits of one job, with what the report says of them."""

    def __init__(self, cache: Path, room: Room, dataset: Dataset, facts: DatasetFacts, computing: Computing) -> None:
        self.cache, self.room, self.dataset, self.facts, self.computing = cache, room, dataset, facts, computing
        self.asked = self.measured = 0
        self.notes: list[str] = []

    def logits(
        self,
        architecture: str,
        model: Classifier,
        images: Images,
        measure: Callable[[], Tensor],
        part: Sequence[Any] | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """Return a model's logits: kept ones, or those that `measure` returns now. `part`: which images these are
        (`part_of`), and what else decides, as JSON; None for all test images. `rows`: of logits, if each image has not
        one."""
        # The number of threads may have changed since the job began.
        computing = replace(self.computing, threads=torch.get_num_threads())
        own = key(model, architecture, images, self.dataset, self.facts, computing, part)

        def counted() -> Tensor:
            self.measured += 1
            return measure()

        self.asked += 1
        return logits(self.cache, self.room, own, len(images) if rows is None else rows, counted, self._note)

    def report(self) -> dict[str, Any]:
        """Return what the report says: how many times logits were taken, and measured."""
        return {"taken": self.asked - self.measured, "measured": self.measured, "notes": list(self.notes)}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def part_of(split: str, images: int, rows: Tensor) -> list[Any]:
    """Return what tells these rows of a split, which has so many images, from others: for a key."""
    return [split, images, hashlib.sha256(_bytes(rows)).hexdigest()]


def logits(
    cache: Path,
    room: Room,
    key: str,
    images: int,
    measure: Callable[[], Tensor],
    note: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """Return the logits under `key`, float32 n × K: of an entry of the cache, or measured now, and kept if there is
    room. `images`: their number n. `note` is called with what was not read, or is not kept, and why."""

    def say(text: str) -> None:
        log.info("kept logits: %s", text)
        note(text)

    entry = cache / f"{key}{LOGITS}"
    found = _read(entry / _FILE, images, say)
    if found is not None:
        log.info("logits on %d images were measured before", images)
        with suppress(OSError):
            os.utime(entry)  # The trimming of the cache deletes what was not used for the longest time.
        return found
    measured = measure()
    needed = measured.numel() * measured.element_size()
    if needed > room.bytes(cache):
        say(f"not kept for later jobs: the cache has no room for {needed:,} bytes")
        return measured
    try:
        with alone(lock_of(entry)):
            write_whole(entry / _FILE, lambda path: path.write_bytes(_content(measured)))
    except (OSError, StorageFull) as error:
        say(f"not kept for later jobs: {getattr(error, 'strerror', None) or error}")
    return measured


def key(
    model: Classifier,
    architecture: str,
    images: Images,
    dataset: Dataset,
    facts: DatasetFacts,
    computing: Computing,
    part: Sequence[Any] | None = None,
) -> str:
    """Return the key of a model's logits: sha256, hex. They are computed in float32, whatever the precision of the
    training, but a folded teacher's as it teaches. `part`: see `Kept.logits`."""
    digest = hashlib.sha256()
    network = model.network
    decides = {
        "version": VERSION,
        "torch": [torch.__version__, torch.backends.cpu.get_cpu_capability()],
        "computing": [
            *(computing.device, computing.threads, computing.folded, computing.folded and computing.bf16),
            *([building.entry_of(building.kind())] if computing.convolutions else []),
        ],
        "network": [architecture, *(one.facts.digest for one in network.modules() if isinstance(one, Program))],
        "classes": [_listed(model.order), _listed(model.merged)],
        "normalization": [_listed(model.mean), _listed(model.std)],
        "data": [facts.digest or dataset.source, DATASET_READING, dataset.deciding()],
        "images": list(images.at(model.image_size).pixels.shape),
        **({} if part is None else {"part": part}),
    }
    digest.update(json.dumps(decides, sort_keys=True).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _listed(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.tolist()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _content(logits_nK: Tensor) -> bytes:
    return save({"logits": logits_nK}, {_CHECKSUM: hashlib.sha256(_bytes(logits_nK)).hexdigest()})


def _read(path: Path, images: int, say: Callable[[str], None]) -> Tensor | None:
    """Return the logits in a file; None if there is none, or if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            logits_nK: Tensor = file.get_tensor("logits")
            checksum = (file.metadata() or {}).get(_CHECKSUM)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        say(f"measured again: {getattr(error, 'strerror', None) or error}")
        return None
    whole = logits_nK.dtype == torch.float32 and logits_nK.dim() == 2 and len(logits_nK) == images
    if whole and hashlib.sha256(_bytes(logits_nK)).hexdigest() == checksum:
        return logits_nK
    say("measured again: the stored numbers have another checksum")
    return None
