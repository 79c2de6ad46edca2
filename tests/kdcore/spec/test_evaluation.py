import pytest

from base.errors import SpecFaults
from kdcore.catalog import DatasetFacts, ModelFacts
from kdcore.spec import (
    Dataset,
    EvaluationSpec,
    Preprocessing,
    Teacher,
    evaluation_warnings,
    fit_evaluation,
    parse_evaluation,
    resolve_evaluation,
)

DATA = DatasetFacts(
    kind="arrays", num_classes=3, class_names=["a", "b", "c"], channels=1, image_size=(8, 8), train=30, test=9,
    mean=[0.25], std=[0.5], test_carved=True,
)  # fmt: skip
MODEL = ModelFacts(architecture="convnet4", num_classes=3, channels=1, parameters=5, bytes=20, format="safetensors")
BODY = {"kind": "evaluation", "model": {"checkpoint": "file:m.safetensors"}, "dataset": {"source": "file:d.npz"}}


def spec(**model) -> EvaluationSpec:
    return EvaluationSpec(model=Teacher(checkpoint="file:m.safetensors", **model), dataset=Dataset(source="file:d.npz"))


def test_parse_evaluation_reads_what_as_json_writes():
    parsed = parse_evaluation(BODY)
    assert parse_evaluation(parsed.as_json()) == parsed and parsed.method_name == "evaluation"


def test_parse_evaluation_returns_every_fault():
    with pytest.raises(SpecFaults) as caught:
        parse_evaluation({**BODY, "dataset": {"source": ""}, "epochs": 3})
    assert {fault.pointer for fault in caught.value.faults} == {"/dataset/source", "/epochs"}


def test_fit_evaluation_points_to_the_model():
    other = MODEL.model_copy(update={"num_classes": 10, "channels": 3})
    faults = fit_evaluation(spec(preprocessing=Preprocessing(mean=(0.1, 0.2), std=(1.0,))), other, DATA)
    assert [(fault.pointer, fault.allowed, fault.got) for fault in faults] == [
        ("/model/preprocessing/mean", 1, 2),
        ("/model/checkpoint", 3, 10),
        ("/model/checkpoint", 1, 3),
    ]
    assert fit_evaluation(spec(), MODEL, DATA) == []


def test_fit_evaluation_has_no_metrics_to_alert_of():
    alerts = [{"no_progress_s": 60}, {"metric": "validation/loss", "above": 2}]
    asked = parse_evaluation({**BODY, "scheduling": {"alerts": alerts}})
    (fault,) = fit_evaluation(asked, MODEL, DATA)
    assert (fault.pointer, fault.allowed) == ("/scheduling/alerts/1/metric", "no_progress_s")


def test_fit_evaluation_needs_labels():
    (fault,) = fit_evaluation(spec(), MODEL, DATA.model_copy(update={"labelled": False}))
    assert fault.pointer == "/dataset/source" and "has no labels" in fault.message


def test_evaluation_warnings_say_what_is_guessed():
    assert [one.code for one in evaluation_warnings(spec(), MODEL, DATA)] == [
        "test_split_carved",
        "normalization_guessed",
    ]
    given = spec(preprocessing=Preprocessing(mean=(0.1,), std=(1.0,)))
    own = DATA.model_copy(update={"test_carved": False})
    assert list(evaluation_warnings(given, MODEL, own)) == []


def test_resolve_evaluation_writes_out_network_and_normalisation():
    resolved = resolve_evaluation(spec(), MODEL, DATA)
    assert resolved.model.architecture == "convnet4"
    assert resolved.model.preprocessing == Preprocessing(mean=(0.25,), std=(0.5,))
    normalised = MODEL.model_copy(update={"mean": [0.1], "std": [0.2]})
    assert resolve_evaluation(spec(), normalised, DATA).model.preprocessing == Preprocessing(mean=(0.1,), std=(0.2,))
    assert resolve_evaluation(resolved, normalised, DATA) == resolved
