"""Warnings: what was guessed, left out, reinterpreted or looks wrong; the job goes on. Each has a stable code.

The codes are a closed list that clients may rely on; `docs/warnings.md` has the cause and the cure of each. A spec or
a registration with `strict` is refused (`warning_refused`) for a warning that is known before the training.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from base.errors import Fault, WarningRefused

When = Literal["registration", "submit", "teacher_check", "training", "result"]

CODES: dict[str, When] = {
    "normalization_guessed": "registration",
    "architecture_found": "registration",
    "averaged_weights_taken": "registration",
    "tensors_left_out": "registration",
    "weights_matched_by_order": "registration",
    "head_activation_guessed": "registration",
    "outputs_are_probabilities": "registration",
    "test_split_carved": "registration",
    "files_left_out": "registration",
    "folders_merged": "registration",
    "folders_repeated": "registration",
    "file_names_differ": "registration",
    "class_too_small": "registration",
    "pictures_skipped": "registration",
    "pictures_cut": "registration",
    "pixels_dark": "registration",
    "alpha_over_white": "registration",
    "orientation_ignored": "registration",
    "sixteen_bit_scaled": "registration",
    "frames_left_out": "registration",
    "grey_as_colour": "submit",
    "class_order_changed": "submit",
    "class_map_found": "submit",
    "teacher_classes_differ": "submit",
    "teacher_not_tested": "submit",
    "weights_partly_loaded": "submit",
    "image_size_differs": "submit",
    "budget_short": "submit",
    "student_small": "submit",
    "memory_short": "submit",
    "int8_not_exported": "submit",
    "baseline_found": "submit",
    "class_order_wrong": "teacher_check",
    "normalization_wrong": "teacher_check",
    "channel_order_wrong": "teacher_check",
    "teacher_near_chance": "teacher_check",
    "probability_dropped": "teacher_check",
    "distillation_loss_zero": "training",
    "distillation_loss_constant": "training",
    "student_at_chance": "training",
    "teacher_saturated": "training",
    "batch_norm_not_converged": "training",
    "bits_not_repeatable": "training",
    "decoded_again": "training",
    "teacher_cache_off": "training",
    "checkpoint_not_saved": "training",
    "checkpoint_not_kept": "training",
    "checkpoint_skipped": "training",
    "engine_ended": "training",
    "student_ended_at_chance": "result",
    "student_below_baseline": "result",
    "teacher_below_baseline": "result",
    "export_unavailable": "result",
    "export_mismatch": "result",
    "int8_overflows": "result",
    "document_not_made": "result",
    "tracking_failed": "result",
}
"""All codes, and when each can first be known."""
NAMES = tuple(CODES)
Code = Literal[NAMES]  # type: ignore[valid-type]

REFUSED_IF_STRICT: tuple[When, ...] = ("registration", "submit", "teacher_check")
"""`strict` refuses what is known before the training; never what only the training shows."""
NEVER_REFUSED = ("baseline_found",)
"""Codes that `strict` does not refuse: what they say was asked for, and nothing about it is doubtful."""
KNOWN_AT_SUBMIT: tuple[When, ...] = ("registration", "submit")
"""A job that is retried from scratch keeps these warnings; its attempts find the others again."""


@dataclass(frozen=True)
class WarningItem:
    """One warning. `pointer` is a place in the spec or the registration (RFC 6901), "" if it concerns no field."""

    code: str
    pointer: str
    message: str
    hint: str | None = None
    """What to do about it."""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code!r} is not in the closed list of codes")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def refused_if_strict(warnings: Iterable[WarningItem]) -> list[WarningItem]:
    """Return the warnings that `strict` refuses."""
    return [
        warning
        for warning in warnings
        if CODES[warning.code] in REFUSED_IF_STRICT and warning.code not in NEVER_REFUSED
    ]


def warning_faults(refused: Iterable[WarningItem]) -> list[Fault]:
    """Return refused warnings as faults, each with its hint."""
    return [
        Fault(one.pointer, f"{one.code}: {one.message}" + (f"; {one.hint}" if one.hint else ""), WarningRefused.code)
        for one in refused
    ]
