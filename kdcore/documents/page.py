"""report.html: a job's report as one page that needs no other file, no network and no script.

`html` is a function of the report, the resolved spec, the curves and a few pictures. Names of classes, jobs and files
are text from outside: the template escapes all that it is given.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from base.references import BLOB, FILE
from base.wire import BUSY
from kdcore.data.images import Images
from kdcore.documents import drawing
from kdcore.measure import chance
from kdcore.measure.curves import Curve, Curves
from kdcore.spec.measured import ruling
from kdcore.spec.plan import FURTHER_SEED

PICTURE_SIDE = 96
"""Pictures are made smaller if they have more pixels."""
TABLE_CLASSES = 1000
"""The most classes that the table of all classes has."""
DRAWN_CLASSES = 25
"""The most classes of which the confusion matrix is drawn; of more its cells are too small."""
SHOWN_POINTS = 250
"""Of a curve, so that the page stays small."""
CHARTS = (
    ("validation/accuracy", "Accuracy on held-out images", "%"),
    ("train/label_loss", "Loss on the labels, in training", ""),
    ("train/distillation_loss", "Distillation loss", ""),
)
MARKDOWN = "card.md.jinja"
MODELS = {"teacher": "teacher", "student": "student", "alone": "student alone"}
PHASES = {
    "imports": "before its start: imports",
    "data": "reading the data",
    "preparing": "reading the teacher, building networks",
    "teacher_check": "checking the teacher",
    "caching": "the teacher's cache",
    "training": "training",
    "held_out": "held-out images after each epoch",
    "evaluating": "test images at the end",
    "exporting": "writing and measuring files",
}


def html(report: Mapping[str, Any], spec: Mapping[str, Any], curves: Curves, pictures: Mapping[int, bytes]) -> str:
    """Return the page. `spec`: the resolved one. `pictures`: PNG files of test images by their row."""
    template = environment().get_template("report.html.jinja")
    style = _file("report.css")
    return template.render(
        report=report,
        spec=spec,
        spec_json=json.dumps(spec, indent=2, ensure_ascii=False),
        style=style,
        style_hash=_hash(style),
        title=spec.get("name") or "Distillation report",
        subject=_subject(report, spec),
        proof=_proof(report),
        models=_models(report),
        charts=_charts(curves),
        complete=curves.complete,
        calibrations=_calibrations(report),
        matrix=_matrix(report),
        classes=_classes(report),
        names=report["dataset"]["class_names"],
        pictures={row: "data:image/png;base64," + base64.b64encode(png).decode() for row, png in pictures.items()},
        phases=_phases(report),
        busy=_busy(report),
        cache=_cache(report),
        levers=_levers(report),
    )


def example_rows(report: Mapping[str, Any]) -> list[int]:
    """Return the rows of the test images that the page shows."""
    worst = report.get("classes", {}).get("worst", ())
    return sorted({example["image"] for one in worst for example in one["examples"]})


def thumbnails(images: Images, rows: Sequence[int]) -> dict[int, bytes]:
    """Return images as PNG files by their row, drawn from decoded pixels, at most PICTURE_SIDE wide and high."""
    if not rows:
        return {}
    pixels = images.pixels.index_select(0, torch.tensor(rows, device=images.pixels.device)).cpu().numpy()
    return {row: _png(one) for row, one in zip(rows, pixels, strict=True)}


def _png(pixels_CHW: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    grey = len(pixels_CHW) == 1
    image = Image.fromarray(pixels_CHW[0] if grey else np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


# The parts of the page


def _subject(report: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """Return what was distilled into what, in a line."""
    teacher, student = report["teacher"], report["student"]
    methods = spec["method"] if isinstance(spec["method"], list) else [spec["method"]]
    source = spec["dataset"]["source"]
    if source.startswith(BLOB):
        data = f"{report['dataset']['num_classes']} classes"
    else:
        data = PurePath(source.removeprefix(FILE)).name
    names = " + ".join(method["name"] for method in methods)
    taught = f"{teacher['architecture']} → " if teacher else ""
    return f"{taught}{student['architecture']} · {names} · {data} · {report['test_samples']:,} test images"


def _proof(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the intervals that are drawn, each with its span, and what they are for; and the runs of several seeds."""
    proof = report.get("proof") or {}
    gap, gain, scope = ruling(proof)
    return {
        "scope": scope,
        "gap_closed": gap and {**gap, "span": _span(gap, (0.0, 1.0))},
        "gain": gain and {**gain, "span": _span(gain, (-0.01, 0.01))},
        "no_gap": proof.get("no_gap"),
        "images": proof.get("images"),
        "seeds": proof.get("seeds") or (),
        "over_seeds": proof.get("over_seeds"),
    }


def _span(interval: Mapping[str, float], bounds: drawing.Point) -> drawing.Span:
    return drawing.span(interval["low"], interval["value"], interval["high"], bounds)


