"""Checkpoints in the forms in which people publish them: each loads, or gets an answer that a stranger can act on."""

import argparse
import datetime
import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from base.errors import TeacherMismatch
from kdcore import models, weights
from kdcore.protocol import NOTHING_KNOWN, KnownBefore
from kdcore.spec import Teacher
from kdcore.spec.doubts import model_warnings
from kdcore.spec.resolving import loaded_as
from kdcore.weights import ANY, Choice

NAME = "resnet8"
State = dict[str, Tensor]


def fresh(seed: int, classes: int = 10, name: str = NAME) -> State:
    torch.manual_seed(seed)
    return dict(models.build(name, classes).state_dict())


def before(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): value for name, value in state.items()}


def numbered(state: State) -> State:
    """Under names that say nothing, as exporters and other implementations write them."""
    return {f"layers.{at}.{name.rpartition('.')[2]}": value for at, (name, value) in enumerate(state.items())}


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 9,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**before("model.", state), "criterion.weight": torch.ones(7)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hyper_parameters": {"lr": 0.1, "when": datetime.timedelta(1)},
    }


@dataclass(frozen=True)
class Form:
    """How a trainer writes a network's weights, with others that it writes beside them."""

    write: Callable[[State, State], Any]
    codes: tuple[str, ...] = ()
    """The warnings about what was guessed."""
    choice: Choice = ANY


FORMS = {
    "a state dict": Form(lambda own, _: own),
    "OrderedDict of parameters": Form(
        lambda own, _: OrderedDict((k, nn.Parameter(v) if v.is_floating_point() else v) for k, v in own.items())
    ),
    "DataParallel, CRD's {model, opt}": Form(
        lambda own, _: {"opt": argparse.Namespace(lr=0.1), "model": before("module.", own), "epoch": 240}
    ),
    "torch.compile within DDP": Form(lambda own, _: before("_orig_mod.module.", own)),
    "mdistiller's student": Form(lambda own, _: {"epoch": 240, "model": before("module.student.", own)}),
    "mdistiller with a teacher of another network": Form(
        lambda own, _: {
            "model": {**before("module.student.", own), **before("module.teacher.", fresh(2, 10, "resnet14"))}
        },
        ("tensors_left_out",),
    ),
    "a distiller with two of one network": Form(
        lambda own, other: {"model": {**before("module.student.", own), **before("module.teacher.", other)}},
        choice=Choice(part="student"),
    ),
    "Lightning": Form(lambda own, _: lightning(own), ("tensors_left_out",)),
    "Lightning's WeightAveraging": Form(
        lambda own, other: {
            "state_dict": before("model.", own),
            "current_model_state": before("model.", other),
            "averaging_state": {"n_averaged": torch.tensor(7)},
        },
        ("averaged_weights_taken",),
    ),
    "Lightning's StochasticWeightAveraging": Form(
        lambda own, other: {
            "state_dict": before("model.", other),
            "callbacks": {"StochasticWeightAveraging": {"average_model_state": before("model.", own)}},
        },
        ("averaged_weights_taken",),
    ),
    "timm": Form(
        lambda own, other: {
            "epoch": 9,
            "arch": "something",
            "state_dict": other,
            "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 3)}}},
            "args": argparse.Namespace(when=datetime.datetime(2026, 1, 1)),
            "state_dict_ema": own,
            "metric": np.float64(72.6),
        },
        ("averaged_weights_taken",),
    ),
    "timm's raw ones": Form(
        lambda own, other: {"state_dict": own, "state_dict_ema": other}, choice=Choice(averaged=False)
    ),
    "torchvision's references": Form(
        lambda own, other: {
            "model": other,
            "model_ema": {"n_averaged": torch.tensor(5), **before("module.", own)},
            "optimizer": {},
            "args": argparse.Namespace(model="resnet18"),
        },
        choice=Choice(averaged=True),
    ),
    "averages in a list, which nothing names": Form(
        lambda own, other: {"model": own, "ema": {"decay": 0.999, "shadow_params": list(other.values())}},
        ("tensors_left_out",),
    ),
    "averaged alone": Form(lambda own, _: {"ema_state_dict": own}),
    "OpenMMLab": Form(
        lambda own, _: {
            "meta": {"epoch": 3, "hook_msgs": {}},
            "state_dict": {("head." if k.startswith("fc.") else "backbone.") + k: v for k, v in own.items()},
        }
    ),
    "nested containers": Form(lambda own, _: {"checkpoint": {"net": {"state_dict": before("module.net.", own)}}}),
    "a classifier called linear": Form(lambda own, _: renamed(own, "fc.", "linear.")),
    "a classifier behind a dropout": Form(lambda own, _: renamed(own, "fc.", "fc.1.")),
    "shortcuts called shortcut": Form(lambda own, _: renamed(own, "downsample", "shortcut")),
    "half precision": Form(lambda own, _: {k: v.half() if v.is_floating_point() else v for k, v in own.items()}),
    "bfloat16": Form(lambda own, _: {k: v.bfloat16() if v.is_floating_point() else v for k, v in own.items()}),
    "the order alone": Form(lambda own, _: {"state_dict": numbered(own)}, ("weights_matched_by_order",)),
    "the order of a safetensors file": Form(
        lambda own, _: numbered(dict(sorted(own.items()))), ("weights_matched_by_order",)
    ),
    "notes of many kinds": Form(
        lambda own, _: {
            "model": defaultdict(int, own),
            "history": defaultdict(list, {"loss": [0.1]}),
            "queue": deque([1, 2]),
            "rng": np.arange(3),
            "path": Path("x"),
        }
    ),
}


