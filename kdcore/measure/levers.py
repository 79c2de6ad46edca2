"""Which levers, that is means to make a step faster, a stage of a job really used, for its report.

`Computing` (`kdcore/device.py`) says what the job allows; it is chosen before there is a network. Whether a layer then
takes the faster form is decided where it runs. So what ran is counted, after the first step of each stage. The report
has it as `computing.used`, by stage and lever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from base import cores
from kdcore.cache.teacher import CachedTeacher
from kdcore.models.layers import FOLDED, FUSED, OWN, can_fold, forget_forms, ran_as
from kdcore.programs import Program
from kdcore.schemes.offline import TeacherAhead
from kdcore.spec import GIVEN, Trial

if TYPE_CHECKING:
    from kdcore.lesson import Teacher
    from kdcore.prepare import PreparedJob
    from kdcore.training import StageTraining

Lever = dict[str, Any]
"""`used`; `places`, the layers that it computed, and `of`, how many there are (None where it is no matter of layers);
`why` it was not used, or not everywhere."""

NO_TEACHER = "no teacher runs in this stage"


def begin(training: StageTraining) -> None:
    """Count what runs from now on, in the learners of a stage and in its teacher."""
    for network in (training.learners, *_networks(training.scheme.teacher)):
        forget_forms(network)


def used(job: PreparedJob, trial: Trial, training: StageTraining) -> dict[str, Lever]:
    """Return the levers of a trial's stage after a first step."""
    teacher = training.scheme.teacher
    return {
        "folded": _folded(job, teacher),
        "kernels": _kernels(job, training),
        "convolutions": _convolutions(job, training),
        "overlap": _overlap(job, teacher),
        "graph": _graph(job, training),
        "teacher_cache": _cache(job, trial, teacher),
    }


def in_words(by_lever: Mapping[str, Lever]) -> str:
    """Return the levers in one line, for the log."""
    return "; ".join(_line(name, one) for name, one in by_lever.items())


def _line(name: str, lever: Lever) -> str:
    counted = f" in {lever['places']} of {lever['of']} places" if lever["of"] is not None and lever["used"] else ""
    why = f" ({lever['why']})" if lever["why"] else ""
    return f"{name}: {'used' if lever['used'] else 'not used'}{counted}{why}"


def _lever(why: str, used: bool = False) -> Lever:
    return {"used": used, "places": None, "of": None, "why": why}


def _counted(form: str, layers: Iterable[nn.Module], why_none: str, why_not_all: str) -> Lever:
    layers = list(layers)
    places = ran_as(form, layers)
    why = "" if places == len(layers) > 0 else why_not_all if places else why_none
    return {"used": places > 0, "places": places, "of": len(layers), "why": why}


def _networks(teacher: Teacher | None) -> Iterator[nn.Module]:
    for member in teacher.members if teacher is not None else ():
        yield member.network


def _folded(job: PreparedJob, teacher: Teacher | None) -> Lever:
    """Return what became of the convolutions of the teacher, of all its members."""
    if teacher is None:
        return _lever(NO_TEACHER)
    if job.stored is teacher:
        return _lever("a file of logits runs no network")
    networks = list(_networks(teacher))
    if all(isinstance(network, Program) for network in networks):
        return _lever("a program computes by itself")
    convolutions = [one for network in networks for one in network.modules() if isinstance(one, nn.Conv2d)]
    if not convolutions:
        return _lever("the teacher has no convolution")
    if job.computing.folded:
        why = "its network computes them by itself, or a method reads their activations"
    elif (why := _not_allowed(job)) == "":
        known = can_fold(job.computing.bf16)
        why = "the job began without it" if known else "PyTorch has no fused convolutions here that are right"
    return _counted(FOLDED, convolutions, why, why)


def _kernels(job: PreparedJob, training: StageTraining) -> Lever:
    """Return what became of the batch norms of the learners."""
    norms = [one for one in training.learners.modules() if isinstance(one, nn.BatchNorm2d)]
    if not norms:
        return _lever("no learner of this stage has a batch norm")
    why = "their network computes them by itself, or a method reads their activations"
    if not job.computing.kernels:
        why = _not_allowed(job) or job.computing.note or "the job began without it"
    return _counted(FUSED, norms, why, why)


def _convolutions(job: PreparedJob, training: StageTraining) -> Lever:
    """Return what became of the convolutions of learners and teacher."""
    networks = [training.learners, *_networks(training.scheme.teacher)]
    layers = [one for network in networks for one in network.modules() if isinstance(one, nn.Conv2d)]
    if not layers:
        return _lever("no network of this stage has a convolution")
    with_stride = "" if job.computing.bf16 else " without a stride"
    why = f"it is for 3 × 3 convolutions of 16, 32, … channels{with_stride} that no method reads"
    if not job.computing.convolutions:
        why = _why_no_convolutions(job)
    return _counted(OWN, layers, why, why)


def _why_no_convolutions(job: PreparedJob) -> str:
    computing = job.computing
    if not_allowed := _not_allowed(job):
        return not_allowed
    if not computing.kernels and computing.note:
        return computing.note
    flags, needed = ({"avx512_bf16"}, "AVX512_BF16") if computing.bf16 else ({"avx2", "fma"}, "AVX2 and FMA")
    if cores.flags() >= flags:
        return "the job began without it"
    return f"in {'bfloat16' if computing.bf16 else 'float32'} it is for CPUs with {needed}"


def _not_allowed(job: PreparedJob) -> str:
    """Return why the job allows no form but PyTorch's own; "" if it does."""
    if job.device.type != "cpu":
        return "it is for CPUs"
    return "training.kernels is 'eager'" if job.spec.training.kernels == "eager" else ""


def _overlap(job: PreparedJob, teacher: Teacher | None) -> Lever:
    if teacher is None:
        return _lever(NO_TEACHER)
    if isinstance(teacher, TeacherAhead):
        return _lever("", used=True)
    if not job.spec.training.overlap:
        return _lever("training.overlap is false")
    if job.stored is teacher:
        return _lever("a file of logits computes nothing")
    return _lever("it is for CPUs" if job.device.type != "cpu" else "the job began without it")


def _graph(job: PreparedJob, training: StageTraining) -> Lever:
    if training.graph_step is not None:
        return _lever("", used=True)
    if job.spec.training.step != "graph":
        return _lever("training.step is 'eager'")
    return _lever("it is for GPUs" if job.device.type != "cuda" else "epochs that train for int8 are eager")


def _cache(job: PreparedJob, trial: Trial, teacher: Teacher | None) -> Lever:
    if teacher is None:
        return _lever(NO_TEACHER)
    if trial.taught_by != GIVEN:
        return _lever("no other job has the teacher of this stage")
    if job.stored is teacher:
        return _lever("a file of logits is in memory already")
    behind = teacher.teacher if isinstance(teacher, TeacherAhead) else teacher
    if isinstance(behind, CachedTeacher):
        return _lever(behind.why_unused, used=not behind.why_unused)
    return _lever("it is for CPUs" if job.device.type != "cpu" else "the job began without it")
