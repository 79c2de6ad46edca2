"""The layouts of image archives: which folder is a split, which one a class, and what is left out.

Only names count here, and whether a file is an image. `docs/data.md` has the table of layouts. Folders around
everything are ignored. A folder is a split by its name (`split_role`): `train`, `Testing`, `seg_train`, `valid-images`.
Of several held-out splits one measures the student (`MEASURES`), another chooses its best epoch (`CHOOSES`). Images
without class folders get their labels from a table of file and label (`tables.py`) if the archive has one.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from base.errors import DatasetUnreadable
from kdcore.catalog.facts import LeftOut
from kdcore.data.decoding import Split
from kdcore.data.image_files import Header
from kdcore.data.splits import Role, by_role, class_and_split, held_out, split_roles
from kdcore.data.tables import Labelled, Tables

SPLITS = "<split>/<class>/<image>"
CLASSES = "<class>/<image>"
CLASS_SPLITS = "<class>/<split>/<image>"
CLASS_AND_SPLIT = "<class>_<split>/<image>"
SPLITS_AND_TABLE = "<split>/<image> and a table"
TABLE = "<image> and a table"
UNLABELLED = "<image>"
"""The values of `DatasetFacts.layout` for an archive of images."""
READ = (
    "Read are train/<class>/<image> with test/<class>/<image> (and val/), <class>/<image> alone, <class>/train/<image> "
    "with <class>/test/<image>, <class>_train/<image> with <class>_test/<image>, or images beside a table of file and "
    "label, such as labels.csv with the columns filename,label."
)
_MOST_LEFT_OUT = 20
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Member:
    """A file or folder: its position in the archive, its name, and its path below the folder that is read.

    `header` is None for folders and notes (text files); for other files it is the image's, or why it is no image.
    """

    ordinal: int
    name: str
    below: tuple[str, ...]
    header: Header | DatasetUnreadable | None
    is_note: bool = False

    @property
    def is_stray(self) -> bool:
        """True for a file directly in this folder."""
        return self.header is not None and len(self.below) == 1

    @property
    def is_image(self) -> bool:
        return isinstance(self.header, Header)

    def inside(self) -> "Member":
        return Member(self.ordinal, self.name, self.below[1:], self.header, self.is_note)


Classes = dict[str, list[Member]]


@dataclass
class Layout:
    """Files by split and class. Without labels there is one class without a name. `splits` are the folders, tables or
    columns that were found to be splits, with the number of their images."""

    form: str
    classes: dict[Split, Classes]
    splits: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    """Two or more folders that are inside of each class folder: perhaps they are the classes, or masks."""
    respelled: list[tuple[str, str]] = field(default_factory=list)
    """Names in a table, with those of the files that differ from them in case or suffix."""


def _other_notes(members: Iterable[Member]) -> list[LeftOut]:
    """Return the texts beside images without labels that may hold the labels in a form that is not read."""
    paths = (PurePosixPath(one.name.lower()) for one in members if one.is_note)
    counts = Counter(
        path.suffix
        for path in paths
        if path.suffix in (".json", ".xml", ".txt") and not path.stem.startswith(("readme", "licen"))
    )
    why = "no labels are read from them: write a table of file and label, such as labels.csv"
    return [LeftOut(what=f"{suffix} files", count=count, why=why) for suffix, count in counts.items()]


class _Left:
    """Collects why images are not used, by their position in the archive."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[str, str]] = {}
        self.tables: list[LeftOut] = []
        self.respelled: list[tuple[str, str]] = []

    def add(self, members: Iterable[Member], what: str, why: str) -> None:
        for member in members:
            if member.is_image:
                self._of.setdefault(member.ordinal, (what, why))

    def note(self, images: Iterable[Member], labelled: Mapping[int, Labelled], read: Tables) -> None:
        """Add what a table says of these images: no label, or another name than the file's."""
        for image in images:
            at = image.ordinal
            if at in labelled and at in read.respelled:
                self.respelled.append((read.respelled[at], image.name))
            elif at not in labelled and at in read.without_label:
                self.add([image], f"images in {read.without_label[at]} whose label is empty", "they have no label")

    def listed(self, members: Sequence[Member], classes: Mapping[Split, Classes]) -> list[LeftOut]:
        """Return every image of the archive that is in no class, and files that are no images, counted by reason."""
        used = {file.ordinal for of in classes.values() for files in of.values() for file in files}
        other = ("files that are no images", "only images are read")
        reasons = Counter(
            self._of.get(member.ordinal, (_folder(member.name), "no split or class is read from it"))
            if member.is_image
            else other
            for member in members
            if member.ordinal not in used and (member.is_image or (member.header is not None and "." in member.name))
        )
        found = [LeftOut(what=what, count=count, why=why) for (what, why), count in reasons.items()]
        return shortened([*found, *self.tables])


