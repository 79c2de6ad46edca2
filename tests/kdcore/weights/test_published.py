"""Published weights: what the libraries say about them, and how one file gets into the cache once."""

import errno
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from base.data_cache import lock_of, partial_of
from base.errors import SpecInvalid, WeightsUnavailable
from base.files import sha256_of
from kdcore import models
from kdcore.prepare import prepare, teacher_file
from kdcore.run import TrialSetup
from kdcore.spec import Teacher
from kdcore.weights import published
from tests.kdcore.engine import events, job, workspace, write_arrays

SHUFFLENET = "torchvision/shufflenet_v2_x0_5"
TINY = "timm/test_resnet.r160_in1k"
"""One of timm's own test networks, of some hundred thousand parameters."""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's folder, and no other place: a download fails as without internet."""

    def unreachable(*_arguments: object, **_options: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(published.SETTING, str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def small(name: str = SHUFFLENET) -> published.Published:
    """Published weights whose file may have any bytes."""
    return replace(published.find(name), sha256_prefix="")


def write_tiny(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = models.build("timm/test_resnet", 1000).state_dict()
    path = folder / TINY / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(state, path)
    return state


@pytest.mark.parametrize(
    "name", ["ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", SHUFFLENET, f"{SHUFFLENET}.IMAGENET1K_V1"]
)
def test_find_in_torchvision_says_what_the_library_states(name: str) -> None:
    found = published.find(name)
    facts = found.facts
    assert (facts.architecture, facts.num_classes, facts.channels, facts.image_size) == (
        SHUFFLENET,
        1000,
        3,
        (224, 224),
    )
    assert facts.class_names is not None and facts.class_names[0] == "tench"
    assert (facts.mean, facts.file) == ([0.485, 0.456, 0.406], "shufflenetv2_x0.5-f707e7126e.pth")
    assert found.sha256_prefix == "f707e7126e" and facts.parameters == 1_366_792


def test_find_googlenet_normalises_twice_so_its_numbers_are_halves() -> None:
    assert published.find("torchvision/googlenet").facts.std == [0.5, 0.5, 0.5]


def test_find_in_timm_says_what_the_library_states() -> None:
    found = published.find(TINY)
    assert (found.facts.architecture, found.facts.image_size) == ("timm/test_resnet", (160, 160))
    assert (found.repository, found.facts.file) == (TINY, f"{TINY}/model.safetensors")


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("ResNet18_Weights.V9", "publishes no weights", "ResNet50_Weights.IMAGENET1K_V2"),
        ("torchvision/resnet81", "publishes no weights", "torchvision/resnet18"),
        ("torchvision/resnet18.V9", "no weights 'V9' of resnet18", "IMAGENET1K_V1"),
        ("FCN_ResNet50_Weights.DEFAULT", "not the weights of an image classifier", ""),
        ("timm/resnet81", "no model 'resnet81'", "resnet18"),
        ("timm/resnet18.nothing", "with the tag 'nothing' of resnet18", "timm/resnet18.a1_in1k"),
        ("timm/vit_base_patch8_224.augreg_in21k", "in a format of its own", "there are timm/vit_base_patch8_224"),
    ],
)
def test_find_names_what_there_is(name: str, text: str, hint: str) -> None:
    with pytest.raises(SpecInvalid, match=text) as raised:
        published.find(name)
    assert hint in (raised.value.hint or "")


def test_fetch_keeps_a_file_by_its_digest_and_asks_once(weights: Path, tmp_path: Path) -> None:
    found, cache = small(), tmp_path / "cache"
    (weights / found.facts.file).write_bytes(b"weights")
    path = published.fetch(found, cache)
    assert path.name == f"{sha256_of(path)}.pth" and path.read_bytes() == b"weights"
    (weights / found.facts.file).unlink()
    assert published.fetch(found, cache) == path
    assert lock_of(path.parent).exists() and path.parents[1] == cache / "downloads"


def test_fetch_replaces_what_a_killed_job_or_a_bad_disk_has_left(weights: Path, tmp_path: Path) -> None:
    found, cache = small(), tmp_path / "cache"
    (weights / found.facts.file).write_bytes(b"weights")
    folder = published.fetch(found, cache).parent
    partial_of(folder).mkdir()
    (partial_of(folder) / "copied").write_bytes(b"wei")
    next(folder.iterdir()).write_bytes(b"damaged")
    path = published.fetch(found, cache)
    assert path.read_bytes() == b"weights" and len(list(folder.iterdir())) == 1 and not partial_of(folder).exists()


def test_fetch_refuses_a_file_of_other_bytes(weights: Path, tmp_path: Path) -> None:
    found = published.find(SHUFFLENET)
    (weights / found.facts.file).write_bytes(b"other")
    with pytest.raises(WeightsUnavailable, match="are not the published weights: its SHA-256 begins with d9298a10"):
        published.fetch(found, tmp_path / "cache")


def test_fetch_takes_a_mirror_by_its_address(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(published.SETTING, weights.as_uri() + "/")
    for found in (small(), small(TINY)):
        (weights / found.facts.file).parent.mkdir(parents=True, exist_ok=True)
        (weights / found.facts.file).write_bytes(b"weights")
        assert published.fetch(found, tmp_path / "cache").read_bytes() == b"weights"


def test_fetch_without_network_names_the_way_out_and_is_not_retried(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsUnavailable, match=r"could not be downloaded from https://.*no route") as raised:
        published.fetch(published.find(SHUFFLENET), tmp_path / "cache")
    assert not raised.value.retryable
    assert "distillery models add NAME FILE --architecture torchvision/shufflenet" in str(raised.value.hint)
    assert f"the folder that {published.SETTING} names" in str(raised.value.hint)

    def offline(*_arguments: object, **_options: object) -> None:
        raise ValueError("the hub's own kind of error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(WeightsUnavailable, match=r"from huggingface.co/timm/test_resnet.*own kind"):
        published.fetch(published.find(TINY), tmp_path / "cache")


def test_fetch_a_full_disk_is_no_missing_network(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(OSError, match="no space"):
        published.fetch(published.find(SHUFFLENET), tmp_path / "cache")


def test_state_of_torchvision_has_the_names_of_the_network(tmp_path: Path) -> None:
    """DenseNet's files have dots in names that the network does not have."""
    given = models.build("torchvision/densenet121", 1000).state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value for name, value in given.items()}
    torch.save(old, tmp_path / "densenet.pth")
    found = published.state(published.find("torchvision/densenet121"), tmp_path / "densenet.pth")
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)


def test_a_student_and_a_teacher_start_from_published_weights(weights: Path, tmp_path: Path) -> None:
    published_state = write_tiny(weights)
    data = write_arrays(tmp_path / "data.npz", side=32)
    where, stream = workspace(tmp_path / "run")
    student = {"architecture": "timm/test_resnet", "checkpoint": f"weights:{TINY}"}
    spec = job(data, dataset={"source": f"file:{data}", "channels": 3}, student=student)
    prepared = prepare(spec, where)
    (taken,) = events(stream, "weights_taken")
    assert taken["digest"].startswith("sha256:") and taken["classifier"] == "fresh"
    assert prepared.spec.students[0].preprocessing.mean == (0.5, 0.5, 0.5)  # as timm states it
    network = TrialSetup(prepared.trials[0], prepared, None).students[0].network
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, published_state[name])]
    assert changed == ["fc.weight", "fc.bias"]
    teacher = teacher_file(Teacher(checkpoint=f"weights:{TINY}"), prepared.data, where)
    assert teacher.facts.num_classes == 1000 and teacher.facts.digest == taken["digest"]
    assert teacher.state.keys() == published_state.keys()
