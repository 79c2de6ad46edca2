"""Which outputs of a teacher answer which class of the data: by a map, by names, by ImageNet's; and the refusals."""

from importlib.util import find_spec

import pytest

from kdcore.catalog import imagenet, named_facts
from kdcore.spec import fit_evaluation, parse, parse_evaluation, resolve, resolve_evaluation, spec_warnings
from kdcore.spec.classes import class_order, class_outputs
from kdcore.spec.inputs import Teacher
from tests.kdcore.spec.specs import DATA, TEACHER, body, fit_faults, known, resolved

FIVE = TEACHER.model_copy(update={"num_classes": 5, "class_names": ["v", "A", "w_x", "c", "b"]})
BARE = TEACHER.model_copy(update={"num_classes": 5})
NORMALIZED = {"mean": [0.5] * 3, "std": [0.5] * 3}


def mapped(class_map, **more):
    return {"checkpoint": "model:big", "class_map": class_map, **more}


def test_class_order_gives_the_output_of_each_class():
    assert class_order(["c", "a", "b"], DATA) == (1, 2, 0)
    assert class_order(["a", "b", "c"], DATA) is None
    assert class_order(None, DATA) is None
    assert class_order(["a", "b", "x"], DATA) is None, "other names are in no order"


@pytest.mark.parametrize(
    ("network", "class_map", "outputs"),
    [
        (FIVE, {"a": "A", "b": "b", "c": ["c", "v"]}, [[1], [4], [3, 0]]),
        (FIVE, {"c": "W x", "a": 0, "b": ["a"]}, [[0], [1], [2]]),  # Case, underscores; numbers beside names.
        (BARE, {"a": 4, "b": [0, 2], "c": 1}, [[4], [0, 2], [1]]),
    ],
)
def test_resolve_writes_a_map_as_numbers_in_the_datas_order(network, class_map, outputs):
    assert fit_faults(network=network, teacher=mapped(class_map)) == []
    spec = resolved(network=network, teacher=mapped(class_map))
    written = spec.as_json()["teacher"]
    assert (list(written["class_map"]), list(written["class_map"].values())) == (["a", "b", "c"], outputs)
    assert written["class_names"] is None
    facts = known(body(), BARE)  # The engine's file may not say what was registered.
    assert resolve(parse(spec.as_json()), facts) == spec


@pytest.mark.parametrize(
    ("network", "class_map", "pointer", "said"),
    [
        (FIVE, {"a": "A", "b": "b"}, "", "1 of 3 classes of the data set have no output, first 'c'"),
        (FIVE, {"a": "A", "b": "b", "c": "cc"}, "/c", "the teacher has no class 'cc'; did you mean 'c'?"),
        (FIVE, {"a": "A", "b": "b", "cat/1": "c"}, "/cat~11", "the data set has no class 'cat/1'"),
        (FIVE, {"a": "A", "b": "b", "c": 5}, "/c", "the teacher has no output 5: it has 5, counted from 0"),
        (FIVE, {"a": "A", "b": "b", "c": ["c", 4]}, "/c", "output 4 answers 'b' already, and can answer one class"),
        (FIVE, {"a": "A", "b": "b", "c": "b"}, "/c", "output 4 ('b') answers 'b' already"),
        (FIVE, {"a": "A", "b": "b", "B": "c", "c": "v"}, "/B", "the class 'b' is in the map twice"),
        (BARE, {"a": 1, "b": 2, "c": "c"}, "/c", "the names of the teacher's classes are not known: give an output's"),
    ],
)
def test_fit_refuses_a_map_at_the_class_that_is_wrong(network, class_map, pointer, said):
    ((at, code, text),) = fit_faults(network=network, teacher=mapped(class_map))
    assert (at, code) == (f"/teacher/class_map{pointer}", "teacher_mismatch") and text.startswith(said)


def test_fit_tells_at_most_a_number_of_faults_of_one_map():
    wrong = {f"class {number}": f"name {number}" for number in range(1000)}
    assert 20 <= len(fit_faults(network=FIVE, teacher=mapped(wrong))) <= 22


@pytest.mark.parametrize("bad", [{"a": True, "b": 1}, {"a": -1, "b": 1}, {"a": [], "b": 1}, {"a": 1.5, "b": 1}])
def test_a_map_of_other_values_is_no_spec(bad):
    with pytest.raises(Exception, match="class_map"):
        parse(body(teacher=mapped(bad)))


