"""Jobs of several methods at once, and jobs on unlabelled images."""

import json

import pytest

from kdcore.run import run
from tests.kdcore.engine import events, job, workspace, write_arrays, write_pool, write_teacher

KD, ATTENTION = {"name": "kd"}, {"name": "attention"}
TWO_HINTS = {"name": "fitnet", "stages": "two"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    write_arrays(folder / "data.npz")
    write_pool(folder / "pool.npz")
    write_teacher(folder / "teacher.safetensors", "convnet4")
    return folder


def points(folder, out, **fields) -> list[dict]:
    """The metric lines of a job; their values of the training alone."""
    where, stream = workspace(out, folder / "cache")
    run(job(folder / "data.npz", folder / "teacher.safetensors", **fields), where)
    return events(stream, "metric")


def train_values(point: dict) -> dict:
    return {name.removeprefix("train/"): value for name, value in point["values"].items() if name.startswith("train/")}


def test_run_a_sum_weighs_each_method_and_beta_weighs_the_sum(folder, tmp_path):
    method = [{**KD, "weight": 0.9}, {**ATTENTION, "weight": 1000}]
    for point in points(folder, tmp_path, method=method, alpha=0.5, beta=2):
        values = train_values(point)
        by_hand = 0.9 * values["kd"] + 1000 * values["attention"]
        assert values["distillation_loss"] == pytest.approx(by_hand, rel=1e-5)
        assert values["loss"] == pytest.approx(0.5 * values["label_loss"] + 2 * by_hand, rel=1e-5)


def test_run_a_method_of_a_sum_weighs_what_it_weighs_alone(folder, tmp_path):
    """kd 0.9, attention 1000, labels kd's 0.1, and beta 1."""
    (point, _) = points(folder, tmp_path, method=[KD, ATTENTION])
    values = train_values(point)
    distillation = 0.9 * values["kd"] + 1000 * values["attention"]
    assert values["loss"] == pytest.approx(0.1 * values["label_loss"] + distillation, rel=1e-5)


def test_run_figures_that_members_observe_are_told_beside_their_values(folder, tmp_path):
    (point, _) = points(folder, tmp_path, method=[KD, {"name": "rkd"}])
    assert {"kd", "rkd", "rkd/distance", "rkd/angle"} <= train_values(point).keys()


@pytest.mark.parametrize("first", ["activation_boundary", "fsp"])
def test_run_what_only_comes_first_is_taught_alone_and_the_rest_beside_the_labels(first, folder, tmp_path):
    method = [{**KD, "weight": 0.5}, {"name": first, "weight": 3}]
    before, *after = points(folder, tmp_path, method=method, alpha=1, beta=2)
    assert before["trial"] == f"student/{first}" and {point["trial"] for point in after} == {"student"}
    values = train_values(before)
    assert values["loss"] == pytest.approx(2 * 3 * values["distillation_loss"], rel=1e-5) and "kd" not in values
    for point in after:
        values = train_values(point)
        assert first not in values
        assert values["distillation_loss"] == pytest.approx(0.5 * values["kd"], rel=1e-5)
        assert values["loss"] == pytest.approx(values["label_loss"] + 2 * 0.5 * values["kd"], rel=1e-5)


def test_run_hints_in_two_stages_come_first_and_end_as_kd_beside_the_others(folder, tmp_path):
    before, *after = points(folder, tmp_path, method=[TWO_HINTS, ATTENTION])
    assert before["trial"] == "student/fitnet"
    assert train_values(before)["loss"] == train_values(before)["distillation_loss"]
    for point in after:
        values = train_values(point)
        assert values["distillation_loss"] == pytest.approx(
            0.9 * values["fitnet"] + 1000 * values["attention"], rel=1e-5
        )


def test_run_several_first_stages_follow_each_other_in_the_order_of_the_list(folder, tmp_path):
    method = [{"name": "factor_transfer"}, {"name": "fsp"}, KD, {"name": "activation_boundary"}]
    trials = [point["trial"] for point in points(folder, tmp_path, method=method)]
    first = ["student/factor_transfer", "student/fsp", "student/activation_boundary"]
    assert trials == [*first, "student", "student"]


def test_run_two_methods_of_one_name_are_told_apart(folder, tmp_path):
    """Hints at two places, each in two stages."""
    method = [{**TWO_HINTS, "tap": "layer1"}, {**TWO_HINTS, "tap": "layer2"}]
    found = points(folder, tmp_path, method=method)
    assert [point["trial"] for point in found] == ["student/fitnet", "student/fitnet-2", "student", "student"]
    assert {"fitnet", "fitnet-2"} <= train_values(found[-1]).keys()


def unlabelled(folder, out, method="kd", baseline="none", **fields) -> list[dict]:
    """One epoch of batches of 30: the pool has 60 images, the data set 108 to train on."""
    pool = {"source": f"file:{folder / 'pool.npz'}", **fields}
    return points(folder, out, method=method, unlabelled=pool, baseline=baseline,
                  training={"epochs": 1, "batch_size": 30})  # fmt: skip


@pytest.mark.parametrize("labels", ["teacher", "none"])
@pytest.mark.parametrize(("labelled_too", "steps"), [(True, 168 // 30), (False, 60 // 30)])
def test_run_a_student_learns_from_the_pool_and_its_baseline_from_labels_alone(
    labels, labelled_too, steps, folder, tmp_path
):
    student, alone = unlabelled(folder, tmp_path, labels=labels, labelled_too=labelled_too, baseline="train")
    assert (student["trial"], student["step"]) == ("student", steps)
    assert (alone["trial"], alone["step"]) == ("alone", 108 // 30)
    graded = train_values(student)["label_loss"] > 0
    assert graded == (labels == "teacher" or labelled_too)
    assert train_values(student)["distillation_loss"] > 0 and train_values(alone)["label_loss"] > 0


def test_run_where_nobody_answers_nothing_is_graded(folder, tmp_path):
    (point,) = unlabelled(folder, tmp_path, labelled_too=False, labels="none")
    values = train_values(point)
    assert values["accuracy"] == values["label_loss"] == 0
    assert values["loss"] == pytest.approx(0.9 * values["distillation_loss"], rel=1e-5)


@pytest.mark.parametrize("method", [{"name": "crd", "negatives": 8}, {"name": "dkd"},
                                    {"name": "attention", "mapping": "gradient"}], ids=str)  # fmt: skip
def test_run_methods_that_look_at_labels_look_at_the_teachers_answers(method, folder, tmp_path):
    (point,) = unlabelled(folder, tmp_path, method=method, labelled_too=False)
    assert train_values(point)["loss"] > 0


def test_run_the_exported_spec_says_what_was_learned_from(folder, tmp_path):
    unlabelled(folder, tmp_path, labels="none")
    spec = json.loads((tmp_path / "spec.json").read_text())
    assert spec["unlabelled"]["labels"] == "none" and spec["unlabelled"]["labelled_too"] is True
