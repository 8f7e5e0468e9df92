"""``solopo evaluate``: sub-EM, EM and F1 of a Hugging Face folder by context length."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
import transformers

from megatron_solopo import __version__, template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.data.building.contexts import build_contexts
from megatron_solopo.data.building.pool import DistractorPool
from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.building.sources import (
    DEFAULT,
    LeftOut,
    add_source_option,
    load_source,
    read_pool,
    read_questions,
)
from megatron_solopo.data.files.inputs import fingerprint, place
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.files.records import Record, write_jsonl
from megatron_solopo.data.hf_model import DTYPES, check_device, check_reach, load_model, weight_facts
from megatron_solopo.data.options import (
    TokenizerOptions,
    add_normalisation_option,
    add_prompt_options,
    add_tokenizer_options,
    check_outputs,
    files_of,
    prompt_format_of,
)
from megatron_solopo.data.schema import Question
from megatron_solopo.data.scoring import SCORERS, score
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.counting import TokenCounter
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.generation import DEFAULT_BATCH_TOKENS, Response, generate
from megatron_solopo.evaluation.results import LengthResult, intervals_text, length_label, mean_interval
from megatron_solopo.metrics import metric_of
from megatron_solopo.progress import ProgressBar


@dataclass(frozen=True)
class Item:
    """One question at every length: ``prompts[i]`` are the token ids of its prompt at the i-th length."""

    id: str
    question: str
    answers: list[str]
    prompts: list[list[int]]


def build_items(
    data: Sequence[str | Path],
    sizes: Sequence[int],
    unit: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seed: int = 0,
    pool: Sequence[str | Path] = (),
    limit: int | None = None,
    source: str = DEFAULT,
) -> tuple[list[Item], Counter[str]]:
    """Returns the questions that can be asked at every size, with their prompts; the others are counted by reason.

    The context of a larger size holds that of a smaller one, so lengths differ in distractors only.

    Args:
        sizes: ascending, in ``unit``: ``documents`` (gold ones included) or ``tokens`` (of the whole prompt).
        pool: further files of distractors; the paragraphs of all questions are always used.
        limit: the first so many questions (the distractors still come from all).

    Raises:
        UserError: no question is left.
    """
    left_out = LeftOut()
    questions: list[Question] = []
    counted = None  # entries of `left_out` up to the last question of the limit
    reading = ProgressBar(read_questions(source, data, left_out), desc="reading", unit="question", leave=False)
    for question in reading:
        questions.append(question)
        if len(questions) == limit:
            counted = len(left_out.entries)
    counts = Counter(reason for _, reason in left_out.entries[:counted])
    counter = TokenCounter(tokenizer)
    in_tokens = unit == "tokens"
    paragraphs = [*(paragraph for question in questions for paragraph in question.paragraphs), *read_pool(pool)]
    distractors = DistractorPool.of(paragraphs, prompt_format, counter.texts if in_tokens else None)
    items = []
    for question in ProgressBar(questions[:limit], desc="contexts", unit="question", leave=False):
        try:
            contexts = build_contexts(
                question,
                distractors,
                sizes,
                prompt_format=prompt_format,
                seed=seed,
                count_tokens=counter.chat if in_tokens else None,
            )
        except CannotBuild as reason:
            counts[str(reason)] += 1
            continue
        items.append(
            Item(
                question.id,
                question.question,
                list(question.answers),
                [prompt_ids(tokenizer, context.messages) for context in contexts],
            )
        )
    if not items:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common()) or "the input is empty"
        raise UserError(
            "questions-unusable",
            f"no question can be asked at every length ({reasons}); change the lengths, the data or --pool",
        )
    return items, counts


def score_responses(
    items: Sequence[Item],
    index: int,
    length: int,
    unit: str,
    responses: Sequence[Response],
    normalisation: str | None = None,
) -> tuple[LengthResult, list[Record]]:
    """Returns the scores at one length and one record a question for the predictions file.

    Args:
        index: of the length in every item's ``prompts``.
        responses: one a question, in the order of the items.
        normalisation: see `scoring.score`.
    """
    answered = list(zip(items, responses, strict=True))
    scores = {name: [score(name, one.text, item.answers, normalisation) for item, one in answered] for name in SCORERS}
    intervals = {name: mean_interval(name, values) for name, values in scores.items()}
    result = LengthResult(
        length,
        unit,
        means={name: statistics.fmean(values) for name, values in scores.items()},
        intervals={name: interval for name, (interval, _) in intervals.items()},
        count=len(answered),
        mean_prompt_tokens=statistics.fmean(len(item.prompts[index]) for item in items),
        methods={name: method for name, (_, method) in intervals.items()},
        cut=sum(not response.finished for response in responses),
    )
    records: list[Record] = [
        {
            "id": item.id,
            "length": result.label,
            "question": item.question,
            "answers": item.answers,
            "prediction": response.text,
            "finished": response.finished,
            **{name: values[number] for name, values in scores.items()},
            "prompt_tokens": len(item.prompts[index]),
        }
        for number, (item, response) in enumerate(answered)
    ]
    return result, records


def table_lines(results: Sequence[LengthResult]) -> list[str]:
    """Returns the results for a terminal: a mean and its 95 % interval over questions for each metric and length.

    The last lines explain how the intervals were computed, and what a cut answer is where there are any.
    """
    lines = [
        f"{'context':<16}{'questions':>10}{'cut':>8}{'prompt tokens':>15}"
        + "".join(f"{metric_of(name).label:>22}" for name in SCORERS)
    ]
    for one in results:
        cells = (
            f"{mean:.3f} [{one.intervals[name][0]:.3f}, {one.intervals[name][1]:.3f}]"
            for name, mean in one.means.items()
        )
        lines.append(
            f"{one.label:<16}{one.count:>10,}{one.cut or 0:>8,}{one.mean_prompt_tokens:>15,.1f}"
            + "".join(f"{cell:>22}" for cell in cells)
        )
    lines.append(f"[low, high]: 95 % intervals over questions; {intervals_text(one.methods for one in results)}")
    if any(one.cut for one in results):
        lines.append("cut: answers that did not end within --max-new-tokens; they are scored as far as they go")
    return lines


def predictions_path(output: str | Path) -> Path:
    """Returns where the predictions of a results file are: ``results.json`` -> ``results.predictions.jsonl``."""
    path = Path(output)
    return path.parent / f"{path.stem}.predictions.jsonl"


def _full(name: str) -> str:
    """Returns a path that names the same file or folder anywhere ("." does not); a name of the hub as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def lengths_option(flag: str, value: str) -> list[int]:
    """``"8,16,32"`` -> ascending lengths.

    Raises:
        UserError: not positive whole numbers separated by commas, or one occurs twice.
    """
    try:
        lengths = [int(part) for part in value.split(",")]
    except ValueError:
        raise UserError(
            "option-value", f"{flag} {value}: must be whole numbers separated by commas, such as 8,16,32"
        ) from None
    if min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise UserError("option-value", f"{flag} {value}: must be positive lengths, each once")
    return sorted(lengths)


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo evaluate",
        description="Ask a model the same questions at several context lengths and score its answers.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder (a training run's --save-hf)")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help="question files")
    add_source_option(group)
    group.add_argument(
        "--pool",
        nargs="+",
        default=[],
        metavar="FILE",
        help="further distractors, JSONL of {title, text}; the pool always has the paragraphs of all questions",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="ask the first N questions; the pool keeps all of them (default: all)"
    )
    group.add_argument(
        "--output",
        required=True,
        metavar="FILE.json",
        help="file of the results; the predictions go to FILE.predictions.jsonl",
    )
    group = parser.add_argument_group("context lengths")
    lengths = group.add_mutually_exclusive_group(required=True)
    lengths.add_argument(
        "--context-documents", metavar="N,N,...", help="numbers of documents, gold ones included, such as 8,16,32,64"
    )
    lengths.add_argument(
        "--context-tokens",
        metavar="N,N,...",
        help="lengths of the whole prompt in tokens (98 %% to 100 %% of N), such as 1024,4096,8192",
    )
    add_tokenizer_options(parser, required=False)
    add_prompt_options(parser)
    group = parser.add_argument_group("generation (the most likely token each time)")
    add_generation_options(group)
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help="tokens in a batch, padding and responses included; lower it when memory runs out (default: %(default)s)",
    )
    group = parser.add_argument_group(
        "scoring",
        "sub_em finds short gold answers (yes, no, one short word, a number) as whole words of a response's answer "
        "part only; sub_em_plain is the paper's, any part of the text",
    )
    add_normalisation_option(group, "unicode")
    group = parser.add_argument_group("randomness")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed; with its id it determines a question's distractors and their order (default: 0)",
    )
    return parser


