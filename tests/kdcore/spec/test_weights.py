"""What every loss weighs, where a spec does not say."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from kdcore.catalog import METHODS
from kdcore.spec import weights
from kdcore.spec.methods import NAMES, Method


def methods(*given: Any) -> tuple[Method, ...]:
    return tuple(TypeAdapter(Method).validate_python(one) for one in given)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_alone_has_the_weights_of_its_page(name: str):
    page, alone = METHODS[name], methods(name)
    assert weights.alpha(alone) == page.alpha
    assert weights.beta(alone) == page.beta
    assert weights.temperature(alone) == page.temperature
    assert weights.uses_temperature(alone[0]) == (page.temperature is not None)


@pytest.mark.parametrize(
    ("method", "alpha", "beta", "temperature"),
    [
        ({"name": "kd", "standardize": True}, 0.1, 9.0, 2.0),
        ({"name": "dkd", "standardize": True}, 1.0, 1.0, 4.0),
        ({"name": "kd", "form": "logits_l2"}, 0.1, 0.9, None),
        ({"name": "fitnet", "stages": "two"}, 0.1, 0.9, 4.0),
        ({"name": "attention", "reduction": "norms"}, 1.0, 10.0, None),
        ({"name": "attention", "mapping": "gradient"}, 1.0, 1.0, None),
        ({"name": "cc", "form": "gaussian"}, 1.0, 1.0, None),
    ],
    ids=str,
)
def test_a_variant_has_weights_of_its_own(method, alpha, beta, temperature):
    alone = methods(method)
    assert (weights.alpha(alone), weights.beta(alone), weights.temperature(alone)) == (alpha, beta, temperature)


def test_in_a_sum_each_method_brings_its_own_beta_as_its_weight():
    several = methods("attention", {"name": "kd", "weight": 0.5}, "crd")
    assert [method.weight for method in weights.weigh(several)] == [1000, 0.5, 0.8]
    assert (weights.alpha(several), weights.beta(several), weights.temperature(several)) == (1.0, 1.0, 4.0)


def test_a_list_of_one_is_that_one():
    """Its weight is beta's business, unless it is given one: then beta is out of the way."""
    assert weights.weigh(methods("kd")) == methods("kd") and weights.beta(methods("kd")) == 0.9
    weighed = methods({"name": "kd", "weight": 0.5})
    assert weights.weigh(weighed) == weighed and weights.beta(weighed) == 1.0


def test_the_temperature_is_that_of_the_first_method_that_has_one():
    assert weights.temperature(methods("sp", "dml", "kd")) == 1.0
    assert weights.temperature(methods("sp", "crd")) is None


@pytest.mark.parametrize(
    ("method", "staged", "labels_alone"),
    [
        ("fitnet", False, False),
        ({"name": "fitnet", "stages": "two"}, True, False),
        ("factor_transfer", True, False),
        ("activation_boundary", True, True),
        ("fsp", True, True),
        ("ofd", False, False),
    ],
    ids=str,
)
def test_some_methods_teach_something_before_the_labels_are_seen(method, staged, labels_alone):
    (one,) = methods(method)
    assert (weights.is_staged(one), weights.leaves_labels_alone(one)) == (staged, labels_alone)
