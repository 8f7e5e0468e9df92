"""MkDocs hooks: pages that are generated, and pages whose Markdown is outside docs/ (`make docs`, mkdocs.yml).

options.md        every option of every command, from the commands' parsers
mutants.md        the mutants of tests/mutation with the tests that must fail
start.md          README.md
launch.md         examples/launch/README.md
contributing.md   CONTRIBUTING.md
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_solopo.arguments import Parser  # noqa: E402
from megatron_solopo.cli import COMMANDS, dispatch  # noqa: E402

OUTSIDE = {"start.md": "README.md", "launch.md": "examples/launch/README.md", "contributing.md": "CONTRIBUTING.md"}
"""Page of the site -> its file in the repository."""
LINK = re.compile(r'(\]\(|src=")([^)"#:\s]+)')


class _Captured(Exception):
    """A parser that was asked for its help."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Returns the parser of a command of `solopo`, as its ``--help`` uses it."""

    def capture(self: Parser, file: Any = None) -> None:
        raise _Captured(self)

    with patch.object(Parser, "print_help", capture):
        try:
            dispatch([command, "--help"])
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f"solopo {command} --help has no parser")


def sections(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, list[argparse.Action]]]:
    """Yields (title, description, options) of the groups of a parser and of its sub-commands."""
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help" and a.help is not argparse.SUPPRESS]
        commands = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
        if actions and not commands:
            title = group.title if group.title not in ("options", "positional arguments") else ""
            yield title or "", group.description or "", actions
        for action in commands:
            for name, sub in action.choices.items():
                for title, _, options in sections(sub):
                    yield f"{name} {title}".strip(), sub.description or "", options


def row(action: argparse.Action) -> str:
    """Returns an option as a row of its table: names, meaning, default."""
    metavar = action.metavar if isinstance(action.metavar, str) else None
    names = ", ".join(action.option_strings)
    if not names:
        names, metavar = metavar or action.dest, None
    elif metavar is None and action.nargs != 0:
        metavar = action.dest.upper() if action.choices is None else "{" + ",".join(map(str, action.choices)) + "}"
    several = " ..." if action.nargs in ("+", "*") else ""
    text = re.sub(r"\s+", " ", action.help or "").replace("%%", "%")
    stated = re.search(
        r" \(default: ([^()]*(?:\([^()]*\))?[^()]*)\)$", text.replace("%(default)s", str(action.default))
    )
    if stated:
        text = text.replace("%(default)s", str(action.default))[: stated.start()]
        default = stated.group(1)
    elif action.required:
        default = "required"
    elif action.nargs == 0 or action.default in (None, argparse.SUPPRESS):
        default = ""
    else:
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
    form = names + (f" {metavar}" if metavar and action.nargs != 0 else "") + several
    meaning, default = (html.escape(cell, quote=False).replace("|", "\\|") for cell in (text, default))
    return f"| `{form}` | {meaning} | {default} |"


def options_page() -> str:
    """Returns every command with its options: names, meaning, default."""
    lines = [
        "# Options of every command",
        "",
        "Generated from the commands' parsers; `solopo COMMAND --help` prints the same. The file of `--config` has the",
        "names with underscores ([option files](pipeline.md#options-in-files)).",
    ]
    for command, (_, about) in COMMANDS.items():
        lines += ["", f"## solopo {command}", "", f"{about[0].upper()}{about[1:]}."]
        if command == "launch":
            lines += ["", "Its options are torchrun's."]
            continue
        before = None
        for title, description, actions in sections(parser_of(command)):
            lines += ["", f"### {command}: {title}", "", description] if title else []
            lines += ["", "| option | meaning | default |", "|---|---|---|"] if title != before else []
            lines += map(row, actions)
            before = title
    return "\n".join(lines) + "\n"


def mutants_page() -> str:
    """Returns the table of tests/mutation/run.py."""
    command = [sys.executable, str(ROOT / "tests" / "mutation" / "run.py"), "--list"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    about = "Generated by `python tests/mutation/run.py --list`; [testing](testing.md#mutants) explains them."
    return f"# Mutants\n\n{about}\n\n{table}"


def moved(text: str, source: str) -> str:
    """Returns the text of a file of the repository with relative links as the site has them."""
    pages = {path: page for page, path in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return match[0]  # strict mode reports it
        here = posixpath.dirname(source.removeprefix("docs/")) if source.startswith("docs/") else ""
        return match[1] + posixpath.relpath(target, here or ".")

    return LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of this module."""
    from mkdocs.structure.files import File

    pages = {name: moved((ROOT / path).read_text(encoding="utf-8"), path) for name, path in OUTSIDE.items()}
    pages |= {"options.md": options_page(), "mutants.md": mutants_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links out of docs/ to the pages of this module."""
    return markdown if page.file.generated_by else moved(markdown, f"docs/{page.file.src_uri}")
