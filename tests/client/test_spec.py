import io
from pathlib import Path
from typing import Any

import pytest
from httpx import MockTransport

from client.errors import ApiError, InvalidInput
from client.sdk import Distillery
from client.spec import (
    DEFAULT_NAMES,
    parse_duration,
    parse_methods,
    parse_numbers,
    read_class_map,
    read_class_names,
    read_spec,
    set_data,
    set_field,
    set_student,
    set_teachers,
    upload_files,
)
from kdcore.spec import parse
from kdcore.spec.recipe import Multistep, Sgd, Training
from tests.client.fake_service import FakeFiles, problem


def test_read_spec_numbers_of_yaml_are_those_of_json(tmp_path: Path):
    """PyYAML reads those without a point as text, which the service refuses; a date or a version is text."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-3\nb: -2E+2\nc: 3\nd: 0.5\ne: '1e-3'\nf: 1e\ng: e3\nh: 1.5e3\n")
    assert read_spec(str(path)) == {
        "a": 1e-3,
        "b": -200.0,
        "c": 3,
        "d": 0.5,
        "e": "1e-3",
        "f": "1e",
        "g": "e3",
        "h": 1500.0,
    }
    path.write_text('{"lr": 1e-3}')
    assert read_spec(str(path)) == {"lr": 1e-3}


def test_read_spec_from_json_and_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = {"dataset": "digits", "training": {"epochs": 3}}
    (tmp_path / "a.json").write_text('{"dataset": "digits", "training": {"epochs": 3}}')
    (tmp_path / "a.yaml").write_text("dataset: digits\ntraining:\n  epochs: 3\n")
    assert read_spec(str(tmp_path / "a.json")) == read_spec(str(tmp_path / "a.yaml")) == spec
    monkeypatch.setattr("sys.stdin", io.StringIO("{dataset: digits, training: {epochs: 3}}"))
    assert read_spec("-") == spec


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "neither JSON nor YAML"), ("[1]", "it must be an object"), ("", "is not a job spec")]
)
def test_read_spec_of_a_file_without_a_spec(tmp_path: Path, text: str, expected: str):
    for name in ("a.json", "a.yaml"):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidInput, match=f"{expected}|neither JSON nor YAML"):
            read_spec(str(tmp_path / name))


def test_read_spec_of_a_missing_file(tmp_path: Path):
    with pytest.raises(InvalidInput, match="No such file"):
        read_spec(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("before", "setting", "after"),
    [
        ({}, "training.batch_size=64", {"training": {"batch_size": 64}}),
        ({"training": {"epochs": 1}}, "training.epochs=1e3", {"training": {"epochs": 1000.0}}),
        ({}, "name=some words", {"name": "some words"}),
        ({}, "name=a=b", {"name": "a=b"}),
        ({}, "training.mix=null", {"training": {"mix": None}}),
        ({"method": "kd"}, "method.standardize=true", {"method": {"name": "kd", "standardize": True}}),
        ({"dataset": "birds"}, "dataset.image_size=64", {"dataset": {"source": "birds", "image_size": 64}}),
        (
            {"training": {"optimizer": "sgd"}},
            "training.optimizer.lr=0.1",
            {"training": {"optimizer": {"name": "sgd", "lr": 0.1}}},
        ),
        ({"teacher": [{"weight": 1}]}, "teacher.0.weight=2", {"teacher": [{"weight": 2}]}),
        (
            {"method": ["kd", {"name": "attention"}]},
            "method.attention.p=1",
            {"method": ["kd", {"name": "attention", "p": 1}]},
        ),
        ({"method": ["kd", "dkd"]}, "method.kd.weight=2", {"method": [{"name": "kd", "weight": 2}, "dkd"]}),
        ({"method": ["kd", "dkd"]}, "method.1=dist", {"method": ["kd", "dist"]}),
        ({"assistants": ["a", "b"]}, "assistants.b=c", {"assistants": ["a", "c"]}),
        (
            {"student": ["a", "a"]},
            "student.1.preprocessing.mean=[0.5]",
            {"student": ["a", {"architecture": "a", "preprocessing": {"mean": [0.5]}}]},
        ),
        ({"unlabelled": "pool"}, "unlabelled.labels=none", {"unlabelled": {"source": "pool", "labels": "none"}}),
    ],
)
def test_set_field(before: dict[str, Any], setting: str, after: dict[str, Any]):
    set_field(before, setting)
    assert before == after


@pytest.mark.parametrize(
    "setting",
    ["training.epochs", "=3", "training..epochs=3", "teacher.5.x=1", "name.first=x", "alpha.x.y=1", "alpha.x=1"],
)
def test_set_field_refuses_a_wrong_path(setting: str):
    with pytest.raises(InvalidInput, match="--set"):
        set_field({"name": "a", "teacher": [{}], "alpha": 1}, setting)


def test_set_field_of_an_optimizer_without_a_name_changes_the_services_default():
    spec: dict[str, Any] = {}
    set_field(spec, "training.optimizer.lr=0.1")
    set_field(spec, "training.schedule.gamma=0.2")
    training = parse({"dataset": "digits", "student": "convnet4", "method": "supervised", **spec}).training
    assert training.optimizer == Sgd(lr=0.1)
    assert training.schedule == Multistep(gamma=0.2)
    assert spec["training"]["optimizer"]["name"] == Training().optimizer.name == DEFAULT_NAMES["optimizer"]
    assert spec["training"]["schedule"]["name"] == Training().schedule.name == DEFAULT_NAMES["schedule"]
    set_field(spec, "training.optimizer.name=adamw")
    assert spec["training"]["optimizer"] == {"name": "adamw", "lr": 0.1}


def test_parse_numbers():
    assert parse_numbers("--mean", "0.5, 0.25 1") == [0.5, 0.25, 1.0]
    for bad in ("", ",", "a", "0.5;0.4", "inf"):
        with pytest.raises(InvalidInput, match=r"--mean .* one number for each channel"):
            parse_numbers("--mean", bad)


def test_read_class_map(tmp_path: Path):
    assert read_class_map('{"cat": ["tabby", 282]}') == {"cat": ["tabby", 282]}
    file = tmp_path / "map.json"
    file.write_text('{"dog": 207}')
    assert read_class_map(str(file)) == {"dog": 207}
    file.write_text("[207]")
    for text, said in ((str(file), "must be a JSON object"), ("{cat: 1}", "neither"), ("none.json", "neither")):
        with pytest.raises(InvalidInput, match=said):
            read_class_map(text)


def test_read_class_names(tmp_path: Path):
    listed = tmp_path / "names.json"
    listed.write_text('["cat", "sea, lion"]')
    assert read_class_names(str(listed)) == ["cat", "sea, lion"]
    listed.write_text('{"0": "cat"}')
    with pytest.raises(InvalidInput, match="must be a JSON list of names"):
        read_class_names(str(listed))
    lines = tmp_path / "names.txt"
    lines.write_bytes(b"cat\r\n dog \n\n")
    assert read_class_names(str(lines)) == ["cat", "dog"]
    lines.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot read"):
        read_class_names(str(lines))
    assert read_class_names("cat,dog") == ["cat", "dog"]


def test_set_field_in_a_list_needs_an_index_or_a_unique_name():
    for spec, setting in (
        ({"method": ["kd", "attention"]}, "method.p=1"),
        ({"method": ["kd", "attention"]}, "method.2.p=1"),
        ({"method": ["kd", "kd", "attention"]}, "method.kd.weight=1"),
    ):
        with pytest.raises(InvalidInput, match=r"--set .*method is a list, 0 \(kd\), .*attention\)"):
            set_field(spec, setting)


@pytest.mark.parametrize(
    ("text", "means"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("1h30m", 5400), ("2d", 172_800), ("30m", 1800)]
)
def test_parse_duration(text: str, means: float):
    assert parse_duration(text) == means


@pytest.mark.parametrize("text", ["", "soon", "-5", "1e3", "8 h", "h", "h8", "1h30"])
def test_parse_duration_refuses_other_text(text: str):
    with pytest.raises(InvalidInput, match="write it in seconds, or as 30m"):
        parse_duration(text)


def test_parse_methods():
    assert parse_methods(["kd"]) == "kd"
    assert parse_methods(["kd=0.5"]) == {"name": "kd", "weight": 0.5}
    assert parse_methods(["kd", "attention=1e3"]) == ["kd", {"name": "attention", "weight": 1000}]


def test_set_teachers_by_reference_or_by_file(tmp_path: Path):
    checkpoint, program = tmp_path / "t.pth", tmp_path / "t.pt2"
    checkpoint.touch()
    program.touch()
    spec: dict[str, Any] = {}
    set_teachers(spec, ["model:big"], ["resnet56"])
    assert spec == {"teacher": {"checkpoint": "model:big", "architecture": "resnet56"}}
    set_teachers(spec, [str(checkpoint)], [])
    assert spec == {"teacher": {"checkpoint": f"file:{checkpoint}", "architecture": "resnet56"}}
    spec = {"teacher": {"checkpoint": "model:big", "weight": 2}}
    set_teachers(spec, [str(program)], [])
    assert spec == {"teacher": {"program": f"file:{program}", "weight": 2}}


def test_set_student_by_reference_or_by_file(tmp_path: Path):
    checkpoint = tmp_path / "s.pth"
    checkpoint.write_bytes(b"weights")
    spec: dict[str, Any] = {"student": "resnet8"}
    set_student(spec, None, [], None)
    assert spec == {"student": "resnet8"}
    set_student(spec, "weights:torchvision/resnet18", ["layer1", "layer2"], 10)
    start = {"checkpoint": "weights:torchvision/resnet18", "freeze": ["layer1", "layer2"], "head_lr": 10}
    assert spec == {"student": {"architecture": "resnet8", **start}}
    set_student(spec, str(checkpoint), ["*"], None)
    again = {"checkpoint": f"file:{checkpoint}", "freeze": ["*"], "head_lr": 10}
    assert spec == {"student": {"architecture": "resnet8", **again}}


def test_set_student_refuses_other_text_and_several_students():
    with pytest.raises(InvalidInput, match="--student-checkpoint 'big' is neither a local file nor a reference"):
        set_student({}, "big", [], None)
    with pytest.raises(InvalidInput, match=r'--freeze is for one student; of several: --set student.0.freeze=\["fc"\]'):
        set_student({"student": ["resnet8", "resnet8"]}, None, ["fc"], None)


def test_set_teachers_replaces_with_several():
    spec: dict[str, Any] = {"teacher": {"checkpoint": "model:old", "weight": 2}}
    set_teachers(spec, ["model:a", "model:b"], [])
    assert spec == {"teacher": [{"checkpoint": "model:a"}, {"checkpoint": "model:b"}]}
    set_teachers(spec, [], ["resnet56", "resnet110"])
    assert [teacher["architecture"] for teacher in spec["teacher"]] == ["resnet56", "resnet110"]


def test_set_teachers_refuses_other_text():
    with pytest.raises(InvalidInput, match="--teacher 'big' is neither a local file nor a reference"):
        set_teachers({}, ["big"], [])
    with pytest.raises(InvalidInput, match="--teacher cannot change 'model:big'"):
        set_teachers({"teacher": "model:big"}, [], ["resnet56"])


def test_set_teachers_refuses_unequal_numbers():
    with pytest.raises(InvalidInput, match="several"):
        set_teachers({"teacher": [{}, {}]}, ["model:big"], [])
    with pytest.raises(InvalidInput, match="--teacher-architecture is given 1 times, --teacher 2"):
        set_teachers({}, ["model:a", "model:b"], ["resnet56"])


@pytest.mark.parametrize(
    ("source", "dataset"),
    [
        ("digits", "digits"),
        ("ds_1", "ds_1"),
        ("blob:sha256:00", "blob:sha256:00"),
        ("birds.npz", "file:birds.npz"),
        ("./birds", "file:./birds"),
        ("birds.tar.gz", "file:birds.tar.gz"),
    ],
)
def test_set_data_by_name_or_by_file(source: str, dataset: str):
    spec: dict[str, Any] = {}
    set_data(spec, source)
    assert spec["dataset"] == dataset


def test_set_data_keeps_the_other_fields():
    spec: dict[str, Any] = {"dataset": {"source": "a", "image_size": 64}}
    set_data(spec, "b")
    assert spec["dataset"] == {"source": "b", "image_size": 64}


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Any]:
    """A spec that names three files here."""
    for name in ("my teacher.pth", "birds.npz", "base.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    return {
        "dataset": {"source": f"file:{tmp_path / 'birds.npz'}", "image_size": 32},
        "teacher": {"checkpoint": f"file:{tmp_path / 'my teacher.pth'}", "architecture": "resnet56"},
        "baseline": f"file:{tmp_path / 'base.safetensors'}",
    }


class Registry(FakeFiles):
    """A service that takes several uploads, one after another."""

    def create(self, request: Any) -> Any:
        self.taken = b""
        return super().create(request)


def test_upload_files_registers_local_files(local: dict[str, Any]):
    fake = Registry().service()
    fake.routes.update({"POST /v1/models": {}, "POST /v1/datasets": {}})
    brought = upload_files(fake.client(), local)
    (model,), (dataset,) = fake.bodies("POST /v1/models"), fake.bodies("POST /v1/datasets")
    assert model["name"].startswith("my-teacher-resnet56-")
    assert dataset["name"].startswith("birds-32-")
    assert brought["teacher"] == {"checkpoint": f"model:{model['name']}", "architecture": "resnet56"}
    assert brought["dataset"] == {"source": dataset["name"], "image_size": 32}
    assert brought["baseline"].startswith("blob:sha256:")
    assert local["baseline"].startswith("file:")


def test_upload_files_of_what_students_start_from(tmp_path: Path):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    student = {"architecture": "resnet8", "checkpoint": f"file:{tmp_path / 'weights.pth'}"}
    fake = Registry().service()
    for spec in ({"student": student, "assistants": [student]}, {"student": ["resnet8", student]}):
        brought = upload_files(fake.client(), spec)
        found = [
            *brought.get("assistants", []),
            *([brought["student"]] if "assistants" in spec else brought["student"]),
        ]
        assert all(one == "resnet8" or one["checkpoint"].startswith("blob:sha256:") for one in found)


def test_upload_files_of_several_teachers(tmp_path: Path):
    program, images = tmp_path / "t.pt2", tmp_path / "pool.npz"
    program.write_bytes(b"program")
    images.write_bytes(b"images")
    fake = Registry().service()
    fake.routes["POST /v1/datasets"] = {}
    spec = {
        "dataset": {"source": "birds", "image_size": 32},
        "unlabelled": {"source": f"file:{images}"},
        "teacher": [{"checkpoint": "model:a"}, {"program": f"file:{program}"}, {"logits": f"file:{images}"}],
    }
    brought = upload_files(fake.client(), spec)
    assert brought["teacher"][0] == {"checkpoint": "model:a"}
    assert brought["teacher"][1]["program"].startswith("blob:sha256:")
    assert brought["teacher"][2]["logits"].startswith("blob:sha256:")
    (pool,) = fake.bodies("POST /v1/datasets")
    assert brought["unlabelled"] == {"source": pool["name"]}
    assert pool["image_size"] == 32, "they are read at the size of the labelled images"


def test_upload_files_packs_a_folder_of_images_and_sends_it_once(tmp_path: Path):
    folder = tmp_path / "birds"
    (folder / "train" / "owl").mkdir(parents=True)
    (folder / "train" / "owl" / "1.png").write_bytes(b"owl")
    fake = Registry().service()
    fake.routes["POST /v1/datasets"] = {}
    spec: dict[str, Any] = {}
    set_data(spec, f"{folder}/")
    name = upload_files(fake.client(), spec)["dataset"]
    assert name.startswith("birds-") and name == fake.bodies("POST /v1/datasets")[0]["name"]
    fake.routes[f"GET /v1/datasets/{name}"] = {}
    fake.requests.clear()
    assert upload_files(fake.client(), {"dataset": {"source": f"file:{folder}"}})["dataset"] == {"source": name}
    assert {request.method for request in fake.requests} == {"GET"}


def test_upload_files_registers_data_as_the_spec_reads_it(tmp_path: Path):
    """A file that is read in another way is another data set; unlabelled images have no limit by classes."""
    images, pool = tmp_path / "birds.zip", tmp_path / "pool.zip"
    images.write_bytes(b"images")
    pool.write_bytes(b"more")
    names = set()
    for options in ({}, {"skip_unreadable": True, "limit": 50}, {"skip_unreadable": True, "limit": 60}):
        fake = Registry().service()
        fake.routes["POST /v1/datasets"] = {}
        spec = {"dataset": {"source": f"file:{images}", **options}, "unlabelled": f"file:{pool}"}
        brought = upload_files(fake.client(), spec)
        labelled, unlabelled = fake.bodies("POST /v1/datasets")
        assert {name: labelled.get(name) for name in options} == options
        assert unlabelled.get("skip_unreadable") == options.get("skip_unreadable") and "limit" not in unlabelled
        assert brought["dataset"] == {"source": labelled["name"], **options}
        names.add(labelled["name"])
    assert len(names) == 3


def test_upload_files_uploads_the_same_file_once(local: dict[str, Any]):
    fake = Registry().service()
    fake.routes.update({"POST /v1/models": {}, "POST /v1/datasets": {}})
    brought = upload_files(fake.client(), {"teacher": local["teacher"], "dataset": local["dataset"]["source"]})
    model, dataset = brought["teacher"]["checkpoint"].removeprefix("model:"), brought["dataset"]
    fake.routes.update({f"GET /v1/models/{model}": {}, f"GET /v1/datasets/{dataset}": {}})
    fake.requests.clear()
    assert upload_files(fake.client(), {"teacher": [local["teacher"]], "dataset": local["dataset"]["source"]}) == {
        "teacher": [brought["teacher"]],
        "dataset": dataset,
    }
    assert {request.method for request in fake.requests} == {"GET"}


def test_upload_files_without_local_files_sends_nothing():
    fake = FakeFiles().service()
    spec = {"dataset": "digits", "teacher": {"checkpoint": "job:job_1"}, "baseline": "train"}
    assert upload_files(fake.client(), spec) == spec
    assert fake.requests == []


def test_upload_files_names_the_field_of_a_missing_file(tmp_path: Path):
    for field in ("dataset", "unlabelled", "baseline"):
        with pytest.raises(InvalidInput, match=f"^{field}: there is no file "):
            upload_files(FakeFiles().service().client(), {field: f"file:{tmp_path / 'none.npz'}"})
    with pytest.raises(InvalidInput, match=r"^baseline: .* is a folder, not a file"):
        upload_files(FakeFiles().service().client(), {"baseline": f"file:{tmp_path}"})
    with pytest.raises(InvalidInput, match=r"^teacher: there is no file "):
        upload_files(FakeFiles().service().client(), {"teacher": {"program": f"file:{tmp_path / 'none.pt2'}"}})


def test_upload_files_raises_other_errors(local: dict[str, Any]):
    distillery = Distillery("http://fake", transport=MockTransport(lambda _: problem(401, "unauthorized")))
    with pytest.raises(ApiError, match="unauthorized"):
        upload_files(distillery, local)
