"""docs/report.md: its tables of fields are written from the types in base/wire.py and their docstrings by

    python -m tests.report_page

and compared with these by tests/base/test_wire.py. The text above them is written by hand.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "report.md"
MARK = "<!-- Below, everything is written by `python -m tests.report_page`. -->"
TITLES = {"Report": "The report", "Measured": "A model"}


def types() -> dict[str, ast.ClassDef]:
    """The classes of base/wire.py by name."""
    module = ast.parse((ROOT / "base" / "wire.py").read_text())
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def fields(of: ast.ClassDef) -> Iterator[tuple[str, ast.expr, str]]:
    """Name, type and docstring of each field of a class."""
    for node, after in zip(of.body, [*of.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node.target.id, node.annotation, " ".join(after.value.value.split()) if told else ""


def reached(name: str, known: dict[str, ast.ClassDef]) -> list[str]:
    """A type and all that it contains, in the order in which a reader meets them."""
    found = [name]
    for one in found:
        for _, annotation, _ in fields(known[one]):
            inside = (node.id for node in ast.walk(annotation) if isinstance(node, ast.Name) and node.id in known)
            found += [other for other in dict.fromkeys(inside) if other not in found]
    return found


ANY = "anything"
WORDS = {
    **{"Any": ANY, "str": "text", "int": "integer", "float": "number", "bool": "true or false", "None": "null"},
    "WarningCode": "text",
}


def in_words(node: ast.expr, known: dict[str, ast.ClassDef]) -> str:
    """A type as a reader of JSON knows it."""
    match node:
        case ast.BinOp(left=left, right=right):
            return f"{in_words(left, known)} or {in_words(right, known)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return " or ".join(f"`{ast.literal_eval(value)}`" for value in values)
        case ast.Subscript(value=ast.Name(id=container), slice=inner):
            of = in_words(inner.elts[-1] if isinstance(inner, ast.Tuple) else inner, known)
            if container == "NotRequired":
                return of
            listed = f"({of})" if " or " in of else of
            return f"list of {listed}" if container == "list" else "object" + (f" of {of} by name" if of != ANY else "")
    name = ast.unparse(node)
    return link(name) if name in known else WORDS[name]


def link(name: str) -> str:
    return f"[{name}](#{TITLES.get(name, name).lower().replace(' ', '-')})"


def tables() -> str:
    """The part of the page that is written."""
    known = types()
    parts = []
    for name in reached("Report", known):
        told = ast.get_docstring(known[name]) or ""
        parts += [
            f"## {TITLES.get(name, name)}",
            "",
            " ".join(told.split()),
            "",
            "| field | type | meaning |",
            "|---|---|---|",
        ]
        for field, annotation, meaning in fields(known[name]):
            optional = "NotRequired" in ast.unparse(annotation)
            kind = in_words(annotation, known) + (", or absent" if optional else "")
            parts.append(f"| `{field}` | {kind} | {meaning.replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts)


def page(before: str) -> str:
    """The whole page, given what it was."""
    return f"{before.partition(MARK)[0]}{MARK}\n\n{tables()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
