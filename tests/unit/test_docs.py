"""README and docs: links, generated pages, the figure, the files that the design names, and the field's words."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from megatron_solopo.cli import COMMANDS, dispatch, usage
from megatron_solopo.config import OWNER, flag

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import demo_figure  # noqa: E402
import docs_site  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/launch/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]*`", re.M | re.S)
IDIOMS = {
    r"learnt": "learned, trained on",
    r"(?:go|goes|going|gone|went) on": "resume, continue",
    r"tells?|told": "report, log, distinguish",
    r"lends?|lent": "map, share",
    r"stands?|stood|standing": "is, occurs",
    r"heard": "requested",
    r"continuations?": "response, completion",
    r"companions?": "files beside the weights",
    r"boards?": "logging",
    r"health": "monitoring",
    r"mends?|mended": "fix",
    r"nobody": "no process, no person",
    r"short side stopped": "stop-grad on short",
}
"""Words of a private dialect -> the field's words. Names of files and quoted messages, which are code, are exempt."""


def idioms_in(text: str) -> list[str]:
    """The idioms outside code, each with its line."""
    prose = CODE.sub(lambda match: "\n" * match[0].count("\n"), text)
    return [
        f"line {number}: {match[0]!r}; write: {better}"
        for number, line in enumerate(prose.splitlines(), 1)
        for idiom, better in IDIOMS.items()
        for match in re.finditer(rf"(?<![\w-])(?:{idiom})(?![\w-])", line, re.I)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_speak_the_fields_language(page: Path) -> None:
    assert not idioms_in(page.read_text(encoding="utf-8"))


def test_help_speaks_the_fields_language() -> None:
    """Help of every command, as the options page has it, and of the list of commands."""
    assert not idioms_in(docs_site.options_page()) and not idioms_in(usage())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r'(?:\]\(|src=")([^)"\s]+)', CODE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        pass

    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    listed = [page for section in navigation for pages in section.values() for item in pages for page in item.values()]
    written = [str(page.relative_to(ROOT / "docs")) for page in PAGES if (ROOT / "docs") in page.parents]
    assert sorted(listed) == sorted([*written, *docs_site.OUTSIDE, "options.md", "mutants.md"])
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert not [
        name for name in [*written, *docs_site.OUTSIDE.values()] if f"{name})" not in index and name != "index.md"
    ]


def test_the_options_page_has_what_help_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = docs_site.options_page()
    for command in COMMANDS.keys() - {"launch"}:
        with pytest.raises(SystemExit):
            dispatch([command, "--help"])
        section = page.partition(f"\n## solopo {command}\n")[2].partition("\n## ")[0]
        printed = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M)
        assert [name for name in printed if f"`{name}" not in section] == [], command
    train = page.partition("\n## solopo train\n")[2].partition("\n## ")[0]
    for name, owner in OWNER.items():
        default = (
            {True: "on", False: "off"}[owner.spec.default]
            if isinstance(owner.spec.default, bool)
            else owner.spec.default
        )
        row = re.search(rf"^\| `{flag(name)}[ ,`].*\| (.*) \|$", train, re.M)
        assert row and (default is None or row[1] == str(default)), name
    assert "### convert-checkpoint: hf-to-megatron" in page and "required |" in page


def test_links_of_pages_from_outside_docs_are_those_of_the_site() -> None:
    assert docs_site.moved("[a](docs/data.md#x) [b](../CONTRIBUTING.md)", "README.md") == (
        "[a](data.md#x) [b](../CONTRIBUTING.md)"
    )
    assert docs_site.moved("[a](../README.md)", "docs/index.md") == "[a](start.md)"
    assert docs_site.moved("[a](../examples/launch/README.md)", "docs/data.md") == "[a](launch.md)"
    assert (
        docs_site.moved("[a](../data.md) [b](https://x.y)", "docs/evidence/z.md") == "[a](../data.md) [b](https://x.y)"
    )


def test_the_mutants_page_lists_every_mutant() -> None:
    rows = re.findall(r"^\| (.*?) \| `", docs_site.mutants_page(), re.M)
    assert len(rows) > 200 and "alpha dropped" in rows


def test_the_figure_is_that_of_the_recorded_results(tmp_path: Path) -> None:
    lengths, series = demo_figure.read_table(demo_figure.TABLE.read_text(encoding="utf-8"))
    assert lengths == [8, 16, 32, 64] and len(series) == 5 and series["base"][0] == (0.92, 0.89, 0.95)
    assert demo_figure.main(["--output", str(tmp_path / "demo.svg")]) == 0
    drawn, kept = (
        re.findall(r' d="(M [^"]*)"', path.read_text()) for path in (tmp_path / "demo.svg", demo_figure.FIGURE)
    )
    assert drawn == kept, "make figure draws it again"
    assert demo_figure.FIGURE.stat().st_size < 60 * 1024


def test_the_design_names_every_module_where_it_is() -> None:
    """Each section of a room names all its files (its folders are named as such), and none that is not there."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    package = ROOT / "megatron_solopo"
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = re.findall(r"^\| (`[^|]*) \|", body, re.M)
        names = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w/.-]+)`", row)}
        room = package / title
        if room.is_dir() and room != package:
            there = {p.name for p in room.iterdir() if (p.suffix == ".py" or p.is_dir()) and p.name[:2] != "__"}
            assert names == there, title
    base = {name for name in re.findall(r"`(\w+\.py)`", text)}
    assert not {path.name for path in package.glob("*.py") if path.name[:2] != "__"} - base
