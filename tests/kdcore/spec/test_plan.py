"""The plans of jobs, compared with plans that are written out here."""

from typing import Any

import pytest
import torch

from kdcore.classifier import Classifier
from kdcore.data.images import Images, TrainingSet
from kdcore.models import build
from kdcore.schemes.offline import Alone
from kdcore.spec import GIVEN, Stage, Unlabelled, numbered, trials
from kdcore.training import Observer, StageTraining
from tests.kdcore.spec.specs import DATA, POOL, resolved

NINE = {"training": {"epochs": 9, "batch_size": 100, "seed": 5}}
"""900 images are left to train on: nine steps an epoch."""


def planned(**changes: Any) -> list[tuple[str, list[str], str | None, list[str], int]]:
    """Name, students, teacher, methods and seed of each trial."""
    return [
        (
            trial.name,
            [student.architecture for student in trial.students],
            trial.taught_by,
            [method.name for method in trial.methods],
            trial.seed,
        )
        for trial in trials(resolved(**{**NINE, **changes}), DATA, POOL if "unlabelled" in changes else None)
    ]


def in_steps(**changes: Any) -> list[tuple[str, int, int]]:
    spec = resolved(**{**NINE, **changes})
    planned = trials(spec, DATA, POOL if "unlabelled" in changes else None)
    return [(stage.name, stage.epochs, stage.steps) for trial in planned for stage in trial.stages]


def test_trials_one_student_of_one_teacher():
    assert planned() == [("student", ["resnet20"], GIVEN, ["kd"], 5)]
    assert in_steps() == [("student", 9, 81)]


def test_trials_a_student_of_labels_alone():
    assert planned(method="supervised", teacher=None) == [("student", ["resnet20"], None, [], 5)]


def test_trials_a_baseline_comes_last_from_the_same_seed():
    assert planned(baseline="train")[1:] == [("alone", ["resnet20"], None, [], 5)]
    assert in_steps(baseline="train") == [("student", 9, 81), ("alone", 9, 81)]
    assert len(planned(baseline="job:job_1")) == 1


def test_trials_only_what_is_delivered_and_its_baseline_train_for_int8_in_their_last_stage():
    def aware(**changes: Any) -> dict[str, int]:
        planned = trials(resolved(**{**NINE, "quantization": {}, **changes}), DATA, None)
        return {stage.name: stage.aware_epochs for trial in planned for stage in trial.stages}

    assert aware(baseline="train", quantization={"aware": False}) == {"student": 0, "alone": 0}
    assert aware(baseline="train", method="fsp", seeds=2) == {
        "student/fsp": 0, "student": 1, "alone": 1, "student-seed-6/fsp": 0, "student-seed-6": 1, "alone-seed-6": 1,
    }  # fmt: skip
    assert aware(assistants=["resnet32"], quantization={"epochs": 4}) == {"assistant-1": 0, "student": 4}
    assert aware(method="born_again", teacher=None) == {"generation-1": 0, "generation-2": 0, "student": 1}


def test_trials_each_seed_is_a_run_of_student_and_baseline_and_assistants_are_trained_once():
    assert planned(baseline="train", assistants=["resnet32"], seeds=3) == [
        ("assistant-1", ["resnet32"], GIVEN, ["kd"], 5),
        ("student", ["resnet20"], "assistant-1", ["kd"], 5),
        ("alone", ["resnet20"], None, [], 5),
        ("student-seed-6", ["resnet20"], "assistant-1", ["kd"], 6),
        ("alone-seed-6", ["resnet20"], None, [], 6),
        ("student-seed-7", ["resnet20"], "assistant-1", ["kd"], 7),
        ("alone-seed-7", ["resnet20"], None, [], 7),
    ]


def test_trials_no_baseline_has_the_unlabelled_images_whatever_its_seed():
    steps = dict((name, steps) for name, _, steps in in_steps(unlabelled="pool", baseline="train", seeds=2))
    assert steps["student"] == steps["student-seed-6"] > steps["alone"] == steps["alone-seed-6"]


def test_trials_methods_of_two_stages_each_have_one_before_the_labels():
    """30 of 240 epochs are 1.125 of nine, rounded to one; the baseline has no such stage."""
    assert in_steps(method=["fsp", "kd", "factor_transfer"], baseline="train") == [
        ("student/fsp", 1, 9),
        ("student/factor_transfer", 1, 9),
        ("student", 9, 81),
        ("alone", 9, 81),
    ]
    hints = {"name": "fitnet", "stages": "two", "pretraining_epochs": 3}
    assert in_steps(method=hints) == [("student/fitnet", 3, 27), ("student", 9, 81)]
    assert in_steps(method="fitnet") == [("student", 9, 81)]


def test_numbered_stages_of_the_same_method_are_told_apart():
    early, late = ({"name": "fsp", "taps": taps} for taps in (["layer1", "layer2"], ["layer2", "layer3"]))
    assert [name for name, _, _ in in_steps(method=[early, late])] == ["student/fsp", "student/fsp-2", "student"]
    assert numbered(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]