def _folder(name: str) -> str:
    return name.rpartition("/")[0] or name


def shortened(left_out: Sequence[LeftOut]) -> list[LeftOut]:
    """Return the list with everything after the twentieth entry counted as one, and long names cut."""
    left_out = [one.model_copy(update={"what": one.what[:_LONGEST_NAME]}) for one in left_out]
    rest = left_out[_MOST_LEFT_OUT:]
    if not rest:
        return left_out
    more = LeftOut(what=f"{len(rest)} more", count=sum(one.count for one in rest), why="of the same kinds")
    return [*left_out[:_MOST_LEFT_OUT], more]


def read_layout(members: Sequence[Member], tables: Callable[[], Tables]) -> Layout:
    """Return images by split and class. `tables` reads the archive's tables; it is called only if labels are missing.

    Raises DatasetUnreadable for a layout without a meaning: the message says what was found, the hint what is read.
    """
    left = _Left()
    here = _unwrapped(members)
    tops = _folders(here)
    named = _by_class_and_split(tops)
    roles = {} if named else split_roles(tops)
    if roles and not any(not _is_flat(tops[name]) for name in roles) and len(roles) < len(tops):
        roles = {}  # Folders of images, some of which are named after splits: a class may be called train.
    if roles and "train" not in roles.values() and len(roles) < len(tops):
        _refuse_a_train_part_beside(tops, roles)
        roles = {}
    if roles:
        layout = _splits(tops, roles, tables, left)
        left.add((one for one in here if one.is_stray), "images beside the splits", "they are in no split")
        for name in tops.keys() - roles.keys():
            left.add(tops[name], name, "it is beside the splits and named like none")
    elif named:
        layout = replace(_class_splits(here, named, left), form=CLASS_AND_SPLIT)
    elif _has_class_splits(tops):
        layout = _class_splits(here, tops, left)
    else:
        layout = _without_splits(here, tops, tables, left)
    if layout.form == UNLABELLED:
        left.tables += _other_notes(members)
    else:
        _refuse_splits_as_classes(layout)
        layout.repeated = _repeated(layout)
    layout.left_out = left.listed(members, layout.classes)
    layout.respelled = left.respelled
    return layout


def _unwrapped(members: Sequence[Member]) -> list[Member]:
    """Return what is inside of the folders around all images: down to folders of splits, or above those of images."""
    here = list(members)
    while (inside := _only_holder(here)) is not None:
        holds_splits = bool(split_roles(_folders(inside)))
        if not holds_splits and any(len(one.below) < 3 for one in here if one.is_image):
            break
        here = inside
    return [one for one in here if not one.is_note]


def _only_holder(here: Sequence[Member]) -> list[Member] | None:
    """Return the content of the one folder that holds all images. None if there are others, or empty ones, or if it is
    a split."""
    tops = _folders(here, notes=True)
    holding = [name for name, inside in tops.items() if _images(inside)]
    empty = [name for name, inside in tops.items() if all(not one.is_note and one.header is None for one in inside)]
    strays = any(one.is_stray and one.is_image for one in here)
    return tops[holding[0]] if len(holding) == 1 and not empty and not strays and not split_roles(holding) else None


def _folders(members: Iterable[Member], notes: bool = False) -> dict[str, list[Member]]:
    """Return the content of each folder directly here; notes are passed over unless they are asked for."""
    folders: dict[str, list[Member]] = {}
    for item in members:
        if item.is_note and (not notes or len(item.below) < 2):
            continue
        if item.below and not item.is_stray:
            folders.setdefault(item.below[0], []).append(item.inside())
    return folders


