"""ImageNet's 1,000 classes in the usual order of outputs: WordNet's numbers and names, from files that timm brings.

The files are read, and timm is not imported, because it imports torch. Without timm nothing is known of them.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CLASSES = 1000
_SYNSETS, _LEMMAS = "imagenet_synsets.txt", "imagenet_synset_to_lemma.txt"


@cache
def synonyms() -> tuple[frozenset[str], ...]:
    """Return all names of each class, in the order of the outputs: its WordNet number (n01440764), each of its
    synonyms, and these as one text ("tench, Tinca tinca"). Empty if there is no timm, or none that has these files."""
    found = find_spec("timm")
    if found is None or found.origin is None:
        return ()
    folder = Path(found.origin).parent / "data" / "_info"
    if not (folder / _LEMMAS).is_file() or not (folder / _SYNSETS).is_file():
        return ()
    lemmas = _by_number(folder / _LEMMAS)
    numbers = (folder / _SYNSETS).read_text(encoding="utf-8").split()
    return tuple(frozenset((number, lemmas[number], *lemmas[number].split(", "))) for number in numbers)


def _by_number(path: Path) -> Mapping[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines if line)
