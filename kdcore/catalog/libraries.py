"""The names of networks and weights that the installed torchvision and timm have, read from the text of their source.

Neither is imported, because both import torch: so a name that no library has costs no process. What is read may be more
than a library has, never less. A library that is not installed, or writes its names in another way, has none here; then
nothing is known to be missing.
"""

import re
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_BUILDER = re.compile(r"^@register_model\b.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
_WEIGHTS = re.compile(r"^class (\w+)\(WeightsEnum\)", re.MULTILINE)
_FORMER = re.compile(r"register_model_deprecations\((.*?)\}\)", re.DOTALL)
_KEY = re.compile(r"""["']([\w.]+)["']\s*:""")


@cache
def names(library: str) -> frozenset[str]:
    """Return the names of a library's networks, of former ones, and of its enumerations of weights; none if they are
    not known."""
    found = find_spec(library)
    if found is None or found.origin is None:
        return frozenset()
    known: set[str] = set()
    for path in sorted((Path(found.origin).parent / "models").rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        known.update(_BUILDER.findall(text), _WEIGHTS.findall(text))
        known.update(name for former in _FORMER.findall(text) for name in _KEY.findall(former))
    return frozenset(known)


def missing(name: str) -> str | None:
    """Return a sentence about a name that no library has: `timm/<network>`, `torchvision/<network>` or an enumeration
    of torchvision's weights, each perhaps with a tag behind a dot. None if there may be such a network."""
    library = "timm" if name.startswith("timm/") else "torchvision"
    network = name.removeprefix(f"{library}/").partition(".")[0]
    known = names(library)
    if not known or network in known:
        return None
    near = get_close_matches(network[:100], known, n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"{library} has no model {network!r}{hint}"
