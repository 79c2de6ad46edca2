"""Students that start from weights: what is taken, what is frozen, and that all of it resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from base.errors import SpecFaults, SpecInvalid, TeacherMismatch
from kdcore import models
from kdcore.checkpoint import Stopped
from kdcore.models.networks import skeleton
from kdcore.prepare import PreparedJob, prepare
from kdcore.run import TrialSetup, run
from kdcore.training import Observer, StageTraining
from kdcore.weights import starting
from kdcore.weights.starting import Shape
from tests.kdcore.engine import events, job, method_job, same, workspace, write_arrays, write_teacher

SILENT = Observer(metric=lambda *_: None, after_step=lambda _: None)
NOTES = {"mean": [0.5], "std": [0.25]}


def write_weights(path: Path, classes: int = 7, architecture: str = "convnet4", **notes: Any) -> Path:
    """Weights with running averages of their own, in a file that says how its images were normalized."""
    torch.manual_seed(5)
    state = models.build(architecture, classes, 1).state_dict()
    for name in [name for name in state if "running" in name]:
        state[name] += 0.5
    save_file(state, path, {"distillery": json.dumps({"architecture": architecture, **NOTES, **notes})})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starting")
    write_arrays(folder / "data.npz")
    write_teacher(folder / "teacher.safetensors", "convnet8")
    write_weights(folder / "seven.safetensors")
    write_weights(folder / "three.safetensors", 3, class_names=["2", "0", "1"])
    write_weights(folder / "renamed.safetensors", 3, class_names=["x", "y", "z"])
    write_weights(folder / "nameless.safetensors", 3)
    write_weights(folder / "other.safetensors", 3, "resnet8")
    return folder


def started(folder: Path, weights: str = "seven", **fields: Any) -> dict[str, Any]:
    return {"architecture": "convnet4", "checkpoint": f"file:{folder / weights}.safetensors", **fields}


def built(folder: Path, student: Any, **fields: Any) -> PreparedJob:
    where, _ = workspace(folder / "run", folder / "cache")
    return prepare(job(folder / "data.npz", student=student, **fields), where)


def setup(prepared: PreparedJob, trial: str = "student") -> TrialSetup:
    return TrialSetup(next(one for one in prepared.trials if one.name == trial), prepared, prepared.teacher)


def network(made: TrialSetup, number: int = 0) -> nn.Module:
    return made.students[number].network


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in one.items() if name not in other or not torch.equal(value, other[name])}


def test_start_takes_the_bits_of_the_file_and_a_fresh_classifier_for_other_classes(folder: Path) -> None:
    file = load_file(folder / "seven.safetensors")
    prepared = built(folder, started(folder))
    assert differing(dict(network(setup(prepared)).state_dict()), file) == {"fc.weight", "fc.bias"}
    facts = prepared.starts["/student"].facts
    assert (facts.num_classes, facts.channels, facts.fresh) == (7, 1, ["fc.weight", "fc.bias"])
    assert facts.parameters - facts.taken == 3 * 8 + 3
    student = prepared.spec.students[0]
    assert student.preprocessing is not None and student.preprocessing.mean == (0.5,)
    assert student.head_lr == 1


def test_start_a_classifier_of_the_same_names_is_kept_in_the_order_of_the_data(folder: Path) -> None:
    file = load_file(folder / "three.safetensors")
    state = network(setup(built(folder, started(folder, "three")))).state_dict()
    order = [1, 2, 0]  # The outputs of the file that are the data's classes 0, 1 and 2.
    assert torch.equal(state["fc.weight"], file["fc.weight"][order])
    assert torch.equal(state["fc.bias"], file["fc.bias"][order])
    unnamed = network(setup(built(folder, started(folder, "nameless")))).state_dict()
    assert same(dict(unnamed), load_file(folder / "nameless.safetensors"))


def test_start_a_classifier_of_other_names_is_fresh_and_warned_about(folder: Path) -> None:
    where, stream = workspace(folder / "renamed", folder / "cache")
    prepared = prepare(job(folder / "data.npz", student=started(folder, "renamed")), where)
    assert prepared.starts["/student"].fresh == {"fc.weight", "fc.bias"}
    (warning,) = events(stream, "warning")
    assert (warning["code"], warning["pointer"]) == ("weights_partly_loaded", "/student/checkpoint")
    assert "x, y, z and not 0, 1, 2" in warning["message"]
    (taken,) = events(stream, "weights_taken")
    assert (taken["classifier"], taken["taken"]) == ("fresh", taken["parameters"] - 27)
    renamed = started(folder, "renamed", class_names=["2", "1", "0"])
    assert prepare(job(folder / "data.npz", student=renamed), where).starts["/student"].fresh == frozenset()


def test_start_a_part_that_fits_is_taken_with_a_warning(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "seven.safetensors")
    missing = {name: value for name, value in file.items() if not name.startswith("layer2")}
    save_file(missing, tmp_path / "part.safetensors")
    where, stream = workspace(tmp_path / "run", folder / "cache")
    student = {"architecture": "convnet4", "checkpoint": f"file:{tmp_path / 'part.safetensors'}"}
    prepare(job(folder / "data.npz", student=student), where)
    codes = [warning["code"] for warning in events(stream, "warning")]
    assert codes == ["weights_partly_loaded", "normalization_guessed"]
    assert "tensors before the classifier are not in it, first layer2" in events(stream, "warning")[0]["message"]


def test_start_half_precision_is_taken_and_quantised_weights_are_named(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "seven.safetensors")
    half = {name: value.half() if value.is_floating_point() else value for name, value in file.items()}
    save_file(half, tmp_path / "half.safetensors")
    facts = starting.inspect(tmp_path / "half.safetensors", Shape("convnet4", 3, 1))
    assert facts.fresh == ["fc.weight", "fc.bias"]
    half["layer1.0.weight"] = torch.zeros_like(file["layer1.0.weight"], dtype=torch.int8)
    save_file(half, tmp_path / "int8.safetensors")
    with pytest.raises(TeacherMismatch, match=r"quantised: layer1\.0\.weight is torch\.int8"):
        starting.inspect(tmp_path / "int8.safetensors", Shape("convnet4", 3, 1))


def test_start_behind_a_prefix_and_of_several_networks_is_chosen_as_a_teachers(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "seven.safetensors")
    both = {"teacher": {name: value + 1 for name, value in file.items()}, "student": file}
    torch.save(
        {f"{part}.{name}": one for part, state in both.items() for name, one in state.items()}, tmp_path / "b.pt"
    )
    student = {"architecture": "convnet4", "checkpoint": f"file:{tmp_path / 'b.pt'}"}
    with pytest.raises(TeacherMismatch, match="student"):
        built(folder, student)
    prepared = built(folder, {**student, "part": "student"})
    assert differing(dict(network(setup(prepared)).state_dict()), file) == {"fc.weight", "fc.bias"}
    assert prepared.spec.students[0].part == "student"


@pytest.mark.parametrize(
    ("student", "pointer", "text"),
    [
        ({"weights": "other"}, "/student/checkpoint", "nothing in the checkpoint fits convnet4"),
        ({"freeze": ["layer9"]}, "/student/freeze/0", "no module 'layer9'; did you mean layer"),
        ({"freeze": ["*", "fc"]}, "/student/freeze", "everything is frozen"),
        ({"freeze": ["fc"]}, "/student/freeze", "fc.weight is frozen and not taken from the checkpoint"),
        ({"class_names": ["a", "b"]}, "/student/class_names", "2 class names, and the checkpoint has 7 classes"),
    ],
)
def test_start_refusals_name_the_field(student: dict[str, Any], pointer: str, text: str, folder: Path) -> None:
    with pytest.raises(SpecFaults) as raised:
        built(folder, started(folder, **student))
    (fault,) = raised.value.faults
    assert fault.pointer == pointer and text in fault.message


def test_start_of_another_number_of_channels_names_the_field_of_the_data(folder: Path, tmp_path: Path) -> None:
    save_file(models.build("convnet4", 3, 3).state_dict(), tmp_path / "colour.safetensors")
    student = {"architecture": "convnet4", "checkpoint": f"file:{tmp_path / 'colour.safetensors'}"}
    with pytest.raises(SpecInvalid, match=r"images of 3 channels, the data set has 1; dataset\.channels: 3"):
        built(folder, student)


def test_start_refuses_weights_that_are_no_numbers_and_ensembles(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "seven.safetensors")
    file["layer1.0.weight"][0] = float("nan")
    save_file(file, tmp_path / "nan.safetensors")
    with pytest.raises(TeacherMismatch, match=r"layer1.0.weight holds values that are no numbers"):
        built(folder, {"architecture": "convnet4", "checkpoint": f"file:{tmp_path / 'nan.safetensors'}"})
    notes = {"architecture": "convnet4", "members": 2}
    save_file(file, tmp_path / "two.safetensors", {"distillery": json.dumps(notes)})
    with pytest.raises(TeacherMismatch, match="an ensemble of 2 networks"):
        starting.inspect(tmp_path / "two.safetensors", Shape("convnet4", 3, 1))


def test_start_a_tag_of_weights_alone_is_refused_with_both_spellings(folder: Path) -> None:
    with pytest.raises(SpecFaults) as raised:
        built(folder, "timm/resnet18.a1_in1k")
    (fault,) = raised.value.faults
    assert fault.pointer == "/student/architecture"
    assert fault.allowed == [
        {"architecture": "timm/resnet18", "checkpoint": "weights:timm/resnet18.a1_in1k"},
        {"architecture": "timm/resnet18"},
    ]


def test_inspect_named_says_without_a_file_what_will_be_taken() -> None:
    facts = starting.inspect_named("resnet20", 100, 3, Shape("resnet20", 10, 3, ("layer1", "layer8")))
    assert (facts.num_classes, facts.fresh, facts.frozen_fresh) == (100, ["fc.weight", "fc.bias"], [])
    assert facts.parameters - facts.taken == 650 and facts.frozen == 3 * (2 * 16 * 16 * 9 + 2 * 32)
    assert "layer1" in facts.unknown_modules["layer8"]


def test_freeze_keeps_parameters_and_statistics_to_the_bit(folder: Path) -> None:
    prepared = built(folder, started(folder, freeze=["layer1"]), training={"batch_size": 16, "ema": 0.9})
    training = setup(prepared).training(0, SILENT)
    learned = network_of(training)
    before = {name: value.clone() for name, value in learned.state_dict().items()}
    trained = [parameter for group in training.optimizers[0].param_groups for parameter in group["params"]]
    assert not any(one is other for one in learned.layer1.parameters() for other in trained)
    outcome = training.run()["student"]
    for weights in (dict(learned.state_dict()), outcome.best, outcome.last):
        changed = differing(before, dict(weights))
        assert changed and not any(name.startswith("layer1") for name in changed)
        assert {"layer2.1.running_mean", "fc.weight"} <= changed
    assert not training.optimizers[0].state.keys() & set(learned.layer1.parameters())


def network_of(training: StageTraining) -> Any:
    return training.scheme.models["student"].network


def test_freeze_everything_but_the_classifier_trains_it_alone(folder: Path) -> None:
    prepared = built(folder, started(folder, freeze=["*"]))
    training = setup(prepared).training(0, SILENT)
    learned = network_of(training)
    before = {name: value.clone() for name, value in learned.state_dict().items()}
    best = training.run()["student"].best
    assert differing(before, dict(best)) == {"fc.weight", "fc.bias"}
    assert prepared.starts["/student"].facts.frozen == sum(
        p.numel() for n, p in learned.named_parameters() if "fc" not in n
    )


def test_freeze_holds_where_a_scheme_builds_the_network_into_another_one(folder: Path) -> None:
    spec = method_job("one", folder / "data.npz", folder, student=started(folder, freeze=["layer1"]))
    where, _ = workspace(folder / "run", folder / "cache")
    training = setup(prepare(spec, where)).training(0, SILENT)
    before = {name: value.clone() for name, value in network_of(training).state_dict().items()}
    training.run()
    after = dict(network_of(training).state_dict())
    assert not any(name.startswith("layer1") for name in differing(before, after))


def test_freeze_every_tensor_of_a_transformer_but_its_head() -> None:
    """Its class token and position embedding belong to no module that could be frozen alone."""
    network = skeleton("torchvision/vit_b_32", 3)
    starting.freeze(network, Shape("torchvision/vit_b_32", 3, 3, ("*",)))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == ["heads.head.weight", "heads.head.bias"]
    assert not network.train().encoder.training


def first_step(folder: Path, **student: Any) -> dict[str, torch.Tensor]:
    """The change of each parameter in the first step."""
    recipe = {"optimizer": {"name": "sgd", "lr": 0.5}, "schedule": "cosine"}
    training = setup(built(folder, started(folder, **student), training=recipe)).training(0, SILENT)
    before = {name: value.clone() for name, value in network_of(training).named_parameters()}
    training.learners.train()
    training._step(training.batches.of(training.training_set.rows[:36]))
    return {name: value.detach() - before[name] for name, value in network_of(training).named_parameters()}


def test_head_lr_multiplies_the_first_step_of_fresh_parameters_only(folder: Path) -> None:
    plain, faster = first_step(folder), first_step(folder, head_lr=4)
    assert plain.keys() == faster.keys()
    for name in plain:
        factor = 4 if name.startswith("fc") else 1
        assert torch.allclose(faster[name], factor * plain[name], atol=1e-6), name
        assert name.startswith("fc") or torch.equal(faster[name], plain[name])


def test_start_the_baseline_begins_with_the_same_weights_and_freezes_the_same(folder: Path) -> None:
    spec = {"method": "kd", "baseline": "train", "teacher": folder / "teacher.safetensors"}
    prepared = built(folder, started(folder, freeze=["layer1"]), **spec)
    student, alone = setup(prepared), setup(prepared, "alone")
    assert same(dict(network(student).state_dict()), dict(network(alone).state_dict()))
    frozen = [name for name, one in network(alone).named_parameters() if not one.requires_grad]
    assert frozen and all(name.startswith("layer1") for name in frozen)


def test_start_assistants_and_peers_each_have_their_own(folder: Path) -> None:
    file = load_file(folder / "seven.safetensors")
    chain = {"teacher": folder / "teacher.safetensors", "method": "kd", "assistants": [started(folder)]}
    prepared = built(folder, "convnet8", **chain)
    assert same_but_head(network(setup(prepared, "assistant-1")), file)
    assert prepared.start(prepared.spec.students[0]) is None
    peers = built(folder, ["convnet4", started(folder)], method="dml")
    assert not same_but_head(network(setup(peers)), file) and same_but_head(network(setup(peers), 1), file)


def same_but_head(network: nn.Module, file: dict[str, torch.Tensor]) -> bool:
    return differing(dict(network.state_dict()), file) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("method", "steps"), [("kd", 2), ("kd", 9), ("factor_transfer", 2)])
def test_a_stopped_job_continues_to_the_same_bits_without_the_file(
    method: str, steps: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the student's trial, in the baseline's, and in a first stage that has no student: the file is needed
    for what begins later, and is gone."""
    weights = write_weights(tmp_path / "weights.safetensors")
    student = {"architecture": "convnet4", "checkpoint": f"file:{weights}", "freeze": ["layer1"], "head_lr": 3}
    teacher = folder / "teacher.safetensors"
    spec = job(folder / "data.npz", teacher, student=student, method=method, baseline="train")
    where, _ = workspace(tmp_path / "whole", folder / "cache")
    report = run(spec, where)
    assert report["starts"]["/student"]["taken"] == report["student"]["parameters"] - 27
    exported = load_file(where.out / "student.safetensors")
    assert exported.keys() == models.build("convnet4", 3, 1).state_dict().keys()

    broken, stream = workspace(tmp_path / "stopped", folder / "cache")
    with monkeypatch.context() as patch:
        done, step = [0], StageTraining._step

        def counted(self: StageTraining, batch: Any) -> None:
            step(self, batch)
            done[0] += 1
            broken.stop_requested = done[0] == steps

        patch.setattr(StageTraining, "_step", counted)
        with pytest.raises(Stopped):
            run(spec, broken)
    weights.unlink()
    onward, later = workspace(tmp_path / "resumed", folder / "cache")
    onward.warnings = list(broken.warnings)
    resumed = run(spec, onward, broken.out / events(stream, "checkpoint")[-1]["path"])
    for name in ("student", "alone"):
        whole, continued = (load_file(one.out / f"{name}.safetensors") for one in (where, onward))
        assert same(whole, continued)
    assert resumed["starts"] == report["starts"]
    assert events(later, "weights_taken") == []
    kept = torch.load(sorted((onward.out / "checkpoints").glob("*.pt"))[-1], weights_only=True)["starts"]["/student"]
    assert kept["state"] is None  # No trial will begin with them any more.


def test_inspect_tells_what_a_deeper_network_has_more(tmp_path: Path) -> None:
    """A ResNet-14 has everything of a ResNet-8: taken is half of a network, which nobody may have meant."""
    shape = Shape("resnet8", 3, 1)
    file = starting.inspect(write_weights(tmp_path / "s.safetensors", 7, "resnet14"), shape)
    named = starting.inspect_named("resnet14", 7, 1, shape)
    for facts in (file, named):
        assert facts.loading is not None and facts.loading.ignored == 30
        assert facts.loading.ignored_names[0].startswith("layer1.1.")
    assert starting.inspect_named("resnet8", 7, 1, shape).loading is None


def test_inspect_refuses_weights_that_are_no_numbers(tmp_path: Path) -> None:
    state = models.build("resnet8", 7, 1).state_dict()
    save_file({**state, "bn1.weight": state["bn1.weight"] * torch.nan}, tmp_path / "s.safetensors")
    with pytest.raises(TeacherMismatch, match=r"bn1\.weight holds values that are no numbers") as caught:
        starting.inspect(tmp_path / "s.safetensors", Shape("resnet8", 3, 1))
    assert "diverged" in str(caught.value.hint)
