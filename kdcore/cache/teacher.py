"""A teacher whose outputs are kept by image and view, in front of the one that computes them.

The loss sees the same bits whether a view's outputs were stored, were computed now, or are kept nowhere:

- The teacher runs on pieces of one size: what is missing, in the order of the epoch, and rows again if a piece is not
  full. A piece may reach into later batches, so that few missing views cost little.
- Before the first piece, two pieces of noise show whether a row's outputs are the same bits in another place, beside
  other rows, and on one thread. If they are not, the teacher runs on whole batches and nothing is kept.
- Stored numbers are those that the teacher gave (`layout.py`).
- Of the first views that an earlier process has stored, one piece is computed again and compared.

What decides the outputs is in the key (`key.py`). An entry of the cache belongs to one key (`store.py`).
Shapes: N batch, W numbers of a view.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.data_cache import TEACHER, TEACHER_MAX_BYTES
from base.warning import WarningItem
from kdcore.cache.key import decides
from kdcore.cache.layout import Layout, Values, same_bits
from kdcore.cache.store import Keys, ViewStore
from kdcore.data import streaming
from kdcore.data.views import Batches
from kdcore.lesson import NOTHING, Batch, Needs, Teacher, View
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import RandomResizedCrop

log = logging.getLogger("kdcore")

PIECE = 64
"""Rows of a piece; those of a batch, if these are fewer: a user may have chosen them because of the memory."""
SETTING = "DISTILLERY_TEACHER_CACHE_MAX_BYTES"
"""What limits the stored outputs, unless the whole cache may hold less."""
_VIEW_BITS = 20
"""A key is the row, and a number of the view of so many bits: crop_flip has 33,282 views at most, a spec 100,000."""


@dataclass
class _Epoch:
    """An epoch's views: where each is stored, and what was computed of the others."""

    rows: Tensor
    keys: Keys
    places: Keys
    """In the store; -1 if a view must be computed."""
    missing: Keys = field(init=False)
    """Positions in the epoch, rising, of the views that are to be computed."""
    done: int = 0
    """So many of `missing` have been computed."""
    computed: dict[int, Values] = field(default_factory=dict)
    """Numbers by position, until their batch comes."""

    def starts_at(self, position: int) -> None:
        self.missing, self.done = np.flatnonzero(self.places[position:] < 0) + position, 0


