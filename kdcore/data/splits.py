"""The names of splits: which folder, array or value of a table stands for training, choosing or measuring."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from base.errors import DatasetUnreadable

Role = Literal["train", "val", "dev", "eval", "holdout", "test"]
_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating"), "val"),
    **dict.fromkeys(("dev", "devel", "development"), "dev"),
    **dict.fromkeys(("eval", "evaluation", "evaluate"), "eval"),
    **dict.fromkeys(("holdout", "heldout"), "holdout"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_USUAL = {
    *("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "pictures", "pics", "photos", "samples"),
    *("files", "folder", "dir", "split", "seg", "raw", "final", "x"),
}
"""Words beside a split's own word that do not change its meaning."""
MEASURES: tuple[Role, ...] = ("test", "holdout", "eval", "val", "dev")
"""The split that measures the student is the first of these that the data has."""
CHOOSES: tuple[Role, ...] = ("val", "dev", "eval", "holdout")
"""The split that chooses the best epoch is the first of these that does not measure."""


def split_role(name: str) -> tuple[Role, tuple[str, ...]] | None:
    """Return the split that a folder or array is named after, and the words beside its own that are not usual ones.

    `seg_train` is ("train", ()), `flowers-test` is ("test", ("flowers",)); None for a name of no split, or of two.
    Kaggle's `PublicTest` chooses the best epoch, as `dev`, and its `PrivateTest` is the test.
    """
    plain = re.sub(r"(h[oe]ld)[\W_]*(out)", r"\1\2", name.lower())
    for word, role in (("public", "dev"), ("private", "test")):
        test_of = rf"(?<![^\W\d_])(?:{word}[\W_]*test|test[\W_]*{word})(?![^\W\d_])"
        plain = re.sub(test_of, role, plain)
    plain = re.sub(r"train[\W_]*val(?![^\W\d_])", "trainval", plain)
    roles, rest = [], []
    for word in re.findall(r"[^\W\d_]+", plain):
        stem = next((word.removesuffix(usual) for usual in _USUAL if word.removesuffix(usual) in _WORDS), word)
        if stem in _WORDS:
            roles.append(_WORDS[stem])
        elif word not in _USUAL:
            rest.append(word)
    return (roles[0], tuple(rest)) if len(roles) == 1 else None


def split_roles(names: Iterable[str]) -> dict[str, Role]:
    """Return those names that are named after splits. Other words beside the split's own are allowed only if two splits
    have the same ones: `flowers_train` and `flowers_test`, but not `train station`."""
    parsed = {name: found for name in names if (found := split_role(name)) is not None}
    roles_of: dict[tuple[str, ...], set[Role]] = {}
    for name, (role, rest) in parsed.items():
        roles_of.setdefault(rest or _kaggle(name), set()).add(role)
    return {name: role for name, (role, rest) in parsed.items() if not rest or len(roles_of[rest]) > 1}


def _kaggle(name: str) -> tuple[str, ...]:
    """Return the word of `public_test` or `private_test` that names its split. Beside `public_train` it is a word that
    both have."""
    return tuple(re.findall("public|private", name.lower()))[:1]


def class_and_split(name: str) -> tuple[str, str] | None:
    """Return the parts of a folder's name if it is of a class and a split: `pos_train` and `train-pos` are ("pos",
    "train"); None for other names."""
    role = split_role(name)
    if role is None or not role[1]:
        return None
    for pattern in (r"(?P<class>.+)[-_. ](?P<split>[^\W_]+)", r"(?P<split>[^\W_]+)[-_. ](?P<class>.+)"):
        parts = re.fullmatch(pattern, name)
        if parts is not None and split_role(parts["split"]) == (role[0], ()) and split_role(parts["class"]) is None:
            return parts["class"].strip("-_. "), parts["split"]
    return None


def by_role(names: Mapping[str, Role]) -> dict[Role, str]:
    """Return names by split. Raises DatasetUnreadable if two names stand for one split."""
    found: dict[Role, str] = {}
    for name, role in names.items():
        if role in found:
            raise DatasetUnreadable(
                f"Both {found[role]!r} and {name!r} are named like the split {role!r}.",
                "If they are parts of one split, put their images into one of them. If they are different classes, "
                "name the folders <split>/<class>, or all of them <class>_<split> with the images directly inside.",
            )
        found[role] = name
    return found


def held_out(roles: Iterable[Role]) -> tuple[Role | None, Role | None]:
    """Return which split measures and which one chooses the best epoch."""
    present = set(roles)
    measures = next((role for role in MEASURES if role in present), None)
    return measures, next((role for role in CHOOSES if role in present and role != measures), None)
