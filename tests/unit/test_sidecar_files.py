"""The files beside the weights of an exported folder: where generation stops, and all chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_model
from transformers import AutoTokenizer, GenerationConfig

from megatron_solopo.conversion.sidecar_files import SidecarFiles


@pytest.mark.parametrize(
    ("generation", "model", "stops"),
    [
        ({"eos_token_id": 5, "temperature": 0.7}, {}, [5, 9]),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 4}, [5, 7, 9]),
        ({"temperature": 0.7}, {}, [9]),
        (None, {"eos_token_id": 4, "bos_token_id": 3}, [4, 9]),
        (None, {}, [9]),
    ],
)
def test_the_trained_end_of_turn_joins_the_stops(
    tmp_path: Path, generation: dict[str, Any] | None, model: dict[str, Any], stops: list[int]
) -> None:
    source, folder = tmp_path / "source", tmp_path / "new"
    source.mkdir(), folder.mkdir()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    SidecarFiles(source, json.dumps(model), end_of_turn=9).write(folder)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == (model if generation is None else generation) | {"eos_token_id": stops}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == stops


@pytest.mark.parametrize("text", ['{"eos_token_id": 9}', '{"eos_token_id":[4,\n9]}', None])
def test_stops_that_include_it_stay_as_they_are(tmp_path: Path, text: str | None) -> None:
    source, folder = tmp_path / "source", tmp_path / "new"
    source.mkdir(), folder.mkdir()
    if text is not None:
        (source / "generation_config.json").write_text(text)
    SidecarFiles(source, '{"eos_token_id": [4, 9]}', end_of_turn=9).write(folder)
    written = folder / "generation_config.json"
    assert (written.read_text() if written.exists() else None) == text


def test_further_chat_templates_are_copied(tmp_path: Path) -> None:
    source, folder = write_model(tmp_path / "hf"), tmp_path / "new"
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    folder.mkdir()
    SidecarFiles(source, "{}", chat_template="of the run").write(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == {"default": "of the run", "tool_use": "with tools"}
