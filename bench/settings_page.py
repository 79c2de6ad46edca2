"""docs/settings.md, made from the classes of the settings: `python -m bench.settings_page` writes it anew.

tests/bench/test_settings_page.py compares the file with the classes.
"""

import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from bench.processes import REPOSITORY
from store.settings import FromEnvironmentOrFile, Settings
from worker.context import Options

PAGE = REPOSITORY / "docs" / "settings.md"
HEAD = """# Settings

Made from the code by `python -m bench.settings_page`; a test compares it.

A setting is a variable of the environment, or a line of a file that `DISTILLERY_CONFIG` names; the variable is
stronger. The file is TOML: the name without `DISTILLERY_`, in small letters. What only workers read is in its table
`[worker]`. A name that no setting has, and a value that no setting takes, ends the program with a line that says so.
All processes of one service need the same database, broker, files and lease; sizes are in bytes, times in seconds.

```toml
home = "/var/lib/distillery"
database_url = "postgresql://distillery@db.internal/distillery"
broker_url = "redis://redis.internal:6379/0"
log_format = "json"

[worker]
threads = 4
```

A password belongs into PostgreSQL's own `PGPASSWORD` or `~/.pgpass`, where no log and no list of processes shows it.
"""
OTHERS = """
## Variables that are not settings of the server

| variable | read by | meaning |
|---|---|---|
| `DISTILLERY_CONFIG` | API, workers, `python -m store` | the file with settings |
| `DISTILLERY_WEIGHTS` | engines | a folder with published weights, asked first, or the address of a mirror |
| `OMP_NUM_THREADS` | engines | threads of a training, where neither job nor worker sets a number |
| `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` | engines | as for the Hugging Face client: timm's weights |
| `OTEL_…` | API | OpenTelemetry's own, with `DISTILLERY_OTEL`: `OTEL_EXPORTER_OTLP_ENDPOINT` … |
| `FORWARDED_ALLOW_IPS` | API | proxies whose `X-Forwarded-For` is believed; default: this machine |
| `DISTILLERY_URL`, `DISTILLERY_API_KEY` | the command line, the SDK | the server, and the key to send |
| `DISTILLERY_VENV`, `PYTHON` | `./run` | its folder for the environment, and the interpreter |
"""


def page() -> str:
    """Return the page as it should be."""
    parts = [HEAD]
    for title, kind in (("Of all programs", Settings), ("Of workers: `[worker]` in the file", Options)):
        parts += [f"\n## {title}\n\n| variable | type | default | meaning |\n|---|---|---|---|\n", *_rows(kind)]
    return "".join([*parts, OTHERS])


def _rows(kind: type[FromEnvironmentOrFile]) -> list[str]:
    rows = []
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.__name__}.{name} has no description"
        text = field.description.removesuffix(".").replace("|", "\\\\|")
        rows.append(f"| `DISTILLERY_{name.upper()}` | {_type(field)} | {_default(name, field)} | {text} |\n")
    return rows


def _type(field: FieldInfo) -> str:
    bounds = {type(one).__name__: one for one in field.metadata}
    limits = [f"{sign} {getattr(bounds[name], name.lower()):g}" for name, sign in SIGNS.items() if name in bounds]
    return " ".join([_plain(field.annotation), *[", ".join(limits)] * bool(limits)])


SIGNS = {"Gt": ">", "Ge": "≥", "Lt": "<", "Le": "≤"}
WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}


def _plain(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, types.UnionType):
        return _plain(next(one for one in get_args(kind) if one is not type(None)))
    if get_origin(kind) is tuple:
        return "JSON list"
    return WORDS.get(getattr(kind, "__name__", ""), str(kind))


def _default(name: str, field: FieldInfo) -> str:
    if name == "engine":
        return "our own"
    value = field.default
    if value is None or value in ("", Path()):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
