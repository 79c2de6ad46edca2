"""The service's answers about itself, as files. They are rewritten by

    python -m tests.golden_make

and compared with the service by `tests/test_golden.py`. All of it is fetched over REST, so that it stays the same
question however the code behind it is arranged. Nothing there is edited by hand: a change is made here, and its diff
reviewed.
"""

import asyncio
import hashlib
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path
from typing import Any

from kdcore.catalog import NamedStartFacts
from store.database import migrate
from store.settings import Settings
from tests.api.conftest import DATASET, MODEL, PROGRAM, PUBLISHED, START, Service, serving

FOLDER = Path(__file__).parent / "golden"
WIDTH = 100

Golden = dict[str, Any]
Spec = dict[str, Any]


async def methods(service: Service) -> Golden:
    """Both ways to read of a method."""
    listed = await _get(service, "/v1/methods")
    found: Golden = {"GET /v1/methods": listed}
    for entry in listed["data"]:
        alone = await _get(service, f"/v1/methods/{entry['name']}")
        found[f"GET /v1/methods/{entry['name']}"] = "as in the list" if alone == entry else alone
    return found


async def openapi(service: Service) -> Golden:
    found: Golden = await _get(service, "/openapi.json")
    return found


async def resolved_specs(service: Service) -> Golden:
    """What is sent and what becomes of it, for every method and for all that changes what a method means; and of each
    method between other networks what becomes of the method."""
    await _register(service)
    names = await _names(service)
    found = {}
    for case, spec in {**{name: _job(name) for name in names}, **VARIANTS}.items():
        answer = await _validated(service, spec)
        assert answer["valid"], (case, answer["errors"])
        found[case] = {"sent": spec, "resolved": answer["resolved_spec"], "estimate": answer["estimate"]}
    for name, (teacher, student) in product(names, PAIRS):
        answer = await _validated(service, _job(name, teacher, student))
        case = f"{name} from {teacher} to {student}"
        found[case] = answer["resolved_spec"]["method"] if answer["valid"] else answer["errors"]
    return found


async def refusals(service: Service) -> Golden:
    """Each method beside all that not every method goes with: code and pointer of each fault; none for a sound spec."""
    await _register(service)
    names = await _names(service)
    found: Golden = {}
    for name in names:
        cases = {what: {**_job(name), **changes} for what, changes in BESIDE.items()}
        cases |= {f"given {what}": _given(name, fields) for what, fields in OPTIONS.items()}
        cases |= {f"summed with {other}": _sum(name, other) for other in names}
        found[name] = {what: await _faults(service, spec) for what, spec in cases.items()}
    return found


GOLDEN: dict[str, Callable[[Service], Awaitable[Golden]]] = {
    "methods.json": methods,
    "openapi.json": openapi,
    "resolved_specs.json": resolved_specs,
    "refusals.json": refusals,
}

TEACHERS = ("resnet56", "resnet110", "vgg13", "wrn_40_2", "torchvision/resnet50")
PAIRS = (
    ("vgg13", "mobilenetv2_x0_5"),
    ("wrn_40_2", "shufflenetv1"),
    ("torchvision/resnet50", "torchvision/resnet18"),
    ("torchvision/resnet50", "vgg8"),
)
"""Networks of other families than resnet56 and resnet20, who stand everywhere else: their taps are others."""


def _digest(name: str) -> str:
    """Of a file that holds only its own name: the same on every machine."""
    return hashlib.sha256(name.encode()).hexdigest()


def _model(network: str, **more: Any) -> Spec:
    return {"checkpoint": f"model:{network.replace('/', '-')}", **more}


def _job(method: str, teacher: str = "resnet56", student: str = "resnet20") -> Spec:
    """A job of one method with whatever it needs, and nothing else."""
    spec: Spec = {"dataset": "cifar100", "student": student, "method": method}
    if method == "dml":
        spec["student"] = [student, student]
    return spec if method in ("supervised", "dml", "one", "byot") else {**spec, "teacher": _model(teacher)}


def _sum(one: str, other: str) -> Spec:
    """With what the method needs that is more than an objective."""
    spec = _job(min(one, other, key=_is_offline))
    return {**spec, "method": [one, other]}


def _is_offline(method: str) -> bool:
    return method not in ("supervised", "dml", "one", "byot", "born_again")


def _given(method: str, fields: Spec) -> Spec:
    return {**_job(method), "method": {"name": method, **fields}}


