import pytest
import torch

from kdcore.measure.verdict import Run, verdict
from kdcore.spec.measured import ruling

EVEN = [25, 25, 25, 25]


def right(begin: int, end: int) -> torch.Tensor:
    """Right on these of 100 images."""
    images = torch.arange(100)
    return (images >= begin) & (images < end)


def judged(student, alone=None, teacher=None, counts=EVEN, **options):
    runs = [Run(0, right(*student), None if alone is None else right(*alone))]
    return verdict(runs, counts, None if teacher is None else right(*teacher), True if teacher else None, **options)


@pytest.mark.parametrize(
    ("models", "codes", "told"),
    [
        ({"student": (0, 90)}, [], "The student is right on 90.0 % of 100 test images."),
        (
            {"student": (0, 90), "alone": (0, 70)},
            [],
            "Distilling helped: the student is right on 90.0 % of 100 test images, 20.0 points above the same student "
            "alone (95 % interval +",
        ),
        (
            {"student": (0, 90), "alone": (0, 70), "teacher": (0, 95)},
            [],
            "Gap closed: 80 % (95 % interval 60 to 98 %); distilling helped: the student",
        ),
        (
            {"student": (0, 92), "alone": (0, 90)},
            [],
            "No measurable gain: the interval holds 0 (-1.7 to +6.1 points); the student is right on 92.0 % of 100 "
            "test images, 2.0 points above the same student alone.",
        ),
        ({"student": (0, 88), "alone": (0, 90)}, [], "2.0 points below the same student alone."),
        ({"student": (0, 60), "alone": (40, 100)}, [], "No measurable gain: the interval holds 0"),
        ({"student": (0, 70), "alone": (0, 90)}, ["student_below_baseline"], "Distilling harmed: the student is right"),
        (
            {"student": (0, 80), "alone": (0, 80), "teacher": (0, 50)},
            ["teacher_below_baseline"],
            "its teacher (50.0 %) is no better than the student alone (80.0 %), so it has little to teach.",
        ),
        (
            {"student": (0, 80), "alone": (0, 80), "teacher": (0, 78)},
            [],
            "(78.0 %) is no better than the student alone",
        ),
        (
            {"student": (0, 80), "alone": (0, 80), "teacher": (0, 82)},
            [],
            "its teacher (82.0 %) is not measurably better than the student alone (80.0 %), so that no gap is stated.",
        ),
        ({"student": (0, 50), "teacher": (0, 20)}, [], "50.0 %"),
        ({"student": (0, 25)}, ["student_ended_at_chance"], "has learned nothing: it is right on 25.0 %"),
        ({"student": (0, 22)}, ["student_ended_at_chance"], "guessing gives 25.0 %"),
        (
            {"student": (0, 25), "alone": (0, 90), "teacher": (0, 30)},
            ["student_ended_at_chance", "student_below_baseline", "teacher_below_baseline"],
            "distilling harmed: the student is 65.0 points below",
        ),
    ],
)
def test_verdict_is_one_sentence_with_its_warnings(models, codes, told):
    found = judged(**models)
    assert [warning.code for warning in found.warnings] == codes
    assert told in found.sentence and found.sentence.endswith(".")


def test_verdict_chance_is_the_largest_class():
    assert judged((0, 90), counts=[90, 10]).warnings[0].code == "student_ended_at_chance"
    assert judged((0, 99), counts=[90, 10]).warnings == []


@pytest.mark.parametrize("images", range(4, 9))
def test_verdict_sentence_warning_and_interval_follow_one_rule(images):
    """So many images on which the student alone is right and the student is not: each of the three says the same."""
    found = judged((0, 80), (0, 80 + images), (0, 99))
    harmed = found.proof["gain"]["high"] < 0
    assert harmed == (images >= 5)
    assert ("distilling harmed" in found.sentence) == harmed == bool(found.warnings)
    assert ("no measurable gain" in found.sentence) == (not harmed)
    assert (found.proof["gap_closed"]["high"] < 0) == harmed


@pytest.mark.parametrize(
    ("models", "options", "code"),
    [
        ({"student": (0, 90), "teacher": (0, 95)}, {}, "no_baseline"),
        ({"student": (0, 90), "alone": (0, 70)}, {}, "no_teacher"),
        ({"student": (0, 90), "alone": (0, 70), "teacher": (0, 71)}, {}, "teacher_gap_holds_zero"),
        ({"student": (0, 90), "alone": (0, 70), "teacher": (0, 40)}, {}, "teacher_below_baseline"),
    ],
)
def test_verdict_says_why_no_gap_is_stated(models, options, code):
    proof = judged(**models, **options).proof
    assert proof["gap_closed"] is None and proof["no_gap"]["code"] == code and proof["no_gap"]["message"]


