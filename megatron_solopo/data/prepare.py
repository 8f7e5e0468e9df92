"""``solopo prepare-data``: question sets to short and long contexts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_solopo.data import contexts
from megatron_solopo.data.chat import load_tokenizer, prompt_ids
from megatron_solopo.data.contexts import CannotBuild, ContextPair, DistractorPool, PromptFormat, build_contexts
from megatron_solopo.data.schema import Message, Paragraph, Question, write_jsonl
from megatron_solopo.data.sources import SOURCES, read_pool
from megatron_solopo.errors import UserError


@dataclass
class Summary:
    """What became of the questions; lengths in tokens, chat template included."""

    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    short_tokens: list[int] = field(default_factory=list)
    long_tokens: list[int] = field(default_factory=list)
    short_documents: list[int] = field(default_factory=list)
    long_documents: list[int] = field(default_factory=list)

    def add(self, pair: ContextPair) -> None:
        self.kept += 1
        for name in ("short_tokens", "long_tokens", "short_documents", "long_documents"):
            getattr(self, name).append(getattr(pair, name))

    def lines(self) -> list[str]:
        """The summary for a person."""
        lines = [f"questions kept: {self.kept}, left out: {self.left_out.total()}"]
        lines += [f"  {count} left out: {reason}" for reason, count in self.left_out.most_common()]
        if self.kept:
            for name in ("short", "long"):
                tokens, documents = getattr(self, f"{name}_tokens"), getattr(self, f"{name}_documents")
                lines.append(f"{name} contexts: {spread(tokens)} tokens, {spread(documents)} documents")
            ratios = [short / long for short, long in zip(self.short_tokens, self.long_tokens, strict=True)]
            lines.append(
                f"compression ratio rho = short / long: mean {statistics.mean(ratios):.3f} "
                f"(min {min(ratios):.3f}, max {max(ratios):.3f})"
            )
        return lines


def spread(values: Sequence[int]) -> str:
    return f"mean {statistics.mean(values):.1f} (min {min(values)}, max {max(values)})"


def prepare(
    questions: Sequence[Question],
    pool: DistractorPool,
    sizes: tuple[int, int],
    *,
    prompt_format: PromptFormat,
    seed: int,
    count_tokens: Callable[[list[Message]], int],
    in_tokens: bool,
    source: str,
    summary: Summary,
) -> Iterator[ContextPair]:
    """Yields the context pair of each question that has one; the others are counted in ``summary``.

    Args:
        sizes: short and long, in tokens of the whole prompt when ``in_tokens``, else in documents.
    """
    for question in questions:
        try:
            short, long = build_contexts(
                question,
                pool,
                sizes,
                prompt_format=prompt_format,
                seed=seed,
                count_tokens=count_tokens if in_tokens else None,
            )
        except CannotBuild as reason:
            summary.left_out[str(reason)] += 1
            continue
        pair = ContextPair(
            id=question.id,
            question=question.question,
            answers=list(dict.fromkeys(question.answers)),
            short_messages=short.messages,
            long_messages=long.messages,
            short_tokens=short.tokens or count_tokens(short.messages),
            long_tokens=long.tokens or count_tokens(long.messages),
            source=source,
            short_documents=len(short.paragraphs),
            long_documents=len(long.paragraphs),
            short_gold=short.gold_positions,
            long_gold=long.gold_positions,
        )
        summary.add(pair)
        yield pair


def text_option(flag: str, value: str) -> str:
    r"""The text of an option given as text (``\n`` and ``\t`` are line break and tab) or as ``@FILE``.

    One line break at the end of the file is not part of the text.
    """
    if not value.startswith("@"):
        return value.replace("\\n", "\n").replace("\\t", "\t")
    path = Path(value[1:])
    if not path.is_file():
        raise UserError(f"{flag} {value}: no such file; give @FILE or the text itself")
    return path.read_text(encoding="utf-8").removesuffix("\n")


def add_tokenizer_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that every command with a tokenizer has; where it is not required, the model's folder has one."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer",
        required=required,
        metavar="DIR",
        help="Hugging Face folder" + (" of the model to train" if required else " (default: the model's)"),
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja chat template, when the tokenizer has none or another is wanted"
    )
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""values for variables of the chat template, such as '{"enable_thinking": false}' (default: those of """
        "the folder's tokenizer_config.json, which a training run with this option writes)",
    )
    group.add_argument(
        "--eos-token", metavar="TOKEN", help="token that ends a turn (default: what the chat template writes there)"
    )


