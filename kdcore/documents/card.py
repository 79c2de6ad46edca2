"""The model card by Hugging Face's conventions: README.md with YAML at its head, and config.json.

Beside the student's own files they are `model_card.zip`, a folder that `huggingface_hub.upload_folder` pushes as it is.
Nothing is sent from here, and no field is guessed: a licence is stated where a file or a library states one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open

from base.errors import SpecInvalid
from base.references import STUDENT_FILE
from base.text import shown
from kdcore.catalog import DATASETS
from kdcore.documents.page import MARKDOWN, environment
from kdcore.exports import Deliverable, student_source
from kdcore.measure import chance
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import Teacher
from kdcore.weights import published

COPIED = (STUDENT_FILE, student_source.NAME, "report.json", "report.html", "spec.json")
"""The artifacts that are copied into the folder, those of them that there are."""
LICENCES = ("license", "licence")
"""Names of the note in a safetensors file that states its licence."""
ON_HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "mnist": "ylecun/mnist"}
"""Built-in data sets that the hub has, by its names for them."""
NAMES = 50
"""The most class names that the card lists; config.json has all."""
WORST = 5


@dataclass(frozen=True)
class Origin:
    """Where a teacher is from, as far as it says so."""

    title: str
    repository: str | None = None
    """On the Hugging Face hub."""
    licence: str | None = None
    stated_by: str = ""


def texts(job: PreparedJob, workspace: Workspace, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the card's own files by name."""
    origins = [origin(teacher, workspace) for teacher in job.spec.teachers]
    files = [name for name in (STUDENT_FILE, student_source.NAME) if (workspace.out / name).is_file()]
    student = Deliverable.of(job.spec, job.data.facts, {}, {})
    facts = {name: value for name, value in student.facts.items() if name not in ("metrics", "spec")}
    config = {"library": "distillery", **facts, "temperature": report["student"].get("temperature")}
    return {
        "README.md": readme(report, job.spec.as_json(), origins, files),
        "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def readme(report: Mapping[str, Any], spec: Mapping[str, Any], origins: Sequence[Origin], files: Sequence[str]) -> str:
    """Return the text of README.md. `files`: those of the student that are in the folder."""
    name = spec.get("name") or f"{report['student']['architecture']} student"
    data = _data(spec, report)
    head = _metadata(name, report, spec, origins, data).to_yaml()
    rows = [
        (title, report[key])
        for key, title in (("teacher", "teacher"), ("student", "**student**"), ("alone", "student alone"))
    ]
    text = (
        environment()
        .get_template(MARKDOWN)
        .render(
            name=name,
            report=report,
            spec=spec,
            data=data,
            origins=origins,
            rows=[
                {
                    **row,
                    "title": title,
                    "interval": None
                    if row["accuracy"] is None
                    else chance.wilson(row["accuracy"], report["test_samples"]),
                }
                for title, row in rows
                if row is not None
            ],
            proof=report.get("proof") or {},
            calibration=report["calibration"]["student"],
            worst=report["classes"]["worst"][:WORST],
            names=report["dataset"]["class_names"],
            most_names=NAMES,
            methods=_methods(spec),
            has_source=student_source.NAME in files,
        )
    )
    return f"---\n{head}\n---\n\n{text}"


def _metadata(
    name: str, report: Mapping[str, Any], spec: Mapping[str, Any], origins: Sequence[Origin], data: Mapping[str, Any]
) -> ModelCardData:
    """Return the card's YAML. Fields that the hub checks against its own repositories are left out unless they are
    known to be there."""
    student, images, calibration = report["student"], report["test_samples"], report["calibration"]
    interval = [round(bound, 4) for bound in chance.wilson(student["accuracy"], images)]
    many = report["dataset"]["num_classes"] > 5
    figures = [
        ("accuracy", "Accuracy", student["accuracy"], {"interval_95": interval, "images": images}),
        *([("accuracy", "Top-5 accuracy", student["accuracy_top5"], {"k": 5, "images": images})] if many else []),
        ("expected_calibration_error", "ECE", calibration["student"]["ece"], {"bins": calibration["bins"]}),
    ]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data["type"],
            dataset_name=data["title"],
            dataset_split="test",
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 4),
            metric_args=arguments,
        )
        for kind, title, value, arguments in figures
    ]
    bases = [origin.repository for origin in origins if origin.repository is not None]
    licences = [origin.licence for origin in origins if origin.licence is not None]
    stated: dict[str, Any] = {"teacher_license": licences[0] if len(licences) == 1 else licences} if licences else {}
    return ModelCardData(
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["image-classification", "knowledge-distillation", "distillery", *_methods(spec)],
        base_model=bases or None,
        datasets=[data["hub"]] if data["hub"] else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=results,
        **stated,
    )


def _methods(spec: Mapping[str, Any]) -> list[str]:
    methods = spec["method"] if isinstance(spec["method"], list) else [spec["method"]]
    return [method["name"] for method in methods]


def _data(spec: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the data set is named, and what is stated of its licence."""
    source, facts = spec["dataset"]["source"], report["dataset"]
    named = DATASETS.get(source)
    if named is not None:
        hub = ON_HUB.get(named.name)
        return {"title": named.title, "type": named.name, "hub": hub, "licence": named.licence, "digest": None}
    title = f"{facts['num_classes']} classes of images"
    kind = (facts.get("digest") or "custom").replace(":", "-")[:23]
    return {"title": title, "type": kind, "hub": None, "licence": None, "digest": facts.get("digest")}


def origin(teacher: Teacher, workspace: Workspace) -> Origin:
    """Return where a teacher is from. The licence is that which its file or timm states."""
    reference = teacher.checkpoint or teacher.program or teacher.logits or ""
    title = teacher.architecture or "program"
    if reference.startswith(published.PREFIX):
        return _of_library(title, reference)
    licence = _stated(workspace.source(reference)) if reference else None
    return Origin(title, None, licence, "its file" if licence else "")


def _of_library(title: str, reference: str) -> Origin:
    name = reference.removeprefix(published.PREFIX)
    try:
        found = published.find(name)
    except SpecInvalid:  # Another version of the library, which does not know the name any more.
        return Origin(f"{title} ({name})")
    licence = found.licence
    return Origin(f"{title} ({name})", found.repository, licence, "timm" if licence else "")


def _stated(path: Path | None) -> str | None:
    """Return the licence in the notes of a safetensors file; None for any other file."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return next((shown(notes[name])[:100] for name in LICENCES if name in notes), None)
