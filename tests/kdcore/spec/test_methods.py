"""Every method's class: facts, options, hooks, and its row in docs/methods.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from kdcore.catalog import architecture
from kdcore.objectives import OBJECTIVES, Objective, Setting, TwoStages
from kdcore.spec import METHODS, Method, Options, Pair
from kdcore.spec.methods import Networks, scheme_of
from kdcore.spec.methods.options import OnLogits, SchemeOptions
from kdcore.spec.vocabulary import TapPath
from tests.kdcore.spec.specs import resolved

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"
EACH_CLASS = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

TWO_STAGES = {"name": "fitnet", "stages": "two"}
BY_GRADIENT = {"name": "attention", "mapping": "gradient"}

SCHEMES_WITHOUT_TEACHER = ("alone", "mutual", "ensemble", "exits")
NEEDS_OF_TAPS = {
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


def options(given: Any) -> Options:
    read: Options = TypeAdapter(Method).validate_python(given)
    return read


@EACH_CLASS
def test_facts_agree_with_each_other_and_with_the_options(method: type[Options]):
    facts, on_logits = method.facts, issubclass(method, OnLogits)
    assert (facts.teacher == "none") == (facts.scheme in SCHEMES_WITHOUT_TEACHER)
    assert (facts.beta is None) == (facts.scheme == "alone")
    assert (facts.temperature is not None) == (on_logits or facts.scheme == "exits")
    assert NEEDS_OF_TAPS[facts.taps] <= set(facts.needs)
    assert not on_logits or facts.taps == "none"
    assert facts.alpha > 0 and (facts.beta is None or facts.beta > 0)


@EACH_CLASS
def test_facts_cite_the_paper_and_the_source_of_the_defaults(method: type[Options]):
    facts = method.facts
    assert any(source in facts.defaults_from for source in ("code", "paper", "others report", "timm"))
    assert any(part in facts.paper for part in ("arXiv:", "CVPR 2017", "none: the reference"))
    assert all((facts.title, facts.matches, facts.owns, facts.cost))


@EACH_CLASS
def test_facts_cite_the_same_paper_as_the_docstring(method: type[Options]):
    """The docstring is the description of the options' schema: first author and year are the same in both."""
    docstring, paper = method.__doc__ or "", method.facts.paper
    if paper.startswith(("none", "the simplest")):
        return
    assert _first_author(docstring) == _first_author(paper)
    year = next(word.strip(",.") for word in paper.split() if word.strip(",.").isdigit())
    assert year in docstring


def _first_author(text: str) -> str:
    return re.split(r" et al\.|,| & ", text, maxsplit=1)[0]


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
def test_facts_of_methods_in_crds_table_have_its_defaults(name, alpha, beta, temperature):
    facts = METHODS[name].facts
    assert (facts.alpha, facts.beta, facts.temperature) == (alpha, beta, temperature)
    assert name == "dkd" or "CRD's code" in facts.defaults_from


def test_facts_say_which_defaults_are_second_hand_or_ours():
    defaults_from = {name: method.facts.defaults_from for name, method in METHODS.items()}
    assert "as others report" in defaults_from["dist"] and METHODS["dist"].facts.beta == 2
    assert "gamma 3.5, T 3" in defaults_from["nkd"]
    assert all("is ours" in defaults_from[name] for name in ("feature", "cc"))
    assert "are ours" in defaults_from["attention"]


def test_facts_owns_is_nothing_for_a_loss_without_parameters():
    owners = "fitnet factor_transfer activation_boundary feature vid ofd reviewkd cc crd dml one byot born_again"
    bare = "supervised kd dkd nkd dist attention nst fsp rkd sp pkt"
    assert all(METHODS[name].facts.owns != "nothing" for name in owners.split())
    assert all(METHODS[name].facts.owns == "nothing" for name in bare.split())


