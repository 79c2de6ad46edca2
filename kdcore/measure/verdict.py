"""What a job proves: the gap closed and the gain with their intervals, over images and seeds, and one sentence.

One rule for the sentence, the warnings and the gap: a difference is measurable if its 95 % interval holds no 0. Shapes:
n test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.warning import WarningItem
from kdcore.measure import chance, intervals
from kdcore.measure.intervals import LEVEL, RESAMPLES, SEEDS_FOR_IMAGES_TOO, Interval, Paired


@dataclass(frozen=True)
class Verdict:
    """What a job has shown: `proof` of its report, the same in one sentence, and what is wrong."""

    sentence: str
    warnings: list[WarningItem]
    proof: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One seed of a job: on which test images its student, and the same student alone, is right. Bool n."""

    seed: int
    student: Tensor
    alone: Tensor | None


def verdict(
    runs: Sequence[Run],
    counts: Sequence[int],
    teacher: Tensor | None = None,
    teacher_answers: bool | None = None,
    teacher_on_training: float | None = None,
) -> Verdict:
    """Judge a job by which test images its models are right on. The first run is the delivered one.

    `counts`: test images by class. `teacher`: on which images it is right; None where that is not known.
    `teacher_answers`: False for a teacher of other classes; None for a job without a teacher. `teacher_on_training`:
    the accuracy on training images of one that is known on these alone.
    """
    first, images, level = runs[0], sum(counts), chance.chance_level(counts)
    accuracy, warnings = _share(first.student), list[WarningItem]()
    figures = f"right on {_percent(accuracy)} of {images:,} test images"
    over_images = _paired(first, teacher)
    no_gap = _no_gap(over_images, teacher, teacher_answers)
    over = _over_seeds(runs, teacher) if len(runs) > 1 else None
    sentences = []
    if chance.is_at_chance(accuracy, images, level):
        text = f"the student has learned nothing: it is {figures}, and guessing gives {_percent(level)}"
        hint = "look at the curves and at the other warnings; a smaller training.optimizer.lr often helps"
        warnings.append(WarningItem("student_ended_at_chance", "", f"{_capital(text)}.", hint))
        sentences.append(text)
    if over_images is None or first.alone is None:
        sentences = sentences or [f"the student is {figures}"]
        sentences += _seeds_without_baseline(over)
    else:
        subject = f"the {'delivered ' * (over is not None)}student"
        # What a student at chance is right on has been said.
        sentences += _comparison(over_images, over, f"{subject} is" if sentences else f"{subject} is {figures},")
        if (gain := _ruling(over_images, over).gain).high < 0:
            whose = "student ended" if over is None else f"student of {over.seeds} seeds ended on average"
            points = f"{abs(100 * gain.value):.1f} points"
            alone = _percent(_share(first.alone) if over is None or over.alone is None else over.alone.value)
            text = f"The {whose} {points} below the same student trained alone ({alone})."
            hint = (
                "a better teacher, another method, a smaller beta or more epochs may help; else use the student alone"
            )
            warnings.append(WarningItem("student_below_baseline", "/method", text, hint))
    if teacher_answers is False:
        sentences.append("its teacher has other classes, so that the teacher's accuracy cannot be measured")
    if teacher_on_training is not None:
        sentences.append(
            f"its teacher was measured on training images only ({_percent(teacher_on_training)}), not on test images"
        )
    if teacher is not None and first.alone is not None and over_images is not None:
        gap, alone = over_images.teacher_gap, _percent(_share(first.alone))
        assert gap is not None, "there is a teacher"
        own = _percent(_share(teacher))
        if gap.value <= 0:
            sentences.append(
                f"its teacher ({own}) is no better than the student alone ({alone}), so it has little to teach"
            )
        elif gap.holds_zero:
            sentences.append(
                f"its teacher ({own}) is not measurably better than the student alone ({alone}), so that no gap is "
                "stated"
            )
        if gap.high < 0:
            text = f"The teacher ({own}) is worse than the student alone ({alone}): it has nothing to teach."
            warnings.append(WarningItem("teacher_below_baseline", "/teacher", text, "train or take a better teacher"))
    proof = {
        "gap_closed": _as_dict(None if over_images is None else over_images.gap_closed),
        "no_gap": no_gap,
        "gain": _as_dict(None if over_images is None else over_images.gain),
        "teacher_gap": _as_dict(None if over_images is None else over_images.teacher_gap),
        "images": {"test_samples": images, "resamples": RESAMPLES, "level": LEVEL},
        "seeds": [_of_seed(run, teacher) for run in runs],
        "over_seeds": None if over is None else asdict(over),
    }
    return Verdict(f"{_capital('; '.join(sentences))}.", warnings, proof)


# Figures


@dataclass(frozen=True)
class _OverSeeds:
    seeds: int
    student: Interval
    alone: Interval | None
    gain: Interval | None
    gap_closed: Interval | None
    gain_on_other_images: Interval | None
    gap_closed_on_other_images: Interval | None


def _paired(run: Run, teacher: Tensor | None) -> Paired | None:
    if run.alone is None:
        return None
    return intervals.paired(run.student.numpy(), run.alone.numpy(), None if teacher is None else teacher.numpy())


