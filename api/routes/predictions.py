"""Predictions: a finished job's teacher and student, side by side, on an image that a client sends.

The API only stores the bytes: a worker decodes them, in a bounded child. The answer is waited for, so that one request
is enough where a worker is there.
"""

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from api.dependencies import Caller, Config, Db, Files, WakeWorkers
from api.openapi import headers
from api.problems import (
    ImageUnreadable,
    MalformedBody,
    NotFound,
    NotReady,
    RequestTimeout,
    StorageFull,
    TooLarge,
    responses,
)
from api.routes.uploads import Space, announced, pieces
from api.schemas import Id, Json, prediction_view
from base.errors import DatasetUnreadable, Fault
from base.wire import PredictionView
from store import jobs, predictions
from store.database import Database
from store.predictions import Prediction

router = APIRouter(prefix="/v1", tags=["jobs"])

PICTURE_BYTES = 20_000_000
"""The largest image. A photograph of a phone has 3 to 8 MB."""
PICTURE_S = 60.0
"""Time limit of its arrival."""
WAIT_S = 20.0
LOOK_S = 0.15
WAITING = 100
"""The most requests of this process that wait for an answer at a time; others are answered with 202 at once."""

IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

_waiting = 0


@router.post(
    "/jobs/{job_id}/predict",
    response_model=PredictionView,
    responses={
        202: {"model": PredictionView, "description": "It waits; `Location` has the answer later.",
              **headers("Location", "Retry-After")},
        **responses(NotFound, NotReady, MalformedBody, RequestTimeout, TooLarge, ImageUnreadable, StorageFull),
    },
    openapi_extra=IMAGE_BODY,
)  # fmt: skip
async def predict(
    *,
    job_id: Id,
    request: Request,
    caller: Caller,
    db: Db,
    files: Files,
    settings: Config,
    wake_workers: WakeWorkers,
    wait: Annotated[float, Query(ge=0, le=WAIT_S, description="Seconds to wait for the answer before a 202.")] = WAIT_S,
) -> Response:
    """Show an image to the job's teacher and student: `curl --data-binary @cat.jpg …/predict`.

    The body is the file itself, of up to 20 MB: PNG, JPEG, WebP, BMP, GIF, PPM or TIFF. It is decoded and resized as
    the images of the job's data set are. A worker runs the models beside its trainings, one image after the other. If
    there is no answer in time, or no worker, it is 202, and `Location` is where to look. If the models cannot be run,
    the `state` is `failed`, and `error` says why. The image is deleted when it is answered, the answer after an hour.
    """
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise MalformedBody("the body is a form: send the file itself, as by `curl --data-binary @cat.jpg`, not by -F")
    await db.read(_require_student, job_id, caller.project)
    if announced(request) > PICTURE_BYTES:
        raise _too_large()
    space, prediction_id = Space(files, settings.min_free_bytes), predictions.make_id()
    await space.require(announced(request))
    path = files.picture_path(prediction_id)
    try:
        sha256 = await _receive(request, path, space)
        made = await db.write(predictions.add, caller.project, job_id, prediction_id, sha256)
    except BaseException:
        await to_thread.run_sync(_unlink, path)
        raise
    wake_workers()
    answered = await _wait(db, made, wait)
    if answered.error is not None and answered.error["code"] == DatasetUnreadable.code:
        error = answered.error
        raise ImageUnreadable(error["message"], [Fault("", error["message"], ImageUnreadable.code)], hint=error["hint"])
    view = await db.read(_view, answered, settings.lease_s)
    where = {"Location": f"/v1/predictions/{answered.id}"}
    if answered.state in predictions.OPEN:
        return Json(view, 202, {**where, "Retry-After": str(predictions.RETRY_AFTER_S)})
    return Json(view, 200, where)


@router.get(
    "/predictions/{prediction_id}",
    response_model=PredictionView,
    responses={200: headers("Cache-Control"), **responses(NotFound)},
)
async def one(prediction_id: Id, caller: Caller, db: Db, settings: Config) -> Response:
    """An image that a job's models were asked about, with their answer. It is kept for an hour."""

    def read(connection: Connection) -> dict[str, Any]:
        return _view(connection, predictions.get(connection, caller.project, prediction_id), settings.lease_s)

    return Json(await db.read(read), 200, {"Cache-Control": "no-store"})


def _require_student(connection: Connection, job_id: str, project: str) -> None:
    """Raise NotReady unless the job has a student."""
    job = jobs.get(connection, job_id, project=project)
    if job.kind != "distillation":
        raise NotReady(f"job {job_id} is of the kind {job.kind}: only a distillation has a student", kind=job.kind)
    if job.status != "succeeded":
        raise NotReady(f"job {job_id} is {job.status}: it has a student when it succeeds", job_status=job.status)


async def _receive(request: Request, path: Path, space: Space) -> str:
    """Write the body to a file, in bounded memory and time. Returns its SHA-256."""
    digest, length = hashlib.sha256(), 0
    await to_thread.run_sync(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    try:
        async with asyncio.timeout(PICTURE_S):
            with await to_thread.run_sync(path.open, "xb") as file:
                async for piece in pieces(request):
                    length += len(piece)
                    if length > PICTURE_BYTES:
                        raise _too_large()
                    digest.update(piece)
                    await to_thread.run_sync(space.write, file, piece)
    except TimeoutError:
        raise RequestTimeout(f"the image was not whole after {PICTURE_S:g} s") from None
    except ClientDisconnect:
        raise MalformedBody("the connection was closed before the end of the body") from None
    if length == 0:
        raise MalformedBody("send the file of an image as the body, as by `curl --data-binary @cat.jpg`")
    return digest.hexdigest()


async def _wait(db: Database, made: Prediction, wait_s: float) -> Prediction:
    """Return the prediction when it is answered, or after this time as it is then."""
    global _waiting  # noqa: PLW0603 - of the whole process
    if _waiting >= WAITING:
        return made
    until = time.monotonic() + wait_s
    _waiting += 1
    try:
        found = made
        while found.state in predictions.OPEN and time.monotonic() < until:
            await asyncio.sleep(min(LOOK_S, max(0.0, until - time.monotonic())))
            found = await db.read(predictions.get, made.project, made.id)
        return found
    finally:
        _waiting -= 1


def _view(connection: Connection, prediction: Prediction, lease_s: float) -> dict[str, Any]:
    return prediction_view(prediction, predictions.why_it_waits(connection, prediction, lease_s))


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _too_large() -> TooLarge:
    return TooLarge(f"an image here has at most {PICTURE_BYTES} bytes", limit_bytes=PICTURE_BYTES)