def test_facts_takes_maps_where_the_loss_needs_places():
    takes = {name: method.facts.takes for name, method in METHODS.items()}
    on_maps = "attention nst factor_transfer activation_boundary fsp vid ofd"
    assert all(takes[name] == "maps" for name in on_maps.split())
    assert all(takes[name] == "maps_or_vectors" for name in ("fitnet", "feature", "reviewkd"))
    assert all(takes[name] == "anything" for name in ("kd", "sp", "rkd", "pkt", "cc", "crd"))
    assert options({"name": "fitnet", "regressor": "linear"}).takes == "anything"


@pytest.mark.parametrize("name", METHODS)
def test_method_is_read_from_its_name_alone(name: str):
    assert options(name) == options({"name": name}) == METHODS[name]()
    assert options(name).weight is None and options(name).pairs == ()


@pytest.mark.parametrize("name", METHODS)
def test_own_weights_of_plain_options_are_the_facts(name: str):
    facts, method = METHODS[name].facts, options(name)
    assert (method.defaults.alpha, method.own_beta, method.own_temperature) == (
        facts.alpha, facts.beta, facts.temperature,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "alpha", "beta", "temperature"),
    [
        ({"name": "kd", "standardize": True}, 0.1, 9.0, 2.0),
        ({"name": "dkd", "standardize": True}, 1.0, 1.0, 4.0),
        ({"name": "kd", "form": "logits_l2"}, 0.1, 0.9, None),
        (TWO_STAGES, 0.1, 0.9, 4.0),
        ({"name": "attention", "reduction": "norms"}, 1.0, 10.0, None),
        (BY_GRADIENT, 1.0, 1.0, None),
        ({"name": "cc", "form": "gaussian"}, 1.0, 1.0, None),
    ],
    ids=str,
)
def test_own_beta_and_own_temperature_depend_on_the_options(given, alpha, beta, temperature):
    method = options(given)
    assert (method.defaults.alpha, method.own_beta, method.own_temperature) == (alpha, beta, temperature)


@pytest.mark.parametrize(
    ("given", "taps", "gradient"),
    [
        ("kd", False, False),
        ("supervised", False, False),
        ("byot", False, False),
        ("attention", True, False),
        (BY_GRADIENT, False, True),
        ("crd", True, False),
    ],
    ids=str,
)
def test_looks_inside_means_compares_taps_or_compares_gradients(given, taps, gradient):
    method = options(given)
    assert (method.compares_taps, method.compares_gradients) == (taps, gradient)
    assert method.looks_inside == (taps or gradient)


@pytest.mark.parametrize("name", METHODS)
def test_at_sets_the_pairs_of_a_method_with_taps(name: str):
    method, pair = options(name), Pair(student="layer1", teacher="layer2@nhwc")
    has_taps = method.facts.taps != "none"
    assert has_taps == bool({"tap", "taps"} & set(METHODS[name].model_fields)) == method.looks_inside
    if has_taps:
        assert method.at((pair,)).pairs == (pair,)
        assert not isinstance(method, OnLogits)


@pytest.mark.parametrize("name", METHODS)
def test_named_places_are_fields_with_paths(name: str):
    """Of every place that the defaults name, the field exists and the paths are those of the resolved method."""
    resnet = architecture("resnet20")
    method = options(name).resolved(8, resnet, resnet)
    places = {(field, network): paths for field, network, paths in method.named_places() if paths}
    assert {field for field, _ in places} <= set(METHODS[name].model_fields)
    assert bool(places) == (method.compares_taps or name == "byot")
    assert not method.places_are_open or name == "byot"
    assert list(method.misfits(Networks(resnet, resnet, {}))) == []


@pytest.mark.parametrize(
    ("given", "trains_student", "then_labels_alone"),
    [
        ("fitnet", None, None),
        (TWO_STAGES, True, False),
        ("factor_transfer", False, False),
        ("activation_boundary", True, True),
        ("fsp", True, True),
        ("ofd", None, None),
    ],
    ids=str,
)
def test_first_stage_of_methods_that_have_one(given, trains_student, then_labels_alone):
    stage = options(given).first_stage
    if trains_student is None:
        assert stage is None
        return
    assert stage is not None and stage.epochs is None
    assert (stage.trains_student, stage.then_labels_alone) == (trains_student, then_labels_alone)


