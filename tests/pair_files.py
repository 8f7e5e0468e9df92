"""Contexts, sampled responses and the pairs that build-pairs makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from option_lines import last_wins_in

from megatron_solopo.data.pairing import build_pairs
from megatron_solopo.data.schema import PreferenceGroup, read_groups

main = last_wins_in(build_pairs.main)


def contexts(path: Path, answers: dict[str, list[str]]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        for question_id, accepted in answers.items():
            short, long = ([{"role": "user", "content": f"{size} {question_id}"}] for size in ("short", "long"))
            out.write(
                json.dumps(
                    {
                        "id": question_id,
                        "question": "?",
                        "answers": accepted,
                        "short_messages": short,
                        "long_messages": long,
                        "short_tokens": 3,
                        "long_tokens": 9,
                        "source": "test",
                    }
                )
                + "\n"
            )
    return path


def responses(path: Path, records: dict[str, list[str]], **finished: list[bool]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        for question_id, texts in records.items():
            marks = {"finished": finished[question_id]} if question_id in finished else {}
            out.write(json.dumps({"id": question_id, "responses": texts, **marks}) + "\n")
    return path


def build(files: list[str], tmp_path: Path, *more: str) -> list[PreferenceGroup]:
    assert main([*files, "--output", str(tmp_path / "groups.jsonl"), *more]) == 0
    return list(read_groups(tmp_path / "groups.jsonl"))