def _is_flat(inside: Iterable[Member]) -> bool:
    """Return True if images are in no folder."""
    depths = [len(item.below) for item in inside if item.is_image]
    return bool(depths) and max(depths) == 1


def _images(members: Iterable[Member]) -> list[Member]:
    return [item for item in members if item.is_image]


def _by_name(members: Iterable[Member]) -> list[Member]:
    return sorted((item for item in members if item.header is not None), key=lambda item: item.name)


def _classes(members: list[Member]) -> Classes:
    """Return files by class; classes and files are in the order of their names."""
    stray = next((item for item in members if item.is_stray and item.is_image), None)
    if stray is not None:
        raise DatasetUnreadable(
            f"{stray.name} is in no class folder.", f"Put each image in the folder of its class. {READ}"
        )
    folders = _folders(members)
    return {name: _by_name(folders[name]) for name in sorted(folders)}


def _refuse_a_train_part_beside(tops: Mapping[str, list[Member]], roles: Mapping[str, Role]) -> None:
    """Raise if a held-out folder has the class folders beside it; otherwise it is a class with a split's name."""
    for name in roles:
        classes = set(_folders(tops[name]))
        others = [set(_folders(inside)) for other, inside in tops.items() if other not in roles]
        if classes & (tops.keys() - roles.keys()) or (len(classes) > 1 and classes in others):
            raise _no_train(name)


def _no_train(name: str) -> DatasetUnreadable:
    return DatasetUnreadable(f"There is a folder {name!r} but none named 'train'.", READ)


def _refuse_splits_as_classes(layout: Layout) -> None:
    roles = split_roles(layout.classes["train"])
    if layout.form not in (TABLE, SPLITS_AND_TABLE) and len(set(roles.values())) > 1:
        names = " and ".join(repr(name) for name in sorted(roles))
        raise DatasetUnreadable(f"The folders {names} are named like splits, but were to be read as classes.", READ)


def _repeated(layout: Layout) -> list[str]:
    """Return the folders inside of the class folders if all of these hold the same ones, at least two."""
    of_classes = [{one.below[0] for one in files if len(one.below) > 1} for files in layout.classes["train"].values()]
    is_repeated = len(of_classes) > 1 and len(of_classes[0]) > 1 and all(of == of_classes[0] for of in of_classes)
    return sorted(of_classes[0])[:_MOST_LEFT_OUT] if is_repeated and layout.form in (CLASSES, SPLITS) else []


def _splits(
    tops: Mapping[str, list[Member]], roles: Mapping[str, Role], tables: Callable[[], Tables], left: _Left
) -> Layout:
    """Read folders of splits: each holds class folders, or images that a table labels."""
    names = by_role(roles)
    inside = {role: _inner(tops[name]) for role, name in names.items()}
    known = _folders(inside.get("train", [])).keys()
    inside = {role: _without_one_folder(members, known) for role, members in inside.items()}
    flat = {role: _images(members) for role, members in inside.items() if _is_flat(members)}
    found: dict[Role, Classes] = {}
    if "train" not in names and len(flat) < len(inside):
        raise _no_train(next(iter(names.values())))
    if "train" in names and "train" not in flat:
        found["train"] = _classes(inside["train"])
    labelled = _from_tables(flat, found.get("train"), tables, left) if flat else {}
    found |= labelled
    if "train" not in found:
        these = " and ".join(repr(name) for role, name in names.items() if role in flat)
        raise DatasetUnreadable(f"The images in {these} are in no class folders, and no table has their labels.", READ)
    for role, members in inside.items():
        if role not in flat and role != "train" and (_images(members) or _is_only_held_out(role, inside)):
            found[role] = _classes(members)
        elif role in flat and role not in found:
            left.add(members, names[role], "its images are in no class folders, and no table has their labels")
    return _assigned(found, names, SPLITS_AND_TABLE if labelled else SPLITS, left)


def _is_only_held_out(role: Role, inside: Mapping[Role, list[Member]]) -> bool:
    """Return True for an empty split if no other held-out split has images: then it is named as a fault."""
    return not any(_images(members) for other, members in inside.items() if other not in ("train", role))


