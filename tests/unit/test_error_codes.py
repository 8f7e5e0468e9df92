"""Every error has a code, and docs/errors.md lists them all."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import errors_page  # noqa: E402

WITHOUT_CODES: tuple[str, ...] = ()
"""Rooms whose errors may still lack a code."""


def test_the_page_lists_every_code_and_message() -> None:
    assert errors_page.PAGE.read_text(encoding="utf-8") == errors_page.page(), "make errors-page writes it again"


def test_every_error_has_a_code() -> None:
    rooms = tuple(f"megatron_solopo/{room}/" for room in WITHOUT_CODES)
    wrong = [
        raised.place
        for raised in errors_page.all_raised()
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", raised.code) and not raised.place.startswith(rooms)
    ]
    assert wrong == []


RAISED = '''
class Gone(UserError):
    """A subclass."""

TABLE = {"lost": "gone", "late": "did not come"}

def check(path, error):
    raise UserError("no-text", f"{path}: {len(error.names)} of " f"{', '.join(names)}: no text" + remedy) from None
    raise errors.Gone("process-gone", "gone")
    raise UserError(error.code, f"{path}: {error}")
    raise UserError(f"{path}: no code")
    raise UserError(of_caller, "a name")
    kind, remedy = "other-run", "keep it"
    raise UserError(kind, remedy)
    which = "loss-nan" if path else "gradient-nan"
    raise UserError(which, "step")
    key = find(error)
    raise UserError(key, f"{TABLE[key]}")
'''


def test_codes_and_messages_are_read_from_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").write_text(RAISED)
    monkeypatch.setattr(errors_page, "ROOT", tmp_path)
    assert [(raised.place, raised.code, raised.template) for raised in errors_page.all_raised()] == [
        ("tools/a.py:8", "no-text", "{path}: {len(error.names)} of {…}: no text{remedy}"),
        ("tools/a.py:9", "process-gone", "gone"),
        ("tools/a.py:11", "", "{path}: no code"),
        ("tools/a.py:12", "", "a name"),
        ("tools/a.py:14", "other-run", "{remedy}"),
        ("tools/a.py:16", "gradient-nan", "step"),
        ("tools/a.py:16", "loss-nan", "step"),
        ("tools/a.py:18", "late", "{TABLE[key]}"),
        ("tools/a.py:18", "lost", "{TABLE[key]}"),
    ]
    section = "## no-text\n\n- `{path}: {len(error.names)} of {…}: no text{remedy}`  \n  `tools/a.py`\n"
    assert section in errors_page.page()


def test_codes_in_tests_are_those_of_the_product() -> None:
    """A test of a code that nothing raises would be a typo, or of an error that is gone."""
    codes = {raised.code for raised in errors_page.all_raised()}
    unknown = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case (
                    ast.Call(func=ast.Name(id="refused"), args=[ast.Constant(value=code), *_])
                    | ast.Call(func=ast.Name(id="check_refusal"), args=[_, ast.Constant(value=code), *_])
                ):
                    unknown += [f"{path.name}:{node.lineno}: {code}"] if code not in codes else []
    assert unknown == []