def add_generation_options(group: argparse._ArgumentGroup) -> None:
    """The options that ``evaluate`` and ``ask`` share."""
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="a response is cut after N tokens (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="type of the weights; auto: the checkpoint's on a GPU, float32 on a CPU (default: %(default)s)",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="device of the model; auto: a GPU if there is one (default: %(default)s)",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    start, options = time.monotonic(), build_parser().parse_args(argv)
    evaluate(options)
    written = f"{options.output} and {predictions_path(options.output)}"
    print(f"wrote {written} in {time.monotonic() - start:.1f} s")
    return 0


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Record], Record, list[Record]]:
    """Evaluates and writes the two files; returns metrics by length, settings, and the predictions.

    Raises:
        UserError: an option or a file that cannot be, or a length that no question can be asked at.
    """
    unit = "documents" if options.context_documents is not None else "tokens"
    flag = f"--context-{unit}"
    sizes = lengths_option(flag, getattr(options, f"context_{unit}"))
    for name in ("limit", "max_new_tokens", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError("option-value", f"--{name.replace('_', '-')} {value}: must be at least 1")
    load_source(options.source)
    prompt_format = prompt_format_of(options)
    read = [(flag, place(name)) for flag in ("--data", "--pool") for name in getattr(options, flag[2:])]
    outputs = [("--output", path) for path in (options.output, predictions_path(options.output))]
    check_outputs(outputs, [*read, *files_of(options)])
    output = Path(options.output)
    with Jobs(output.with_name(output.name + ".partial")) as jobs:
        return _evaluate(options, output, sizes, unit, prompt_format, jobs)


def _evaluate(
    options: argparse.Namespace, output: Path, sizes: list[int], unit: str, prompt_format: PromptFormat, jobs: Jobs
) -> tuple[dict[str, Record], Record, list[Record]]:
    flag = f"--context-{unit}"
    named = TokenizerOptions.of(options, options.model)
    tokenizer = named.load(of_resumed=jobs.settings.get(template_kwargs.DATE))
    options.chat_template_date = template_kwargs.date_of(tokenizer)  # for the results
    if unit == "tokens":  # known before a minute is spent on building contexts
        for size in sizes:
            check_reach(options.model, size, options.max_new_tokens, f"{flag} {size}")
    check_device(options.device)
    items, left_out = build_items(
        options.data, sizes, unit, tokenizer, prompt_format, options.seed, options.pool, options.limit, options.source
    )
    for index, size in enumerate(sizes):
        check_reach(
            options.model, max(len(item.prompts[index]) for item in items), options.max_new_tokens, f"{flag} {size}"
        )
    print(f"{len(items)} questions at each length, {left_out.total()} left out")
    for reason, count in left_out.most_common():
        print(f"  {count} left out: {reason}")
    model = load_model(options.model, options.device, options.dtype)
    jobs.begin(
        {
            "version": __version__,
            "model": _full(options.model),
            "weights": weight_facts(options.model),
            "dtype": str(model.dtype),
            **text_facts(named.folder, tokenizer),
            **{name: fingerprint(getattr(options, name)) for name in ("data", "pool")},
            **{name: getattr(options, name) for name in ("source", "limit", "max_new_tokens", "seed")},
            "prompt_format": asdict(prompt_format),
            f"context_{unit}": sizes,
        }
    )
    generated: dict[str, dict[int, Response]] = {}
    for job in jobs.finished():
        label, *indices = job["job"]
        generated.setdefault(label, {}).update(
            {index: Response(*answer) for index, answer in zip(indices, job["answers"], strict=True)}
        )
    if generated:
        print(
            f"resuming: {sum(map(len, generated.values()))} of {len(items) * len(sizes)} answers were generated before"
        )
    results: list[LengthResult] = []
    records: list[Record] = []
    for index, size in enumerate(sizes):
        label = length_label(size, unit)

        def add(answered: dict[int, Response], label: str = label) -> None:
            jobs.add([label, *answered], {"answers": [astuple(answer) for answer in answered.values()]})

        responses = generate(
            model,
            tokenizer,
            [item.prompts[index] for item in items],
            options.max_new_tokens,
            options.batch_tokens,
            progress=label,
            generated=generated.get(label),
            add=add,
        )
        result, predictions = score_responses(items, index, size, unit, responses, options.normalisation)
        results.append(result)
        records += predictions
    print("\n".join(table_lines(results)))
    write_jsonl(predictions_path(output), records)
    metrics = {result.label: result.record() for result in results}
    settings: Record = {
        **{name: value for name, value in vars(options).items() if name not in ("model", "data", "output")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "left_out": dict(left_out),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    names = {"model": _full(options.model), "data": ", ".join(map(_full, options.data))}
    file = names | {"metrics": metrics, "settings": settings}
    write_text(output, json.dumps(file, indent=2, ensure_ascii=False) + "\n")
    jobs.remove()
    return metrics, settings, records
