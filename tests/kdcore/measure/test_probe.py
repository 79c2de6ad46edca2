"""The probe of a job's cost: of every method, with the stages that the job would have."""

import json

import pytest

from base.errors import SpecInvalid
from kdcore.__main__ import main
from kdcore.catalog import ModelFacts, named_facts
from kdcore.measure import probe as probes
from kdcore.measure.probe import probe
from kdcore.spec import METHODS, Known, each_teacher, parse, resolve, trials
from kdcore.spec.cost import ProbeRequest, cost_rows, predict
from kdcore.spec.shipping import Quantization
from tests.kdcore.engine import SMALL

DIGITS = named_facts("digits", None)
FACTS = Known(dataset=DIGITS)


def request(method="kd", **fields):
    """A request for a small job on the digits, 8 x 8."""
    method = {"name": method, **SMALL.get(method, {})} if isinstance(method, str) else method
    body = {
        "dataset": "digits",
        "student": "convnet8",
        "method": method,
        "training": {"batch_size": 32, "precision": "fp32"},
        **fields,
    }
    if "teacher" not in body and METHODS[method["name"]].facts.teacher == "required":
        body["teacher"] = {"checkpoint": "model:x"}
    if method["name"] == "dml":
        body["student"] = ["convnet8", "convnet8"]
    spec = parse(body)
    network = ModelFacts(
        architecture="convnet8", num_classes=10, channels=1, parameters=1, bytes=4, format="safetensors"
    )
    known = Known(dataset=DIGITS, teachers={at: network for at, _ in each_teacher(vars(spec))})
    return ProbeRequest(spec=resolve(spec, known), dataset=DIGITS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_probe_measures_every_stage_of_every_method(method):
    asked = request(method, baseline="none" if method == "supervised" else "train")
    cost = probe(asked)
    names = {stage.name for trial in trials(asked.spec, DIGITS, None) for stage in trial.stages}
    assert cost.stages.keys() == names
    assert all(one.step_s > 0 for one in cost.stages.values()) and cost.test_image_s > 0
    assert (cost.basis, cost.device, cost.precision, cost.preparing_s) == ("probe", "cpu", "fp32", None)
    assert 0 < cost.memory_fixed_bytes <= cost.memory_bytes
    prediction = predict(asked.spec, FACTS, cost_rows(asked.spec, FACTS, cost), "cpu")
    assert prediction.basis == "probe" and prediction.seconds > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"teacher": [{"checkpoint": "model:x"}, {"checkpoint": "model:y"}]},
        {"assistants": ["convnet8"]},
        {"method": {"name": "born_again", "generations": 3}, "teacher": {"checkpoint": "model:x"}},
        {"training": {"batch_size": 2, "ema": 0.9, "mix": "mixup", "optimizer": "adamw"}},
        {"baseline": "blob:sha256:" + "0" * 64},
        {"unlabelled": {"source": "more", "labels": "teacher"}},
    ],
    ids=["several teachers", "assistants", "generations", "recipe", "given baseline", "unlabelled"],
)
def test_probe_measures_jobs_of_other_shapes(fields):
    asked = request(**fields)
    names = {stage.name for trial in trials(asked.spec, DIGITS, None) for stage in trial.stages}
    assert probe(asked).stages.keys() == names


def test_probe_measures_steps_in_float_and_steps_that_round():
    """A student that starts from weights may train for int8 alone."""
    asked = request(quantization={"aware": True}, baseline="train")
    cost = probe(asked)
    assert list(cost.stages) == ["student", "student/int8", "alone", "alone/int8"]
    assert predict(asked.spec, FACTS, cost_rows(asked.spec, FACTS, cost), "cpu").seconds > 0
    alone = request("supervised", training={"batch_size": 32, "epochs": 2, "precision": "fp32"}).spec
    alone = alone.model_copy(update={"quantization": Quantization(epochs=2)})
    cost = probe(ProbeRequest(spec=alone, dataset=DIGITS))
    assert list(cost.stages) == ["student/int8"] and cost.test_image_s > 0


def test_probe_scales_a_batch_for_which_there_is_no_time(monkeypatch):
    """With no time at all only small batches are run: the figures of 8 images, times 512 / 8."""
    monkeypatch.setattr(probes, "BUDGET_S", 0.0)
    sizes = []
    steps = probes._Prober._steps
    monkeypatch.setattr(probes._Prober, "_steps", lambda self, *of: sizes.append(of[2]) or steps(self, *of))
    cost = probe(request("supervised", training={"batch_size": 512}))
    assert sizes == [8]
    assert cost.stages["student"].step_s > 0


def test_probe_refuses_a_program_whose_network_is_in_the_file():
    asked = request(teacher={"program": "blob:sha256:" + "0" * 64})
    with pytest.raises(SpecInvalid, match="only a job that runs"):
        probe(asked)


def test_inspect_cost_prints_one_json_object(capsys):
    assert main(["inspect", "cost", request("supervised").model_dump_json()]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] and printed["facts"]["stages"].keys() == {"student"}