def test_trials_a_chain_is_walked_from_the_teacher_down():
    assert planned(assistants=["resnet44", "resnet32"], baseline="train") == [
        ("assistant-1", ["resnet44"], GIVEN, ["kd"], 5),
        ("assistant-2", ["resnet32"], "assistant-1", ["kd"], 5),
        ("student", ["resnet20"], "assistant-2", ["kd"], 5),
        ("alone", ["resnet20"], None, [], 5),
    ]
    assert [steps for _, _, steps in in_steps(assistants=["resnet44", "resnet32"])] == [81, 81, 81]


def test_trials_generations_of_a_teacher():
    assert planned(method="born_again") == [
        ("generation-1", ["resnet20"], GIVEN, ["born_again"], 5),
        ("generation-2", ["resnet20"], "generation-1", ["born_again"], 6),
        ("student", ["resnet20"], "generation-2", ["born_again"], 7),
    ]


def test_trials_generations_of_nobody_begin_with_labels_alone():
    assert planned(method="born_again", teacher=None, baseline="train") == [
        ("generation-1", ["resnet20"], None, [], 5),
        ("generation-2", ["resnet20"], "generation-1", ["born_again"], 6),
        ("student", ["resnet20"], "generation-2", ["born_again"], 7),
        ("alone", ["resnet20"], None, [], 5),
    ]
    assert in_steps(method="born_again", teacher=None) == [
        ("generation-1", 9, 81),
        ("generation-2", 9, 81),
        ("student", 9, 81),
    ]


def test_trials_a_generation_is_tapped_alike_on_both_sides():
    """Only the first generation learns from the teacher that was given, and looks at its layers."""
    spec = resolved(method=["born_again", "attention"], network="wrn_40_2")
    taps = [[(pair.student, pair.teacher) for pair in trial.methods[1].pairs] for trial in trials(spec, DATA, None)]
    assert taps[0][0] == ("layer1", "block1")
    assert taps[1][0] == taps[2][0] == ("layer1", "layer1")


def test_trials_staged_methods_begin_every_generation_that_is_taught():
    names = [name for name, _, _ in in_steps(method=["born_again", "fsp"], teacher=None)]
    assert names == ["generation-1", "generation-2/fsp", "generation-2", "student/fsp", "student"]


def test_trials_one_generation_is_the_student():
    one = {"name": "born_again", "generations": 1}
    assert planned(method=one) == [("student", ["resnet20"], GIVEN, ["born_again"], 5)]


def test_peers_train_in_one_trial_and_the_first_has_the_baseline():
    assert planned(method="dml", teacher=None, student=["resnet20", "vgg8"], baseline="train") == [
        ("student", ["resnet20", "vgg8"], None, ["dml"], 5),
        ("alone", ["resnet20"], None, [], 5),
    ]


@pytest.mark.parametrize("method", ["one", "byot"])
def test_parts_of_one_network_train_in_one_trial(method: str):
    assert planned(method=method, teacher=None) == [("student", ["resnet20"], None, [method], 5)]


@pytest.mark.parametrize(("labelled_too", "steps"), [(True, 14), (False, 5)])
def test_trials_a_pool_makes_epochs_longer_but_for_the_baseline(labelled_too: bool, steps: int):
    """900 labelled images and 500 others, in batches of 100."""
    pool = {"source": "theirs", "labelled_too": labelled_too}
    assert in_steps(unlabelled=pool, method="fsp", baseline="train") == [
        ("student/fsp", 1, steps),
        ("student", 9, 9 * steps),
        ("alone", 9, 81),
    ]


@pytest.mark.parametrize("labelled_too", [True, False])
@pytest.mark.parametrize(
    ("train", "pool", "fraction", "batch_size"),
    [(100, 0, 0.1, 10), (97, 0, 0.1, 8), (45, 13, 0.1, 7), (40, 9, 0.33, 4), (9, 3, 0.05, 2)],
)
def test_trials_the_engine_takes_as_many_steps_as_the_plan_says(train, pool, fraction, batch_size, labelled_too):
    unlabelled = Unlabelled(source="theirs", labelled_too=labelled_too) if pool else None
    training = {"epochs": 3, "batch_size": batch_size, "validation_fraction": fraction}
    spec = resolved(training=training, **({"unlabelled": unlabelled.model_dump()} if unlabelled else {}))
    data, more = DATA.model_copy(update={"train": train}), POOL.model_copy(update={"train": pool})
    ((stage,),) = (trial.stages for trial in trials(spec, data, more if unlabelled else None))
    training_set = TrainingSet.of(_images(train, labels=3), spec.training)
    if unlabelled is not None:
        training_set = training_set.with_unlabelled(_images(pool, labels=0), unlabelled)
    engine = StageTraining(
        scheme=Alone(Classifier(build("convnet4", 3, 3), [0.5] * 3, [0.2] * 3)),
        objective=None,
        alpha=1.0,
        beta=0.0,
        smoothing=0.0,
        epochs=stage.epochs,
        recipe=spec.training,
        training_set=training_set,
        num_classes=3,
        observer=Observer(metric=lambda *_: None, after_step=lambda _: None),
    )
    assert stage == Stage("student", 3, 3 * engine.steps_per_epoch)


def _images(count: int, labels: int) -> Images:
    pixels = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % labels if labels else torch.full((count,), -1))
