"""What the catalogue says of each method, held against its options and against what the engine teaches."""

from typing import get_args

import pytest

from kdcore.catalog import METHODS, MethodFacts
from kdcore.objectives import TAUGHT
from kdcore.spec.methods import NAMES, Method, Options
from kdcore.spec.methods.base import OnLogits

OPTIONS: dict[str, type[Options]] = {one.model_fields["name"].default: one for one in get_args(get_args(Method)[0])}

TAUGHT_BY_ITSELF = ("alone", "mutual", "ensemble", "exits")

NEEDS = {
    "none": set(),
    "embedding": {"embedding"},
    "last_stage": {"maps"},
    "middle_stage": {"maps"},
    "stages": {"maps"},
    "flows": {"maps"},
    "preactivations": {"preactivations"},
    "margins": {"preactivations", "batch_norm"},
    "review": {"maps", "embedding"},
}
"""What is looked at, by the places that are taken where a job names none."""


def test_a_page_stands_under_its_own_name():
    assert all(facts.name == name for name, facts in METHODS.items())
    assert set(METHODS) == set(NAMES) == {"supervised", *TAUGHT}


@pytest.mark.parametrize("facts", METHODS.values(), ids=METHODS)
def test_a_page_agrees_with_itself_and_with_the_options(facts: MethodFacts):
    on_logits = issubclass(OPTIONS[facts.name], OnLogits)
    assert (facts.teacher == "none") == (facts.scheme in TAUGHT_BY_ITSELF)
    assert (facts.beta is None) == (facts.scheme == "alone")
    assert (facts.temperature is not None) == (on_logits or facts.name == "byot")
    assert NEEDS[facts.taps] <= set(facts.needs)
    assert not on_logits or facts.taps == "none"
    assert facts.alpha > 0 and (facts.beta is None or facts.beta > 0)


@pytest.mark.parametrize("facts", METHODS.values(), ids=METHODS)
def test_a_page_says_whose_its_defaults_are_and_cites_its_paper(facts: MethodFacts):
    assert any(source in facts.defaults_from for source in ("code", "paper", "others report", "timm"))
    known = ("arXiv:", "CVPR 2017", "none: the reference")
    assert any(part in facts.paper for part in known)
    assert all((facts.title, facts.matches, facts.owns, facts.cost))


@pytest.mark.parametrize(
    ("name", "alpha", "beta", "temperature"),
    [
        ("kd", 0.1, 0.9, 4),
        ("dkd", 1, 1, 4),
        ("fitnet", 1, 100, None),
        ("attention", 1, 1000, None),
        ("nst", 1, 50, None),
        ("vid", 1, 1, None),
        ("rkd", 1, 1, None),
        ("sp", 1, 3000, None),
        ("pkt", 1, 30000, None),
        ("cc", 1, 0.02, None),
        ("crd", 1, 0.8, None),
    ],
)
def test_defaults_of_crds_code_are_those_of_its_table(name, alpha, beta, temperature):
    facts = METHODS[name]
    assert (facts.alpha, facts.beta, facts.temperature) == (alpha, beta, temperature)
    assert name == "dkd" or "CRD's code" in facts.defaults_from


def test_what_was_not_read_in_the_authors_code_is_called_hearsay():
    assert "as others report" in METHODS["dist"].defaults_from and METHODS["dist"].beta == 2
    assert "gamma 3.5, T 3" in METHODS["nkd"].defaults_from
    assert all("is ours" in METHODS[name].defaults_from for name in ("feature", "cc"))
    assert "are ours" in METHODS["attention"].defaults_from


def test_who_trains_parts_of_its_own_says_so():
    owners = "fitnet factor_transfer activation_boundary feature vid ofd reviewkd cc crd dml one byot born_again"
    bare = "supervised kd dkd nkd dist attention nst fsp rkd sp pkt"
    assert all(METHODS[name].owns != "nothing" for name in owners.split())
    assert all(METHODS[name].owns == "nothing" for name in bare.split())


def test_who_needs_maps_says_so():
    takes = {name: facts.takes for name, facts in METHODS.items()}
    on_maps = "attention nst factor_transfer activation_boundary fsp vid ofd"
    assert all(takes[name] == "maps" for name in on_maps.split())
    assert all(takes[name] == "maps_or_vectors" for name in ("fitnet", "feature", "reviewkd"))
    assert all(takes[name] == "anything" for name in ("kd", "sp", "rkd", "pkt", "cc", "crd"))