def test_a_map_is_found_by_the_names_if_each_class_has_one_and_a_warning_says_so():
    spec = body()
    facts = known(spec, FIVE.model_copy(update=NORMALIZED))
    assert fit_faults(network=FIVE) == []
    (warning,) = spec_warnings(parse(spec), facts)
    assert (warning.code, warning.pointer) == ("class_map_found", "/teacher/class_map")
    assert warning.hint is not None and '{"a": 1, "b": 4, "c": 3}' in warning.hint
    assert resolve(parse(spec), facts).as_json()["teacher"]["class_map"] == {"a": [1], "b": [4], "c": [3]}
    (fault,) = fit_faults(network=FIVE.model_copy(update={"class_names": ["a", "b", "x", "y", "z"]}))
    assert "1 of 3 classes have no one output of their name, first 'c'" in fault[2]


def test_numbers_as_names_are_never_matched_between_different_sets():
    """Class 3 of ten digits is not class 3 of a hundred things."""
    digits = DATA.model_copy(update={"class_names": ["0", "1", "2"]})
    hundred = TEACHER.model_copy(update={"num_classes": 100, "class_names": [str(one) for one in range(100)]})
    assert class_outputs(Teacher(checkpoint="model:big"), hundred, digits) is None
    assert len(fit_faults(network=hundred, more={"dataset": digits})) == 1


def test_methods_without_logits_accept_a_teacher_of_other_classes():
    assert fit_faults(network=FIVE.model_copy(update={"class_names": list("vwxyz")}), method="rkd") == []
    assert fit_faults(network=BARE, method={"name": "fitnet", "tap": "layer2"}) == []
    assert len(fit_faults(network=BARE, method=["kd", "rkd"])) == 1
    answered = {"unlabelled": {"source": "theirs"}, "method": "rkd"}  # Its answers become labels.
    assert len(fit_faults(network=BARE, **answered)) == 1
    assert len(fit_faults(network=BARE, method={"name": "attention", "mapping": "gradient"})) == 1


# ImageNet: the places of Imagenette's ten classes among the 1,000 are published (Howard 2019).

with_timm = pytest.mark.skipif(find_spec("timm") is None, reason="ImageNet's names are read from timm's files")
PLACES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
NUMBERS = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413", "n03445777",
    "n03888257",
)  # fmt: skip
NETTE = named_facts("imagenette")
THOUSAND = TEACHER.model_copy(update={"num_classes": 1000})


@with_timm
@pytest.mark.parametrize("names", [NETTE.class_names, NUMBERS, [f"{one}-x y" for one in NUMBERS]])
@pytest.mark.parametrize("own", ["none", "numbers", "lemmas"])
def test_imagenets_classes_are_found_by_their_names_and_wordnets_numbers(names, own):
    synonyms = imagenet.synonyms()
    assert len(synonyms) == 1000 and synonyms[0] == {"n01440764", "tench", "Tinca tinca", "tench, Tinca tinca"}
    listed = {
        "none": None,
        "numbers": [next(one for one in each if one[1:].isdigit()) for each in synonyms],
        "lemmas": [max(each, key=len) for each in synonyms],
    }[own]
    data = NETTE.model_copy(update={"class_names": list(names)})
    found = class_outputs(Teacher(checkpoint="model:big"), THOUSAND.model_copy(update={"class_names": listed}), data)
    assert found is not None and tuple(place for (place,) in found.outputs) == PLACES
    assert found.by == "imagenet's order" if own == "none" else found.by in ("names", "imagenet")


@with_timm
def test_imagenets_order_is_taken_for_unknown_names_with_a_warning():
    spec = body()
    facts = known(spec, THOUSAND.model_copy(update=NORMALIZED), dataset=NETTE)
    codes = {one.code: one for one in spec_warnings(parse(spec), facts)}
    assert "taken to be ImageNet's in their usual order" in codes["class_map_found"].message


@with_timm
def test_a_name_of_two_of_imagenets_classes_is_refused_with_both():
    """A crane is a bird (134) and a machine (517)."""
    assert sum("crane" in names for names in imagenet.synonyms()) == 2
    class_map = {"a": "crane", "b": "n02012849_bird", "c": "tench"}
    ((pointer, _, text),) = fit_faults(network=THOUSAND, teacher=mapped(class_map))
    assert pointer == "/teacher/class_map/a" and "may be the teacher's output 134 or 517: give the number" in text


def test_evaluations_take_a_map_and_resolve_it():
    spec = parse_evaluation({"model": mapped({"a": 4, "b": [0, 2], "c": 1}), "dataset": {"source": "mine"}})
    assert fit_evaluation(spec, BARE, DATA) == []
    written = resolve_evaluation(spec, BARE, DATA).as_json()["model"]["class_map"]
    assert written == {"a": [4], "b": [0, 2], "c": [1]}
    bare = parse_evaluation({"model": {"checkpoint": "model:big"}, "dataset": {"source": "mine"}})
    (fault,) = fit_evaluation(bare, BARE, DATA)
    assert fault.pointer == "/model/checkpoint" and "class_map" in fault.message


def test_without_timm_only_a_teachers_own_names_are_known(monkeypatch):
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    assert imagenet.synonyms.__wrapped__() == ()