def add_prompt_options(parser: argparse.ArgumentParser, documents: bool = True) -> None:
    """The options that `prompt_format_of` reads; without ``documents`` a document is used as it is, and only one."""
    group = parser.add_argument_group(r"prompt (each is a text, in which \n is a line break, or @FILE)")
    if documents:
        group.add_argument(
            "--document-template",
            default=contexts.DEFAULT_DOCUMENT_TEMPLATE,
            metavar="TEXT",
            help="one document, with {number}, {title}, {text} (default: %(default)r)",
        )
        group.add_argument(
            "--document-separator",
            default=contexts.DEFAULT_DOCUMENT_SEPARATOR,
            metavar="TEXT",
            help="between documents (default: %(default)r)",
        )
    else:
        parser.set_defaults(document_template="{text}", document_separator="")
    group.add_argument(
        "--prompt-template",
        default=contexts.DEFAULT_PROMPT_TEMPLATE,
        metavar="TEXT",
        help="the user message, with {documents} and {question} (default: asks for a short chain of thought, "
        "then the answer)",
    )
    group.add_argument(
        "--system-prompt", metavar="TEXT", help="a system message before it (default: none but the chat template's own)"
    )


def prompt_format_of(options: argparse.Namespace) -> PromptFormat:
    """The prompt format that the options of `add_prompt_options` describe."""
    return PromptFormat(
        document_template=text_option("--document-template", options.document_template),
        document_separator=text_option("--document-separator", options.document_separator),
        prompt_template=text_option("--prompt-template", options.prompt_template),
        system_prompt=text_option("--system-prompt", options.system_prompt) if options.system_prompt else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solopo prepare-data",
        description="Build, for each question, a short and a long context that hold the same gold paragraphs.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--source", choices=sorted(SOURCES), default="musique", help="format of the input (default: musique)"
    )
    group.add_argument("--input", nargs="+", required=True, metavar="FILE", help="question files")
    group.add_argument(
        "--pool",
        nargs="+",
        default=[],
        metavar="FILE",
        help="more distractors, JSONL of {title, text}; the paragraphs of all questions are always in the pool",
    )
    group.add_argument("--output", required=True, metavar="FILE", help="contexts, JSONL")
    group.add_argument("--limit", type=int, metavar="N", help="use the first N questions (the pool keeps all of them)")
    group = parser.add_argument_group(
        "sizes: tokens of the whole prompt (98 % to 100 % of N), or documents, gold ones included"
    )
    for unit in ("tokens", "documents"):
        for which in ("short", "long"):
            group.add_argument(f"--{which}-{unit}", type=int, metavar="N")
    add_tokenizer_options(parser)
    add_prompt_options(parser)
    group = parser.add_argument_group("randomness")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="with a question's id it decides its distractors and their order (default: 0)",
    )
    return parser


def _sizes(options: argparse.Namespace) -> tuple[tuple[int, int], bool]:
    tokens, documents = (
        (getattr(options, f"short_{unit}"), getattr(options, f"long_{unit}")) for unit in ("tokens", "documents")
    )
    in_tokens = None not in tokens
    if in_tokens == (None not in documents) or (tokens if not in_tokens else documents) != (None, None):
        raise UserError(
            "give both --short-tokens and --long-tokens, or both --short-documents and --long-documents, not a mixture"
        )
    sizes = tokens if in_tokens else documents
    unit = "tokens" if in_tokens else "documents"
    if not 0 < sizes[0] <= sizes[1]:
        raise UserError(
            f"--short-{unit} {sizes[0]} --long-{unit} {sizes[1]}: give positive numbers, "
            "the short one not above the long one"
        )
    return sizes, in_tokens


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = _parser().parse_args(argv)
    sizes, in_tokens = _sizes(options)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: give a number of questions of at least 1")
    prompt_format = prompt_format_of(options)
    begin = time.monotonic()
    summary = Summary()
    questions = list(SOURCES[options.source](options.input, summary.left_out))
    extra = list(read_pool(options.pool))
    tokenizer = load_tokenizer(
        options.tokenizer, options.chat_template, options.eos_token, options.chat_template_kwargs
    )

    def count_texts(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    paragraphs: list[Paragraph] = [*(p for question in questions for p in question.paragraphs), *extra]
    pool = DistractorPool(paragraphs, prompt_format, count_texts if in_tokens else None)
    print(f"{len(questions)} questions, {len(pool)} distinct paragraphs to draw distractors from")
    pairs = prepare(
        questions[: options.limit],
        pool,
        sizes,
        prompt_format=prompt_format,
        seed=options.seed,
        count_tokens=lambda messages: len(prompt_ids(tokenizer, messages)),
        in_tokens=in_tokens,
        source=options.source,
        summary=summary,
    )
    total = min(len(questions), options.limit or len(questions))
    written = write_jsonl(options.output, tqdm(_not_empty(pairs, summary), total=total, unit="question", disable=None))
    print("\n".join(summary.lines()))
    print(f"wrote {written} questions to {options.output} in {time.monotonic() - begin:.1f} s")
    return 0


def _not_empty(pairs: Iterator[ContextPair], summary: Summary) -> Iterator[ContextPair]:
    """Passes pairs on and refuses an empty result before the output is renamed into place."""
    yield from pairs
    if not summary.kept:
        reasons = (
            "; ".join(f"{count} x {reason}" for reason, count in summary.left_out.most_common()) or "the input is empty"
        )
        raise UserError(f"no question could be used ({reasons}); change the sizes, the input or --pool")
