"""The options of every method, whatever it is called."""

from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from kdcore.catalog import METHODS
from kdcore.spec.methods import NAMES, Method, Options, Pair
from kdcore.spec.methods.base import OnLogits, TapPath
from kdcore.spec.tapping import looks_inside

CLASSES: dict[str, type[Options]] = {one.model_fields["name"].default: one for one in get_args(get_args(Method)[0])}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_all_that_a_method_needs(name: str):
    options = CLASSES[name]()
    assert options == TypeAdapter(Method).validate_python(name) == TypeAdapter(Method).validate_python({"name": name})
    assert options.weight is None and options.pairs == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_options_cites_its_paper(name: str):
    """What the schema of a method says first is what its catalogue page cites: the first author and the year."""
    docstring = CLASSES[name].__doc__ or ""
    paper = METHODS[name].paper
    if paper.startswith(("none", "the plainest")):
        return
    assert (
        docstring.split(" et al.")[0].split(",")[0].split(" & ")[0]
        == paper.split(",")[0].split(" et al.")[0].split(" & ")[0]
    )
    year = next(word.strip(",.") for word in paper.split() if word.strip(",.").isdigit())
    assert year in docstring


@pytest.mark.parametrize("name", NAMES)
def test_what_has_taps_can_be_told_where_to_look(name: str):
    options = CLASSES[name]()
    pair = Pair(student="layer1", teacher="layer2@nhwc")
    has_taps = METHODS[name].taps != "none"
    assert has_taps == bool({"tap", "taps"} & set(CLASSES[name].model_fields)) == looks_inside(options)
    if has_taps:
        assert options.at((pair,)).pairs == (pair,)
        assert not isinstance(options, OnLogits)


def test_a_plain_path_is_the_same_on_both_sides():
    (both,) = TypeAdapter(Method).validate_python({"name": "attention", "taps": ["layer1"]}).pairs
    assert both == Pair(student="layer1", teacher="layer1")


@pytest.mark.parametrize("path", ["layer1", "fc@in", "features.1@nhwc", "blocks.3@tokens", "layer4.0.bn_2"])
def test_paths_are_module_paths_and_where_to_look_there(path: str):
    assert TypeAdapter(TapPath).validate_python(path) == path


@pytest.mark.parametrize("path", ["", "layer 1", "fc@out", "a@in@in", "../etc", "x" * 201])
def test_what_is_no_module_path_is_refused(path: str):
    with pytest.raises(ValidationError):
        TypeAdapter(TapPath).validate_python(path)
