import io
from pathlib import Path
from typing import Any

import pytest
from httpx import MockTransport

from client.errors import ApiError
from client.errors import InvalidInput
from client.sdk import Distillery
from client.spec import set_field
from client.spec import upload_files
from client.spec import set_data
from client.spec import read_spec
from client.spec import parse_duration
from client.spec import set_teachers
from client.spec import parse_methods
from tests.client.fake import Files, problem


def test_json_and_yaml_are_the_same_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = {"dataset": "digits", "training": {"epochs": 3}}
    (tmp_path / "a.json").write_text('{"dataset": "digits", "training": {"epochs": 3}}')
    (tmp_path / "a.yaml").write_text("dataset: digits\ntraining:\n  epochs: 3\n")
    assert read_spec(str(tmp_path / "a.json")) == read_spec(str(tmp_path / "a.yaml")) == spec
    monkeypatch.setattr("sys.stdin", io.StringIO("{dataset: digits, training: {epochs: 3}}"))
    assert read_spec("-") == spec


@pytest.mark.parametrize(
    ("text", "says"), [("{", "neither JSON nor YAML"), ("[1]", "the top must be an object"), ("", "holds no job spec")]
)
def test_files_that_hold_no_spec(tmp_path: Path, text: str, says: str):
    for name in ("a.json", "a.yaml"):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidInput, match=f"{says}|neither JSON nor YAML"):
            read_spec(str(tmp_path / name))


def test_no_such_file(tmp_path: Path):
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
def test_one_field_by_its_path(before: dict[str, Any], setting: str, after: dict[str, Any]):
    set_field(before, setting)
    assert before == after


@pytest.mark.parametrize(
    "setting",
    ["training.epochs", "=3", "training..epochs=3", "teacher.5.x=1", "name.first=x", "alpha.x.y=1", "alpha.x=1"],
)
def test_settings_that_lead_nowhere(setting: str):
    with pytest.raises(InvalidInput, match="--set"):
        set_field({"name": "a", "teacher": [{}], "alpha": 1}, setting)


def test_of_several_one_is_named_by_place_or_by_a_name_that_no_other_has():
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
def test_durations(text: str, means: float):
    assert parse_duration(text) == means


@pytest.mark.parametrize("text", ["", "soon", "-5", "1e3", "8 h", "h", "h8", "1h30"])
def test_a_duration_that_is_none_names_what_is(text: str):
    with pytest.raises(InvalidInput, match="write it in seconds, or as 30m"):
        parse_duration(text)


def test_methods_stand_alone_or_in_a_sum():
    assert parse_methods(["kd"]) == "kd"
    assert parse_methods(["kd=0.5"]) == {"name": "kd", "weight": 0.5}
    assert parse_methods(["kd", "attention=1e3"]) == ["kd", {"name": "attention", "weight": 1000}]


def test_a_teacher_by_reference_or_by_file(tmp_path: Path):
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


def test_several_teachers_are_named_anew():
    spec: dict[str, Any] = {"teacher": {"checkpoint": "model:old", "weight": 2}}
    set_teachers(spec, ["model:a", "model:b"], [])
    assert spec == {"teacher": [{"checkpoint": "model:a"}, {"checkpoint": "model:b"}]}
    set_teachers(spec, [], ["resnet56", "resnet110"])
    assert [teacher["architecture"] for teacher in spec["teacher"]] == ["resnet56", "resnet110"]


def test_a_teacher_that_is_neither():
    with pytest.raises(InvalidInput, match="--teacher 'big' is no file here, and no reference"):
        set_teachers({}, ["big"], [])
    with pytest.raises(InvalidInput, match="--teacher cannot change 'model:big'"):
        set_teachers({"teacher": "model:big"}, [], ["resnet56"])


def test_flags_do_not_guess_which_of_several_teachers_is_meant():
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
def test_data_by_name_or_by_file(source: str, dataset: str):
    spec: dict[str, Any] = {}
    set_data(spec, source)
    assert spec["dataset"] == dataset


def test_data_keeps_what_the_file_said_of_its_images():
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


class Registry(Files):
    """Forgets the bytes of an upload once it is told of another."""

    def create(self, request: Any) -> Any:
        self.taken = b""
        return super().create(request)


def test_local_files_are_uploaded_registered_and_named(local: dict[str, Any]):
    fake = Registry().fake()
    fake.routes.update({"POST /v1/models": {}, "POST /v1/datasets": {}})
    brought = upload_files(fake.client(), local)
    (model,), (dataset,) = fake.bodies("POST /v1/models"), fake.bodies("POST /v1/datasets")
    assert model["name"].startswith("my-teacher-resnet56-")
    assert dataset["name"].startswith("birds-32-")
    assert brought["teacher"] == {"checkpoint": f"model:{model['name']}", "architecture": "resnet56"}
    assert brought["dataset"] == {"source": dataset["name"], "image_size": 32}
    assert brought["baseline"].startswith("blob:sha256:")
    assert local["baseline"].startswith("file:")


def test_each_file_of_several_teachers_is_brought(tmp_path: Path):
    program, images = tmp_path / "t.pt2", tmp_path / "pool.npz"
    program.write_bytes(b"program")
    images.write_bytes(b"images")
    fake = Registry().fake()
    fake.routes["POST /v1/datasets"] = {}
    spec = {
        "dataset": {"source": "birds", "image_size": 32},
        "unlabelled": {"source": f"file:{images}"},
        "teacher": [{"checkpoint": "model:a"}, {"program": f"file:{program}"}],
    }
    brought = upload_files(fake.client(), spec)
    assert brought["teacher"][0] == {"checkpoint": "model:a"}
    assert brought["teacher"][1]["program"].startswith("blob:sha256:")
    (pool,) = fake.bodies("POST /v1/datasets")
    assert brought["unlabelled"] == {"source": pool["name"]}
    assert pool["image_size"] == 32, "they are read at the size of the labelled images"


def test_the_same_file_is_sent_once(local: dict[str, Any]):
    fake = Registry().fake()
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


def test_a_spec_without_local_files_asks_nothing():
    fake = Files().fake()
    spec = {"dataset": "digits", "teacher": {"checkpoint": "job:job_1"}, "baseline": "train"}
    assert upload_files(fake.client(), spec) == spec
    assert fake.requests == []


def test_a_file_that_is_not_there_is_named_with_its_field(tmp_path: Path):
    for field in ("dataset", "unlabelled", "baseline"):
        with pytest.raises(InvalidInput, match=f"^{field}: .* is no file here"):
            upload_files(Files().fake().client(), {field: f"file:{tmp_path / 'none.npz'}"})
    with pytest.raises(InvalidInput, match=r"^dataset: .* is a folder; pack it"):
        upload_files(Files().fake().client(), {"dataset": f"file:{tmp_path}"})
    with pytest.raises(InvalidInput, match=r"^teacher: .* is no file here"):
        upload_files(Files().fake().client(), {"teacher": {"program": f"file:{tmp_path / 'none.pt2'}"}})


def test_a_server_that_refuses_to_say_is_heard(local: dict[str, Any]):
    distillery = Distillery("http://fake", transport=MockTransport(lambda _: problem(401, "unauthorized")))
    with pytest.raises(ApiError, match="unauthorized"):
        upload_files(distillery, local)
