"""``solopo evaluate``: scores of a model by context length, on questions of files or of benchmarks."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import transformers

from megatron_solopo import __version__, template_kwargs
from megatron_solopo.atomic import write_text
from megatron_solopo.data.building.sources import load_source
from megatron_solopo.data.files.inputs import fingerprint, place
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.files.records import Record, write_jsonl
from megatron_solopo.data.hf_model import check_reach
from megatron_solopo.data.options import TokenizerOptions, check_outputs, files_of, prompt_format_of
from megatron_solopo.data.sampling.server_options import check_server_options, set_defaults
from megatron_solopo.data.scoring import SCORERS
from megatron_solopo.data.text.chat import body_ids
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.backends import Backend, InProcess
from megatron_solopo.evaluation.contamination import TrainedQuestions
from megatron_solopo.evaluation.generation import Response
from megatron_solopo.evaluation.items import Depths, Item, build_items, check_some
from megatron_solopo.evaluation.options import (
    IN_PROCESS,
    MAX_NEW_TOKENS,
    OF_SERVER,
    build_parser,
    depths_option,
    lengths_option,
)
from megatron_solopo.evaluation.results import LengthResult, length_label, predictions_path
from megatron_solopo.evaluation.scored import score_responses, table_lines
from megatron_solopo.evaluation.tasks import Chosen, Setting, chosen_tasks, tasks
from megatron_solopo.evaluation.tasks.multiple_choice import LETTERS

ANSWERED_BY = ("source", "limit", "max_new_tokens", "seed", "depths", "gold_log_prob")
"""Options that what is on disk of an interrupted evaluation was made with."""


def _full(name: str) -> str:
    """Returns a path that names the same file or folder anywhere ("." does not); a name of the hub as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    start, options = time.monotonic(), build_parser().parse_args(argv)
    evaluate(options)
    written = f"{options.output} and {predictions_path(options.output)}"
    print(f"wrote {written} in {time.monotonic() - start:.1f} s")
    return 0