PROGRAM_TEACHER = {"program": f"blob:sha256:{_digest('program')}"}
SEVERAL = [_model("resnet56"), _model("resnet110", weight=3)]
ANSWERS_ALONE = {"source": "pool", "labels": "none", "labelled_too": False}

BESIDE: dict[str, Spec] = {
    "nothing": {},
    "no teacher": {"teacher": None},
    "a teacher": {"teacher": _model("resnet56")},
    "a weight of its only teacher": {"teacher": _model("resnet56", weight=2)},
    "several teachers": {"teacher": SEVERAL},
    "a program": {"teacher": PROGRAM_TEACHER},
    "weights to download": {"teacher": {"checkpoint": "weights:ResNet50_Weights.IMAGENET1K_V2"}},
    "an assistant": {"assistants": ["resnet32"]},
    "one student in a list": {"student": ["resnet20"]},
    "two students": {"student": ["resnet20", "resnet20"]},
    "two students of two networks": {"student": ["resnet20", "resnet32"]},
    "a temperature": {"temperature": 2},
    "alpha 0": {"alpha": 0},
    "beta": {"beta": 2},
    "beta 0": {"beta": 0},
    "alpha and beta 0": {"alpha": 0, "beta": 0},
    "mixup": {"training": {"mix": "mixup"}},
    "unlabelled images": {"unlabelled": "pool"},
    "unlabelled images without answers": {"unlabelled": {"source": "pool", "labels": "none"}},
    "unlabelled images alone, without answers": {"unlabelled": ANSWERS_ALONE},
    "its own images, unlabelled": {"unlabelled": "cifar100"},
    "a baseline": {"baseline": "train"},
    "one epoch": {"training": {"epochs": 1}},
}
OPTIONS: dict[str, Spec] = {
    "weight": {"weight": 2},
    "pretraining_epochs": {"pretraining_epochs": 3},
    "warmup_epochs": {"warmup_epochs": 3},
    "tap": {"tap": {"student": "layer1", "teacher": "layer1"}},
    "taps": {"taps": [{"student": "layer1", "teacher": "layer1"}, {"student": "layer2", "teacher": "layer2"}]},
    "taps of no such name": {"taps": [{"student": "layer9", "teacher": "layer1"}]},
    "an option of no such name": {"strength": 1},
}


def _variant(method: Any, **changes: Any) -> Spec:
    return {"dataset": "cifar100", "student": "resnet20", "teacher": _model("resnet56"), "method": method, **changes}


def _without_teacher(method: Any, **changes: Any) -> Spec:
    return {"dataset": "cifar100", "student": "resnet20", "method": method, **changes}


TWO = {"name": "fitnet", "stages": "two"}
LAYER2, LAYER3 = {"student": "layer2", "teacher": "layer2"}, {"student": "layer3", "teacher": "layer3"}
RECIPE = {
    "epochs": 60, "batch_size": 128, "seed": 7, "optimizer": {"name": "adamw", "lr": 0.002},
    "schedule": {"name": "cosine", "warmup_epochs": 5}, "augmentation": {"name": "random_resized_crop"},
    "mix": "cutmix", "label_smoothing": 0.1, "ema": 0.999, "clip_norm": 1, "precision": "fp32", "device": "cpu",
    "validation_fraction": 0.2, "checkpoint_every_s": 5,
}  # fmt: skip

