import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from base.files import Written, write_whole
from kdcore import models, weights
from kdcore.exports import Deliverable, safetensors
from kdcore.prepare import prepare
from tests.kdcore.engine import job, same, workspace, write_arrays


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_arrays(folder / "data.npz")
    where, _ = workspace(folder / "run")
    return prepare(job(folder / "data.npz"), where)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return models.build("convnet4", 3, 1).state_dict()


def write(path, weights, built, metrics, members: int = 1) -> Written:
    student = Deliverable.of(built.spec, built.data.facts, weights, metrics, members)
    return write_whole(path, lambda to: safetensors.write(student, to))


def notes(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["distillery"])


def test_student_weights_stand_under_the_networks_own_names(built, tmp_path):
    written = write(tmp_path / "one.safetensors", state(), built, {"accuracy": 0.5})
    assert same(load_file(written.path), state())
    assert written.bytes == written.path.stat().st_size


def test_student_the_file_says_all_that_its_use_needs(built, tmp_path):
    path = tmp_path / "one.safetensors"
    write(path, state(), built, {"accuracy": 0.5})
    said, dataset = notes(path), built.data.facts
    assert said["architecture"] == "convnet4" and said["members"] == 1
    assert (said["num_classes"], said["channels"], said["image_size"]) == (3, 1, [8, 8])
    assert said["class_names"] == ["0", "1", "2"]
    assert said["mean"] == pytest.approx(dataset.mean) and said["std"] == pytest.approx(dataset.std)
    assert said["metrics"] == {"accuracy": 0.5} and said["spec"] == built.spec.as_json()


def test_the_same_student_is_the_same_file_to_the_last_byte(built, tmp_path):
    """safetensors orders its notes by chance, once in two tries so and once the other way."""
    noted = {"note": 'a "quote", ü and \n'}
    written = [write(tmp_path / f"{n}.safetensors", state(), built, noted) for n in range(16)]
    assert len({one.sha256 for one in written}) == 1
    assert notes(written[0].path)["metrics"] == noted and same(load_file(written[0].path), state())


def test_student_the_file_is_a_teacher_for_others_as_it_stands(built, tmp_path):
    path = tmp_path / "one.safetensors"
    write(path, state(), built, {})
    found = weights.open_teacher(path, None)
    assert found.facts.architecture == "convnet4" and found.facts.class_names == ["0", "1", "2"]
    assert found.facts.mean == pytest.approx(built.data.facts.mean) and same(found.state, state())


def test_student_what_is_laid_out_for_speed_or_still_learns_is_written_plainly(built, tmp_path):
    laid_out = {
        name: value.to(memory_format=torch.channels_last).requires_grad_() if value.ndim == 4 else value
        for name, value in state().items()
    }
    path = tmp_path / "one.safetensors"
    write(path, laid_out, built, {})
    assert same(load_file(path), state())


def test_student_several_members_say_how_many_they_are(built, tmp_path):
    path = tmp_path / "two.safetensors"
    both = {f"{number}.{name}": value for number in range(2) for name, value in state(number).items()}
    write(path, both, built, {}, members=2)
    assert notes(path)["members"] == 2 and same(load_file(path), both)


def test_a_failed_write_leaves_nothing_behind(built, tmp_path):
    with pytest.raises(AttributeError):
        write(tmp_path / "one.safetensors", {"weight": None}, built, {})
    assert not list(tmp_path.iterdir())
