from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcore.classifier import FrozenTeacher
from kdcore.lesson import Teacher
from kdcore.prepare import PreparedJob, prepare
from kdcore.run import TrialSetup, untrained
from kdcore.schemes.ensemble import NativeEnsemble
from kdcore.schemes.exits import Exits
from kdcore.schemes.mutual import Mutual
from kdcore.schemes.offline import Alone, Offline, Preparation
from kdcore.spec import GIVEN, METHODS, JobSpec, Trial
from kdcore.training import Observer
from tests.kdcore.engine import copied, job, method_job, same, workspace, write_arrays, write_pool, write_teacher
from tests.kdcore.tiny import changed, values

SILENT = Observer(metric=lambda *_: None, after_step=lambda _: None)
TWO_HINTS = {"name": "fitnet", "stages": "two"}
VARIANTS = {
    "fitnet in two stages": TWO_HINTS,
    "attention by gradient": {"name": "attention", "mapping": "gradient"},
    "two first stages and a sum": [
        {"name": "kd"}, {"name": "factor_transfer"}, {"name": "activation_boundary"}, {"name": "attention"}
    ],
}  # fmt: skip
# What a first stage does not reach: what comes after the deepest place that it compares.
BEYOND = {
    "student/fitnet": ("layer3", "fc"),
    "student/activation_boundary": ("fc",),
    "student/fsp": ("fc",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    write_arrays(folder / "data.npz")
    write_pool(folder / "pool.npz")
    write_teacher(folder / "convnet4.safetensors", "convnet4")
    write_teacher(folder / "convnet8.safetensors", "convnet8")
    return folder


def built(spec: JobSpec, folder: Path) -> PreparedJob:
    where, _ = workspace(folder / "run", folder / "cache")
    return prepare(spec, where)


def distilling(folder: Path, **fields: Any) -> PreparedJob:
    return built(job(folder / "data.npz", folder / "convnet8.safetensors", **fields), folder)


def without_teacher(folder: Path, **fields: Any) -> PreparedJob:
    return built(job(folder / "data.npz", **fields), folder)


def teacher_of(trial: Trial, prepared: PreparedJob) -> Teacher | None:
    """The one that is given; for a link of a chain, any network in the place of the link before."""
    if trial.taught_by is None or trial.taught_by == GIVEN:
        return prepared.teacher if trial.taught_by == GIVEN else None
    return FrozenTeacher(prepared.student(prepared.spec.students[0]))


def setups(prepared: PreparedJob) -> Iterator[TrialSetup]:
    for trial in prepared.trials:
        yield TrialSetup(trial, prepared, teacher_of(trial, prepared))


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_trial_setup_two_steps_of_each_stage_change_what_it_trains_and_nothing_else(name, folder):
    method = {"method": VARIANTS[name]} if name in VARIANTS else {}
    # FSP compares channel with channel.
    teacher = folder / ("convnet4.safetensors" if name == "fsp" else "convnet8.safetensors")
    recipe = {"epochs": 1, "batch_size": 54}
    given = method_job("kd" if method else name, folder / "data.npz", teacher, **method, training=recipe)
    for setup in setups(built(given, folder)):
        frozen = copied(setup.teacher.state_dict()) if setup.teacher is not None else {}
        for number, stage in enumerate(setup.trial.stages):
            two_steps(setup, number, stage.name)
        assert setup.teacher is None or same(setup.teacher.state_dict(), frozen)


def two_steps(setup: TrialSetup, number: int, stage: str) -> None:
    training = setup.training(number, SILENT)
    objective = training.objective or nn.Module()
    learned, owned, buffers = values(training.learners), values(objective), copied(dict(objective.named_buffers()))
    students = [values(student) for student in setup.students]
    training.run()

    beyond = BEYOND.get(stage, ())
    expected = {path for path in learned if not path.removeprefix("0.network.").startswith(beyond)}
    assert changed(training.learners, learned) == expected
    assert changed(objective, owned) == {path for path, value in objective.named_parameters() if value.requires_grad}
    if isinstance(training.scheme, Preparation):
        assert not any(changed(*pair) for pair in zip(setup.students, students, strict=True))
    for path, buffer in objective.named_buffers():
        assert buffer.isfinite().all() and buffer.shape == buffers[path].shape


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("supervised", [Alone]),
        ("kd", [Offline]),
        ("crd", [Offline]),
        ("factor_transfer", [Preparation, Offline]),
        ("activation_boundary", [Offline, Offline]),
        ("dml", [Mutual]),
        ("one", [NativeEnsemble]),
        ("byot", [Exits]),
    ],
)
def test_trial_setup_each_stage_has_the_scheme_of_its_method(name, kinds, folder):
    prepared = built(method_job(name, folder / "data.npz", folder / "convnet8.safetensors"), folder)
    (setup,) = setups(prepared)
    assert [type(setup.training(number, SILENT).scheme) for number in range(len(kinds))] == kinds
    assert len(setup.trial.stages) == len(kinds)


