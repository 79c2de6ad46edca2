"""The room's front door: `open_program` and `inspect`."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from base.errors import TeacherMismatch
from kdcore import __main__ as engine
from kdcore import models, programs
from kdcore.catalog import DatasetFacts
from kdcore.catalog.facts import ProgramFacts
from kdcore.classifier import Classifier, FrozenTeacher
from kdcore.data import load
from kdcore.measure.evaluate import logits_on
from kdcore.run import run
from kdcore.spec import Dataset, parse
from tests.kdcore.engine import events, workspace
from tests.kdcore.programs.making import MODEL, WEIGHTS, exported, rewritten
from tests.kdcore.programs.onnx_making import ANY_SIZE, needs_onnx, node, plain, saved, tensor
from tests.kdcore.programs.onnx_making import exported as onnx_exported

DATA = DatasetFacts(
    kind="arrays", num_classes=10, class_names=list("0123456789"), channels=1, image_size=(8, 8), train=400, test=100,
    mean=[0.5], std=[0.25],
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "plainer"), [("resnet8", False), ("resnet8", True), ("torchvision/squeezenet1_1", False)]
)
def test_open_program_logits_are_those_of_the_network(tmp_path: Path, name: str, plainer: bool):
    torch.manual_seed(0)
    network, images = models.build(name, 7).eval(), torch.randn(5, 3, 32, 32)
    program = programs.open_program(exported(network, tmp_path / "t.pt2", images[:2], plainer=plainer))
    assert program.facts.parameters == sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        for count in (5, 2, 1):
            assert torch.allclose(program(images[:count]), network(images[:count]), rtol=0, atol=1e-6)


def test_inspect_what_an_inspection_sees(program: Path, network: nn.Module):
    assert programs.inspect(program) == ProgramFacts(
        num_classes=10,
        channels=1,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bytes=program.stat().st_size,
        digest=f"sha256:{hashlib.sha256(program.read_bytes()).hexdigest()}",
        image_size=(8, 8),
    )


def test_inspect_facts_come_back_from_json(program: Path):
    facts = programs.inspect(program)
    assert ProgramFacts.model_validate_json(facts.model_dump_json()) == facts


def test_inspect_the_command_answers_with_facts_or_with_the_reason(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "no.pt2").write_bytes(b"PK nothing")
    answers = []
    for path in (program, tmp_path / "no.pt2"):
        monkeypatch.setattr(sys, "argv", ["kdcore", "inspect", "program", str(path)])
        assert engine.main() == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == {"ok": True, "facts": programs.inspect(program).model_dump(mode="json")}
    assert answers[1]["ok"] is False and answers[1]["error"]["code"] == "teacher_mismatch"


@needs_onnx
def test_inspect_model_finds_a_program_by_its_bytes(
    program: Path, network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    onnx = onnx_exported(network, tmp_path / "named.pth", torch.zeros(2, 1, 8, 8))
    for path, kind in ((program, "pt2"), (onnx, "onnx")):
        for options in ([], ["--architecture", "convnet4"]):
            assert engine.main(["inspect", "model", str(path), *options]) == 0
            assert json.loads(capsys.readouterr().out)["facts"]["format"] == kind
    (tmp_path / "no.onnx").write_bytes(b"\x08 is no version of ONNX")
    assert not programs.is_program(tmp_path / "no.onnx")


def test_open_program_images_that_fit(program: Path):
    assert programs.open_program(program, DATA).facts.num_classes == 10


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"channels": 3}, "images of 1 channels, the data has 3"),
        ({"image_size": (8, 16)}, "images of 8 x 8 pixels, the data has 8 x 16"),
    ],
)
def test_open_program_images_that_do_not_fit_are_refused(program: Path, data: dict[str, object], words: str):
    with pytest.raises(TeacherMismatch, match=words):
        programs.open_program(program, DATA.model_copy(update=data))


@pytest.mark.parametrize("sides", [(8, 8), (None, None)], ids=["one size", "any size"])
def test_inspect_a_program_that_takes_gigabytes_is_refused(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: tuple[int | None, int | None]
):
    peaks = [1 << 28, 3 << 30]
    monkeypatch.setattr("kdcore.programs.program.peak_bytes", lambda: peaks.pop(0))
    facts = ProgramFacts(num_classes=10, channels=1, parameters=1, bytes=1, image_size=sides)
    opened = programs.open_program(program)
    opened.facts = facts
    monkeypatch.setattr("kdcore.programs.opening.open_traced", lambda _: opened)
    peaks[:] = [1 << 28, 3 << 30]
    side = sides[0] or 64
    with pytest.raises(TeacherMismatch, match=rf"takes 3\.0 GB of memory for 3 images of {side} x {side} pixels"):
        programs.inspect(program)


def test_open_program_of_a_job_has_the_bound_of_its_engine(program: Path, monkeypatch: pytest.MonkeyPatch):
    peaks = [0, 64 << 30]
    monkeypatch.setattr("kdcore.programs.program.peak_bytes", lambda: peaks.pop(0))
    assert programs.open_program(program, DATA).facts.num_classes == 10


class Head(nn.Module):
    """Logits of the mean colour, and what a test does to them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return self.changed(images.mean((2, 3)) @ self.weight)

    def changed(self, logits: Tensor) -> Tensor:
        return logits