@pytest.mark.parametrize("answers", [True, False], ids=["training images only", "other classes"])
def test_verdict_states_no_gap_to_a_teacher_that_was_not_measured_on_test_images(answers):
    trained_on = 0.9 if answers else None
    found = verdict([Run(0, right(0, 90), right(0, 70))], EVEN, None, answers, trained_on)
    assert found.proof["no_gap"]["code"] == "teacher_not_measured" and found.proof["gain"]["low"] > 0
    assert ("training images only (90.0 %)" in found.sentence) == answers
    assert ("cannot be measured" in found.sentence) == (not answers)


def drawn(seed: int, accuracy: float, images: int = 1000) -> torch.Tensor:
    return torch.rand(images, generator=torch.Generator().manual_seed(seed)) < accuracy


def runs(count: int, student: float, alone: float) -> list[Run]:
    return [Run(7 + one, drawn(one, student), drawn(100 + one, alone)) for one in range(count)]


def test_verdict_over_seeds_is_about_their_mean():
    several = runs(3, 0.8, 0.7)
    found = verdict(several, [500, 500], drawn(1000, 0.9), True)
    proof, over = found.proof, found.proof["over_seeds"]
    assert [one["seed"] for one in proof["seeds"]] == [7, 8, 9] and over["seeds"] == 3
    gains = [one["student"] - one["alone"] for one in proof["seeds"]]
    assert over["gain"]["value"] == pytest.approx(sum(gains) / 3)
    assert over["gain_on_other_images"] is None and over["gap_closed_on_other_images"] is None
    assert found.sentence.startswith("Gap closed: ") and "(95 % interval for other seeds: " in found.sentence
    assert f"the mean gain of 3 seeds is {100 * over['gain']['value']:+.1f} points" in found.sentence
    assert "the delivered student is right on" in found.sentence
    assert proof["gain"] == verdict(several[:1], [500, 500], drawn(1000, 0.9), True).proof["gain"]


def test_verdict_from_five_seeds_on_is_for_other_images_too():
    over = verdict(runs(5, 0.8, 0.7), [500, 500], drawn(1000, 0.9), True).proof["over_seeds"]
    assert over["gain_on_other_images"]["value"] == pytest.approx(over["gain"]["value"])
    assert over["gap_closed_on_other_images"]["low"] > 0


def test_verdict_seeds_that_agree_on_too_few_images_prove_nothing():
    """Two images more in each of three seeds: the interval over seeds is short, but there are only 100 images."""
    found = verdict([Run(seed, right(0, 82), right(0, 80)) for seed in range(3)], EVEN)
    assert found.proof["over_seeds"]["gain"]["low"] > 0
    assert "no measurable gain: the interval holds 0" in found.sentence.lower()


@pytest.mark.parametrize(("count", "alone"), [(1, 0.7), (3, 0.7), (3, 0.79), (5, 0.7)])
def test_verdict_states_the_gap_and_the_gain_that_lists_and_pages_take_from_its_proof(count, alone):
    """One seed, several, several of which the images leave it open, and seeds for other images, too."""
    found = verdict(runs(count, 0.8, alone), [500, 500], drawn(1000, 0.95), True)
    gap, gain, scope = ruling(found.proof)
    sentence = found.sentence.lower()
    assert sentence.startswith(f"gap closed: {100 * gap['value']:.0f} % (95 % interval{f' {scope}:' * bool(scope)} ")
    bounds = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    assert bounds in sentence and ("helped" in sentence) == (gain["low"] > 0)


def test_verdict_seeds_without_baselines_have_a_mean():
    found = verdict([Run(seed, drawn(seed, 0.8), None) for seed in range(3)], [500, 500])
    assert found.proof["over_seeds"]["gain"] is None and "the mean of 3 seeds is" in found.sentence


def test_verdict_warns_of_harm_by_the_mean_of_the_seeds_not_by_the_delivered_one():
    """The delivered student is 2 points above its baseline, seven others 10 points below."""
    several = [Run(seed, right(0, 60 if seed else 72), right(0, 70)) for seed in range(8)]
    found = verdict(several, EVEN)
    assert "distilling harmed: the mean gain of 8 seeds is -8.5 points" in found.sentence.lower()
    assert "2.0 points above the same student alone" in found.sentence
    [warning] = found.warnings
    assert warning.message == (
        "The student of 8 seeds ended on average 8.5 points below the same student trained alone (70.0 %)."
    )