@dataclass
class Figures:
    """What the cache has done in this attempt at a job."""

    hits: int = 0
    misses: int = 0
    compared: int = 0
    """Stored views that were computed again."""
    seconds: float = 0.0
    """Of the teacher's forward passes."""
    stored: int = 0
    not_kept: int = 0
    """Views that were computed while the cache was on, and not stored: `notes` say why."""
    bytes: int = 0
    """Of the entries used, with what other jobs have stored in them."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            log.info("teacher cache: %s", text)


class CachedTeacher(Teacher):
    """A teacher in front of another. `keep` is False if nothing is to be kept: the bits are the same.

    `setting` is the name of what sets `max_bytes`. `spent` gets the seconds of each call without the teacher's own: of
    looking up and keeping. `through` says what is shown next; until then, views are passed on to the other teacher as
    they are.
    """

    def __init__(
        self,
        teacher: Teacher,
        decides: Mapping[str, Any],
        folder: Path,
        keep: bool = True,
        max_bytes: int = TEACHER_MAX_BYTES,
        warn: Callable[[WarningItem], None] = lambda _: None,
        setting: str = SETTING,
        spent: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.teacher, self.members, self.spent = teacher, teacher.members, spent
        self.decides, self.folder = decides, folder
        self.keep, self.max_bytes, self.setting, self.warn = keep, max_bytes, setting, warn
        self.figures = Figures()
        self.needs = NOTHING
        self._off = "" if keep else "training.teacher_cache is 'off'"
        self._unfit = ""
        self._coming: Batches | None = None
        """Of the present epoch."""
        self._layout: Layout | None = None
        self._threads: int | None = None
        """Part of the key, if a row's outputs are others on one thread."""
        self._store: ViewStore | None = None
        self._epoch: _Epoch | None = None
        self._is_tried = False
        self._is_compared = False

    # Teacher

    def show(self, needs: Needs) -> None:
        self.close()
        self.needs, self._coming, self._is_tried, self._layout, self._unfit = needs, None, False, None, ""
        self.teacher.show(needs)

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        return self.teacher.combined(logits_kNK)

    def soft_targets(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        return self.teacher.soft_targets(logits_kNK, temperature)

    def __call__(self, batch: Batch) -> View:
        began, of_teacher = time.monotonic(), self.figures.seconds
        view = self._view(batch)
        self.spent(time.monotonic() - began - (self.figures.seconds - of_teacher))
        return view

    def _view(self, batch: Batch) -> View:
        layout = self._layout_for(batch)
        if layout is None:
            return self._timed(batch)
        first = int(batch.index[0])
        epoch = self._epoch
        if epoch is None:
            epoch = self._epoch = self._begin_epoch(batch, layout)
        start = int((epoch.rows == first).nonzero()[0])
        end = start + len(batch.index)
        assert torch.equal(epoch.rows[start:end], batch.index), "a stage shows its rows in the epoch's order"
        return layout.view(self._values(epoch, batch, start, end, layout))

    def through(self, batches: Batches) -> Iterable[Batch]:
        self._coming, self._epoch = batches, None
        return self.teacher.through(batches)

    # The job

    def close(self) -> None:
        """Write what is not written yet, and release the entry of the cache."""
        self._flush()
        self._release()
        self._epoch = None

    @property
    def why_unused(self) -> str:
        """Return why nothing is kept of the views of this stage; "" if they are."""
        return self._unfit or self._off

    def report(self) -> dict[str, Any]:
        """Return what the report says of the cache. `used` is False if it was off from the start, or could neither be
        read nor written."""
        figures = self.figures
        return {
            "used": figures.hits + figures.stored > 0 or (self.keep and figures.misses > 0),
            **{name: getattr(figures, name) for name in ("hits", "misses", "compared", "stored", "not_kept", "bytes")},
            "seconds": round(figures.seconds, 3),
            "notes": list(figures.notes),
        }

    # Computing

    def _layout_for(self, batch: Batch) -> Layout | None:
        """Return the layout of views that may be kept, or computed in pieces as if they were; None for all others."""
        if self._coming is None:
            return None
        if not self._is_tried:
            self._is_tried = True
            reason = self._why_not(batch)
            if reason is None:
                found = self._try(batch)
                reason = found if isinstance(found, str) else None
                self._layout = None if isinstance(found, str) else found
            if reason is not None:
                self._unfit = reason
                self.figures.note(f"not used: {reason}")
        return self._layout

    def _why_not(self, batch: Batch) -> str | None:
        if self.needs.input_gradient or self.needs.teacher_layers:
            return "the method reads the teacher's gradients or modules"
        if batch.view_ids is None:
            return "mixed images, and boxes without a number of views, have no numbers"
        return None if batch.inputs.device.type == "cpu" else "it is for CPUs"

    def _try(self, batch: Batch) -> Layout | str:
        """Return the layout of the teacher's views, or what forbids to compute it in pieces: on noise, so that the
        answer is the same wherever a job is resumed."""
        assert self._coming is not None
        size = self._piece
        noise = torch.Generator().manual_seed(0)
        inputs, *sized = (
            torch.randint(0, 256, (size, *views.shape[1:]), dtype=torch.uint8, generator=noise)
            for views in (batch.inputs, *batch.sized.values())
        )
        rows = torch.arange(size)
        piece = Batch(inputs, torch.zeros_like(rows), rows, 0, rows, dict(zip(batch.sized, sized, strict=True)))
        view = self.teacher(piece)
        layout = Layout.of(view)
        if isinstance(layout, str):
            return layout
        once = layout.flat(view)
        # Moved by one place, and a half of other rows.
        moved = rows.roll(1)
        moved[size // 2 :] = 0
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            again = layout.flat(self.teacher(piece.take(moved)))
        finally:
            torch.set_num_threads(threads)
        self._threads = None
        if not same_bits(once[moved.numpy()], again):
            self._threads = threads
            if not same_bits(once[moved.numpy()], layout.flat(self.teacher(piece.take(moved)))):
                return "the teacher's outputs for an image depend on the images beside it"
        return layout

    @property
    def _piece(self) -> int:
        assert self._coming is not None
        return min(PIECE, self._coming.recipe.batch_size)

    def _begin_epoch(self, batch: Batch, layout: Layout) -> _Epoch:
        assert self._coming is not None
        self._flush()
        if self._store is None:
            self._store = self._opened(layout)
        else:
            self._store.refresh()
        rows = self._coming.rows()
        keys = _keys(self._coming, rows)
        epoch = _Epoch(rows, keys, np.full(len(keys), -1, dtype=np.int64))
        start = int((rows == batch.index[0]).nonzero()[0])
        if self._store is not None:
            epoch.places = self._store.find(keys)
            self._compare(epoch, start, layout)
        epoch.starts_at(start)
        return epoch

    def _compare(self, epoch: _Epoch, start: int, layout: Layout) -> None:
        """Compute a piece of stored views again, the first time that there are some. If one has other bits, what is
        stored was computed in another way than the key can tell, and nothing of it is used."""
        stored = np.flatnonzero(epoch.places[start:] >= 0)[: self._piece] + start
        if self._store is None or self._is_compared or not len(stored):
            return
        self._is_compared = True
        self.figures.compared += len(stored)
        found = self._read(epoch, start, epoch.places[stored], layout)
        if found is not None and not same_bits(found, self._computed(epoch, stored, layout)):
            self._forget(epoch, start)
            text = f"of {len(stored)} stored outputs of the teacher, some are not what this machine computes"
            self._end(text, "nothing: the job computes its own. Delete the entry's folder to fill it again")

    def _read(self, epoch: _Epoch, start: int, places: Keys, layout: Layout) -> Values | None:
        """Return what is stored at some places. If it cannot be read, None: then all is computed from `start` on."""
        assert self._store is not None, "places are those of a store"
        try:
            return layout.decoded(self._store.read(places))
        except OSError as error:
            self._forget(epoch, start)
            text = f"the stored outputs of the teacher cannot be read: {error.strerror or error}"
            self._end(text, "let nothing but this service write into the folder of the cache")
            return None

    def _forget(self, epoch: _Epoch, start: int) -> None:
        """Compute all views of the epoch from a position on, and release the entry."""
        epoch.places[:] = -1
        epoch.starts_at(start)
        self._release()

    def _values(self, epoch: _Epoch, batch: Batch, start: int, end: int, layout: Layout) -> Values:
        """Return the numbers of a batch, N × W, after computing pieces until none is missing."""
        is_stored = epoch.places[start:end] >= 0
        values = np.empty((end - start, layout.width), dtype=np.float32)
        if is_stored.any():
            found = self._read(epoch, start, epoch.places[start:end][is_stored], layout)
            if found is None:
                is_stored[:] = False
            else:
                values[is_stored] = found
        missing = np.flatnonzero(~is_stored)
        while len(missing) and epoch.done < len(epoch.missing) and epoch.missing[epoch.done] < end:
            chosen = epoch.missing[epoch.done : epoch.done + self._piece]
            computed = self._computed(epoch, chosen, layout, (batch, start, end))
            epoch.computed.update(zip(chosen.tolist(), computed, strict=True))
            epoch.done += len(chosen)
            self._keep(epoch.keys[chosen], computed, layout)
        for place in missing.tolist():
            values[place] = epoch.computed.pop(start + place)
        self.figures.hits += len(values) - len(missing)
        self.figures.misses += len(missing)
        return values

    def _computed(
        self, epoch: _Epoch, chosen: Keys, layout: Layout, shown: tuple[Batch, int, int] | None = None
    ) -> Values:
        """Return the numbers of views at some positions of an epoch. `shown`: a batch that is cut already, with its
        positions."""
        assert self._coming is not None
        places = torch.from_numpy(np.pad(chosen, (0, self._piece - len(chosen)), mode="edge"))
        if shown is not None and shown[1] <= chosen[0] and chosen[-1] < shown[2]:
            batch, start, _ = shown
            is_whole = len(chosen) == len(batch.index)
            piece = batch if is_whole else batch.take(places - start)
        else:
            piece = self._coming.of(epoch.rows[places])
        return layout.flat(self._timed(piece))[: len(chosen)]

    def _timed(self, batch: Batch) -> View:
        began = time.monotonic()
        view = self.teacher(batch)
        self.figures.seconds += time.monotonic() - began
        return view

    # Keeping

    def _opened(self, layout: Layout) -> ViewStore | None:
        """Return the entry of the cache for these views, or None."""
        if not self.keep:
            return None
        assert self._coming is not None
        recipe = self._coming.recipe
        boxes = isinstance(recipe.augmentation, RandomResizedCrop)
        decides = {
            **self.decides,
            "layout": layout.described(),
            "piece": self._piece,
            "threads": self._threads,
            # Boxes are numbered by their turn, so that a number is another box under another seed.
            "seed": recipe.seed if boxes else None,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
        try:
            store = ViewStore(self.folder / f"{digest}{TEACHER}", layout.size, self.max_bytes)
        except OSError as error:
            self._end(f"the cache of the teacher's outputs cannot be opened: {error.strerror or error}")
            return None
        self._is_compared = not len(store)  # What it has stored itself needs no comparison.
        log.info("teacher cache: %s has %d views of %d bytes", digest[:12], len(store), layout.size)
        return store

    def _keep(self, keys: Keys, values: Values, layout: Layout) -> None:
        if self._store is None or not self.keep:
            return
        if self._threads not in (None, torch.get_num_threads()):
            # The key has those of its begin.
            self._drop(len(keys), "not stored since the number of threads changed: other numbers give other bits here")
            return
        records, exact = layout.encoded(values)
        if not exact.all():
            self._drop(
                int((~exact).sum()),
                "not stored: views with numbers that bfloat16 cannot hold, where those that were tried had none",
            )
        try:
            self._store.add(keys[exact], records[exact])
        except OSError as error:
            self._end_storing(error)

    def _drop(self, views: int, why: str) -> None:
        self.figures.not_kept += views
        self.figures.note(why)

    def _flush(self) -> None:
        if self._store is None:
            return
        try:
            self._store.flush()
        except OSError as error:
            self._end_storing(error)
        if self._store.full:
            self.figures.note(
                f"full: stored outputs may take {self.max_bytes:,} bytes ({self.setting}); no more are added"
            )

    def _release(self) -> None:
        if self._store is not None:
            self._store.refresh()
            self.figures.stored += self._store.written
            self.figures.not_kept += self._store.dropped
            self.figures.bytes += self._store.total_bytes
            self._store.close()
            self._store = None

    def _end_storing(self, error: OSError) -> None:
        self._end(f"the teacher's outputs cannot be stored any more: {error.strerror or error}", "free some disk space")

    def _end(self, text: str, hint: str = "see that the folder of the cache can be written") -> None:
        """Keep nothing more in this job, with a warning."""
        self.keep, self._off = False, text
        self.figures.note(text)
        text += "; the teacher computes them again instead, and the student stays the same, bit for bit"
        self.warn(WarningItem("teacher_cache_off", "/training/teacher_cache", text, hint))


def _keys(batches: Batches, rows: Tensor) -> Keys:
    """Return the keys of an epoch's views of some rows."""
    view_ids = batches.views.ids(rows, batches.recipe.seed, batches.epoch)
    assert view_ids is not None, "only numbered views are kept"
    return (rows << _VIEW_BITS | view_ids).numpy()


# The job's own


def in_front(
    job: PreparedJob, workspace: Workspace, spent: Callable[[float], None] = lambda _: None
) -> CachedTeacher | None:
    """Return the cache in front of a job's teacher; None if there is nothing to keep. `spent`: see CachedTeacher."""
    if job.teacher is None or job.stored is not None or not job.computing.pieces:
        return None
    max_bytes, setting = workspace.teacher_cache_max_bytes, SETTING
    if workspace.cache_max_bytes is not None and workspace.cache_max_bytes < max_bytes:
        max_bytes, setting = workspace.cache_max_bytes, streaming.SETTING
    return CachedTeacher(
        job.teacher,
        decides(job, workspace),
        workspace.cache,
        keep=job.spec.training.teacher_cache != "off",
        max_bytes=max_bytes,
        warn=workspace.warn,
        setting=setting,
        spent=spent,
    )


def report(job: PreparedJob, cache: CachedTeacher | None) -> dict[str, Any] | None:
    """Return the report's figures of the cache; None for a job without a teacher."""
    if job.teacher is None:
        return None
    setting = job.spec.training.model_dump(mode="json")["teacher_cache"]
    if cache is not None:
        return {"setting": setting, **cache.report()}
    why = "it is for CPUs" if job.device.type == "cuda" else "an earlier version began the job"
    note = "a file of logits is in memory already" if job.stored is not None else f"not used: {why}"
    return {"setting": setting, "used": False, "notes": [note]}