def weights(prepared: PreparedJob) -> list[tuple[str, int, float, float, float]]:
    """Name, epochs, alpha, beta and smoothing of the student's stages."""
    setup = next(setup for setup in setups(prepared) if setup.trial.name == "student")
    found = []
    for number, stage in enumerate(setup.trial.stages):
        training = setup.training(number, SILENT)
        found.append((stage.name, training.epochs, training.alpha, training.beta, training.smoothing))
    return found


SMOOTH = {"epochs": 4, "label_smoothing": 0.1}


def test_trial_setup_one_stage_weighs_labels_by_alpha_and_its_objective_by_beta(folder):
    assert weights(distilling(folder, method="kd", alpha=0.3, beta=0.7, training=SMOOTH)) == [
        ("student", 4, 0.3, 0.7, 0.1)
    ]


def test_trial_setup_what_is_learned_before_the_labels_only_is_weighed_by_beta(folder):
    method = {"name": "activation_boundary", "pretraining_epochs": 2}
    first, last = weights(distilling(folder, method=method, alpha=0.5, beta=3, training=SMOOTH))
    assert first == ("student/activation_boundary", 2, 0.0, 3.0, 0.0)
    assert (last[0], last[1], last[2], last[4]) == ("student", 4, 0.5, 0.1)


@pytest.mark.parametrize("method", [TWO_HINTS, {"name": "factor_transfer"}], ids=["fitnet", "factor_transfer"])
def test_trial_setup_where_beta_belongs_to_the_last_stage_the_first_has_weight_one(method, folder):
    first, last = weights(distilling(folder, method={**method, "pretraining_epochs": 1}, alpha=0.5, beta=3))
    assert first == (f"student/{method['name']}", 1, 0.0, 1.0, 0.0)
    assert last == ("student", 2, 0.5, 3.0, 0.0)


def test_trial_setup_in_a_sum_the_first_stage_has_beta_times_its_own_weight(folder):
    method = [{"name": "kd", "weight": 0.9}, {"name": "activation_boundary", "weight": 5}]
    first, last = weights(distilling(folder, method=method, alpha=0.1, beta=2))
    assert first[:4] == ("student/activation_boundary", 1, 0.0, 10.0)
    assert last == ("student", 2, 0.1, 2.0, 0.0)


def test_trial_setup_labels_alone_weigh_alpha_where_they_are_all_and_one_in_a_baseline(folder):
    assert weights(without_teacher(folder, alpha=0.5)) == [("student", 2, 0.5, 0.0, 0.0)]
    distilled = distilling(folder, method="kd", alpha=0.1, baseline="train", training=SMOOTH)
    alone = next(setup for setup in setups(distilled) if setup.trial.name == "alone")
    training = alone.training(0, SILENT)
    assert (training.alpha, training.beta, training.objective, training.smoothing) == (1.0, 0.0, None, 0.1)


def test_trial_setup_student_and_baseline_begin_as_the_same_network_and_see_the_same_images(folder):
    student, alone = setups(distilling(folder, method="crd", baseline="train"))
    assert same(student.students[0].state_dict(), alone.students[0].state_dict())
    assert student.training(0, SILENT).recipe == alone.training(0, SILENT).recipe
    assert torch.equal(student.training_set.rows, alone.training_set.rows)


