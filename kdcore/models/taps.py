"""Read named activations of any network, without changing the network.

A tap is a module's path, as in `named_modules`, and the activation to read there:

    layer3            its output
    fc@in             its input
    features.1@nhwc   its output, laid out N x H x W x C, as maps N x C x H x W
    blocks.3@tokens   its output, N x L x D of a transformer, as maps N x D x s x s: the largest square of tokens from
                      the end; the class token and registers, which come before them, are left out

Paths are those of the network itself, also if torch.compile or data parallelism wraps it.
"""

import difflib
from collections.abc import Iterable
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from base.errors import SpecInvalid

PLACES = ("in", "nhwc", "tokens")


class Taps:
    """Hooks on one network; `read` returns the activations of the last forward pass.

    Raises SpecInvalid for a path that does not exist, a module that ran twice or not at all in one forward pass, one
    that ran without gradients inside a pass that has them, an activation that is not a tensor or not of the shape that
    the path needs, and one that an in-place operation has overwritten.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str]) -> None:
        self._activations: dict[str, tuple[Tensor, int]] = {}
        self._paths = tuple(dict.fromkeys(paths))
        self._with_gradients = False
        self._handles: list[RemovableHandle] = []
        if isinstance(network, DataParallel) and len(network.device_ids) > 1:
            raise SpecInvalid(
                "a network that is split over several devices has no one activation",
                hint="DistributedDataParallel runs one process a device",
            )
        plain = unwrapped(network)
        self._prefix: int | None = getattr(plain, "num_prefix_tokens", None)  # timm's transformers have it.
        modules = [_find(plain, path) for path in self._paths]  # Before any hook, so that a wrong path leaves no hooks.
        if self._paths:
            self._handles.append(plain.register_forward_pre_hook(self._begin, prepend=True))
        self._handles += [self._attach(module, path) for module, path in zip(modules, self._paths, strict=True)]

    def read(self) -> dict[str, Tensor]:
        """Return activations by path, and release them: they would keep the whole graph alive."""
        activations, self._activations = self._activations, {}
        for path in self._paths:
            if path not in activations:
                raise SpecInvalid(
                    f"tap {path!r}: the module did not run in this forward pass",
                    hint="perhaps no pass uses it, or torch.compile had run the network before it was tapped",
                )
            tensor, version = activations[path]
            if not tensor.is_inference() and tensor._version != version:
                raise SpecInvalid(
                    f"tap {path!r}: a later in-place operation overwrote the activation",
                    hint="tap the module that overwrites it, or build the network with inplace=False",
                )
        return {path: _laid_out(path, activations[path][0], self._prefix) for path in self._paths}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach(self, module: nn.Module, path: str) -> RemovableHandle:
        if path.endswith("@in"):
            return module.register_forward_pre_hook(partial(self._keep_input, path), with_kwargs=True)
        return module.register_forward_hook(partial(self._keep_output, path))

    def _begin(self, _network: nn.Module, _args: Any) -> None:
        """Drop the unread activations of an earlier pass, which may have failed."""
        if not _in_backward():
            self._activations.clear()
            self._with_gradients = torch.is_grad_enabled()

    def _keep_input(self, path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(path, next(iter((*args, *kwargs.values())), None))

    def _keep_output(self, path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self._keep(path, output)

    def _keep(self, path: str, activation: Any) -> None:
        if torch.compiler.is_compiling():
            # The rest must run uncompiled: the compiler does not support tensor versions.
            torch._dynamo.graph_break()
        if _in_backward():
            return
        if not isinstance(activation, Tensor):
            raise SpecInvalid(f"tap {path!r}: gives a {type(activation).__name__}, not a tensor")
        if path in self._activations:
            raise SpecInvalid(f"tap {path!r}: the module runs twice in one forward pass; tap one of its callers")
        if self._with_gradients and not torch.is_grad_enabled():
            raise SpecInvalid(
                f"tap {path!r}: the module runs without gradients, so nothing could be learned from it",
                hint="activation checkpointing keeps them with use_reentrant=False",
            )
        self._activations[path] = (activation, 0 if activation.is_inference() else activation._version)


def _in_backward() -> bool:
    """Return True in a backward pass, where activation checkpointing runs modules again (as torch.utils.checkpoint
    tests it)."""
    return torch._C._current_graph_task_id() != -1


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network without the wrappers of torch.compile and data parallelism."""
    while True:
        if isinstance(network, (DataParallel, DistributedDataParallel)):
            network = network.module
        elif (
            "_orig_mod" in network._modules
        ):  # A reference to the class would import the compiler, which takes seconds.
            network = network.get_submodule("_orig_mod")
        else:
            return network


def _find(network: nn.Module, path: str) -> nn.Module:
    names, at, place = path.partition("@")
    if at and place not in PLACES:
        raise SpecInvalid(f"tap {path!r}: there is no @{place}", hint="@" + ", @".join(PLACES))
    module, walked = network, ""
    for name in names.split("."):
        children = [child for child, there in module._modules.items() if there is not None]
        if name not in children:
            raise SpecInvalid(
                f"tap {path!r}: the network has no such module", hint=_near(names, walked, children, network)
            )
        module = unwrapped(module.get_submodule(name))
        walked = f"{walked}.{name}".lstrip(".")
    return module


def _near(path: str, walked: str, children: list[str], network: nn.Module) -> str:
    """Return a hint: the sibling modules if the first part of the path is right, else modules of a similar name."""
    if not children:
        return f"{walked or 'the network'} holds no modules"
    if walked:
        siblings = [f"{walked}.{child}" for child in children]
        return "near it: " + ", ".join(difflib.get_close_matches(path, siblings, n=8, cutoff=0))
    everywhere = [name for name, _ in network.named_modules() if name]
    return "near it: " + ", ".join(difflib.get_close_matches(path, everywhere, n=3, cutoff=0.3) or children)


def _laid_out(path: str, activation: Tensor, prefix: int | None) -> Tensor:
    """Return the activation as N x C x H x W, if the path ends in @nhwc or @tokens."""
    place = path.partition("@")[2]
    if place == "nhwc":
        if activation.dim() != 4:
            raise SpecInvalid(f"tap {path!r}: gives {_shape(activation)}, not N x H x W x C")
        return activation.permute(0, 3, 1, 2)
    if place == "tokens":
        if activation.dim() != 3:
            raise SpecInvalid(f"tap {path!r}: gives {_shape(activation)}, not N x L x D")
        side = _side(path, activation.shape[1], prefix)
        return activation[:, -side * side :].transpose(1, 2).reshape(len(activation), -1, side, side)
    return activation


def _side(path: str, tokens: int, prefix: int | None) -> int:
    """Return the side of the square that the patch tokens form.

    `prefix` is the number of tokens before them, if the network gives it: nine tokens may be a class token, four
    registers and four patches. A layer before the one that adds them has patches only.
    """
    if prefix is None:
        return isqrt(tokens)
    for patches in (tokens - prefix, tokens):
        if patches > 0 and isqrt(patches) ** 2 == patches:
            return isqrt(patches)
    raise SpecInvalid(f"tap {path!r}: gives {tokens} tokens, {prefix} of them before the patches, which make no square")


def _shape(activation: Tensor) -> str:
    return " x ".join(map(str, activation.shape))
