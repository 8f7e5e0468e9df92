"""A user's function as a source: from a raw record to a record of ``--source jsonl``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from megatron_solopo.data.building.sources import jsonl
from megatron_solopo.data.building.sources._source import CannotUse, Record, Source
from megatron_solopo.data.schema import Question
from megatron_solopo.errors import UserError
from megatron_solopo.user_function import error_text, load_function, short, source_digest

FORM = (
    "a user's function: it is called with each record and returns one of `jsonl`'s form, a "
    "`megatron_solopo.data.schema.Question`, or None to leave the record out; a result without `id` has the record's"
)


def user_source(name: str, built_in: Iterable[str]) -> Source:
    """Returns the source of ``module:function``.

    Raises:
        UserError: there is no such module or function.
    """
    function = load_function(f"--source {name}", name, built_in)
    return Source(
        name=name,
        form=FORM,
        question=jsonl.SOURCE.question,
        convert=lambda record, where: _converted(function, name, record, where),
        origin=f", from {name}",
        digest=source_digest(function),
    )


def _converted(function: Callable[..., object], name: str, record: Record, where: str) -> Record:
    record_id = record.get("id", record.get("_id"))
    try:
        result = function(record)
    except CannotUse:
        raise
    except Exception as error:
        raise UserError("function-raises", f"{where}: --source {name}: raised {error_text(error)}") from None
    if result is None:
        raise CannotUse(f"{name} returned None")
    if isinstance(result, Question):
        result = dataclasses.asdict(result)
        result["answer_aliases"] = list(result["answer_aliases"])
        result["documents"] = list(result.pop("paragraphs"))
    if not isinstance(result, dict):
        raise UserError(
            "function-result",
            f"{where}: --source {name}: returned {short(result)}; return a record {{question, answer or answers, "
            "documents}, a Question, or None",
        )
    if result.get("id") in (None, ""):
        result = {name: value for name, value in result.items() if name != "id"}
        result |= {} if record_id is None else {"id": record_id}
    return result