def test_trial_setup_every_generation_is_a_fresh_start_with_a_seed_of_its_own_and_one_held_out_part(folder):
    first, second = setups(without_teacher(folder, method={"name": "born_again", "generations": 2}))
    assert not same(first.students[0].state_dict(), second.students[0].state_dict())
    assert [setup.training(0, SILENT).recipe.seed for setup in (first, second)] == [0, 1]
    assert torch.equal(first.training_set.rows, second.training_set.rows)
    assert torch.equal(first.training_set.held_out.pixels, second.training_set.held_out.pixels)
    again = without_teacher(folder, training={"seed": 1})
    (plain,) = setups(again)
    assert same(plain.students[0].state_dict(), second.students[0].state_dict())


def test_trial_setup_peers_and_branches_begin_differently(folder):
    (dml,) = setups(without_teacher(folder, method="dml", student=["convnet4"] * 2))
    assert not same(dml.students[0].state_dict(), dml.students[1].state_dict())
    (one,) = setups(without_teacher(folder, method={"name": "one", "branches": 4}))
    assert len(one.students) == 4
    heads = [student.network.fc.weight for student in one.students]
    assert not torch.equal(heads[0], heads[1])


def test_trial_setup_a_later_stage_begins_the_same_whatever_ran_before_it_in_the_process(folder):
    """As it does when a job is taken up between its stages."""
    built = distilling(folder, method="factor_transfer")
    translators = []
    for draws in (0, 7):
        (setup,) = setups(built)
        setup.training(0, SILENT)
        torch.rand(draws)
        translators.append(copied(setup.training(1, SILENT).objective.translator.state_dict()))
    assert same(*translators)


def test_run_the_second_stage_holds_the_paraphraser_of_the_first_and_leaves_it_alone(folder):
    (setup,) = setups(distilling(folder, method="factor_transfer"))
    first = setup.training(0, SILENT)
    first.run()
    learned = copied(first.objective.paraphraser.state_dict())
    second = setup.training(1, SILENT)
    assert same(second.objective.paraphraser.state_dict(), learned)
    second.run()
    assert same(second.objective.paraphraser.state_dict(), learned)


@pytest.mark.parametrize(("labels", "answers"), [("teacher", True), ("none", False)])
def test_trial_setup_the_teacher_answers_for_unlabelled_images_where_it_is_asked_to(labels, answers, folder):
    pool = {"source": f"file:{folder / 'pool.npz'}", "labels": labels}
    student, alone = setups(distilling(folder, method="kd", unlabelled=pool, baseline="train"))
    assert student.training(0, SILENT).scheme.answers is answers
    assert len(student.training_set.rows) == 108 + 60 and len(alone.training_set.rows) == 108
    assert (alone.training_set.images.labels >= 0).all()
    assert (student.training_set.held_out.labels >= 0).all() and len(student.training_set.held_out) == 12


def test_trial_setup_the_first_stage_too_is_answered_by_the_teacher(folder):
    pool = {"source": f"file:{folder / 'pool.npz'}", "labelled_too": False}
    (setup,) = setups(distilling(folder, method=TWO_HINTS, unlabelled=pool))
    schemes = [setup.training(number, SILENT).scheme for number in range(2)]
    assert [scheme.answers for scheme in schemes] == [True, True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kd", ["student"]),
        ("dml", ["student", "student-2"]),
        ("one", ["student", "ensemble"]),
        ("byot", ["student", "exit-1", "exit-2"]),
    ],
)
def test_run_the_models_of_a_trial_take_the_weights_that_its_training_leaves(name, expected, folder):
    spec = method_job(name, folder / "data.npz", folder / "convnet8.safetensors", training={"epochs": 1})
    prepared = built(spec, folder)
    (setup,) = setups(prepared)
    outcomes = setup.training(0, SILENT).run()
    empty = untrained(setup.trial, prepared)
    assert list(outcomes) == list(empty) == expected
    for model, outcome in outcomes.items():
        empty[model].network.load_state_dict(outcome.best, strict=True)