def _models(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of models, each with the interval of its accuracy. Runs of further seeds have a
    table of their own."""
    rows = [(title, key, report.get(key)) for key, title in MODELS.items()]
    rows += [(key, key, row) for key, row in report.get("models", {}).items() if FURTHER_SEED not in key]
    images, found = report["test_samples"], []
    for title, key, row in rows:
        if row is None:
            continue
        accuracy = row.get("accuracy")
        interval = None if accuracy is None else chance.wilson(accuracy, images)
        found.append({**row, "title": title, "key": key, "interval": interval})
    return found


def _charts(curves: Curves) -> list[drawing.Chart]:
    charts = (
        drawing.line_chart(title, {trial: _points(curve) for trial, curve in curves.of(key)}, unit)
        for key, title, unit in CHARTS
    )
    return [chart for chart in charts if chart is not None]


def _points(curve: Curve) -> list[drawing.Point]:
    stride = -(-len(curve.steps) // SHOWN_POINTS)
    points = list(zip(curve.steps, curve.values, strict=True))
    return [*points[:-1:stride], points[-1]]


def _calibrations(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = report.get("calibration", {})
    return [
        {**one, "title": title, "diagram": drawing.reliability(one["reliability"], one["reliability_after"])}
        for key, title in MODELS.items()
        if (one := found.get(key)) is not None
    ]


def _matrix(report: Mapping[str, Any]) -> list[list[dict[str, Any]]] | None:
    """Return the cells of the confusion matrix, each with its share of the row; None if it is not drawn."""
    matrix = report.get("confusion", {}).get("matrix")
    if matrix is None or len(matrix) > DRAWN_CLASSES:
        return None
    return [
        [
            {"images": images, "share": round(images / max(1, sum(row)), 3), "right": number == at}
            for at, images in enumerate(row)
        ]
        for number, row in enumerate(matrix)
    ]


def _classes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of classes, the least accurate first."""
    classes = report.get("classes")
    if classes is None:
        return []
    fidelity = report.get("fidelity")
    columns = {
        **{key: classes[key] for key in MODELS},
        "agreement": fidelity and fidelity["student"]["per_class"],
        "images": classes["test_samples"],
    }
    rows = [
        {"name": name, **{key: column and column[number] for key, column in columns.items()}}
        for number, name in enumerate(report["dataset"]["class_names"])
    ]
    return sorted(rows, key=lambda row: (row["student"] is None, row["student"]))[:TABLE_CLASSES]


def _phases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the seconds of the job by what was done in them, with the share of each, the training by trial."""
    timings = report.get("timings", {})
    seconds: dict[str, float] = {}
    for phase, title in PHASES.items():
        given = timings.get(phase)
        for trial, one in given.items() if isinstance(given, dict) else ():
            seconds[f"{title}: {trial}"] = one
        if isinstance(given, int | float):
            seconds[title] = given
    longest = max(seconds.values(), default=0.0) or 1.0
    return [{"title": title, "seconds": one, "share": round(one / longest, 4)} for title, one in seconds.items()]


def _busy(report: Mapping[str, Any]) -> float | None:
    """Return the least share of the CPU that a file had while its latency was measured; None where it had most."""
    runs = (one for file in report.get("files") or () for one in file["latency"])
    share: float = min((one.get("cpu_share", 1.0) for one in runs), default=1.0)
    return share if share < BUSY else None


def _cache(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the cache of the teacher's outputs saved: seconds at the rate at which the others were computed."""
    cache = report.get("teacher_cache")
    if not cache or not cache.get("used"):
        return None
    hits, misses = cache.get("hits", 0), cache.get("misses", 0)
    saved = hits * cache["seconds"] / misses if misses and cache.get("seconds") else None
    return {**cache, "share": hits / max(1, hits + misses), "saved": saved}


LEVERS = {
    "folded": "teacher with folded batch norms",
    "kernels": "fused batch norms of the student",
    "convolutions": "3 × 3 convolutions of our own",
    "overlap": "teacher ahead of the student",
    "graph": "CUDA graph",
    "teacher_cache": "teacher cache",
}


def _levers(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of what each stage used. A lever without a title is one of a newer version."""
    rows = []
    for stage, by_lever in report.get("computing", {}).get("used", {}).items():
        for name, one in by_lever.items():
            used = f"{one['places']} of {one['of']} layers" if one["of"] is not None else "yes" if one["used"] else "no"
            rows.append({"stage": stage, "lever": LEVERS.get(name, name), "used": used, "why": one["why"]})
    return rows


# The template and its filters


@cache
def environment() -> jinja2.Environment:
    """Return the templates of the documents. Those of HTML escape what they are given; Markdown has a filter for it."""
    loader = jinja2.FunctionLoader(_file)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",), default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS
    return environment


def _file(name: str) -> str:
    return (files("kdcore.documents") / "files" / name).read_text(encoding="utf-8")


def _hash(style: str) -> str:
    """Return the hash by which the page's policy allows its own style, and no other."""
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction in percent, with a space at which no line is broken."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}\u00a0%".replace("-", "−")


def points(fraction: float | None) -> str:
    """Return a difference of two fractions in percentage points, with its sign unless it is none."""
    if fraction is None:
        return "–"
    text = f"{100 * fraction:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def size(count: float | None) -> str:
    """Return bytes in units of 1,000."""
    if count is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count < 100 * factor else 0}f} {unit}"
    return f"{count} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def markdown(text: object) -> str:
    """Return text from outside as Markdown that shows it as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~!$&])", r"\\\1", " ".join(str(text).split()))


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent, "points": points, "number": number, "size": size, "duration": duration, "markdown": markdown,
}  # fmt: skip
