"""The documents that a job delivers beside its student: the report and the spec as JSON, the report as a page, a model
card, the curves for TensorBoard.

`write` makes the first two, and those of the others that the spec asks for. Their libraries are imported here and in no
engine that waits for a job.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from base.errors import StorageFull
from base.files import DISK_FULL, write_text, write_whole
from base.warning import WarningItem
from kdcore.measure.curves import Curves
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import Document

log = logging.getLogger("kdcore")

FILES: dict[Document, str] = {
    "html": "report.html",
    "tensorboard": "tensorboard.zip",
    "model_card": "model_card.zip",
}
"""The artifact of each document, in the order in which they are made."""
ZIP = "application/zip"
NOT_MADE = "document_not_made"
EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The time of all files in an archive, so that the same files have the same bytes."""


def write(job: PreparedJob, workspace: Workspace, summary: dict[str, Any], curves: Curves) -> None:
    """Write the report, the resolved spec, and the documents that the spec asks for. `summary` is the report. A
    document that cannot be made is a warning in it: the student is good without."""
    asked = job.spec.documents
    if "html" in asked:
        _try("html", workspace, summary, lambda: _write_page(job, workspace, summary, curves))
    if "tensorboard" in asked:
        _try("tensorboard", workspace, summary, lambda: _write_events(workspace, curves))
    card: dict[str, str] = {}
    if "model_card" in asked:
        _try("model_card", workspace, summary, lambda: card.update(_card(job, workspace, summary)))
    for name, content in (("report.json", summary), ("spec.json", job.spec.as_json())):
        written = write_text(workspace.out / name, json.dumps(content, indent=2) + "\n")
        workspace.announce("artifact", written, name=name, media_type="application/json")
    if card:
        _write_folder(workspace, card)


def _try(document: Document, workspace: Workspace, summary: dict[str, Any], make: Callable[[], None]) -> None:
    """Make a document. A full disk is an error of the job, which then waits for space; all else is a warning."""
    if document == "tensorboard" and find_spec("tensorboard") is None:
        text = f"{FILES[document]} was not made: tensorboard is not installed on this worker"
        hint = "install the extra `tensorboard` on the workers, or leave it out of `documents`"
    else:
        try:
            make()
            return
        except StorageFull:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            log.exception("%s cannot be made", FILES[document])
            text = f"{FILES[document]} was not made: {type(error).__name__}: {error}"
            hint = "all other files are good; report this with the job's log"
    workspace.warn(WarningItem(NOT_MADE, "/documents", text, hint))
    summary["warnings"] = [warning.as_dict() for warning in workspace.warnings]


def _write_page(job: PreparedJob, workspace: Workspace, summary: Mapping[str, Any], curves: Curves) -> None:
    from kdcore.documents import page

    pictures = page.thumbnails(job.data.test.at(None), page.example_rows(summary))
    text = page.html(summary, job.spec.as_json(), curves, pictures)
    written = write_text(workspace.out / FILES["html"], text)
    workspace.announce("artifact", written, name=FILES["html"], media_type="text/html")


def _write_events(workspace: Workspace, curves: Curves) -> None:
    from kdcore.documents import event_files

    _write_zip(workspace, FILES["tensorboard"], event_files.of(curves))


def _card(job: PreparedJob, workspace: Workspace, summary: Mapping[str, Any]) -> dict[str, str]:
    from kdcore.documents import card

    return card.texts(job, workspace, summary)


def _write_folder(workspace: Workspace, texts: Mapping[str, str]) -> None:
    """Write the folder for the hub: the card's own files, and those of the student that one needs to use it."""
    from kdcore.documents import card

    present = [workspace.out / name for name in card.COPIED if (workspace.out / name).is_file()]
    contents: dict[str, bytes | Path] = {name: text.encode() for name, text in texts.items()}
    _write_zip(workspace, FILES["model_card"], {**contents, **{path.name: path for path in present}})


def _write_zip(workspace: Workspace, name: str, contents: Mapping[str, bytes | Path]) -> None:
    """Write an archive of texts and files. Files are stored as they are: weights become no smaller."""

    def write_to(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for inside, content in contents.items():
                info = zipfile.ZipInfo(inside, EARLIEST)
                info.external_attr = 0o644 << 16
                if isinstance(content, bytes):
                    archive.writestr(info, content, zipfile.ZIP_DEFLATED)
                    continue
                with content.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                    while piece := source.read(1 << 20):
                        target.write(piece)

    written = write_whole(workspace.out / name, write_to)
    workspace.announce("artifact", written, name=name, media_type=ZIP)
