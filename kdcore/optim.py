"""The optimizer that a spec asks for, and the learning rate of every step as a pure function."""

import inspect
import math
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import nn

from kdcore.spec import AdamW, Multistep, Optimizer, Schedule

Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])


def _uncompiled(kind: Kind) -> Kind:
    """An optimizer of PyTorch's as it was written, without the wrappers that keep `torch.compile` out of it.

    Their first call imports the compiler, which takes longer than torch itself; nothing is compiled here.
    """
    wrapped = ("add_param_group", "zero_grad", "step", "state_dict", "load_state_dict")
    written = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    plain = type(kind.__name__, (kind,), {**written, "step": torch.no_grad()(written["step"])})
    return cast(Kind, plain)


_AdamW, _Sgd = _uncompiled(torch.optim.AdamW), _uncompiled(torch.optim.SGD)


def optimizer_for(spec: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weight decay reaches every parameter, batch norm's too, as in the recipes that the field's tables stand on."""
    if isinstance(spec, AdamW):
        return _AdamW(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    return _Sgd(parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov)


def learning_rate(base: float, schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate at `step` of the whole training, steps counted from 0.

    During the warm-up the rate rises in a straight line that reaches the base at the warm-up's last step.
    Milestones fall at the start of their epoch; the cosine starts where the warm-up ends.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / math.ceil(warmup)
    if isinstance(schedule, Multistep):
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones or ())
        return base * schedule.gamma**passed
    done = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
    return base * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * done)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