def _of_seed(run: Run, teacher: Tensor | None) -> dict[str, Any]:
    found = _paired(run, teacher)
    return {
        "seed": run.seed,
        "student": _share(run.student),
        "alone": None if run.alone is None else _share(run.alone),
        "gap_closed": None if found is None or found.gap_closed is None else found.gap_closed.value,
    }


def _over_seeds(runs: Sequence[Run], teacher: Tensor | None) -> _OverSeeds:
    students_m, images = np.array([_share(run.student) for run in runs]), len(runs[0].student)
    baselines = [run.alone for run in runs if run.alone is not None]
    student = intervals.mean_over_seeds(students_m, images)
    if len(baselines) < len(runs):
        return _OverSeeds(len(runs), student, None, None, None, None, None)
    baselines_m = np.array([_share(one) for one in baselines])
    gain, gap = intervals.over_seeds(students_m, baselines_m, images, None if teacher is None else _share(teacher))
    if len(runs) < SEEDS_FOR_IMAGES_TOO:
        return _OverSeeds(len(runs), student, intervals.mean_over_seeds(baselines_m, images), gain, gap, None, None)
    elsewhere = intervals.over_seeds_and_images(
        torch.stack([run.student for run in runs]).numpy(),
        torch.stack(baselines).numpy(),
        None if teacher is None else teacher.numpy(),
    )
    return _OverSeeds(len(runs), student, intervals.mean_over_seeds(baselines_m, images), gain, gap, *elsewhere)


def _no_gap(found: Paired | None, teacher: Tensor | None, teacher_answers: bool | None) -> dict[str, str] | None:
    """Return why no gap closed is stated; None where it is."""
    if found is None:
        return _reason("no_baseline", "the same student was not trained alone (baseline: train)")
    if teacher is None and teacher_answers is None:
        return _reason("no_teacher", "the job has no teacher")
    if teacher is None or found.teacher_gap is None:
        return _reason("teacher_not_measured", "the teacher's accuracy on the test images is not known")
    if found.gap_closed is not None:
        return None
    gap = f"the interval of teacher - alone ({_points(found.teacher_gap)})"
    if found.teacher_gap.high < 0:
        return _reason("teacher_below_baseline", f"{gap} is below 0: there is no gap to close")
    return _reason("teacher_gap_holds_zero", f"{gap} holds 0: how large the gap is cannot be said from these images")


def _reason(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _as_dict(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.as_dict()


# The sentence


@dataclass(frozen=True)
class _Ruling:
    """The gain that says whether distilling helped, with the gap closed by the same rule, and what they are for."""

    gain: Interval
    gap_closed: Interval | None
    scope: str = ""

    @property
    def named_scope(self) -> str:
        return f"{self.scope}:" if self.scope else ""


def _ruling(over_images: Paired, over: _OverSeeds | None) -> _Ruling:
    """Return what the sentence is about: with several seeds their mean, unless it is the images that leave it open. A
    few seeds can agree by chance on images that are too few."""
    images = _Ruling(over_images.gain, over_images.gap_closed)
    if over is None or over.gain is None:
        return images
    if over.gain_on_other_images is not None:
        return _Ruling(over.gain_on_other_images, over.gap_closed_on_other_images, " for other seeds and images")
    if over_images.gain.holds_zero:
        return replace(images, scope=" for other images, with the delivered seed")
    return _Ruling(over.gain, over.gap_closed, " for other seeds")


def _comparison(over_images: Paired, over: _OverSeeds | None, figures: str) -> list[str]:
    """Return the clauses about student and baseline, the gap closed first."""
    ruling, own = _ruling(over_images, over), over_images.gain
    gain, gap, clauses = ruling.gain, ruling.gap_closed, []
    if gap is not None:
        low, high = (_signed(100 * bound, "") for bound in (gap.low, gap.high))
        interval = f"(95 % interval{ruling.named_scope} {low} to {high} %)"
        clauses.append(f"gap closed: {_signed(100 * gap.value, '')} % {interval}")
    side = "above" if own.value >= 0 else "below"
    figures = f"{figures} {abs(100 * own.value):.1f} points {side} the same student alone"
    mean = ""
    if over is not None and over.gain is not None:
        mean = f"the mean gain of {over.seeds} seeds is {100 * over.gain.value:+.1f} points"
    if gain.holds_zero:
        clauses.append(f"no measurable gain: the interval holds 0 ({_points(gain)} points{ruling.scope})")
        return [*clauses, *([mean] if mean else []), figures]
    finding = "distilling helped" if gain.low > 0 else "distilling harmed"
    interval = f"(95 % interval{ruling.named_scope} {_points(gain)})"
    return [*clauses, f"{finding}: {mean or figures} {interval}", *([figures] if mean else [])]


def _seeds_without_baseline(over: _OverSeeds | None) -> list[str]:
    if over is None:
        return []
    low, high = (f"{100 * bound:.1f}" for bound in (over.student.low, over.student.high))
    interval = f"(95 % interval for other seeds: {low} to {high} %)"
    return [f"the mean of {over.seeds} seeds is {_percent(over.student.value)} {interval}"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _points(interval: Interval) -> str:
    return f"{_signed(100 * interval.low, '+', 1)} to {_signed(100 * interval.high, '+', 1)}"


def _signed(value: float, sign: str, digits: int = 0) -> str:
    """Return a rounded number, with more digits where the rounding would hide on which side of 0 it is."""
    return f"{value:{sign}.{digits}f}" if round(value, digits) else f"{value:{sign}.1g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