def written(form: Form, own: State, path: Path) -> Path:
    torch.save(form.write(own, fresh(1, own["fc.weight"].shape[0])), path)
    return path


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_open_teacher_takes_the_right_weights_and_tells_what_it_guessed(tmp_path: Path, form: Form):
    own = fresh(0)
    teacher = weights.open_teacher(written(form, own, tmp_path / "t.pth"), NAME, None, form.choice)
    for name, value in teacher.state.items():
        expected = own[name].half().float() if teacher.facts.loading.precision == "float16" else own[name]
        expected = own[name].bfloat16().float() if teacher.facts.loading.precision == "bfloat16" else expected
        assert torch.equal(value, expected.to(value.dtype)) and value.dtype == own[name].dtype, name
    codes = [one.code for one in model_warnings(teacher.facts) if one.code != "normalization_guessed"]
    assert tuple(codes) == form.codes
    network = models.build(NAME, 10)
    weights.load_into(network, teacher.state, "the teacher")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_inspect_a_form_tells_its_own_class_count(tmp_path: Path, form: Form):
    assert weights.inspect(written(form, fresh(0, 7), tmp_path / "t.pth"), NAME, None, form.choice).num_classes == 7


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_inspect_a_form_with_a_missing_key_says_what_to_do(tmp_path: Path, form: Form):
    own = fresh(0)
    del own["layer1.0.bn1.weight"]
    other = {**fresh(1)}
    del other["layer1.0.bn1.weight"]
    torch.save(form.write(own, other), tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(tmp_path / "t.pth", NAME, None, form.choice)
    message, hint = caught.value.message, caught.value.hint or ""
    if form.codes == ("weights_matched_by_order",):
        assert "missing" in message
    else:
        assert "1 of 56 keys is missing, first layer1.0.bn1.weight" in message
    assert hint and "those of resnet8" not in hint, "the hint repeats the name that was given"


class Trap:
    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sprung}",)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_inspect_a_hostile_form_is_refused_and_runs_nothing(tmp_path: Path, form: Form):
    content = form.write(fresh(0), fresh(1))
    content = {**content, "note": Trap(tmp_path / "sprung")}
    torch.save(content, tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match=r"refused: it names (posix|nt)\.system"):
        weights.inspect(tmp_path / "t.pth", NAME, None, form.choice)
    assert not (tmp_path / "sprung").exists()


def test_open_teacher_reads_the_same_forms_of_names_in_safetensors(tmp_path: Path):
    own = fresh(0)
    for prefix in ("", "model.", "timm_model."):
        save_file(before(prefix, own), tmp_path / "t.safetensors")
        teacher = weights.open_teacher(tmp_path / "t.safetensors", NAME)
        assert all(torch.equal(teacher.state[name], value) for name, value in own.items())
    save_file(numbered(own), tmp_path / "t.safetensors")
    with pytest.raises(TeacherMismatch, match="missing") as caught:
        weights.inspect(tmp_path / "t.safetensors", NAME)
    assert "another implementation" in str(caught.value.hint), "a safetensors file has no order"


def without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def linear(path: str, units: int, width: int) -> State:
    return {f"{path}.weight": torch.ones(units, width), f"{path}.bias": torch.ones(units)}