class Standardized(Head):
    def changed(self, logits: Tensor) -> Tensor:
        return (logits - logits.mean(0)) / (logits.std(0, correction=0) + 1)


class Infinite(Head):
    def changed(self, logits: Tensor) -> Tensor:
        return logits / 0


@pytest.mark.parametrize(
    ("network", "words"),
    [(Standardized(), "depend on the batch around it"), (Infinite(), "no numbers")],
    ids=["batch", "infinite"],
)
def test_open_program_logits_that_teach_nothing_are_refused(tmp_path: Path, network: nn.Module, words: str):
    with pytest.raises(TeacherMismatch, match=words):
        programs.open_program(exported(network, tmp_path / "t.pt2", torch.randn(2, 3, 8, 8)))


def test_a_program_for_any_size_is_tried_on_the_datas(tmp_path: Path):
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    path = exported(Infinite(), tmp_path / "t.pt2", torch.randn(2, 3, 8, 8), shapes=shapes)
    assert programs.open_program(path).facts.image_size == (None, None)
    with pytest.raises(TeacherMismatch, match="no numbers"):
        programs.open_program(path, DATA.model_copy(update={"channels": 3}))


def test_open_program_images_that_are_too_small_for_it(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(1, 10, 7), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    shapes = ({0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO},)
    path = exported(network, tmp_path / "t.pt2", torch.randn(2, 1, 16, 16), shapes=shapes)
    assert programs.open_program(path, DATA).facts.image_size == (None, None)
    with pytest.raises(TeacherMismatch, match=r"fails on images of 4 x 4 pixels: .*[Kk]ernel"):
        programs.open_program(path, DATA.model_copy(update={"image_size": (4, 4)}))


@needs_onnx
def test_inspect_tries_an_onnx_model_for_any_size_unless_the_images_are_too_small_for_it(tmp_path: Path):
    softmax = plain(node("Softmax", "logits", "y", axis=1), images=("N", 3, "H", 30))
    facts = programs.inspect(saved(tmp_path / "softmax.onnx", softmax))
    assert (facts.image_size, facts.outputs) == ((None, 30), "probabilities")
    infinite = plain(("Div", "logits zero", "y"), constants=[tensor("zero", 0.0)], images=("N", 3, "H", "W"))
    with pytest.raises(TeacherMismatch, match="no numbers"):
        programs.inspect(saved(tmp_path / "infinite.onnx", infinite))
    network = nn.Sequential(nn.Conv2d(3, 4, 100), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    large = onnx_exported(network, tmp_path / "large.onnx", torch.zeros(1, 3, 100, 100), ANY_SIZE)
    assert programs.inspect(large).image_size == (None, None)
    with pytest.raises(TeacherMismatch, match="onnxruntime cannot run"):
        programs.open_program(large, DATA.model_copy(update={"channels": 3}))


@torch.library.custom_op("distillery_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Own(Head):
    def changed(self, logits: Tensor) -> Tensor:
        return twice(logits)


def test_inspect_an_operator_of_ones_own_is_refused_by_name(tmp_path: Path):
    with pytest.raises(TeacherMismatch, match=r"calls torch\.ops\.distillery_test\.twice\.default") as caught:
        programs.inspect(exported(Own(), tmp_path / "t.pt2", torch.zeros(2, 3, 8, 8)))
    assert "PyTorch's own layers" in str(caught.value.hint)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_open_program_stays_in_eval_mode_and_has_no_gradients(program: Path, network: nn.Module, images: torch.Tensor):
    teacher = programs.open_program(program).train()
    images.requires_grad_()
    logits = teacher(images)
    assert not logits.requires_grad and not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        # Batch statistics would differ by far more than the last bits, in which two graphs of one network may differ.
        torch.testing.assert_close(logits, network(images))
        assert torch.equal(teacher(images), logits)


def test_open_program_computes_in_full_precision_inside_autocast(program: Path, images: torch.Tensor):
    teacher = programs.open_program(program)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(images), teacher(images.bfloat16().float().lerp(images, 1)))
        assert teacher(images.bfloat16()).dtype == torch.float32


class Viewed(nn.Module):
    """Its views work in the memory format that it was traced with, and in no other."""

    def __init__(self, traced: torch.memory_format) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 4)
        self.last = traced == torch.channels_last
        self.to(memory_format=traced)  # type: ignore[call-overload]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        rows = features.permute(0, 2, 3, 1) if self.last else features
        return self.head(rows.view(images.shape[0], -1))


@pytest.mark.parametrize("traced", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("target", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_open_program_its_own_memory_format_is_kept(
    tmp_path: Path, traced: torch.memory_format, target: torch.memory_format
):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 6, 6)
    network = Viewed(traced).eval()
    of_its_format = images.to(memory_format=traced)
    teacher = programs.open_program(exported(network, tmp_path / "t.pt2", of_its_format))
    teacher = teacher.to(memory_format=target)  # type: ignore[call-overload]
    assert torch.allclose(teacher(images.to(memory_format=target)), network(of_its_format), atol=1e-6)


def test_open_program_a_classifier_teaches_with_it(program: Path, network: nn.Module):
    pixels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = Classifier(network, [0.3], [0.4])(pixels).logits
        teacher = FrozenTeacher(Classifier(programs.open_program(program), [0.3], [0.4], bf16=True)).train()
        assert torch.allclose(teacher.classifier(pixels).logits, expected, atol=1e-6)


def test_open_program_all_of_it_moves(program: Path):
    moved = programs.open_program(program).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}


def test_open_program_names_that_a_module_would_not_allow(program: Path, tmp_path: Path, images: torch.Tensor):
    """Graph names are the file's own."""

    def change(model: dict) -> None:
        text = json.dumps(model)
        for name, odd in (("p_fc_weight", "forward"), ("p_fc_bias", "a.b"), ("b_layer1_1_running_mean", "")):
            text = text.replace(f'"{name}"', f'"{odd}"')
        model.update(json.loads(text))

    path = rewritten(program, tmp_path / "t.pt2", {MODEL: change})
    assert torch.equal(programs.open_program(path)(images), programs.open_program(program)(images))


def test_open_program_an_answer_of_another_shape_than_promised_is_refused(program: Path, tmp_path: Path):
    def change(config: dict) -> None:
        for name, size in (("fc.weight", [5, 16]), ("fc.bias", [5])):
            meta = config["config"][name]["tensor_meta"]
            meta["sizes"] = [{"as_int": side} for side in size[: len(meta["sizes"])]]

    path = rewritten(program, tmp_path / "t.pt2", {WEIGHTS: change})
    with pytest.raises(TeacherMismatch, match="the program"):
        programs.open_program(path)


def test_program_outputs_are_put_into_the_datas_order_by_its_class_names(
    program: Path, network: nn.Module, tmp_path: Path
):
    names = [str(digit) for digit in (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)]
    teacher = {"program": f"file:{program}", "class_names": names}
    body = {"dataset": "digits", "student": "convnet4", "method": "kd", "teacher": teacher}
    where, stream = workspace(tmp_path)
    report = run(parse({**body, "training": {"epochs": 1, "batch_size": 512}}), where)
    assert "class_order_changed" in [line["code"] for line in events(stream, "warning")]
    data = load(Dataset(source="digits"), None, tmp_path)
    answers = logits_on(Classifier(network, data.facts.mean, data.facts.std), data.test).argmax(1)
    right = [int(names[answer]) == label for answer, label in zip(answers, data.test.labels.tolist(), strict=True)]
    assert report["teacher"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert events(stream, "teacher_check")[0]["accuracy"] == pytest.approx(sum(right) / len(right))