def _inner(members: list[Member]) -> list[Member]:
    """Return what is inside of folders around all images of a split: the repeated one of seg_train/seg_train."""
    while True:
        folders = _folders(members)
        if len(folders) != 1 or any(len(item.below) < 3 for item in members if item.is_image) or not _images(members):
            return members
        members = next(iter(folders.values()))


def _without_one_folder(members: list[Member], known: Collection[str]) -> list[Member]:
    """Return what is inside of a split's only folder if that is none of several known classes: images without class
    folders, as in Tiny ImageNet's val/images."""
    holding = {name: inside for name, inside in _folders(members).items() if _images(inside)}
    is_one = len(holding) == 1 and not holding.keys() & known and all(len(one.below) == 2 for one in _images(members))
    return next(iter(holding.values())) if is_one and len(known) > 1 else members


def _assigned(found: Mapping[Role, Classes], names: Mapping[Role, str], form: str, left: _Left) -> Layout:
    """Return the layout in which the held-out splits have their tasks; those without a task are left out."""
    measures, chooses = held_out(found)
    classes: dict[Split, Classes] = {"train": found["train"]}
    if chooses is not None:
        classes["val"] = _known(found[chooses], found["train"], names[chooses], left)
        if not any(classes["val"].values()):
            del classes["val"]
    if measures is not None:
        classes["test"] = found[measures]
    for role in found.keys() - {"train", measures, chooses}:
        why = (
            f"{names[measures]!r} measures and {names[chooses]!r} chooses the best epoch"
            if measures and chooses
            else ""
        )
        left.add((file for files in found[role].values() for file in files), names[role], why)
    used = {"train": "train", "val": chooses, "test": measures}
    counts = {names[used[split]]: sum(map(len, of.values())) for split, of in classes.items()}  # type: ignore[index]
    return Layout(form, classes, counts)


def _known(classes: Classes, train: Classes, name: str, left: _Left) -> Classes:
    """Return a validation split with the classes of the training split; it need not have all, and others are left out.
    It was not read in earlier versions, so its faults must not refuse what they accepted."""
    for other in classes.keys() - train.keys():
        left.add(classes[other], f"{name}/{other}", "the training split has no such class")
    return {each: classes.get(each, []) for each in train}


def _has_class_splits(tops: Mapping[str, list[Member]]) -> bool:
    """Return True if a class folder holds a training and a held-out folder."""
    roles = [set(split_roles(_folders(inside)).values()) for inside in tops.values()]
    return any("train" in found and len(found) > 1 for found in roles)


def _by_class_and_split(tops: Mapping[str, list[Member]]) -> dict[str, list[Member]]:
    """Return the content of class folders with folders of splits for flat folders such as `pos_train` and `pos_test`.
    Empty unless all folders of images are named so, and there are two classes and two splits."""
    classes: dict[str, list[Member]] = {}
    for name, inside in tops.items():
        if not _images(inside):
            continue
        parts = class_and_split(name)
        if parts is None or not _is_flat(inside):
            return {}
        class_name, split = parts
        moved = [replace(one, below=(split, *one.below)) for one in inside]
        classes.setdefault(class_name, []).extend(moved)
    return classes if len(classes) > 1 and _has_class_splits(classes) else {}


def _class_splits(here: list[Member], tops: Mapping[str, list[Member]], left: _Left) -> Layout:
    """Read class folders that each hold folders of splits."""
    found: dict[Role, Classes] = {}
    names: dict[Role, str] = {}
    for name in sorted(tops):
        folders = _folders(tops[name])
        of_class = by_role(split_roles(folders))
        if "train" not in of_class:
            raise DatasetUnreadable(f"The class {name!r} has no folder 'train', and other classes have one.", READ)
        for role, folder in of_class.items():
            names.setdefault(role, folder)
            found.setdefault(role, {})[name] = _by_name(folders[folder])
        why = "it is in no split of its class"
        left.add((one for one in tops[name] if one.is_stray), f"images directly in {name}", why)
        for folder in folders.keys() - of_class.values():
            left.add(folders[folder], f"{name}/{folder}", why)
    left.add((one for one in here if one.is_stray), "images beside the classes", "they are in no class folder")
    return _assigned(found, names, CLASS_SPLITS, left)