def changed(state: State, name: str, *leaves: str) -> State:
    """Without one weight, of which two parts are there instead."""
    rest = {path: value for path, value in state.items() if path != name}
    return {**rest, **{f"{name.rpartition('.')[0]}.{leaf}": state[name] for leaf in leaves}}


HINTS: dict[str, tuple[Callable[[State], State], str]] = {
    "the body alone": (without_head, "no classifier. A student can start from it (student.checkpoint)"),
    "two tasks": (
        lambda own: {**before("body.", without_head(own)), **linear("age", 3, 64), **linear("kind", 2, 64)},
        "age or kind could be its classifier",
    ),
    "SimCLR's projection": (
        lambda own: {**before("f.", without_head(own)), "g.0.weight": torch.ones(64, 64), **linear("g.3", 32, 64)},
        "the file has no classifier",
    ),
    "DINO's projection": (
        lambda own: {
            **before("module.backbone.", without_head(own)),
            **linear("module.head.mlp.0", 64, 64),
            **linear("module.head.mlp.2", 32, 64),
            "module.head.last_layer.weight_g": torch.ones(99, 1),
        },
        "the file has no classifier",
    ),
    "MAE's decoder": (
        lambda own: {**without_head(own), **linear("decoder_embed", 8, 64), **linear("decoder_pred", 5, 8)},
        "the file has no classifier",
    ),
    "no classes": (lambda own: {**without_head(own), **linear("fc", 0, 64)}, "after its training"),
    "a batch norm before the classifier": (
        lambda own: {**without_head(own), **linear("fc.1", 10, 64), "fc.0.weight": torch.ones(64)},
        "its classifier is of a kind that is not built here",
    ),
    "a learned activation": (
        lambda own: {
            **without_head(own),
            **linear("fc.0", 32, 64),
            "fc.1.weight": torch.ones(1),
            **linear("fc.2", 10, 32),
        },
        "its classifier is of a kind that is not built here",
    ),
    "a classifier without a bias": (
        lambda own: {name: value for name, value in own.items() if name != "fc.bias"},
        "state['fc.bias'] = torch.zeros",
    ),
    "weight norm": (lambda own: changed(own, "fc.weight", "weight_g", "weight_v"), "remove_parametrizations"),
    "pruning": (lambda own: changed(own, "conv1.weight", "weight_orig", "weight_mask"), "prune.remove"),
    "adapters": (lambda _: {"base_model.model.conv1.lora_A.weight": torch.ones(4, 3)}, "merge_and_unload()"),
    "a sparse weight": (lambda own: {**own, "fc.weight": own["fc.weight"].to_sparse()}, "to_dense()"),
    "NaN": (lambda own: {**own, "fc.bias": own["fc.bias"] * torch.nan}, "diverged"),
}


@pytest.mark.parametrize(("write", "hint"), HINTS.values(), ids=HINTS)
def test_inspect_a_network_that_was_changed_names_the_one_thing_that_helps(
    tmp_path: Path, write: Callable[[State], State], hint: str
):
    torch.save(write(fresh(0)), tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(tmp_path / "t.pth", NAME)
    assert hint in str(caught.value.hint)


def test_inspect_grey_weights_of_torchvision_are_told_timms_name(tmp_path: Path):
    own = fresh(0, 10, "torchvision/resnet18")
    torch.save({**own, "conv1.weight": torch.ones(64, 1, 7, 7)}, tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match="of another shape, first conv1") as caught:
        weights.inspect(tmp_path / "t.pth", "torchvision/resnet18")
    assert "those of timm/resnet18, which also takes images of other than 3 channels" in str(caught.value.hint)


# Choosing


def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.pth"
    torch.save({"model": {**before("module.student.", fresh(0)), **before("module.teacher.", fresh(1))}}, path)
    return path


def test_choose_two_networks_are_a_refusal_that_names_both_and_the_field(tmp_path: Path):
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(two(tmp_path), NAME)
    assert "model.module.student, model.module.teacher" in caught.value.message
    assert caught.value.hint == 'choose one: "part": "student" or "part": "teacher"'


def test_choose_suggests_the_names_that_tell_two_networks_apart(tmp_path: Path):
    torch.save(
        {"student": before("module.backbone.", fresh(0)), "teacher": before("backbone.", fresh(1))}, tmp_path / "t"
    )
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(tmp_path / "t", NAME)
    assert caught.value.hint == 'choose one: "part": "student" or "part": "teacher"'


@pytest.mark.parametrize("part", ["teacher", "module.teacher", "model.module.teacher"])
def test_choose_a_part_by_any_piece_of_its_path(tmp_path: Path, part: str):
    teacher = weights.open_teacher(two(tmp_path), NAME, None, Choice(part=part))
    assert torch.equal(teacher.state["fc.weight"], fresh(1)["fc.weight"])
    again = Choice(teacher.facts.loading.part, teacher.facts.loading.averaged)
    assert weights.inspect(two(tmp_path), NAME, None, again) == teacher.facts, "jobs choose what was registered"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice(part="peer"), "no weights of this network under 'peer'; it has them at model.module.student"),
        (Choice(averaged=True), "no averaged weights of this network, only those at model.module.student"),
    ],
)
def test_choose_what_the_file_does_not_have_names_what_it_has(tmp_path: Path, choice: Choice, words: str):
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(two(tmp_path), NAME, None, choice)
    assert words in caught.value.message and caught.value.hint


