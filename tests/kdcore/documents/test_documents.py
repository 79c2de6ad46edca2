"""The documents of a whole job, whose names are hostile; and those of reports that are made by hand."""

import base64
import hashlib
import json
import re
import zipfile
from html.parser import HTMLParser
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from kdcore import checkpoint, documents
from kdcore.data.images import Images
from kdcore.documents import card, page
from kdcore.measure.curves import Curves
from kdcore.models import build
from kdcore.run import run
from kdcore.spec import Teacher
from tests.kdcore.engine import distilled, events, workspace, write_arrays

NAMES = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b](http://evil.example/) {{ 7 * 7 }}"]
HOSTILE = "</title><script src=//evil.example/x.js></script>"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with all documents: its folder, its report and its lines."""
    folder = tmp_path_factory.mktemp("documents")
    arrays = dict(np.load(write_arrays(folder / "plain.npz")))
    np.savez(folder / "data.npz", **arrays, class_names=np.array(NAMES))
    torch.manual_seed(1)
    notes = {"distillery": json.dumps({"architecture": "convnet8"}), "license": "cc-by-nc-4.0 | *only*"}
    save_file(build("convnet8", 3, 1).state_dict(), folder / "teacher.safetensors", notes)
    spec = distilled(folder / "data.npz", folder / "teacher.safetensors", epochs=3, kernels="eager")
    spec = spec.model_copy(update={"documents": ("html", "model_card", "tensorboard"), "name": HOSTILE})
    where, stream = workspace(folder / "out")
    report = run(spec, where)
    return SimpleNamespace(folder=where.out, report=report, stream=stream, spec=spec)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and all of its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def html_of(job: SimpleNamespace) -> str:
    return (job.folder / "report.html").read_text(encoding="utf-8")


def test_html_names_from_outside_are_text(job):
    elements = Elements(html_of(job))
    assert all(name in elements.text for name in NAMES) and HOSTILE in elements.text
    assert "script" not in {tag for tag, _ in elements.found}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")], tag


def test_html_needs_no_network_and_no_script(job):
    text = html_of(job)
    elements = Elements(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in elements.found}
    sources = [value for _, attributes in elements.found for name in ("src", "href") if (value := attributes.get(name))]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    (policy,) = [one["content"] for tag, one in elements.found if one.get("http-equiv") == "Content-Security-Policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"style-src 'sha256-{digest}'" in policy
    # The policy allows no style of an element, so there is none.
    assert not [tag for tag, attributes in elements.found if "style" in attributes]
    assert "@import" not in style and "url(" not in style


def test_html_has_the_figures_of_the_report(job):
    text, report = Elements(html_of(job)).text, job.report
    assert report["verdict"] in text
    for key in ("teacher", "student", "alone"):
        assert page.percent(report[key]["accuracy"]) in text
    assert all(one["message"] in text for one in report["warnings"])
    assert json.loads(text[text.rindex("spec.json") + len("spec.json") :])["name"] == HOSTILE
    pictures = {example["image"] for one in report["classes"]["worst"] for example in one["examples"]}
    assert len(re.findall("<img ", html_of(job))) == len(pictures) > 0
    assert "$DISTILLERY_URL/v1/jobs" in text and "127.0.0.1" not in text


def test_html_says_of_each_stage_what_made_its_steps_faster(job):
    text = html_of(job)
    row = "<td>student</td><td>fused batch norms of the student</td><td>0 of 3 layers</td>"
    assert row in text and "training.kernels is &#39;eager&#39;" in text
    assert "<td>alone</td><td>teacher cache</td><td>no</td>" in text


def test_html_has_a_curve_of_each_trial(job):
    found = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', html_of(job))
    drawn = [kind for kind, points in found if points != "0,4 26,4"]  # Those are the lines of the keys.
    assert drawn == ["student", "alone"] * 2 + ["student"]


def test_html_of_a_job_without_teacher_and_baseline_says_what_there_is(job):
    report = {**job.report, "teacher": None, "alone": None, "gain": None, "fidelity": None, "proof": None, "files": []}
    report["calibration"] = {**report["calibration"], "teacher": None, "alone": None}
    report["classes"] = {**report["classes"], "teacher": None, "alone": None, "similar": []}
    text = Elements(page.html(report, job.spec.as_json(), Curves(), {})).text
    assert "The models" in text and "Agreement with the teacher" not in text and "Curves" not in text


def test_html_of_several_seeds_shows_the_figures_that_its_sentence_is_about(job):
    def shown(gain: tuple[float, float], **more: Any) -> str:
        """The part of the page above the models, with a gain over the images between these bounds."""
        figure = {"value": -0.04, "low": gain[0], "high": gain[1]}
        means = {"value": -0.03, "low": -0.07, "high": 0.01}
        over = {"seeds": 3, "student": means, "alone": means, "gain": means, "gap_closed": None}
        over |= {"gain_on_other_images": None, "gap_closed_on_other_images": None, **more}
        proof = {**job.report["proof"], "gain": figure, "gap_closed": figure, "no_gap": None, "over_seeds": over}
        text = Elements(page.html({**job.report, "proof": proof}, job.spec.as_json(), Curves(), {})).text
        return " ".join(text.partition("The models")[0].split())

    other = {"value": 0.5, "low": 0.4, "high": 0.6}
    means = shown((-0.06, -0.02), gap_closed=other)
    assert "50 % 95 % interval for other seeds: 40 % to 60 %" in means and "Student's t" in means
    assert "−3.0 95 % interval for other seeds: −7.0 to +1.0" in means and "−4.0" not in means
    assert "has no bounds" in shown((-0.06, -0.02))
    open_by_images = shown((-0.06, 0.02))
    assert "−4.0 95 % interval for other images, with the delivered seed: −6.0 to +2.0" in open_by_images
    both = shown((-0.06, 0.02), gain_on_other_images=other, gap_closed_on_other_images=other)
    assert "+50.0 95 % interval for other seeds and images: +40.0 to +60.0" in both and "analysis of variance" in both


def test_points_have_a_sign_unless_they_are_none():
    assert [page.points(one) for one in (0.0123, -0.0123, 0.0001, -0.0001, 0, None)] == [
        "+1.2", "−1.2", "0.0", "0.0", "0.0", "–",
    ]  # fmt: skip


def test_thumbnails_are_small_pictures_of_the_rows():
    pixels = torch.zeros(3, 3, 200, 100, dtype=torch.uint8)
    found = page.thumbnails(Images(pixels, torch.zeros(3).long()), [0, 2])
    assert list(found) == [0, 2] and all(one.startswith(b"\x89PNG") for one in found.values())
    assert int.from_bytes(found[0][16:20]) == 48 and int.from_bytes(found[0][20:24]) == page.PICTURE_SIDE


def test_the_same_job_writes_the_same_curves_after_a_resume(job):
    lines = events(job.stream, "metric")
    first, last = (
        checkpoint.load(job.folder / line["path"], torch.device("cpu")).curves
        for line in (events(job.stream, "checkpoint")[0], events(job.stream, "checkpoint")[-1])
    )
    assert set(first.trials) == {"student"} and set(last.trials) == {"student", "alone"} and last.complete
    for trial, curves in last.trials.items():
        of_trial = [line for line in lines if line["trial"] == trial]
        for key, curve in curves.items():
            said = [(line["step"], line["values"][key]) for line in of_trial if key in line["values"]]
            assert list(zip(curve.steps, curve.values, strict=True)) == said


# The model card


def test_model_card_is_a_folder_that_the_hub_can_read(job, tmp_path):
    with zipfile.ZipFile(job.folder / "model_card.zip") as archive:
        archive.extractall(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"README.md", "config.json", "student.safetensors", "report.json", "report.html", "spec.json"} <= names
    assert (tmp_path / "student.safetensors").read_bytes() == (job.folder / "student.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "convnet4" and config["class_names"] == NAMES
    assert config["temperature"] == job.report["calibration"]["student"]["temperature"]
    data = ModelCard((tmp_path / "README.md").read_text()).data
    accuracy, ece = data.eval_results  # Of three classes, the first five say nothing.
    assert accuracy.metric_value == round(job.report["student"]["accuracy"], 4)
    low, high = accuracy.metric_args["interval_95"]
    assert low < accuracy.metric_value < high and accuracy.metric_args["images"] == 30
    assert ece.metric_value == round(job.report["calibration"]["student"]["ece"], 4)
    assert data.pipeline_tag == "image-classification" and "kd" in data.tags and data.base_model is None
    assert data.license is None and data.to_dict()["teacher_license"] == "cc-by-nc-4.0 | *only*"


def test_model_card_names_from_outside_are_text(job):
    with zipfile.ZipFile(job.folder / "model_card.zip") as archive:
        text = archive.read("README.md").decode()
    body = text.split("\n---\n", 1)[1]
    assert not re.search(r"(?<!\\)<", body) and r"a\|b\](http://evil.example/) \{\{ 7 \* 7 \}\}" in body
    assert r"cc-by-nc-4.0 \| \*only\*" in body


def test_model_card_of_several_seeds_states_their_mean(job):
    over = {
        "seeds": 3,
        "student": {"value": 0.7, "low": 0.66, "high": 0.74},
        "alone": {"value": 0.65, "low": 0.6, "high": 0.7},
        "gain": {"value": 0.05, "low": -0.01, "high": 0.11},
    }
    report = {**job.report, "proof": {**job.report["proof"], "over_seeds": over}}
    text = card.readme(report, job.spec.as_json(), [], []).replace("\u00a0", " ")
    assert "**Over 3 seeds**" in text and "student 70.0 % (66.0 % to 74.0 %), student alone 65.0 %, gain +5.0" in text
    lone = card.readme(
        {**report, "proof": {**report["proof"], "over_seeds": {**over, "alone": None, "gain": None}}},
        job.spec.as_json(), [], [],
    )  # fmt: skip
    assert "student alone 65" not in lone and "Over 3 seeds" in lone


def test_model_card_of_published_weights_names_their_repository_and_licence(tmp_path):
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    where, _ = workspace(tmp_path)
    teacher = Teacher(architecture="timm/resnet18", checkpoint="weights:timm/resnet18.a1_in1k")
    found = card.origin(teacher, where)
    assert (found.repository, found.licence, found.stated_by) == ("timm/resnet18.a1_in1k", "apache-2.0", "timm")
    other = card.origin(Teacher(architecture="torchvision/resnet18", checkpoint="weights:torchvision/resnet18"), where)
    assert (other.repository, other.licence) == (None, None)


# TensorBoard


def test_event_files_are_what_tensorboard_reads(job, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    with zipfile.ZipFile(job.folder / "tensorboard.zip") as archive:
        archive.extractall(tmp_path)
    (path,) = (tmp_path / "student").iterdir()
    assert "tfevents" in path.name and {one.name for one in tmp_path.iterdir()} == {"student", "alone"}
    found = [
        (event.step, value.tag, value.simple_value)
        for event in loader.LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]
    lines = [line for line in events(job.stream, "metric") if line["trial"] == "student"]
    said = [(line["step"], key, value) for line in lines for key, value in line["values"].items()]
    assert sorted(found) == [(step, key, pytest.approx(value)) for step, key, value in sorted(said)]


# What is written, and what becomes of what cannot be


def written(job, tmp_path, asked, curves=None):
    """Write documents of the finished job's report into another folder. Returns the folder, the report, the names."""
    where, stream = workspace(tmp_path / "out")
    report = {**job.report, "warnings": []}
    facts = SimpleNamespace(**{name: job.report["dataset"][name] for name in ("class_names", "image_size", "channels")})
    images = Images(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.zeros(30).long())
    stand_in = SimpleNamespace(
        spec=job.spec.model_copy(update={"documents": asked}), data=SimpleNamespace(test=images, facts=facts)
    )
    documents.write(stand_in, where, report, curves or Curves())
    return where.out, report, [line["name"] for line in events(stream, "artifact")]


def test_write_a_job_has_the_documents_that_it_asks_for(job, tmp_path):
    assert written(job, tmp_path / "none", ())[2] == ["report.json", "spec.json"]
    assert written(job, tmp_path / "one", ("html",))[2] == ["report.html", "report.json", "spec.json"]
    announced = [line["name"] for line in events(job.stream, "artifact")]
    assert announced[-5:] == ["report.html", "tensorboard.zip", "report.json", "spec.json", "model_card.zip"]


def test_write_without_the_library_of_a_document_the_job_says_so(job, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    folder, report, names = written(job, tmp_path, ("tensorboard",))
    assert names == ["report.json", "spec.json"]
    (warning,) = json.loads((folder / "report.json").read_text())["warnings"]
    assert warning["code"] == "document_not_made" and "tensorboard is not installed" in warning["message"]
    assert report["warnings"] == [warning]


def test_write_a_document_that_fails_is_a_warning_and_the_report_is_there(job, tmp_path, monkeypatch):
    def fails(*_: object) -> str:
        raise ValueError("no picture")

    monkeypatch.setattr(page, "html", fails)
    folder, report, names = written(job, tmp_path, ("html",))
    assert names == ["report.json", "spec.json"] and not (folder / "report.html").exists()
    assert report["warnings"][0]["message"] == "report.html was not made: ValueError: no picture"


def test_write_a_full_disk_is_an_error_of_the_job(job, tmp_path, monkeypatch):
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "html", full)
    with pytest.raises(OSError, match="No space left"):
        written(job, tmp_path, ("html",))


def test_write_the_student_has_its_temperature_in_the_metadata(job):
    with safe_open(job.folder / "student.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["distillery"])
    assert facts["metrics"]["temperature"] == job.report["calibration"]["student"]["temperature"]