@dataclass(frozen=True)
class _Part:
    """What is asked with the same settings: --data, or one of --tasks.

    Attributes:
        task: its name; "" of --data.
        sizes, unit: the lengths.
        metrics: names of scores.
        build: makes the items; the questions that cannot be asked are counted by reason.
    """

    task: str
    sizes: list[int]
    unit: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    build: Callable[[transformers.PreTrainedTokenizerBase], tuple[list[Item], Counter[str]]]

    def label(self, size: int) -> str:
        return length_label(size, self.unit, self.task)


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Record], Record, list[Record]]:
    """Evaluates and writes the two files; returns metrics by length, settings, and the predictions.

    Raises:
        UserError: an option or a file that cannot be, or a length that no question can be asked at.
    """
    set_defaults(options, IN_PROCESS, OF_SERVER)
    check_server_options(options)
    for name in ("limit", "max_new_tokens", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError("option-value", f"--{name.replace('_', '-')} {value}: must be at least 1")
    chosen = chosen_tasks(options.tasks)
    parts = _parts(options, chosen)
    files = [("--tasks", Path(one.file)) for one in chosen if one.file]
    files += [(f"--{name}", place(path)) for name in ("data", "pool") for path in getattr(options, name)]
    files += [("--training-data", place(path)) for path in options.training_data]
    outputs = [("--output", path) for path in (options.output, predictions_path(options.output))]
    check_outputs(outputs, [*files, *files_of(options)])
    output = Path(options.output)
    with Jobs(output.with_name(output.name + ".partial")) as jobs:
        return _evaluate(options, output, chosen, parts, jobs)


def _parts(options: argparse.Namespace, chosen: Sequence[Chosen]) -> list[_Part]:
    """Returns what the options ask for.

    Raises:
        UserError: an option is missing, contradicts another or has no effect.
    """
    unit = "documents" if options.context_documents is not None else "tokens"
    flag, depths = f"--context-{unit}", depths_option(options.depths)
    given = getattr(options, f"context_{unit}")
    sizes = lengths_option(flag, given) if given is not None else []
    if options.gold_log_prob and chosen:
        raise UserError("option-unused", "--gold-log-prob has no effect with --tasks; leave it out")
    if options.gold_log_prob and options.server and options.server_api == "chat":
        raise UserError(
            "option-conflict",
            "--gold-log-prob with --server-api chat: a chat's answer has no log-probs of a given text; use "
            "--server-api completions",
        )
    if not chosen:
        if not sizes:
            raise UserError("option-missing", "--context-tokens or --context-documents is missing: set the lengths")
        options.max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS
        load_source(options.source)
        prompt_format = prompt_format_of(options)

        def build(tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[list[Item], Counter[str]]:
            seed, pool, limit = options.seed, options.pool, options.limit
            return build_items(
                options.data, sizes, unit, tokenizer, prompt_format, seed, pool, limit, options.source, depths
            )

        return [_Part("", sizes, unit, tuple(SCORERS), options.max_new_tokens, build)]
    sized = [one.task.name for one in chosen if one.task.sized]
    if unit == "documents" or (given is not None and not sized):
        raise UserError("option-unused", f"{flag} has no effect with --tasks {chosen[0].task.name}; leave it out")
    if sized and not sizes:
        raise UserError("option-missing", f"--tasks {sized[0]}: --context-tokens is missing: set the lengths")
    if options.pool:
        raise UserError("option-unused", "--pool has no effect with --tasks, which read their own files; leave it out")
    if options.depths is not None and not any(one.task.by_depth for one in chosen):
        deep = ", ".join(name for name, task in tasks().items() if task.by_depth)
        raise UserError("option-unused", f"--depths has no effect with these --tasks; it is of {deep}")
    return [_part_of(options, one, sizes, depths) for one in chosen]


def _part_of(options: argparse.Namespace, chosen: Chosen, sizes: list[int], depths: Depths) -> _Part:
    task, file = chosen.task, chosen.file
    max_new_tokens = options.max_new_tokens or task.max_new_tokens

    def build(tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[list[Item], Counter[str]]:
        deep, system_prompt = depths if task.by_depth else (None,), prompt_format_of(options).system_prompt
        setting = Setting(tokenizer, sizes, options.seed, options.limit, deep, max_new_tokens, system_prompt)
        counts = Counter[str]()
        return task.build(setting, file, counts), counts

    if task.sized:
        return _Part(task.name, sizes, "tokens", task.metrics, max_new_tokens, build)
    return _Part(task.name, [0], "choices", task.metrics, max_new_tokens, build)


def _check_reach(options: argparse.Namespace, prompt_tokens: int, max_new_tokens: int, where: str) -> None:
    """See `check_reach`; with --server, by the folder of the tokenizer where that has the model's config."""
    folder = options.model if not options.server else options.tokenizer or options.model
    if not options.server or (Path(folder) / "config.json").is_file():
        check_reach(folder, prompt_tokens, max_new_tokens, where)


def _asked(
    options: argparse.Namespace, parts: Sequence[_Part], tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[list[tuple[_Part, list[Item]]], Counter[str]]:
    """Builds the items of every part, and prints how many there are and why others were left out."""
    trained = TrainedQuestions(options.training_data) if options.training_data else None
    asked, total = [], Counter[str]()
    for part in parts:
        items, left_out = part.build(tokenizer)
        if trained is not None:
            items = trained.without(items, left_out)
        check_some(items, left_out, f"--tasks {part.task}: " if part.task else "")
        new_tokens = part.max_new_tokens
        if options.gold_log_prob:
            items = [replace(one, gold=body_ids(tokenizer, one.chats[0], one.answers[0])) for one in items]
            new_tokens = max(new_tokens, *(len(item.gold) for item in items))
        for index, size in enumerate(part.sizes):
            longest = max(len(item.prompts[index]) for item in items)
            where = f"--context-{part.unit} {size}" if part.unit != "choices" else f"--tasks {part.task}"
            _check_reach(options, longest, new_tokens, where)
        named = f"{part.task}: " if part.task else ""
        at_depths = len(items) // len({item.id for item in items})
        deep = f" and at {at_depths} depths" if at_depths > 1 else ""
        count = len({item.id for item in items})
        print(f"{named}{count} questions at each length{deep}, {left_out.total()} left out")
        for reason, number in left_out.most_common():
            print(f"  {number} left out: {reason}")
        asked.append((part, items))
        total.update(left_out)
    return asked, total


def _evaluate(
    options: argparse.Namespace, output: Path, chosen: Sequence[Chosen], parts: Sequence[_Part], jobs: Jobs
) -> tuple[dict[str, Record], Record, list[Record]]:
    named = TokenizerOptions.of(options, options.model)
    tokenizer = named.load(of_resumed=jobs.settings.get(template_kwargs.DATE))
    options.chat_template_date = template_kwargs.date_of(tokenizer)  # for the results
    for part in parts:  # known before a minute is spent on building contexts
        for size in part.sizes if part.unit == "tokens" else ():
            new_tokens = 0 if part.task else part.max_new_tokens  # a task's size may include the response
            _check_reach(options, size, new_tokens, f"--context-tokens {size}")
    if options.server:  # its client is an optional package
        from megatron_solopo.evaluation.server import FromServer

        backend: Backend = FromServer(options, tokenizer)
        model = str(options.model)
    else:
        backend, model = InProcess(options, tokenizer), _full(options.model)
    asked, left_out = _asked(options, parts, tokenizer)
    backend.prepare({f"--tasks {part.task}" if part.task else "--data": items for part, items in asked})
    files = {"tasks": [one.file for one in chosen if one.file]}
    files |= {name: getattr(options, name) for name in ("data", "pool", "training_data")}
    jobs.begin(
        {
            "version": __version__,
            "model": model,
            **backend.settings,
            **text_facts(named.folder, tokenizer),
            **{name: fingerprint(of_name) for name, of_name in files.items()},
            **{name: getattr(options, name) for name in ANSWERED_BY},
            "prompt_format": asdict(prompt_format_of(options)),
            "asked": [[part.task, part.unit, *part.sizes] for part in parts],
        }
    )
    generated: dict[str, dict[int, Response]] = {}
    for job in jobs.finished():
        label, *indices = job["job"]
        generated.setdefault(label, {}).update(
            {index: Response(*answer) for index, answer in zip(indices, job["answers"], strict=True)}
        )
    if generated:
        every = sum(len(items) * len(part.sizes) for part, items in asked)
        print(f"resuming: {sum(map(len, generated.values()))} of {every} answers were generated before")
    results: list[LengthResult] = []
    records: list[Record] = []
    start = time.monotonic()
    for part, items in asked:
        for index, size in enumerate(part.sizes):
            size = size or len(items[0].choices)
            label = part.label(size)
            responses = _responses(backend, part, items, index, label, generated.get(label, {}), jobs)
            result, predictions = score_responses(
                items, index, size, part.unit, responses, options.normalisation, part.metrics, part.task
            )
            results.append(result)
            records += predictions
    new, seconds = len(records) - sum(map(len, generated.values())), time.monotonic() - start
    print(f"{new} answers in {seconds:.1f} s, {new / max(seconds, 1e-9):.2f} a second")
    print("\n".join(table_lines(results)))
    write_jsonl(predictions_path(output), records)
    metrics = {result.label: result.record() for result in results}
    unread = {"model", "data", "output", *(IN_PROCESS if options.server else ("server", *OF_SERVER))}
    settings: Record = {
        **{name: value for name, value in vars(options).items() if name not in unread},
        **backend.notes,
        "left_out": dict(left_out),
    }
    read = [
        *map(_full, options.data),
        *(f"{one.task.name}={_full(one.file)}" if one.file else one.task.name for one in chosen),
    ]
    file = {"model": model, "data": ", ".join(read), "metrics": metrics, "settings": settings}
    write_text(output, json.dumps(file, indent=2, ensure_ascii=False) + "\n")
    jobs.remove()
    return metrics, settings, records


def _responses(
    backend: Backend,
    part: _Part,
    items: Sequence[Item],
    index: int,
    label: str,
    before: dict[int, Response],
    jobs: Jobs,
) -> list[Response]:
    """Returns the response to each item at one length, of which those of ``before`` were made before."""

    def add(answered: dict[int, Response]) -> None:
        jobs.add([label, *answered], {"answers": [astuple(answer) for answer in answered.values()]})

    def add_letters(answered: dict[int, int]) -> None:
        add({number: Response(LETTERS[place], True) for number, place in answered.items()})

    if not items[0].choices:
        return backend.generate(items, index, part.max_new_tokens, label, before, add)
    chosen = {number: LETTERS.index(response.text) for number, response in before.items()}
    return [Response(LETTERS[place], True) for place in backend.choose(items, index, label, chosen, add_letters)]