DISTILLING = [name for name, method in METHODS.items() if method.facts.beta is not None]


@pytest.mark.parametrize("given", [*DISTILLING, TWO_STAGES, BY_GRADIENT], ids=str)
def test_first_stage_agrees_with_the_page_of_the_method(given):
    """Two stages where the options have a first one; nothing beside the labels where they are alone."""
    none = torch.zeros(4, dtype=torch.int64)
    setting = Setting(temperature=4.0, num_classes=3, epochs=8, labels=none, rows=none)
    name = given if isinstance(given, str) else given["name"]
    needs_no_teacher = METHODS[name].facts.teacher == "none"
    students = ["resnet20", "resnet20"] if METHODS[name].facts.scheme == "mutual" else "resnet20"
    changes = {"teacher": None, "student": students} if needs_no_teacher else {}
    method = resolved(method=given, **changes).methods[0]
    options = method.loss_options
    made = OBJECTIVES[options.name](options, setting)
    assert isinstance(made, TwoStages) == (method.first_stage is not None)
    if isinstance(made, TwoStages):
        assert method.first_stage is not None and (made.then is None) == method.first_stage.then_labels_alone
    else:
        assert isinstance(made, Objective)


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ([], SchemeOptions("alone")),
        (["kd"], SchemeOptions("offline")),
        (["supervised", "kd"], SchemeOptions("offline")),
        (["attention", "dml"], SchemeOptions("mutual")),
        ([{"name": "one", "branches": 4, "rampup_epochs": 9}], SchemeOptions("ensemble", branches=4, rampup_epochs=9)),
        ([{"name": "byot", "exits": ["layer1"]}], SchemeOptions("exits", exits=("layer1",))),
        (["kd", {"name": "born_again", "generations": 2}], SchemeOptions("generations", generations=2)),
        (
            [{"name": "born_again", "answer": "ensemble"}],
            SchemeOptions("generations", generations=3, ensemble_is_result=True),
        ),
    ],
    ids=str,
)
def test_scheme_of_is_the_one_scheme_among_the_methods(given, scheme):
    assert scheme_of([options(one) for one in given]) == scheme


def test_tap_of_a_plain_path_is_the_same_on_both_sides():
    (both,) = options({"name": "attention", "taps": ["layer1"]}).pairs
    assert both == Pair(student="layer1", teacher="layer1")


@pytest.mark.parametrize("path", ["layer1", "fc@in", "features.1@nhwc", "blocks.3@tokens", "layer4.0.bn_2"])
def test_tap_path_is_a_module_path_and_a_place_in_it(path: str):
    assert TypeAdapter(TapPath).validate_python(path) == path


@pytest.mark.parametrize("path", ["", "layer 1", "fc@out", "a@in@in", "../etc", "x" * 201])
def test_tap_path_refuses_what_is_no_module_path(path: str):
    with pytest.raises(ValidationError):
        TypeAdapter(TapPath).validate_python(path)


def test_docs_table_is_what_the_classes_hold():
    """For a new method paste the row that the failure shows."""
    table = re.findall(r"^\| `\w+` \|.*$", DOCS.read_text(), re.M)
    rows = [docs_row(name, method) for name, method in sorted(METHODS.items(), key=_docs_order)]
    assert table == rows, "docs/methods.md lacks:\n" + "\n".join(row for row in rows if row not in table)


def docs_row(name: str, method: type[Options]) -> str:
    facts = method.facts
    weights = [f"{facts.alpha:g}", *([f"{facts.beta:g}"] if facts.beta is not None else [])]
    temperature = "" if facts.temperature is None else f", T {facts.temperature:g}"
    return f"| `{name}` | {facts.matches} | {facts.paper} | {' / '.join(weights)}{temperature} |"


def _docs_order(item: tuple[str, type[Options]]) -> int:
    """The families in the order of the docs; within a family the order of the classes."""
    return ("reference", "response", "features", "relations", "schemes").index(item[1].facts.family)