VARIANTS: dict[str, Spec] = {
    "kd as in the README": _variant(
        "kd",
        name="resnet56-to-resnet20",
        temperature=4.0,
        alpha=0.1,
        beta=0.9,
        baseline="train",
        training={"epochs": 3, "batch_size": 64, "seed": 1},
    ),
    "kd with every field of a training": _variant("kd", training=RECIPE),
    "kd with scheduling": _variant("kd", scheduling={"priority": 5, "deadline_s": 3600, "max_attempts": 7}),
    "kd of standardized logits": _variant({"name": "kd", "standardize": True}),
    "kd by cross-entropy": _variant({"name": "kd", "form": "cross_entropy"}),
    "kd by l2 of logits": _variant({"name": "kd", "form": "logits_l2"}),
    "kd by l2 of probabilities": _variant({"name": "kd", "form": "probabilities_l2"}),
    "kd on digits": _without_teacher(
        "kd",
        dataset="digits",
        student="convnet4",
        teacher={"checkpoint": "weights:ResNet18_Weights.IMAGENET1K_V1"},
        training={"epochs": 5},
    ),
    "kd with preprocessing of its own": _variant(
        "kd",
        teacher=_model("resnet56", preprocessing={"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}),
        student={"architecture": "resnet20", "preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]}},
    ),
    "dkd without standardization, few epochs": _variant("dkd", training={"epochs": 8}),
    "dkd, warm-up given": _variant({"name": "dkd", "warmup_epochs": 3, "non_target_weight": 8}),
    "dist of standardized logits": _variant({"name": "dist", "standardize": True}),
    "ttm unweighted": _variant({"name": "ttm", "weighted": False}),
    "attention by gradient": _variant({"name": "attention", "mapping": "gradient"}),
    "attention by norms": _variant({"name": "attention", "reduction": "norms"}),
    "attention at given taps": _variant({"name": "attention", "taps": ["layer2", LAYER3]}),
    "cc by gaussian kernels": _variant({"name": "cc", "form": "gaussian"}),
    "fitnet in two stages": _variant(TWO),
    "fitnet in two stages, few epochs": _variant(TWO, training={"epochs": 2}),
    "fitnet at a given tap": _variant({"name": "fitnet", "tap": LAYER3, "regressor": "linear"}),
    "factor_transfer, stage given": _variant({"name": "factor_transfer", "pretraining_epochs": 5, "p": 2}),
    "activation_boundary, few epochs": _variant("activation_boundary", training={"epochs": 8}),
    "fsp at given taps": _variant({"name": "fsp", "taps": [LAYER2, LAYER3]}),
    "ofd at given taps": _variant({"name": "ofd", "taps": ["layer2.0.bn2"], "margins": ["layer2.0.bn2"]}),
    "reviewkd, few epochs": _variant({"name": "reviewkd", "mid_channels": 64}, training={"epochs": 8}),
    "sum of kd and attention": _variant(["kd", "attention"]),
    "sum of attention and kd": _variant(["attention", "kd"]),
    "sum of kd, attention and crd with weights": _variant(["kd", "attention", {"name": "crd", "weight": 0.5}], beta=2),
    "sum of kd and two stages": _variant(["kd", "factor_transfer", "activation_boundary"]),
    "sum of two hints and attention": _variant([TWO, "attention"]),
    "sum of a method twice": _variant(
        [{"name": "feature", "weight": 1}, {"name": "feature", "form": "cosine", "weight": 2}]
    ),
    "list of one": _variant(["kd"]),
    "list of one with a weight": _variant([{"name": "kd", "weight": 0.5}]),
    "several teachers": _variant("kd", teacher=SEVERAL),
    "several teachers, a sum": _variant(["kd", "dist"], teacher=[_model("resnet56"), PROGRAM_TEACHER]),
    "a list of one teacher": _variant("kd", teacher=[_model("resnet56")]),
    "a program": _variant("kd", teacher=PROGRAM_TEACHER),
    "attention from weights to download": _variant(
        "attention", teacher={"checkpoint": "weights:ResNet50_Weights.IMAGENET1K_V2"}, student="torchvision/resnet18"
    ),
    "assistants": _variant("kd", assistants=["resnet44", {"architecture": "resnet32"}], baseline="train"),
    "assistants, a sum": _variant(["dkd", "dist"], assistants=["resnet32"]),
    "dml of three": _without_teacher("dml", student=["resnet20", "resnet32", "vgg8"]),
    "dml and sp": _without_teacher(["dml", "sp"], student=["resnet20", "resnet20"]),
    "one of five branches": _without_teacher({"name": "one", "branches": 5, "rampup_epochs": 9}),
    "one, few epochs": _without_teacher("one", training={"epochs": 8}),
    "one and dkd": _without_teacher(["one", "dkd"]),
    "byot at given exits": _without_teacher({"name": "byot", "exits": ["layer1"], "hint_weight": 0.1}),
    "byot and kd": _without_teacher(["byot", "kd"]),
    "born_again of two": _variant({"name": "born_again", "generations": 2}, baseline="train"),
    "born_again without a teacher": _without_teacher("born_again"),
    "born_again as an ensemble": _without_teacher({"name": "born_again", "answer": "ensemble"}),
    "born_again and attention": _variant(["born_again", "attention"]),
    "born_again and crd": _variant(["born_again", "crd"]),
    "unlabelled": _variant("kd", unlabelled="pool", baseline="train"),
    "unlabelled without answers": _variant("kd", unlabelled={"source": "pool", "labels": "none"}),
    "unlabelled alone": _variant("kd", unlabelled=ANSWERS_ALONE),
    "unlabelled, crd": _variant("crd", unlabelled="pool"),
    "fine-tuning": _without_teacher(
        "supervised",
        student={"architecture": "torchvision/resnet18", "checkpoint": "weights:torchvision/resnet18", "head_lr": 10},
        training={"epochs": 5},
    ),
    "distilling into a checkpoint, the recipe given": _variant(
        "kd",
        student={"architecture": "resnet20", "checkpoint": "model:resnet56", "freeze": ["layer1"]},
        training={"optimizer": {"name": "adamw", "weight_decay": 0.05}, "schedule": "multistep"},
    ),
    "supervised with alpha": _without_teacher("supervised", alpha=0.5),
    "pictures of another size": _without_teacher(
        "supervised", dataset={"source": "imagenette", "image_size": 96}, student="torchvision/resnet18"
    ),
}


async def _register(service: Service) -> None:
    """Files that hold only their own names, and what an inspection would find in them."""
    facts: dict[str, Any] = {"num_classes": 100, "channels": 3}
    picture = {"channels": 3, "image_size": (32, 32)}
    found: dict[str, Any] = {name: MODEL.model_copy(update={"architecture": name, **facts}) for name in TEACHERS}
    stated = {"mean": [0.5] * 3, "std": [0.25] * 3}
    service.inspector.answers["start weights:torchvision/resnet18"] = NamedStartFacts(**START, **stated)
    small = {"architecture": "convnet32", "num_classes": 10, "channels": 1, "mean": [0.5], "std": [0.25]}
    service.inspector.answers["ResNet18_Weights.IMAGENET1K_V1"] = PUBLISHED.model_copy(update=small)
    found["program"] = PROGRAM.model_copy(update={**facts, "image_size": (32, 32)})
    pool = {"labelled": False, "num_classes": 0, "class_names": [], "train": 5000, "test": 0}
    found["pool"] = DATASET.model_copy(update={**pool, **picture, "mean": [0.5] * 3, "std": [0.25] * 3})
    for name, seen in found.items():
        service.inspector.answers[_digest(name)] = seen
        assert await service.upload(name.encode()) == f"sha256:{_digest(name)}"
    await _post(service, "/v1/datasets", {"name": "pool", "blob": f"sha256:{_digest('pool')}"}, 201)
    for name in TEACHERS:
        body = {"name": name.replace("/", "-"), "blob": f"sha256:{_digest(name)}", "architecture": name}
        await _post(service, "/v1/models", body, 201)


async def _names(service: Service) -> list[str]:
    return sorted(entry["name"] for entry in (await _get(service, "/v1/methods"))["data"])


async def _validated(service: Service, spec: Spec) -> dict[str, Any]:
    answer: dict[str, Any] = await _post(service, "/v1/jobs/validate", spec, 200)
    return answer


async def _faults(service: Service, spec: Spec) -> str:
    """On one line, and in an order that the code's does not change."""
    errors = (await _validated(service, spec))["errors"]
    return ", ".join(sorted(f"{fault['code']} {fault['pointer']}" for fault in errors))


async def _get(service: Service, path: str) -> Any:
    answer = await service.http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def _post(service: Service, path: str, body: Any, status: int) -> Any:
    answer = await service.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def made(name: str, home: Path) -> str:
    """Return the new content of a golden file, from a server in this process on a new home."""

    async def ask() -> Golden:
        async with serving(settings) as service:
            return await GOLDEN[name](service)

    settings = Settings(home=home, min_free_bytes=0)
    migrate(settings.database_url)
    return _pretty(asyncio.run(ask())) + "\n"


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with sorted keys; what fits on one line stands on one."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(indent + line) <= WIDTH or not value or not isinstance(value, dict | list):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_pretty(value[key], inner)}" for key in sorted(value)]
    else:
        lines = [_pretty(one, inner) for one in value]
    start, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return f"{start}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{end}"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name in GOLDEN:
        with tempfile.TemporaryDirectory() as home:
            text = made(name, Path(home))
        path = FOLDER / name
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{name}: {'written anew' if changed else 'as it was'}, {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
