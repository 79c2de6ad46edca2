"""The names in the cache of data sets. The engine fills the cache and holds these locks meanwhile; the store trims it.

<key>/              decoded            <key>.lock, while it is decoded, or found and marked as used
<key>.partial/      being decoded
<key>-streamed/     labels and places of pictures that are decoded when they are needed, locked as <key>/
<key>-teacher/      what a teacher answers for views (`kdcore/cache/store.py`); all its users share <key>-teacher.lock
<key>-logits/       a teacher's logits on test images, locked while they are written
downloads/<name>/   as published       downloads/<name>.lock; it is also in use while a lock `<name>-….lock` is held
downloads/<name>.partial/
projects/<project>/ all of this for a project; that of `default` is the folder itself, as before there were projects

Projects share no entry: a job that finds one, or is fast, would tell that another project has the same data or teacher.
"""

from pathlib import Path

from base.defaults import DEFAULT_PROJECT

DOWNLOADS = "downloads"
PROJECTS = "projects"
STREAMED = "-streamed"
TEACHER = "-teacher"
TEACHER_MAX_BYTES = 2_000_000_000
"""What the stored outputs of all teachers may take of a host, unless a setting says otherwise."""
LOGITS = "-logits"
LOCK = ".lock"
_PARTIAL = ".partial"


def cache_of(cache: Path, project: str) -> Path:
    """Return the folder of a project in a host's cache."""
    return cache if project == DEFAULT_PROJECT else cache / PROJECTS / project


def lock_of(entry: Path) -> Path:
    """Return the lock file of an entry, which is the same for a partial one."""
    return entry.with_name(entry.name.removesuffix(_PARTIAL) + LOCK)


def partial_of(entry: Path) -> Path:
    """Return the folder of an entry while it is filled or deleted."""
    return entry.with_name(entry.name.removesuffix(_PARTIAL) + _PARTIAL)


def is_partial(entry: Path) -> bool:
    return entry.name.endswith(_PARTIAL)
