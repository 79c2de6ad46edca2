"""Read named activations of any network, without changing the network.

A tap is a module's path as `named_modules` spells it: `layer3` is that module's output, `fc@in` its input.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from kdcore.errors import SpecInvalid


class Taps:
    """Hooks on one network; `read` hands over what the last forward pass left in them.

    Raises SpecInvalid for a path that is not there, a module that fired twice or not at all in one forward pass, an
    activation that is not a tensor, and one that an in-place operation has overwritten since.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str]) -> None:
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._paths = tuple(paths)
        self._handles = [self._attach(network, path) for path in self._paths]

    def read(self) -> dict[str, Tensor]:
        """Activations by path, and forget them: they would keep the whole graph alive."""
        seen, self._seen = self._seen, {}
        for path in self._paths:
            if path not in seen:
                raise SpecInvalid(f"tap {path!r}: the module did not run in this forward pass")
            tensor, version = seen[path]
            if not tensor.is_inference() and tensor._version != version:
                raise SpecInvalid(
                    f"tap {path!r}: a later in-place operation overwrote the activation",
                    hint="tap the module that overwrites it, or build the network with inplace=False",
                )
        return {path: tensor for path, (tensor, _) in seen.items()}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach(self, network: nn.Module, path: str) -> Any:
        name, at, where = path.partition("@")
        modules = dict(network.named_modules())
        if not name or name not in modules or (at and where != "in"):
            near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
            raise SpecInvalid(f"tap {path!r}: the network has no such module", hint="near it: " + ", ".join(near))
        if where == "in":
            return modules[name].register_forward_pre_hook(lambda _, args: self._keep(path, args[0]))
        return modules[name].register_forward_hook(self._after(path))

    def _after(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: self._keep(path, output)

    def _keep(self, path: str, activation: Any) -> None:
        if not isinstance(activation, Tensor):
            raise SpecInvalid(f"tap {path!r}: gives a {type(activation).__name__}, not a tensor")
        if path in self._seen:
            raise SpecInvalid(f"tap {path!r}: the module runs twice in one forward pass; tap one of its callers")
        self._seen[path] = (activation, 0 if activation.is_inference() else activation._version)