def _without_splits(
    here: list[Member], tops: Mapping[str, list[Member]], tables: Callable[[], Tables], left: _Left
) -> Layout:
    """Read class folders alone, images that a table labels, or images without labels."""
    images = _images(here)
    flat = _flat(here, tops)
    in_classes = not flat and all(len(one.below) > 1 for one in images)
    read = tables()
    folders = {one.ordinal: one.below[0] for one in images} if in_classes else None
    labelled = read.of(images, folders=folders)
    if folders is not None:
        labelled = labelled or read.lists(images, folders)
    left.tables += read.ignored
    if labelled:
        left.note(images, labelled, read)
        return _by_table(images, labelled, sorted if in_classes else in_order, left)
    left.tables += read.useless
    if flat and all(len(PurePosixPath(one.name).parts) < 3 for one in flat):
        left.tables += read.unread
        return Layout(UNLABELLED, {"train": {"": _by_name(flat)}})
    return Layout(CLASSES, {"train": _classes(here)})


def _flat(here: list[Member], tops: Mapping[str, list[Member]]) -> list[Member]:
    """Return images without class folders: directly here, or in one folder around all of them. In a folder further
    inside they are a class, the only one."""
    if len(tops) == 1 and all(len(item.below) == 2 for item in here if item.is_image):
        here = next(iter(tops.values()))
    return [item for item in here if item.is_stray] if _is_flat(here) else []


def _by_table(
    images: Sequence[Member],
    labelled: Mapping[int, Labelled],
    order: Callable[[Iterable[str]], list[str]],
    left: _Left,
) -> Layout:
    """Return the layout of images whose labels or splits are in tables."""
    found: dict[Role, Classes] = {}
    names: dict[Role, str] = {}
    class_names = order({one.label for one in labelled.values()})
    values = split_roles({one.split for one in labelled.values() if one.split is not None})
    for image in _by_name(images):
        one = labelled.get(image.ordinal)
        if one is None:
            left.add([image], "images that no table names", "they have no label")
            continue
        if one.split is not None and one.split not in values:
            raise DatasetUnreadable(
                f"{one.table} has {image.name} in the split {one.split!r}.",
                "Splits are named train, val (or valid, dev) and test (or eval, holdout).",
            )
        role = values[one.split] if one.split is not None else "train"
        names.setdefault(role, one.split or "train")
        found.setdefault(role, {name: [] for name in class_names})[one.label].append(image)
    if "train" not in found:
        raise DatasetUnreadable(
            f"The tables name no images of a training split, only of {', '.join(names.values())}.", READ
        )
    layout = _assigned(found, names, TABLE, left)
    return layout if values else replace(layout, splits={})


def _from_tables(
    flat: Mapping[Role, list[Member]], known: Classes | None, tables: Callable[[], Tables], left: _Left
) -> dict[Role, Classes]:
    """Return images of splits without class folders, by the labels of tables. The classes are those of the training
    split if it has class folders; then a label may also be the number of its class, from 0."""
    images = [image for members in flat.values() for image in members]
    role_of = {image.ordinal: role for role, members in flat.items() for image in members}
    read = tables()
    labelled = read.of(images, roles=role_of, classes=None if known is None else list(known))
    left.tables += [*read.ignored, *([] if labelled else read.useless)]
    left.note(images, labelled, read)
    train = [one.label for ordinal, one in labelled.items() if role_of[ordinal] == "train"]
    class_names = list(known) if known is not None else in_order(train)
    found: dict[Role, Classes] = {}
    for role, members in flat.items():
        for image in _by_name(members):
            one = labelled.get(image.ordinal)
            if one is None:
                if labelled and any(other.ordinal in labelled for other in members):
                    left.add([image], f"images of {role} that no table names", "they have no label")
            elif one.label not in class_names:
                left.add(
                    [image], f"images of {role} of the class {one.label!r}", "the training split has no such class"
                )
            else:
                found.setdefault(role, {name: [] for name in class_names})[one.label].append(image)
    return found


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the classes of a table: sorted, by value if all are whole numbers, as 10 or 10.0."""
    distinct = set(labels)
    if all(re.fullmatch(r"\d{1,9}(\.0{1,9})?", label) for label in distinct):
        return sorted(distinct, key=lambda label: (float(label), label))
    return sorted(distinct)
