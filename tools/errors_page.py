#!/usr/bin/env python3
"""docs/errors.md: every code of a `UserError` with its messages and the files that raise it (`make errors-page`)."""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
SOURCES = ("megatron_solopo", "tools")
LONGEST = 30
"""Characters of an expression that a template shows; a longer one is an ellipsis."""

ABOUT = """\
# Error codes

A mistake that a user can correct ends a command with exit status 2 and one line on stderr:
`error: MESSAGE [CODE]`. The message names the flag, the file and line, or the rank, and what to change.
A code is the kind of mistake: it stays the same where messages change, so scripts compare codes.
In Python, `UserError.code` and `UserError.message` hold both.

`make errors-page` generates this page from the code.
"""


@dataclass(frozen=True)
class Raised:
    """A place in the code that makes a `UserError`.

    Attributes:
        place: "megatron_solopo/cli.py:120".
        code: "" where the place has none.
        template: the message, with {expressions}; "" where it is that of another error.
    """

    place: str
    code: str
    template: str

    @property
    def file(self) -> str:
        return self.place.rpartition(":")[0]


def raised_in(path: Path, kinds: set[str]) -> Iterator[Raised]:
    """Yields the places of a file that call one of these classes. A place that takes its code from another error is
    left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or _last_name(node.func) not in kinds:
            continue
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        if len(node.args) != 2:
            yield Raised(place, "", template(node.args[0]) if node.args else "")
        elif not (isinstance(node.args[0], ast.Attribute) and node.args[0].attr == "code"):
            for code in sorted(codes(node.args[0], tree)) or [""]:
                yield Raised(place, code, template(node.args[1]))


def codes(node: ast.expr, tree: ast.Module) -> set[str]:
    """Returns the texts that an expression may be: constants, and what a name is assigned or which table it is a key
    of."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return codes(body, tree) | codes(orelse, tree)
        case ast.Name(id=name):
            tables: dict[str, ast.Dict] = {}
            values: list[ast.expr | None] = []
            for part in ast.walk(tree):
                match part:
                    case ast.Assign(targets=[ast.Name(id=table)], value=ast.Dict() as keys):
                        tables[table] = keys
                    case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                        values.append(value)
                    case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=elements)):
                        pairs = zip(targets, elements, strict=False)
                        values += [value for target, value in pairs if _last_name(target) == name]
            for part in ast.walk(tree):
                match part:
                    case ast.Subscript(value=ast.Name(id=table), slice=ast.Name(id=key)) if key == name:
                        values += tables[table].keys if table in tables else []
            return {code for value in values if isinstance(value, ast.expr) for code in codes(value, tree)}
    return set()


def all_raised() -> list[Raised]:
    """Returns every place, by file and line."""
    files = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    kinds = error_classes(files)
    return [raised for path in files for raised in sorted(raised_in(path, kinds), key=_line)]


def error_classes(files: list[Path]) -> set[str]:
    """`UserError` and its subclasses."""
    kinds = {"UserError"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and kinds & {_last_name(base) for base in node.bases}:
                kinds.add(node.name)
    return kinds


def template(node: ast.expr) -> str:
    """Returns a message as a text with {expressions}."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case ast.FormattedValue(value=expression):
            return template(expression) if isinstance(expression, ast.JoinedStr) else _shown(expression)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
        case ast.Call(func=ast.Attribute(value=text, attr="lstrip" | "rstrip" | "strip")):
            return template(text)
    return _shown(node)


def _shown(expression: ast.expr) -> str:
    text = ast.unparse(expression)
    return f"{{{text}}}" if len(text) <= LONGEST and '"' not in text and "'" not in text else "{…}"


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _line(raised: Raised) -> int:
    return int(raised.place.rpartition(":")[2])


def page() -> str:
    """Returns the text of docs/errors.md: a section for each code, in alphabetical order."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for raised in all_raised():
        if raised.code:
            files = places[raised.code][raised.template]
            files += [raised.file] if raised.file not in files else []
    lines = [ABOUT]
    for code, templates in sorted(places.items()):
        lines += [f"## {code}", ""]
        for text, files in templates.items():
            lines.append(f"- {_code(text)}  \n  {', '.join(f'`{file}`' for file in files)}")
        lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Markdown's code span of a text that may hold backticks."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