def test_inspect_leftovers_of_a_larger_network_are_not_left_out(tmp_path: Path):
    """A ResNet-14 has everything of a ResNet-8, and is none."""
    torch.save(before("model.", fresh(0, 10, "resnet14")), tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match=r"unexpected, first layer1\.1\.conv1\.weight") as caught:
        weights.inspect(tmp_path / "t.pth", NAME)
    assert caught.value.hint == "its 175,258 parameters are those of resnet14"


def test_inspect_by_order_needs_the_same_order(tmp_path: Path):
    torch.save(numbered(dict(reversed(fresh(0).items()))), tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(tmp_path / "t.pth", NAME)
    assert "names and order are those of another implementation" in str(caught.value.hint)


@pytest.mark.parametrize("sign", ["fc.weight", "conv1.zero_point"])
def test_inspect_quantised_weights_are_named(tmp_path: Path, sign: str):
    own = fresh(0)
    if sign == "fc.weight":
        own[sign] = own[sign].to(torch.int8)
    else:
        del own["conv1.weight"]
        own[sign] = torch.tensor(3)
    torch.save(own, tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match="quantised") as caught:
        weights.inspect(tmp_path / "t.pth", NAME)
    assert "before the quantisation" in str(caught.value.hint)


# To start from


def test_opened_start_returns_what_fits_and_names_the_rest(tmp_path: Path):
    own = fresh(0)
    torch.save({"model": {k: v for k, v in own.items() if not k.startswith("fc.")}}, tmp_path / "t.pth")
    start = weights.opened_start(tmp_path / "t.pth", NAME)
    assert start.missing == ("fc.weight", "fc.bias")
    assert (start.loading.missing, start.loading.removed) == (2, ["model."])
    assert all(torch.equal(start.state[name], own[name]) for name in start.state)


def test_opened_start_takes_a_complete_file_as_open_teacher_does(tmp_path: Path):
    torch.save(before("module.", fresh(0, 7)), tmp_path / "t.pth")
    start = weights.opened_start(tmp_path / "t.pth", NAME)
    assert start.missing == () and start.state["fc.weight"].shape == (7, 64)


def test_opened_start_refuses_a_file_of_another_network(tmp_path: Path):
    torch.save({"a.weight": torch.zeros(3, 3)}, tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match="nothing in the checkpoint fits resnet8"):
        weights.opened_start(tmp_path / "t.pth", NAME)


# What a job means


@pytest.mark.parametrize(
    ("teacher", "known", "averaged"),
    [
        ({}, NOTHING_KNOWN, None),
        ({}, KnownBefore(), False),
        ({"averaged": True}, KnownBefore(), True),
        ({"averaged": False, "part": "student"}, NOTHING_KNOWN, False),
    ],
)
def test_chosen_weights_of_a_job_accepted_earlier_are_the_raw_ones(
    teacher: dict[str, Any], known: KnownBefore, averaged: bool | None
):
    spec = Teacher(checkpoint="file:t.pth", **teacher)
    assert weights.chosen(spec, known) == Choice(teacher.get("part"), averaged)


def test_chosen_weights_of_every_form_are_those_that_were_inspected(tmp_path: Path):
    """A service inspects a file, writes its choice into the spec, and the engine loads the file with it."""
    for form in FORMS.values():
        path = written(form, fresh(0), tmp_path / "t.pth")
        facts = weights.inspect(path, NAME, None, form.choice)
        spec = Teacher(checkpoint="file:t.pth", architecture=facts.architecture).model_copy(update=loaded_as(facts))
        again = weights.open_teacher(path, spec.architecture, None, weights.chosen(spec, KnownBefore()))
        assert again.facts.loading.removed == facts.loading.removed
